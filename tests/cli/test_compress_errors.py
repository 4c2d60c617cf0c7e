"""What a user can cause in `compress`: one line, exit code 2, nothing half-written, an earlier output untouched."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import Outcome, invoke
from safetensors.torch import load_file, save_file

from edgeprune_export import exporting

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def long_work_is_not_begun(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here is refused before statistics are gathered, unless a test is marked by its fixture."""
    if "long_work" not in request.fixturenames:

        def begun(*_: object, **__: object) -> None:
            raise AssertionError("the long work was begun")

        monkeypatch.setattr("edgeprune.pruning.make_plan", begun)


@pytest.fixture
def long_work() -> None:
    """Let a test go on to the statistics and beyond."""


def refused(message: str, output: Path, *arguments: object) -> None:
    """Run compress and hold that it was refused with one line that holds `message`; the output is as it was."""
    before = snapshot(output.parent)
    outcome = invoke("compress", *arguments, "-o", output, "-q")
    assert_one_line(outcome, message)
    assert snapshot(output.parent) == before


def assert_one_line(outcome: Outcome, message: str) -> None:
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert outcome.err.startswith("edgeprune: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


SMALL = (
    *("--preset", "fast", "--align", 1, "--min-channels", 4, "--dtype", "float32", "--threads", 1),
    *("--calibration-sequences", 8, "--calibration-tokens", 32),
    *("--rounds", 1, "--prompt-tokens", 8, "--generate-tokens", 4),
)


def test_licence_that_is_a_link_out_of_the_models_folder(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "LICENSE").symlink_to(text_file)
    refused("outside its folder; put the file itself there", tmp_path / "out", tmp_path / "model", "-c", text_file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "wandasp"), "did you mean 'wanda-sp'?"),
        (("--preset", "slow"), "unknown --preset 'slow'; expected fast, balanced, best"),
        (("--refit", "some"), "unknown refit 'some'; expected none, least-squares, reconstruct, intercept, bias"),
        (("--recover", "foo"), "recover 'foo' was not understood; expected none, lora, or lora:PASSES"),
        (("--recover", "lora:0"), "with 1 to 1000 passes"),
        (("--recover", "lora:x"), "recover 'lora:x' was not understood"),
        (("--recover", "lora", "--calibration-sequences", "7"), "7 leave none; raise --calibration-sequences to 8"),
        (("--allocation", "unifrom"), "did you mean 'uniform'?"),
        (("--heads", "some"), "unknown --heads 'some'"),
        (("--ratio", "0"), "ratio 0 is out of range"),
        (("--ratio", "0.95"), "ratio 0.95 is out of range"),
        (("--ratio", "-0.2"), "ratio -0.2 is out of range"),
        (("--ratio", "nan"), "ratio nan is out of range"),
        (("--dtype", "int8"), "unknown dtype 'int8'; expected auto, float32, bfloat16"),
        (("--graph-source", "magic"), "expected auto, decoder, traced"),
        (("--memory", "lots"), "'lots' is not a size"),
        (("--align", "0"), "align 0"),
        (("--rounds", "0"), "--rounds is 0; at least 1 was expected"),
        (("--eval-windows", "0"), "--eval-windows is 0"),
        (("--calibration-sequences", "0"), "--calibration-sequences is 0"),
        (("--allocation", "search"), "raise --calibration-sequences to 16 or more"),
        (("--min-decode-speedup", "nan"), "--min-decode-speedup is nan; a factor above 0"),
        (("--min-decode-speedup", "1.1"), "--min-decode-speedup needs at least 3"),
        (("--min-decode-speedup", "1.1", "--rounds", "3", "--generate-tokens", "1"), "needs at least 2"),
        (("--prompt-tokens", "500"), "lower --prompt-tokens or --generate-tokens"),
        (("--eval-text", "{absent}"), "cannot read the text"),
        (("--eval-text", "{text}", "--eval-window", "500"), "--eval-window is 500, the model's context holds 160"),
        (("--eval-text", "{short}", "--eval-window", "100"), "less than one window of 100"),
        (("--calibration-tokens", "500"), "beyond the model's context"),
        (("--seed", str(10**30)), f"at most {2**63 - 1} was expected"),
        (("--threads", "2147483648"), "--threads is 2147483648; at most 1024 was expected"),
        (("-c", "{absent}"), "is no file"),
        (("-c", "x" * 300), "cannot be read (File name too long); expected a .txt or .jsonl file"),
        (("-c", "x" * 300, "--dry-run"), "cannot be read (File name too long)"),
        (("-c", "{surrogate}"), r"line 1 holds '\ud800', which is no character"),
        (("--eval-text", "{surrogate}"), r"line 1 holds '\ud800', which is no character"),
        (("-c", "{empty}"), "is empty; expected text"),
        (("-c", "{short}"), "8 of them held out for the perplexity"),
        (("-c", "{binary}"), "expected plain"),
    ],
)
def test_wrong_value(
    model_folder: Path, text_file: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    files = {"empty": b"", "short": b"Short.", "binary": b"\x00\xff" * 999}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    paths = {name: tmp_path / f"{name}.txt" for name in (*files, "absent")}
    paths |= {"text": text_file, "surrogate": tmp_path / "surrogate.jsonl"}
    paths["surrogate"].write_text(r'{"text": "\ud800 abc"}')
    filled = [argument.format(**paths) for argument in arguments]
    refused(message, tmp_path / "out", model_folder, "-c", text_file, *SMALL, *filled)


def test_unknown_model_names_the_nearest(tmp_path: Path, text_file: Path) -> None:
    refused("did you mean 'smollm2-135m'?", tmp_path / "out", "smolm2-135m", "-c", text_file)


@pytest.mark.parametrize("model", ["~nobody-has-this-name/x", "x" * 300])
def test_name_that_is_no_path(tmp_path: Path, text_file: Path, model: str) -> None:
    outcome = invoke("compress", model, "-c", text_file, "-o", tmp_path / "out", "-q")
    assert_one_line(outcome, "is no usable path")
    assert_one_line(invoke("compress", model, "-c", text_file, "-o", tmp_path / ("y" * 300)), "too long")


def _without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _corrupted(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8:40] = b"\xff" * 32
    (folder / WEIGHTS).write_bytes(data)


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values())).view(-1)[3] = torch.nan
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _other_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba2"}))


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_weights, "holds no weights"),
        (_truncated, "is truncated or corrupted"),
        (_corrupted, "is truncated or corrupted"),
        (_not_finite, "NaN or infinite"),
        (_other_architecture, "which cannot be pruned; known: baichuan, bloom"),
        (_without_config, "has no config.json"),
        (_without_tokenizer, "has no tokenizer"),
    ],
)
def test_damaged_model(
    model_folder: Path, text_file: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    damage(model)
    refused(message, tmp_path / "out", model, "-c", text_file, *SMALL)


def test_existing_output_stays(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    arguments = (model_folder, "-c", text_file, *SMALL)
    refused("exists already; choose another name, or replace it with --force", tmp_path / "out", *arguments)
    refused("is not an output of compress, so --force does not", tmp_path / "out", *arguments, "--force")


def test_model_or_text_that_is_read_is_not_replaced(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model, text = shutil.copytree(model_folder, out / "checkpoint"), shutil.copy(text_file, out)
    (model / "plan.json").touch()
    message = "which is read; choose another output"
    refused(message, model, model, "-c", text_file, "--force", "--checkpoint-only")
    for arguments in ((model, "-c", text_file), (model_folder, "-c", text), (model_folder, "--eval-text", text)):
        refused(message, out, *arguments, "--force")
    assert_one_line(invoke("export", model, "-o", out, "--force"), message)


def test_folder_of_another_program_is_not_a_checkpoint(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text('{"port": 80}')
    arguments = (model_folder, "-c", text_file, "--force", "--checkpoint-only")
    refused("is not a pruned checkpoint, so --force does not", tmp_path / "out", *arguments)


def test_output_below_a_file(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("is no folder to write to", tmp_path / "file" / "out", model_folder, "-c", text_file, *SMALL)


def test_full_disk_is_said_first(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    refused("no disk space left for", tmp_path / "out", model_folder, "-c", text_file, *SMALL)


def test_disk_that_fills_up_keeps_the_earlier_output(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_work: None
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.ir, "save", full)
    (tmp_path / "out/checkpoint").mkdir(parents=True)
    (tmp_path / "out/checkpoint/plan.json").write_text("{}")
    before = snapshot(tmp_path)
    outcome = invoke("compress", model_folder, "-c", text_file, "-o", tmp_path / "out", *SMALL, "-q", "--force")
    assert outcome.code == 2
    assert "no disk space left" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    shutil.rmtree(tmp_path / ".out.work")  # where the same command continues once there is room
    assert snapshot(tmp_path) == before


def test_ratio_that_the_layers_cannot_give(
    model_folder: Path, text_file: Path, tmp_path: Path, long_work: None
) -> None:
    outcome = invoke(
        "compress", model_folder, "-c", text_file, "-o", tmp_path / "out", *SMALL, "-q", "-r", 0.9, "--min-channels", 80
    )
    assert_one_line(outcome, "cannot be reached")
    assert not list(tmp_path.iterdir())
