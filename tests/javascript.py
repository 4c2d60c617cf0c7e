"""Runs the examples' and the tests' JavaScript in Node, with the packages that `make consumers` installs."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NODE_MODULES = ROOT / ".consumers" / "node_modules"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 900


def need_node() -> str:
    """Where Node is; skips without it or without the packages."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node 20 or later")
    if not NODE_MODULES.is_dir():
        pytest.skip(f"needs npm's packages in {NODE_MODULES}: `make consumers` installs them")
    return node


def need_browser() -> str:
    """Where a Chromium is; skips without one."""
    for name in BROWSERS:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")


def run(script: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module from `folder`, where it is copied to: Node looks for packages beside the file that imports them."""
    node = need_node()
    place = folder / script.name
    shutil.copyfile(script, place)
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(NODE_MODULES, target_is_directory=True)
    command = [node, str(place), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S, check=False)


def results(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The lines of JSON that a module wrote."""
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
