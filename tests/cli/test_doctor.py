"""`edgeprune doctor`: one line for each finding, exit codes, and nothing heavy imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import invoke
from tiny_bundle import edit_manifest, write_bundle

from edgeprune_runtime.bundle import Manifest, ModelInfo


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_without_a_bundle_the_machine_is_told_line_by_line() -> None:
    done = invoke("doctor")
    assert (done.code, done.err) == (0, "")
    title, *lines = done.out.splitlines()
    assert title == "This machine:"
    assert {line.split(maxsplit=1)[0] for line in lines} <= {"ok", "note", "problem"}
    assert any(line.startswith("ok       onnxruntime: ") for line in lines)


def test_problem_of_the_machine_alone_is_no_failure() -> None:
    done = invoke("doctor", "--provider", "nnapi")
    assert done.code == 0
    assert "problem  providers: " in done.out


def test_good_bundle_passes(bundle: Path) -> None:
    done = invoke("doctor", bundle, "--verify")
    assert (done.code, done.err) == (0, "")
    assert f"{bundle}:\n" in done.out
    assert "ok       files: " in done.out


def test_damaged_bundle_fails_after_all_findings(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    done = invoke("doctor", bundle)
    assert done.code == 1
    assert "problem  files: " in done.out
    assert "ok       fp32: " in done.out
    assert done.err == f"edgeprune: 1 problem with {bundle} here; the findings say what to do\n"


def test_json_is_one_document_with_levels_and_figures(bundle: Path) -> None:
    (bundle / "config.json").write_text("{}")
    done = invoke("doctor", bundle, "--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert (document["bundle"], document["problems"]) == (str(bundle), 1)
    assert {"level", "subject", "found", "advice", "figures"} == set(document["machine"][0])
    room = [each for each in document["findings"] if each["subject"] == "fp32"][1]
    assert room["figures"]["weights_bytes"] > 0
    without = json.loads(invoke("doctor", "--json").out)
    assert (without["bundle"], without["problems"], without["findings"]) == (None, 0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "'nowhere' is not a folder"),
        (("x" * 300,), "is no usable path (File name too long)"),
        (("--provider", "gpu"), "unknown provider 'gpu'"),
        (("--verify",), "--verify and --variant are about a bundle"),
        (("--variant", "int4"), "--verify and --variant are about a bundle"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = invoke("doctor", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err


def test_names_in_a_bundle_cannot_steer_the_terminal(bundle: Path) -> None:
    name = "[red]nice[/red]\x1b[2J\x07\nok       files: forged"
    edit_manifest(bundle, model=vars(ModelInfo(name, "llama", "x")))
    assert Manifest.load(bundle).model.name == name
    out = invoke("doctor", bundle).out
    assert "[red]nice[/red]" in out
    assert not {"\x1b", "\x07"} & set(out)
    assert "ok       files: forged" not in out.splitlines()


def test_terminal_gets_a_table(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    done = invoke("doctor", bundle)
    assert done.code == 0
    assert "\x1b[32mok\x1b[0m" in done.out
    assert "This machine" in done.out


def test_doctor_imports_neither_torch_nor_transformers(bundle: Path) -> None:
    code = (
        "import sys\nfrom edgeprune.cli import app\n"
        f"app(['doctor', {str(bundle)!r}], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'transformers', 'onnx', 'onnx_ir', 'optimum'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
