"""`--widths uniform`: a stock config, whatever family, or a refusal that says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from commandline import SENTENCES, Outcome, invoke
from cuts import prefill, some_ids
from exported import letter_tokenizer
from transformers import AutoModelForCausalLM

from edgeprune import checkpoint
from edgeprune.checkpoint import load_pruned
from edgeprune.configs import architecture
from edgeprune.groups import layer_widths
from edgeprune.pruning import model_groups

STOCK = [name for name in toys.NAMES if "channels" in architecture(toys.toy(name).config.model_type).STOCK]
FIXED = [name for name in toys.NAMES if name not in STOCK]


def saved(folder: Path, name: str, **changes: Any) -> Path:
    model = toys.toy(name, **{"vocab_size": 128} | changes)  # room for what a tokenizer class adds
    checkpoint.save(model, letter_tokenizer(), None, layer_widths(model_groups(model), {}), folder)
    return folder


def compress(model: Path, tmp_path: Path, *arguments: object) -> Outcome:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 24)
    return invoke(
        "compress", model, "-c", text, "-o", tmp_path / "out", "--checkpoint-only", "--preset", "fast", "--align", 1,
        "--min-channels", 4, "--dtype", "float32", "--calibration-sequences", 8, "--calibration-tokens", 16, "-q",
        *arguments,
    )  # fmt: skip


@pytest.mark.parametrize("heads", ["auto", "even"])
@pytest.mark.parametrize("name", STOCK)
def test_uniform_widths_load_without_custom_code(name: str, heads: str, tmp_path: Path) -> None:
    outcome = compress(saved(tmp_path / "m", name), tmp_path, "--widths", "uniform", "--ratio", 0.15, "--heads", heads)
    assert outcome.code == 0, outcome.err
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert "auto_map" not in written
    assert not written.get("per_layer_config")
    assert not list((tmp_path / "out").glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(prefill(stock, some_ids(stock)), prefill(load_pruned(tmp_path / "out"), some_ids(stock)))
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["allocation"] == "uniform"
    reached = plan["ratio_reached"]
    assert reached == pytest.approx(0.15, abs=0.005) or any(f"reached {reached:.1%}" in note for note in plan["notes"])


@pytest.mark.parametrize("name", FIXED)
def test_families_with_hard_wired_widths_are_refused(name: str, tmp_path: Path) -> None:
    outcome = compress(saved(tmp_path / "m", name), tmp_path, "--widths", "uniform")
    assert outcome.code == 2
    assert "hard-wired" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("allocation", ["search", "protect", "global", "uniform:mixed"])
def test_a_contradictory_allocation_is_refused(allocation: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "m", "llama")
    outcome = compress(model, tmp_path, "--widths", "uniform", "--allocation", allocation)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert f"--allocation {allocation} does not" in outcome.err


def test_an_unknown_form_of_widths(tmp_path: Path) -> None:
    outcome = compress(saved(tmp_path / "m", "llama"), tmp_path, "--widths", "equal")
    assert outcome.code == 2
    assert "unknown --widths 'equal'; expected per-layer, uniform" in outcome.err


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_every_preset_takes_the_allocation_that_makes_equal_widths(preset: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "m", "llama")
    outcome = compress(model, tmp_path, "--widths", "uniform", "--preset", preset, "--refit", "none", "--ratio", 0.3)
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "out/plan.json").read_text())["allocation"] == "uniform"


def test_layers_that_differ_already_cannot_be_made_alike(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", "llama")
    first = compress(model, tmp_path, "--allocation", "global", "--ratio", 0.3)
    assert first.code == 0, first.err
    (tmp_path / "out").rename(tmp_path / "pruned")
    again = compress(tmp_path / "pruned", tmp_path, "--widths", "uniform", "--ratio", 0.1)
    assert again.code == 2
    assert "needs layers that are alike" in again.err


def test_heads_that_the_stand_in_cannot_express_stay(tmp_path: Path) -> None:
    """Llama with biases has no stand-in: only head counts that divide hidden_size are taken."""
    model = saved(tmp_path / "m", "llama-bias", num_attention_heads=6, num_key_value_heads=3)
    for ratio in (0.1, 0.2, 0.3, 0.4):
        outcome = compress(model, tmp_path, "--widths", "uniform", "--ratio", ratio, "--heads", "even", "--force")
        assert outcome.code == 0, outcome.err
        written = json.loads((tmp_path / "out/config.json").read_text())
        assert 48 % written["num_attention_heads"] == 0
        assert written["model_type"] == "llama"
