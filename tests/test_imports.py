"""Who may import whom: edgeprune_runtime <- edgeprune <- edgeprune_export <- edgeprune.cli, and what each may load."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIDES = {
    "edgeprune_runtime": ROOT / "runtime/edgeprune_runtime",
    "edgeprune": ROOT / "edgeprune",
    "edgeprune_export": ROOT / "export/edgeprune_export",
    "edgeprune.cli": ROOT / "edgeprune/cli",
}
ORDER = list(SIDES)
OF_THE_DEVICE = {"numpy", "onnxruntime", "tokenizers", "jinja2", "rich", "typer"}
"""What the base install brings; the device side may import nothing else."""
OF_THE_EXPORT = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_genai"}
"""What the compress side leaves to the export side."""
HEAVY = {
    "torch",
    "transformers",
    "optimum",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "datasets",
    "scipy",
}
TRAVELS = ROOT / "edgeprune/modeling_edgeprune.py"
"""Saved beside a checkpoint and run where there is no edgeprune."""


def side_of(path: Path) -> str:
    return max((side for side, folder in SIDES.items() if folder in path.parents), key=ORDER.index)


def package_of(module: str) -> str:
    return "edgeprune.cli" if f"{module}.".startswith("edgeprune.cli.") else module.partition(".")[0]


def python_files() -> list[Path]:
    folders = {folder for side, folder in SIDES.items() if side != "edgeprune.cli"}
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            assert node.module is not None
            # `from edgeprune import cli` names a module by its alias
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def run(*code: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True, timeout=60, check=False)


def loaded(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement ran in a fresh interpreter."""
    done = run("-c", f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("\n")[-2].split())


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    if path == ROOT / "edgeprune/__main__.py":  # `python -m edgeprune` is the command line
        pytest.skip("belongs to the command line")
    side = side_of(path)
    for line, module in imports(path):
        package = package_of(module)
        if package in ORDER:
            assert ORDER.index(package) <= ORDER.index(side), f"{path}:{line}: {side} must not import {package}"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_side_imports_only_packages_of_its_own(path: Path) -> None:
    side = side_of(path)
    for line, module in imports(path):
        package = package_of(module)
        if package in ORDER or package in sys.stdlib_module_names:
            continue
        if side == "edgeprune_runtime":
            assert package in OF_THE_DEVICE, f"{path}:{line}: the base install does not bring {package}"
        if side == "edgeprune":
            assert package not in OF_THE_EXPORT, f"{path}:{line}: {package} is for edgeprune_export"


def test_modelling_file_that_travels_imports_no_edgeprune() -> None:
    assert {package_of(module) for _, module in imports(TRAVELS)} <= {"torch", "transformers", *sys.stdlib_module_names}


def processor_seconds(*code: str) -> float:
    """What a fresh interpreter needs; all the time there is on an idle machine, and without the work of others."""
    before = os.times()
    done = run(*code)
    after = os.times()
    assert done.returncode == 0, done.stderr
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_loads_nothing_heavy_and_answers_at_once() -> None:
    program = (
        "import sys, runpy\nsys.argv = ['edgeprune', '--help']\n"
        "try:\n runpy.run_module('edgeprune', run_name='__main__')\nexcept SystemExit as stop:\n assert not stop.code"
    )
    modules = loaded(program)
    assert "typer" in modules
    assert not modules & HEAVY
    assert "compress" in run("-m", "edgeprune", "--help").stdout
    # No help page of Typer's comes sooner than these imports. Measured in turn, as the speed of a machine changes.
    pairs = [
        (processor_seconds("-m", "edgeprune", "--help"), processor_seconds("-c", "import typer, typer.rich_utils"))
        for _ in range(5)
    ]
    ours, least = map(min, zip(*pairs, strict=True))
    assert ours < 2 * least


@pytest.mark.parametrize("package", ["edgeprune", "edgeprune_runtime"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    assert not loaded(f"import {package}") & HEAVY


def test_device_commands_load_no_torch() -> None:
    modules = loaded(
        "import pkgutil, importlib, edgeprune.cli, edgeprune_runtime as r\n"
        "[importlib.import_module(f'edgeprune_runtime.{m.name}') for m in pkgutil.iter_modules(r.__path__)]"
    )
    assert not modules & (HEAVY - OF_THE_DEVICE)


@pytest.mark.parametrize("module", ["edgeprune_runtime.session", "edgeprune_export.parity"])
def test_onnx_runtime_reports_nothing(module: str, tmp_path: Path) -> None:
    """ONNX Runtime puts its reports into the home folder, if it may make any, as soon as it is imported."""
    silent = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI")
    kept = {name: value for name, value in os.environ.items() if name not in silent and not name.startswith("XDG_")}
    done = run("-c", f"import {module}, onnxruntime", env={**kept, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name]


@pytest.mark.parametrize(("theirs", "expected"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_unless_the_environment_says_otherwise(theirs: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if theirs is not None:
        environment["ORT_DISABLE_TELEMETRY"] = theirs
    done = run("-c", "import edgeprune_runtime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])", env=environment)
    assert done.stdout.strip() == expected, done.stderr
