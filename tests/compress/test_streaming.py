"""A decoder read block by block computes, scores and is cut exactly as one that is whole in memory."""

import copy
import json
import platform
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import groups_of, unit_sums
from safetensors.torch import load_file, save_file
from toys import KINDS, NAMES, toy

from edgeprune import weights
from edgeprune.calibration import Calibration
from edgeprune.checkpoint import load_pruned, open_decoder, save
from edgeprune.groups import layer_widths
from edgeprune.journal import Journal
from edgeprune.pruning import Settings, apply_plan, make_plan
from edgeprune.sources import count_parameters
from edgeprune.statistics import Method, Moments, gather
from edgeprune.streaming import Decoder
from edgeprune_runtime.errors import EdgepruneError

METHODS = ("taylor-fine", "taylor-mixed", "fusion", "wanda-sp", "obs", "fisher")


def some_ids(sequences: int = 16, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(7))


def stored(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = toy(name, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    return load_pruned(folder, dtype)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def blocks_in_memory(decoder: Decoder) -> int:
    return sum(not parameter.is_meta for block in decoder.blocks for parameter in list(block.parameters())[:1])


def assert_same_moments(found: Moments, expected: Moments) -> None:
    for name in ("gram", "mean", "held_out_gram", "held_out_mean"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.held_out_share == expected.held_out_share == 2 / 16


@pytest.mark.parametrize("name", NAMES)
def test_walk_over_files_equals_the_whole_model(name: str, tmp_path: Path) -> None:
    model, ids = stored(tmp_path, name), some_ids(2)
    decoder = open_decoder(tmp_path)
    hidden, calls = decoder.embed(ids)
    for layer in range(decoder.layers):
        with torch.no_grad(), decoder.block(layer) as block:
            assert blocks_in_memory(decoder) == 1
            hidden = decoder.run(layer, block, hidden, calls)
    assert blocks_in_memory(decoder) == 0
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(hidden), model(ids).logits, atol=1e-6, rtol=1e-6)
    assert count_parameters(decoder.model) == count_parameters(model)
    assert decoder.groups == groups_of(model)


@pytest.mark.parametrize("method", METHODS)
def test_streamed_statistics_equal_those_of_the_whole_model(method: str, tmp_path: Path) -> None:
    model, ids = stored(tmp_path / "model"), some_ids()
    (tmp_path / "work").mkdir()
    journal = Journal(tmp_path / "work")
    found = gather(open_decoder(tmp_path / "model"), groups_of(model), ids, Method.parse(method), journal=journal)
    expected = gather(model, groups_of(model), ids, Method.parse(method))
    for name, scores in expected.scores.items():
        torch.testing.assert_close(found.scores[name], scores, rtol=1e-5, atol=1e-9)
    assert found.moments.keys() == expected.moments.keys()
    for name, moments in expected.moments.items():
        assert_same_moments(found.moments[name], moments)
    assert found.loss == (None if expected.loss is None else pytest.approx(expected.loss, rel=1e-6))
    assert list(found.influence) == pytest.approx(list(expected.influence))


@pytest.mark.parametrize("name", ["qwen3", *KINDS])
def test_streamed_gradients_equal_one_shot_autograd(name: str, tmp_path: Path) -> None:
    model, ids = stored(tmp_path / "model", name), some_ids(11)  # steps of eleven, ten and one sequence
    model.requires_grad_(True)
    loss = model(ids, labels=ids).loss
    loss.backward()
    stats = gather(open_decoder(tmp_path / "model"), groups_of(model), ids, Method.parse("taylor-fine"))
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    for group in groups_of(model):
        total = unit_sums(model, group, lambda weight: (weight * weight.grad).detach().abs())
        torch.testing.assert_close(stats.scores[group.name], total, rtol=1e-5, atol=1e-7)


def test_logits_in_small_chunks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = toy("llama"), some_ids(3)
    expected = gather(model, groups_of(model), ids, Method.parse("taylor-fine"))
    monkeypatch.setattr("edgeprune.streaming.LOGIT_BYTES", 5 * 4 * 4 * 97)
    found = gather(model, groups_of(model), ids, Method.parse("taylor-fine"))
    assert found.loss == pytest.approx(expected.loss)
    for name, scores in expected.scores.items():
        torch.testing.assert_close(found.scores[name], scores, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("allocation", ["protect", "judged"])
def test_only_one_block_is_in_memory_at_a_time(
    allocation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path / "model", num_hidden_layers=6)
    decoder, most = open_decoder(tmp_path / "model"), 0
    run = Decoder.run
    copies: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def counted(self: Decoder, layer: int, block: torch.nn.Module, *arguments: Any) -> torch.Tensor:
        nonlocal most
        if self is decoder and block is not decoder.blocks[layer]:
            copies.add(block)
        most = max(most, blocks_in_memory(decoder) + len(copies))
        return run(self, layer, block, *arguments)

    monkeypatch.setattr(Decoder, "run", counted)
    calibration = Calibration(some_ids(), "test", 0, "")
    (tmp_path / "work").mkdir()
    journal = Journal(tmp_path / "work")
    settings = Settings(0.2, method="taylor-fine", allocation=allocation, align=1, min_channels=4)
    plan, stats = make_plan(decoder, "toy", calibration, settings, journal=journal)
    before = decoder.groups
    apply_plan(decoder, plan, stats.moments, journal=journal)
    save(decoder, None, plan, layer_widths(before, plan.keep), tmp_path / "out")
    assert most <= 1
    assert (len(copies), blocks_in_memory(decoder)) == (0, 0)
    assert count_parameters(load_pruned(tmp_path / "out")) == plan.parameters_after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to give freed memory back")
def test_memory_freed_between_tensors_that_stay_is_given_back_before_a_block_is_read(tmp_path: Path) -> None:
    stored(tmp_path)
    decoder = open_decoder(tmp_path)
    tensors = [torch.ones(25_000) for _ in range(600)]
    staying = tensors[::10]
    held = anonymous_bytes()
    del tensors
    with decoder.block(0):
        assert anonymous_bytes() < held - 30_000_000
    assert len(staying) == 60


@pytest.mark.parametrize("allocation", ["protect", "judged"])
@pytest.mark.parametrize("keeps_blocks", [False, True])
def test_streamed_cut_equals_the_cut_in_memory(keeps_blocks: bool, allocation: str, tmp_path: Path) -> None:
    model = stored(tmp_path / "model")
    decoder = open_decoder(tmp_path / "model", keeps_blocks=keeps_blocks)
    calibration = Calibration(some_ids(), "test", 0, "")
    settings = Settings(0.25, allocation=allocation, align=1, min_channels=4)
    (tmp_path / "work").mkdir()
    for cut, name, journal in ((model, "whole", Journal()), (decoder, "streamed", Journal(tmp_path / "work"))):
        plan, stats = make_plan(cut, "toy", calibration, settings, journal=journal)
        widths = layer_widths(Decoder.of(cut).groups, plan.keep)
        apply_plan(cut, plan, stats.moments, journal=journal)
        save(cut, None, plan, widths, tmp_path / name)
    assert (tmp_path / "whole/plan.json").read_bytes() == (tmp_path / "streamed/plan.json").read_bytes()
    whole, streamed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "streamed"))
    assert whole.keys() == streamed.keys()
    for name in whole:
        torch.testing.assert_close(streamed[name], whole[name])


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float16), *((name, torch.bfloat16) for name in (*KINDS, "gpt_neo"))]
)
def test_stored_dtype_is_kept_and_both_precisions_run(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored(tmp_path / "model", name, dtype=dtype)
    calibration, settings = Calibration(some_ids(), "test", 0, ""), Settings(0.2, align=1, min_channels=4)
    for products in (torch.float32, torch.bfloat16):
        decoder = open_decoder(tmp_path / "model")
        for method in ("taylor-fine", "wanda-sp"):
            ids = calibration.ids
            stats = gather(decoder, decoder.groups, ids, Method.parse(method), dtype=products)
            assert all(scores.dtype == torch.float32 for scores in stats.scores.values())
        plan, stats = make_plan(decoder, "toy", calibration, settings, dtype=products)
        widths = layer_widths(decoder.groups, plan.keep)
        apply_plan(decoder, plan, stats.moments)
        save(decoder, None, plan, widths, tmp_path / str(products))
        tensors = load_file(tmp_path / str(products) / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_block_in_another_dtype_is_a_copy(tmp_path: Path) -> None:
    stored(tmp_path, dtype=torch.bfloat16)
    for keeps_blocks in (False, True):
        decoder = open_decoder(tmp_path, keeps_blocks=keeps_blocks)
        with decoder.block(1, torch.float32) as block:
            assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
            assert block is not decoder.blocks[1]
        assert {parameter.dtype for parameter in decoder.blocks[1].parameters()} == {torch.bfloat16}
        assert blocks_in_memory(decoder) == keeps_blocks


def test_blocks_that_are_kept_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path)
    decoder = open_decoder(tmp_path, keeps_blocks=True)
    for layer in range(decoder.layers):
        with decoder.block(layer):
            pass
    monkeypatch.setattr(decoder, "read_tensor", lambda name: pytest.fail(f"{name} was read again"))
    for layer in range(decoder.layers):
        with decoder.block(layer) as block:
            assert not next(block.parameters()).is_meta


def test_nothing_is_read_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path)
    monkeypatch.setattr(weights, "read_tensor", lambda *_: pytest.fail("a tensor was read"))
    decoder = open_decoder(tmp_path)
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
    assert count_parameters(decoder.model) > 0


def rewrite(folder: Path, change: Any) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = change(load_file(file))
        save_file(tensors, file, {"format": "pt"})


def test_value_that_is_not_finite_is_named_when_its_block_is_read(tmp_path: Path) -> None:
    toy("llama").save_pretrained(tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
        return tensors

    rewrite(tmp_path, spoil)
    decoder = open_decoder(tmp_path)
    with decoder.block(0):
        pass
    with (
        pytest.raises(EdgepruneError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN or infinite"),
        decoder.block(1),
    ):
        pass


def test_names_of_a_bare_decoder_and_old_frequencies_are_understood(tmp_path: Path) -> None:
    model = toy("llama-mha")
    model.save_pretrained(tmp_path)

    def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        return renamed | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    rewrite(tmp_path, bare)
    ids = some_ids(2)
    with open_decoder(tmp_path, keeps_blocks=True).whole() as copy, torch.no_grad():
        assert torch.equal(copy(ids).logits, model(ids).logits)


def test_tensor_that_the_config_does_not_expect_is_refused(tmp_path: Path) -> None:
    toy("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.0.mlp.extra.weight": torch.ones(4)})
    with pytest.raises(EdgepruneError, match=r"does not expect: model\.layers\.0\.mlp\.extra\.weight"):
        open_decoder(tmp_path)


def test_integers_and_pickles_are_refused(tmp_path: Path) -> None:
    model = toy("llama")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {n: t.to(torch.int8) for n, t in tensors.items()})
    with pytest.raises(EdgepruneError, match="is stored as I8; expected floats"):
        open_decoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(EdgepruneError, match="holds torch pickles"):
        open_decoder(tmp_path)


def test_intercepts_survive_streaming(tmp_path: Path) -> None:
    stored(tmp_path / "model")
    decoder, calibration = open_decoder(tmp_path / "model"), Calibration(some_ids(), "test", 0, "")
    settings = Settings(0.2, align=1, min_channels=4, heads="keep")
    plan, stats = make_plan(decoder, "toy", calibration, settings)
    widths = layer_widths(decoder.groups, plan.keep)
    apply_plan(decoder, replace(plan, refit="intercept"), stats.moments)
    save(decoder, None, plan, widths, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["mlp_bias"] is True
    assert load_pruned(tmp_path / "out").model.layers[1].mlp.down_proj.bias is not None


@pytest.mark.parametrize("is_tied", [False, True])
def test_what_lies_behind_the_blocks_is_cast_without_an_embedding_of_its_own(is_tied: bool) -> None:
    model = toy("llama", tie_word_embeddings=is_tied).to(torch.bfloat16)
    decoder = Decoder.of(model)
    with decoder.outside(torch.float32, is_behind=True):
        assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.float32
        assert (model.model.embed_tokens.weight.dtype == torch.float32) == is_tied
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(decoder.embedding_alone) == (not is_tied)
    hidden = torch.randn(2, 3, model.config.hidden_size)
    wanted = copy.deepcopy(model).float()
    expected = wanted.lm_head(wanted.model.norm(hidden))
    torch.testing.assert_close(decoder.logits(hidden), expected)
