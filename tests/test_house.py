"""Promises of the repository itself: one version, plug-ins in the README, nothing of one machine in tracked files."""

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

import edgeprune
import edgeprune_runtime
from edgeprune import plugins

ROOT = Path(__file__).parents[1]
# Written with a class of one letter, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(r"(?<![\w.\-/])/(?:[h]ome|[r]oot|[w]ork|[U]sers|[m]nt)/[\w.\-]+")
REGISTRY_HOSTS = re.compile(r"[p]ypi\.org|[p]ythonhosted\.org|[d]ownload\.pytorch\.org")
PINNED = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+")


@cache
def tracked() -> list[Path]:
    """Files that git tracks or would track; an unpacked sdist has no git, and nothing to check."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version() -> None:
    assert project()["version"] == edgeprune.__version__ == edgeprune_runtime.__version__


def test_changelog_has_unreleased_changes_on_top() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("architectures", "edgeprune"),
        ("importance", "edgeprune"),
        ("allocation", "edgeprune"),
        ("sparsity", "edgeprune"),
        ("targets", "edgeprune_export"),
    ],
)
def test_every_plugin_has_a_row_in_a_table_of_the_readme(kind: str, package: str) -> None:
    """A new plug-in is one file and one README row, its name in backticks in the first cell."""
    rows = re.findall(r"^\|\s*`([^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(plugins.names(kind, package)) <= {row.replace("_", "-") for row in rows}


def test_no_tracked_file_names_a_place_on_one_machine_or_a_registry() -> None:
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if MACHINE_PATHS.search(line) or REGISTRY_HOSTS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_tracked_files_are_small_text() -> None:
    for path in tracked():
        assert path.stat().st_size < 200_000, f"{path} is large; weights, bundles and generated files stay out"
        assert b"\0" not in path.read_bytes(), f"{path} is binary"


def test_ignore_lines_are_anchored() -> None:
    """The build obeys .gitignore: an unanchored name would silently leave a folder of a package out of the wheel."""
    unanchored = {"__pycache__/", "*.py[cod]", "*.egg-info/"}
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if line and line[0] not in "/#" and line not in unanchored] == []


def test_constraints_pin_everything_that_pyproject_asks_for() -> None:
    lines = [
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n") if line and line[0] != "#"
    ]
    assert [line for line in lines if not PINNED.fullmatch(line)] == []
    pinned = {_normal(line.partition("==")[0]) for line in lines}
    asked = [
        *project()["dependencies"],
        *(each for extra in project()["optional-dependencies"].values() for each in extra),
    ]
    names = {_normal(re.split(r"[\[<>=~!; ]", each)[0]) for each in asked}
    assert names - {"edgeprune"} <= pinned


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
