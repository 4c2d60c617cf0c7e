"""Rounding by data: the paper's formula, and the walk through a model's blocks."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import toys
from exported import pruned

from edgeprune.calibration import Calibration
from edgeprune.checkpoint import load_pruned, open_decoder
from edgeprune.journal import Journal
from edgeprune_export import gptq as rounding_by_data
from edgeprune_export.exporting import export
from edgeprune_export.gptq import RoundingData, gptq, round_blocks
from edgeprune_export.quantize import PRECISIONS, Grid, Precision, RoundedWeights, quantize, round_weights
from edgeprune_export.weights import Weights
from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.validate import validate

INT4 = replace(PRECISIONS["int4"], block_size=16, accuracy_level=0, max_perplexity_ratio=9.0, min_argmax_agreement=0.0)
DAMPING = 0.01


def a_weight(rows: int = 6, inputs: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def some_inputs(inputs: int = 40, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    """Inputs that depend on each other, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 2, inputs, generator=generator)
    noise = torch.randn(tokens, inputs, generator=generator)
    return torch.randn(tokens, inputs // 2, generator=generator) @ mixing + noise


def literal_gptq(weight: torch.Tensor, gram: torch.Tensor, precision: Precision) -> torch.Tensor:
    """The optimal brain surgeon's step for one input after the other, from its definition.

    The inverse is taken anew of what is left of the Gram matrix, and no factor is used.
    """
    w, inputs = weight.double().clone(), weight.shape[1]
    system = gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    for j in range(inputs):
        if j % precision.block_size == 0:
            block = slice(j, min(j + precision.block_size, inputs))
            grid = Grid.of(w[:, block].float(), precision, gram.diagonal()[block])
        inverse = torch.linalg.inv(system[j:, j:])
        rounded = grid.nearest(w[:, j : j + 1].float()).double()
        rounded[weight[:, j] == 0] = 0
        error = (w[:, j : j + 1] - rounded) / inverse[0, 0]
        w[:, j:] -= error * inverse[0]
        w[:, j : j + 1] = rounded
    return w.float()


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("inputs", [32, 40, 150])
def test_rounds_as_the_formula_says(is_symmetric: bool, inputs: int) -> None:
    precision = replace(INT4, is_symmetric=is_symmetric)
    weight, x = a_weight(inputs=inputs), some_inputs(inputs)
    weight[:, 3] = 0
    gram = x.T @ x / len(x)
    found = gptq(weight, gram, precision).dequantized(inputs)
    torch.testing.assert_close(found, literal_gptq(weight, gram, precision), rtol=1e-4, atol=1e-4)


def test_what_comes_out_is_nearer_than_with_each_weight_to_its_nearest() -> None:
    weight, x, others = a_weight(30, 96), some_inputs(96), some_inputs(96, seed=1, tokens=4000)[400:]
    gram = x.T @ x / len(x)
    by_data, plain = gptq(weight, gram, INT4), quantize(weight, INT4)
    missed = [((found.dequantized(96) - weight) @ others.T).square().mean() for found in (by_data, plain)]
    assert missed[0] < 0.5 * missed[1]


def test_zeros_stay_zeros() -> None:
    weight = a_weight() * (a_weight(seed=1) > 0)
    x = some_inputs()
    found = gptq(weight, x.T @ x / len(x), INT4).dequantized(40)
    assert (found[weight == 0] == 0).all()
    assert (found[weight != 0] != 0).any()


def test_an_input_that_was_never_seen_loses_its_weights() -> None:
    x = some_inputs()
    x[:, 5] = 0
    found = gptq(a_weight(), x.T @ x / len(x), INT4).dequantized(40)
    assert torch.isfinite(found).all()
    assert (found[:, 5] == 0).all()


# --- the walk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    pruned(tmp_path / "model", "llama", head_dim=16)
    return tmp_path / "model"


def calibration(sequences: int = 12, tokens: int = 24) -> Calibration:
    ids = torch.randint(3, toys.COMMON["vocab_size"], (sequences, tokens), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, "random", 0, "")


def test_every_block_is_rounded_to_what_it_reads_behind_rounded_blocks(checkpoint: Path) -> None:
    data = RoundingData(calibration(), journal=Journal())
    ready = round_blocks(open_decoder(checkpoint), INT4, data)
    model = load_pruned(checkpoint)
    expected = dict(_rounded_one_by_one(model, data.calibration.ids))
    assert ready.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(ready[name]().dequantized(weight.shape[1]), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-mha", "gemma3_text"])
def test_the_head_is_rounded_to_what_it_reads_behind_the_last_rounded_block(name: str, tmp_path: Path) -> None:
    """Of the first toy it is a weight of its own, of the others the embedding."""
    pruned(tmp_path / "model", name, head_dim=16)
    data, precision = RoundingData(calibration(), journal=Journal()), replace(INT4, table_bits=4)
    ready = round_blocks(open_decoder(tmp_path / "model"), precision, data)
    model = load_pruned(tmp_path / "model")
    for block_weight, rounded in _rounded_one_by_one(model, data.calibration.ids):
        torch.testing.assert_close(ready[block_weight]().dequantized(rounded.shape[1]), rounded, rtol=0, atol=1e-5)
    with torch.no_grad():
        read = model.model(data.calibration.ids).last_hidden_state.flatten(0, 1)
    gram = read.T @ read / len(read)
    is_tied = model.config.tie_word_embeddings
    if is_tied:
        gram += 0.3 * gram.diagonal().mean() * torch.eye(len(gram))
    expected = gptq(model.lm_head.weight.detach(), gram, INT4).dequantized(len(gram))
    (found,) = [read() for name, read in ready.items() if "layers" not in name]
    assert ("model.embed_tokens.weight" if is_tied else "lm_head.weight") in ready
    torch.testing.assert_close(found.dequantized(len(gram)), expected, rtol=0, atol=1e-5)
    plain = quantize(model.lm_head.weight, INT4).dequantized(len(gram))
    missed = [((each - model.lm_head.weight) @ read.T).square().mean() for each in (expected, plain)]
    assert missed[0] < 0.8 * missed[1]


def _rounded_one_by_one(model: Any, ids: torch.Tensor) -> Any:
    """The same with the whole model in memory: all Linears of a block from one pass, then the block is rounded."""
    for layer, block in enumerate(model.model.layers):
        linears = {name: each for name, each in block.named_modules() if isinstance(each, torch.nn.Linear)}
        read: dict[str, torch.Tensor] = {}

        def note(_: Any, inputs: Any, *, name: str, read: dict[str, torch.Tensor] = read) -> None:
            read[name] = inputs[0].flatten(0, 1)

        hooks = [each.register_forward_pre_hook(partial(note, name=name)) for name, each in linears.items()]
        with torch.no_grad():
            model(ids)
        for hook in hooks:
            hook.remove()
        for name, each in linears.items():
            gram = read[name].T @ read[name] / len(read[name])
            each.weight.data = gptq(each.weight.data, gram, INT4).dequantized(each.in_features)
            yield f"model.layers.{layer}.{name}.weight", each.weight.data


def test_a_walk_that_was_cut_off_continues_with_the_same_numbers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = round_blocks(open_decoder(checkpoint), INT4, RoundingData(calibration(), journal=Journal()))
    journal = Journal(tmp_path)
    rounds, count = rounding_by_data._round_block, 0

    def killed(*arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return rounds(*arguments)

    monkeypatch.setattr(rounding_by_data, "_round_block", killed)
    with pytest.raises(KeyboardInterrupt):
        round_blocks(open_decoder(checkpoint), INT4, RoundingData(calibration(), journal=journal))
    continued = round_blocks(open_decoder(checkpoint), INT4, RoundingData(calibration(), journal=journal))
    assert count == 1 + len(load_pruned(checkpoint).model.layers)
    for name, read in whole.items():
        assert torch.equal(read().data, continued[name]().data)
        assert torch.equal(read().scales, continued[name]().scales)


@pytest.mark.parametrize("other", [{"block_size": 32}, {"is_symmetric": True}, {"table_bits": 4}])
def test_a_journal_keeps_what_is_rounded_otherwise_apart(other: dict[str, Any], checkpoint: Path) -> None:
    journal, precision = Journal(), replace(INT4, **other)
    round_blocks(open_decoder(checkpoint), INT4, RoundingData(calibration(), journal=journal))
    again = round_blocks(open_decoder(checkpoint), precision, RoundingData(calibration(), journal=journal))
    afresh = round_blocks(open_decoder(checkpoint), precision, RoundingData(calibration(), journal=Journal()))
    for name, read in afresh.items():
        assert torch.equal(read().data, again[name]().data)
        assert torch.equal(read().scales, again[name]().scales)


@pytest.mark.parametrize(
    ("name", "table_bits"),
    [("llama", 8), ("phi3", 8), ("gemma3_text", 8), ("qwen3", 8), ("llama", 4), ("gemma3_text", 4)],
)
def test_the_graph_multiplies_by_what_the_walk_has_rounded(name: str, table_bits: int, tmp_path: Path) -> None:
    folder, precision = tmp_path / "model", replace(INT4, table_bits=table_bits)
    pruned(folder, name, head_dim=16)
    data = RoundingData(calibration())
    export(folder, tmp_path / "bundle", precisions=(precision,), rounding=data)  # the gate has the same in torch
    assert validate(open_bundle(tmp_path / "bundle", verify=True), threads=1).passed
    assert {path.name for path in tmp_path.iterdir()} == {"model", "bundle"}, "nothing is left of the walk"
    by_data, plain = load_pruned(folder), load_pruned(folder)
    weights, ready = Weights(folder), round_blocks(open_decoder(folder), precision, data)
    round_weights(by_data, RoundedWeights(weights, precision, ready))
    round_weights(plain, RoundedWeights(weights, precision))
    names = [name for name, each in by_data.named_parameters() if not torch.equal(each, plain.get_parameter(name))]
    assert set(names) <= set(ready)
    assert len(names) > 0.8 * len(ready)
    assert sum("layers" not in each for each in names) == (table_bits == 4)
    stored = {
        value.const_value.tobytes()
        for value in ir.load(tmp_path / "bundle/onnx/model_q4.onnx").graph.initializers.values()
        if value.const_value is not None
    }
    for each in names:
        if each.endswith(("o_proj.weight", "down_proj.weight")) or "layers" not in each:  # the others are packed
            assert ready[each]().data.numpy().tobytes() in stored
