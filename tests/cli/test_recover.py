"""`compress --recover lora`: what it writes and says, refuses, and how it continues."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Outcome, invoke, killed_after
from safetensors.torch import load_file

from edgeprune.checkpoint import load_pruned
from edgeprune.journal import work_folder
from edgeprune.plan import PrunePlan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the recover extra")
SMALL = (
    *("--preset", "fast", "--align", 1, "--min-channels", 4, "--dtype", "float32", "--allocation", "uniform"),
    *("--calibration-sequences", 16, "--calibration-tokens", 32, "--refit", "none", "--ratio", 0.4),
    *("--prompt-tokens", 8),
)
TRAINED = ("--checkpoint-only", "--recover", "lora:9")


def compress(model: Path, text: Path, output: Path, *arguments: object) -> Outcome:
    return invoke("compress", model, "-c", text, "-o", output, *SMALL, *arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def done(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    output = tmp_path_factory.mktemp("recovered") / "out"
    outcome = compress(model_folder, text_file, output, *TRAINED, "--json")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    return output, outcome


def test_a_trained_checkpoint_has_the_form_of_one_that_is_not(
    done: tuple[Path, Outcome], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    assert compress(model_folder, text_file, tmp_path / "out", "--checkpoint-only").code == 0
    trained, plain = (load_file(folder / "model.safetensors") for folder in (done[0], tmp_path / "out"))
    assert {name: (x.shape, x.dtype) for name, x in trained.items()} == {
        name: (x.shape, x.dtype) for name, x in plain.items()
    }
    changed = {name for name in plain if not torch.equal(plain[name], trained[name])}
    assert changed == {name for name in plain if name.endswith("_proj.weight")}
    assert torch.isfinite(load_pruned(done[0])(torch.tensor([[3, 4, 5]])).logits).all()


def test_plan_card_and_report_say_it(done: tuple[Path, Outcome]) -> None:
    output, outcome = done
    assert PrunePlan.load(output).recover == "lora:9"
    report = json.loads(outcome.out)
    found = report["data"]["recover"]
    assert found["is_accepted"]
    assert found["divergence"] < found["divergence_before"]
    (table,) = (table for table in report["tables"] if table["title"] == "What the recovery did")
    assert table["rows"][0]["held out, after"] == found["divergence"]
    assert "recover lora:9" in outcome.err
    assert "What the recovery did" in outcome.err


def test_a_recovery_that_was_not_taken_is_not_claimed(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.recover.LEARNING_RATE", 1e30)
    outcome = compress(model_folder, text_file, tmp_path / "out", *TRAINED, "--json")
    assert outcome.code == 0, outcome.err
    assert not json.loads(outcome.out)["data"]["recover"]["is_accepted"]
    plan = PrunePlan.load(tmp_path / "out")
    assert plan.recover == "none"
    assert any(note.startswith("recover lora:9 was tried and not taken") for note in plan.notes)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "was tried and not taken" in card
    assert ", recover lora" not in card


@pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
@pytest.mark.parametrize(
    ("step", "continues"),
    [
        ("teacher-1", "continues from block 3 of 4 (dense model, to learn from)"),
        ("adapters", "continues after step 8 of 9 (recover)"),
        ("recover-1", "continues after step 9 of 9 (recover)"),
        ("recover", "continues after the last step (recover)"),
    ],
)
def test_killed_run_continues_to_the_same_bytes(
    done: tuple[Path, Outcome],
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    step: str,
    continues: str,
) -> None:
    output = tmp_path / "out"
    killed_after(step, lambda: compress(model_folder, text_file, output, *TRAINED))
    outcome = compress(model_folder, text_file, output, *TRAINED)
    assert outcome.code == 0, outcome.err
    assert continues in outcome.err
    assert contents(output) == contents(done[0])
    assert not work_folder(output).exists()


def test_zeros_come_after_it_and_stay(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = compress(model_folder, text_file, tmp_path / "out", *TRAINED, "--sparsity", "2:4", "--json")
    assert outcome.code == 0, outcome.err
    data = json.loads(outcome.out)["data"]
    assert data["recover"]["is_accepted"]
    assert data["zeros"]["broken"] == 0


def test_without_peft_it_says_what_to_install_before_any_work(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def blind(name: str, *rest: Any) -> Any:
        return None if name == "peft" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", blind)
    outcome = compress(model_folder, text_file, tmp_path / "out", *TRAINED)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "this command needs peft" in outcome.err
    assert "pip install 'edgeprune[recover]'" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_model_that_memory_does_not_hold_is_refused_before_any_work(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    for limit, code in (("631000000", 2), ("700MB", 0)):
        outcome = compress(model_folder, text_file, tmp_path / "out", *TRAINED, "--max-memory", limit, "-q")
        assert outcome.code == code, outcome.err
        if code:
            assert outcome.err.count("\n") == 1
            assert "the recovery of the whole model takes about" in outcome.err
            assert "use --recover none" in outcome.err
            assert not list(tmp_path.iterdir())


def test_nothing_cut_leaves_nothing_to_recover(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("-c", text_file, "--ratio", 0, "--sparsity", "2:4", "--recover", "lora")
    outcome = invoke("compress", model_folder, "-o", tmp_path / "out", *arguments)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--recover lora says how to cut, and --ratio 0 cuts nothing" in outcome.err


def test_a_dry_run_trains_nothing(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = compress(model_folder, text_file, tmp_path / "out", "--recover", "lora", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "--recover, export and checks come on top" in " ".join(outcome.out.split())
    assert "What the recovery did" not in outcome.out + outcome.err
