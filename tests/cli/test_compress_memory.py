"""`--max-memory`, `--checkpoint-only`, and models that have to be converted first."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commandline import Outcome, invoke
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgeprune import memory
from edgeprune.checkpoint import load_pruned
from edgeprune.journal import Journal
from edgeprune.memory import LIBRARIES_BYTES
from edgeprune.plan import PrunePlan
from edgeprune.streaming import Decoder

SMALL = (
    *("--preset", "fast", "--align", 1, "--min-channels", 4, "--dtype", "float32", "--ratio", 0.2),
    *("--calibration-sequences", 8, "--calibration-tokens", 32, "--gradient-sequences", 4, "--prompt-tokens", 8),
)
# The toy itself takes 2 MB at most: with this it may not keep its blocks, but do all else.
TIGHT = LIBRARIES_BYTES + 1_500_000


def compress(model: Path, text: Path | str, output: Path, *arguments: object) -> Outcome:
    return invoke("compress", model, "-c", text, "-o", output, *SMALL, *arguments)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_checkpoint_only_writes_a_checkpoint_and_no_more(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcome = compress(model_folder, text_file, output, "--checkpoint-only", "--json")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    plan = PrunePlan.load(output)
    data = json.loads(outcome.out)["data"]
    assert data["plan"]["parameters_after"] == plan.parameters_after
    assert data["footprint"]["peak_bytes"] > LIBRARIES_BYTES
    assert data["footprint"]["keeps_blocks"]
    assert sum(parameter.numel() for parameter in load_pruned(output).parameters()) == plan.parameters_after
    assert f"edgeprune export {output}" in outcome.err
    assert not list(output.glob("*.onnx*"))


def test_checkpoint_only_replaces_pruned_checkpoints_alone(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert compress(model_folder, text_file, output, "--checkpoint-only", "-q").code == 0
    before = weights(output)
    outcome = compress(model_folder, text_file, output, "--checkpoint-only", "-q")
    assert outcome.code == 2
    assert "--force" in outcome.err
    assert compress(model_folder, text_file, output, "--checkpoint-only", "-q", "--force", "--ratio", 0.3).code == 0
    assert weights(output) != before
    dense = shutil.copytree(model_folder, tmp_path / "dense")
    outcome = compress(model_folder, text_file, dense, "--checkpoint-only", "-q", "--force")
    assert "is not a pruned checkpoint" in outcome.err
    assert weights(dense) == weights(model_folder)


@pytest.mark.parametrize(
    ("method", "allocation"),
    [("wanda-sp", "judged"), ("wanda-sp", "protect"), ("fusion", "protect"), ("obs", "judged")],
)
def test_streamed_blocks_give_the_same_bytes_as_blocks_that_stay(
    method: str, allocation: str, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--checkpoint-only", "--method", method, "--allocation", allocation)
    assert compress(model_folder, text_file, tmp_path / "roomy", *arguments).code == 0
    most, run, fit = 0, Decoder.run, memory.fit

    def counted(self: Decoder, *given: object) -> torch.Tensor:
        nonlocal most
        assert self.is_streamed
        most = max(most, sum(not next(block.parameters()).is_meta for block in self.blocks))
        return run(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "run", counted)
    monkeypatch.setattr(memory, "fit", lambda *given: replace(fit(*given), keeps_blocks=False))
    monkeypatch.setattr("edgeprune.sources.load", lambda *_: pytest.fail("the model was loaded whole"))
    outcome = compress(model_folder, text_file, tmp_path / "tight", *arguments)
    assert outcome.code == 0, outcome.err
    assert most == 1
    assert weights(tmp_path / "tight") == weights(tmp_path / "roomy")


def test_dry_run_within_little_memory(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.sources.load", lambda *_: pytest.fail("the model was loaded whole"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    seen: list[list[Path]] = []
    forget = Journal.forget

    def looked(self: Journal, *names: str) -> None:
        seen.append(list(tmp_path.rglob("*.rows")))
        forget(self, *names)

    monkeypatch.setattr(Journal, "forget", looked)
    judging = ("--allocation", "judged", "--dry-run", "--max-memory", TIGHT)
    outcome = compress(model_folder, text_file, tmp_path / "out", *judging)
    assert outcome.code == 0, outcome.err
    assert any(seen)  # what flows between the blocks lay on the disk
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-memory", "300MB"), "does not do:"),
        (("--max-memory", "lots"), "is not a size"),
    ],
)
def test_limit_that_does_not_do_is_refused_before_a_weight_is_read(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("edgeprune.weights.read_tensor", lambda *_: pytest.fail("a weight was read"))
    outcome = compress(model_folder, text_file, tmp_path / "out", *arguments, "-q")
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_model_larger_than_memory_does_not_write_its_own_text(model_folder: Path, tmp_path: Path) -> None:
    outcome = compress(model_folder, "self", tmp_path / "out", "--checkpoint-only", "--max-memory", TIGHT, "-q")
    assert outcome.code == 2
    assert "give a text with --calibration" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_torch_pickles_are_converted_once(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder, pickled)
    tensors = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    for name, model in (("expected", model_folder), ("found", pickled)):
        assert compress(model, text_file, tmp_path / name, "--checkpoint-only").code == 0
    assert weights(tmp_path / "found") == weights(tmp_path / "expected")
    assert {path.name for path in tmp_path.iterdir()} == {"pickled", "expected", "found"}
    assert compress(pickled, text_file, tmp_path / "dry", "--dry-run").code == 0


def test_half_precision_source_gives_a_half_precision_checkpoint(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(model_folder, half)
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(half)
    for dtype in ("float32", "bfloat16"):
        outcome = compress(half, text_file, tmp_path / dtype, "--checkpoint-only", "--dtype", dtype)
        assert outcome.code == 0, outcome.err
        tensors = load_file(tmp_path / dtype / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == "bfloat16"
