"""`--target` from the command line: what is written and said, and what is refused in one line before any long work."""

import html
import json
from pathlib import Path

import pytest
from commandline import Outcome, invoke, save_toy

from edgeprune.journal import work_folder
from edgeprune_export.targets import Target, known_targets
from edgeprune_runtime.bundle import open_bundle

SMALL = (
    *("--preset", "fast", "--align", 4, "--min-channels", 4, "--dtype", "float32", "--threads", 1),
    *("--calibration-sequences", 8, "--calibration-tokens", 32, "--eval-windows", 2),
    *("--rounds", 1, "--prompt-tokens", 8, "--generate-tokens", 4),
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose hidden size holds whole blocks. Read only."""
    return save_toy(tmp_path_factory.mktemp("models") / "wide", hidden_size=96, num_hidden_layers=3)


def refused(outcome: Outcome, message: str) -> None:
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


@pytest.mark.parametrize("command", ["export", "compress"])
def test_help_names_every_target(command: str) -> None:
    words = set(invoke(command, "--help").out.replace(",", " ").replace(";", " ").split())
    assert set(known_targets()) <= words


@pytest.mark.parametrize(("target", "provider"), [("wasm", ""), ("directml", " --provider directml")])
def test_export_says_whom_the_bundle_is_for_and_how_to_run_it(target: str, provider: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    model = save_toy(tmp_path / "model", hidden_size=96, num_hidden_layers=1)
    done = invoke("export", model, "-o", out, "--target", target, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["target"] == target
    assert f"note: made for the target {target}: {Target.find(target).title}" in done.err
    assert f"note: verified: {Target.find(target).verified}" in done.err
    where = "Next, on the device" if provider else "Next"
    assert f"\n{where}: edgeprune run {out}{provider} --prompt" in done.err
    checked = invoke("validate", out, "--threads", 1)  # the hint is not followed silently
    assert checked.code == 0, checked.err


def test_compress_measures_the_variants_of_its_target(wide: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("compress", wide, "-c", text_file, "-o", out, *SMALL, "--target", "wasm")
    assert done.code == 0, done.err
    report = json.loads((out / "report.json").read_text())
    assert [side["variant"] for side in report["data"]["bench"]["sides"]] == ["fp32", "int8-dynamic"]
    manifest = open_bundle(out / "bundle", verify=True).manifest
    assert (manifest.target, list(manifest.variants)) == ("wasm", ["int8-dynamic"])
    assert f"verified: {Target.find('wasm').verified}" in " ".join(done.out.split())


def test_compress_reports_what_the_mobile_usability_check_found(wide: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("compress", wide, "-c", text_file, "-o", out, *SMALL, "--target", "mobile", "--quiet")
    assert done.code == 0, done.err
    notes = open_bundle(out / "bundle").manifest.notes
    for begin in (
        "ONNX Runtime's mobile usability check advises ",
        "NNAPI would take ",
        "CoreML MLProgram would take ",
    ):
        (found,) = [note for note in notes if note.startswith(begin)]
        for text in (done.out, (out / "report.md").read_text(), html.unescape((out / "report.html").read_text())):
            assert found in " ".join(text.split())
        assert (out / "bundle/README.md").read_text().count(found) == 1


def test_a_target_alone_never_fails_for_a_model_without_the_decoder_graph(tmp_path: Path) -> None:
    from exported import pruned

    pruned(tmp_path / "model", "gpt2", num_hidden_layers=1)
    done = invoke("export", tmp_path / "model", "-o", tmp_path / "bundle", "--target", "cpu")
    assert done.code == 0, done.err
    assert "note: int8 of the target cpu is made by the decoder graph alone" in done.err
    assert list(open_bundle(tmp_path / "bundle").manifest.variants) == ["fp32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "tensorrt", "--precision", "int4"), "needs the plain graph, which is written in fp32 alone"),
        (("--target", "coreml", "--graph-source", "traced"), "needs the decoder graph, and --graph-source asks for"),
        (("--target", "phone"), "unknown --target 'phone'; expected one of: coreml ("),
        (("--target", "cpu", "--precision", "int5"), "unknown precision 'int5'"),
    ],
)
@pytest.mark.parametrize("command", ["export", "compress"])
def test_contradictions_are_refused_before_any_work(
    command: str, arguments: tuple[str, ...], message: str, wide: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = ("-c", text_file, *SMALL) if command == "compress" else ()
    refused(invoke(command, wide, "-o", tmp_path / "out", *settings, "--quiet", *arguments), message)
    assert not list(tmp_path.iterdir())


def test_checkpoint_alone_is_for_no_target(wide: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("-c", text_file, "-o", tmp_path / "out", *SMALL, "--quiet", "--checkpoint-only", "--target", "cpu")
    refused(invoke("compress", wide, *arguments), "--target cpu is of the ONNX bundle, and --checkpoint-only writes")


def test_a_model_too_large_for_its_target_is_refused_before_it_is_pruned(
    wide: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune_export.targets.wasm.MAX_DATA_BYTES", 1000)
    arguments = ("-c", text_file, "-o", tmp_path / "out", *SMALL, "--quiet", "--target", "wasm")
    refused(invoke("compress", wide, *arguments), "the int8-dynamic weights would take")
    assert not (tmp_path / "out").exists()
    assert not work_folder(tmp_path / "out").exists()
