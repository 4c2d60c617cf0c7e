"""The built wheel: what is in it, and that it works where there is nothing but the base install."""

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "edgeprune": "edgeprune",
    "edgeprune_export": "export/edgeprune_export",
    "edgeprune_runtime": "runtime/edgeprune_runtime",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="needs the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of programs of a fresh environment: the wheel, and of other packages only what the base install brings.

    The packages are those of the running environment, linked one by one: no download, and torch is really not there.
    """
    folder = tmp_path_factory.mktemp("device")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    target = Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for package_file in _files_of_the_base_install():
        link = target / package_file.name
        if not link.exists():
            link.symlink_to(package_file)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, timeout=120)
    return programs


def _files_of_the_base_install() -> set[Path]:
    """Top-level entries in site-packages of all packages that the base install brings, found through their metadata."""
    wanted = [
        Requirement(each)
        for each in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    ]
    seen: set[str] = set()
    entries: set[Path] = set()
    while wanted:
        requirement = wanted.pop()
        if requirement.name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        found = distribution(requirement.name)
        wanted += [Requirement(each) for each in found.requires or []]
        for file in found.files or []:
            if ".." not in file.parts and file.parts[0] != "__pycache__":
                entries.add(Path(str(found.locate_file(file.parts[0]))))
    return entries


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # Away from the repository: its folders must not be what is imported.
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=program.parent,
        check=False,
    )


def _output(program: Path, *arguments: str) -> str:
    done = _run(program, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_the_three_packages_and_nothing_else(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_holds_every_source_file(names: set[str]) -> None:
    for package, folder in PACKAGES.items():
        sources = {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
        assert sources <= names
        assert f"{package}/py.typed" in names
    assert "edgeprune/modeling_edgeprune.py" in names


def test_nothing_but_the_base_install_is_there(device: Path) -> None:
    code = (
        "import json, edgeprune, edgeprune_runtime, importlib.util as u; "
        "print(json.dumps([edgeprune.__file__, [n for n in ('torch', 'transformers', 'onnx') if u.find_spec(n)]]))"
    )
    place, present = json.loads(_output(device / "python", "-c", code))
    assert device.parent in Path(place).parents
    assert present == []


def test_help_answers_without_torch(device: Path) -> None:
    assert "compress" in _output(device / "edgeprune", "--help")
    assert _output(device / "edgeprune", "--version").startswith("edgeprune ")


@pytest.mark.parametrize("command", ["run", "validate", "eval", "bench"])
def test_device_commands_work_without_torch(device: Path, command: str) -> None:
    assert _run(device / "edgeprune", command, "--help").returncode == 0


def test_every_device_module_imports_without_torch(device: Path) -> None:
    code = (
        "import importlib, pkgutil, edgeprune_runtime\n"
        "for module in pkgutil.iter_modules(edgeprune_runtime.__path__, 'edgeprune_runtime.'):\n"
        "    print(importlib.import_module(module.name).__name__)"
    )
    assert "edgeprune_runtime.errors" in _output(device / "python", "-c", code).split()


def test_compress_without_its_extra_says_in_one_line_what_to_install(device: Path) -> None:
    done = _run(device / "edgeprune", "compress", "smollm2-135m", "--ratio", "0.2", "-o", "out")
    assert done.returncode == 2
    assert "pip install 'edgeprune[compress]'" in done.stderr
    assert len(done.stderr.strip().split("\n")) == 1
    assert done.stdout == ""
