"""Block reconstruction: its paths are those of the models, its fit is what a plain loop finds, and may be refused."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import groups_of
from observed import block_outputs
from toys import NAMES, per_layer_lists, toy
from trained import stories

from edgeprune import reconstruct
from edgeprune.calibration import Calibration
from edgeprune.journal import Journal
from edgeprune.plan import PrunePlan
from edgeprune.pruning import Settings, apply_plan, make_plan
from edgeprune.reconstruct import ALTERED_TOKENS, Paths, altered, mlp_names
from edgeprune.statistics import Stats, held_out
from edgeprune.streaming import Decoder
from edgeprune_runtime.errors import EdgepruneError

FAMILIES = [name for name in NAMES if name != "opt-narrow"]


def calibration(sequences: int = 32, length: int = 24) -> Calibration:
    ids = torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(1))
    return Calibration(ids, "test", 0, "")


def planned(model: Any, tokens: Calibration, **changes: Any) -> tuple[PrunePlan, Stats]:
    settings = Settings(0.2, refit="reconstruct", align=4, min_channels=8, **changes)
    return make_plan(model, "toy", tokens, settings)


def read_by(model: Any, tokens: Calibration) -> torch.Tensor:
    """The sequences that a reconstruction of the model reads."""
    return altered(tokens.ids, model.config.get_text_config().vocab_size)


class Remembering(Journal):
    """A journal that forgets nothing."""

    def forget(self, *names: str) -> None:
        pass


@pytest.mark.parametrize("name", FAMILIES)
def test_paths_are_the_hidden_states_of_the_dense_and_of_the_pruned_model(name: str) -> None:
    model, tokens = toy(name, num_hidden_layers=4, **per_layer_lists(name, 4)), calibration()
    plan, stats = planned(model, tokens, allocation="protect:1,1")
    ids = read_by(model, tokens)
    expected = block_outputs(model, ids)
    journal = Remembering()
    apply_plan(model, plan, stats.moments, tokens, journal=journal)
    shape = (*tokens.ids.shape, model.config.hidden_size)
    found = block_outputs(model, ids)
    for layer in range(4):
        dense = journal.rows(f"dense-{layer + 1}", shape, torch.float32)[0:32]
        torch.testing.assert_close(dense, expected[layer], rtol=1e-4, atol=1e-4)
        if layer > 0:
            pruned = journal.rows(f"pruned-{layer + 1}", shape, torch.float32)[0:32]
            torch.testing.assert_close(pruned, found[layer], rtol=1e-4, atol=1e-4)


def test_the_pruned_path_is_that_of_the_weights_as_they_are_stored() -> None:
    model, tokens = toy("llama", num_hidden_layers=4).bfloat16(), calibration()
    plan, stats = planned(model, tokens, allocation="protect:1,1")
    journal = Remembering()
    outcomes = apply_plan(model, plan, stats.moments, tokens, journal=journal)  # computed in float32
    assert any(outcome.is_accepted for name, outcome in outcomes.items() if name.endswith(".mlp"))
    found = block_outputs(model.float(), read_by(model, tokens))
    for layer in range(1, 4):
        pruned = journal.rows(f"pruned-{layer + 1}", (*tokens.ids.shape, 48), torch.float32)[0:32]
        torch.testing.assert_close(pruned, found[layer], rtol=1e-4, atol=1e-4)


def test_fit_is_that_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "STEP_TOKENS", 10_000)  # all tokens in every step, so that no order matters
    model, tokens = toy("llama", intermediate_size=96), calibration()
    plan, stats = planned(copy.deepcopy(model), tokens, allocation="protect:1,1")
    dense, closed = copy.deepcopy(model), copy.deepcopy(model)
    apply_plan(closed, replace(plan, refit="least-squares"), stats.moments)
    apply_plan(model, replace(plan, refit="reconstruct:12"), stats.moments, tokens)
    first = next(layer for layer in range(3) if closed.model.layers[layer].mlp.up_proj.out_features < 96)

    mlp = closed.model.layers[first].mlp
    read: list[torch.Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    of_closed = block_outputs(closed, read_by(closed, tokens)[:28])[first]
    hook.remove()
    with torch.no_grad():
        target = block_outputs(dense, read_by(dense, tokens)[:28])[first] - of_closed + mlp(read[0])
    energy = float(target.square().sum(-1).mean())
    weights = [weight.detach().clone().requires_grad_() for weight in mlp.parameters()]
    rates = [reconstruct.LEARNING_RATE * float(weight.detach().square().mean().sqrt()) for weight in weights]
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in "ab")
    for step in range(12):
        gate, up, down = weights
        x = read[0]
        given = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        loss = (given - target).square().sum(-1).mean() / energy
        share = min(1, (step + 1) / 1.2) * (1 + math.cos(math.pi * step / 12)) / 2
        for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
            means[i] = 0.9 * means[i] + 0.1 * gradient
            squares[i] = 0.99 * squares[i] + 0.01 * gradient**2
            mean, square = means[i] / (1 - 0.9 ** (step + 1)), squares[i] / (1 - 0.99 ** (step + 1))
            with torch.no_grad():
                weights[i] -= rates[i] * share * mean / (square.sqrt() + 1e-8)
    for weight, before, found in zip(
        weights, mlp.parameters(), model.model.layers[first].mlp.parameters(), strict=True
    ):
        torch.testing.assert_close(found - before, weight.detach() - before, rtol=0.02, atol=2e-5)


def test_fit_that_does_not_help_on_the_tokens_kept_aside_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "LEARNING_RATE", 50.0)
    model, tokens = toy("llama", intermediate_size=96), calibration()
    closed = copy.deepcopy(model)
    plan, stats = planned(model, tokens)
    outcomes = apply_plan(model, plan, stats.moments, tokens)
    apply_plan(closed, replace(plan, refit="least-squares"), stats.moments)
    mlps = [outcome for name, outcome in outcomes.items() if name.endswith(".mlp")]
    assert mlps
    assert not any(outcome.is_accepted for outcome in mlps)
    for found, expected in zip(model.parameters(), closed.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_blocks_before_the_first_cut_stay_as_they_are_and_those_behind_it_mend_what_was_lost() -> None:
    model, tokens = toy("llama", num_hidden_layers=5, intermediate_size=96), calibration()
    plan, stats = planned(model, tokens, allocation="protect:1,1")
    before = copy.deepcopy(model.model.layers)
    outcomes = apply_plan(model, plan, stats.moments, tokens)
    assert "model.layers.0.mlp" not in outcomes
    assert {f"model.layers.{layer}.mlp" for layer in range(1, 5)} <= outcomes.keys()
    for layer, parts in ((0, ("self_attn", "mlp")), (4, ("self_attn",))):
        for part in parts:
            found, expected = (getattr(blocks[layer], part) for blocks in (model.model.layers, before))
            assert all(torch.equal(*pair) for pair in zip(found.parameters(), expected.parameters(), strict=True))
    assert outcomes["model.layers.4.mlp"].is_accepted
    assert not torch.equal(model.model.layers[4].mlp.up_proj.weight, before[4].mlp.up_proj.weight)


def test_stored_half_precision_stays() -> None:
    tokens = calibration()
    for products in (torch.float32, torch.bfloat16):
        model = toy("llama", intermediate_size=96).to(torch.bfloat16)
        plan, stats = planned(model, tokens)
        apply_plan(model, plan, stats.moments, tokens, dtype=products)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert torch.isfinite(model(tokens.ids).logits).all()


def test_an_mlp_is_the_module_around_what_reads_channels_or_what_the_architecture_names() -> None:
    for name, expected in {
        "llama": ["mlp"],
        "gpt2": ["mlp"],
        "opt": ["fc1", "activation_fn", "fc2"],
        "gemma3_text": ["mlp", "post_feedforward_layernorm"],
    }.items():
        model = toy(name)
        assert list(mlp_names(model.config, [g for g in groups_of(model) if g.layer == 1])) == expected


def test_an_mlp_that_is_not_simply_added_is_refused_before_any_work() -> None:
    model = toy("opt", do_layer_norm_before=False)
    with pytest.raises(EdgepruneError, match=r"wants an MLP whose output is added .* opt .* --refit least-squares"):
        planned(model, calibration())


def test_too_few_sequences_to_judge_on_are_refused_before_any_work() -> None:
    settings = Settings(0.2, refit="reconstruct")
    settings.check_sequences(8)
    with pytest.raises(EdgepruneError, match="7 leave none; raise --calibration-sequences to 8 or more"):
        planned(toy("llama"), calibration(sequences=7))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_fit_keeps_the_zeros_of_matrices_where_it_is_asked_to(name: str, products: torch.dtype) -> None:
    tokens, journal = calibration(), Journal()
    for keeps_zeros in (True, False):
        model = toy(name)
        decoder, groups = Decoder.of(model), [group for group in groups_of(model) if group.layer == 0]
        paths = Paths(decoder, tokens.ids, products, journal, name=f"{keeps_zeros}", keeps_zeros=keeps_zeros)
        paths.advance_dense(0)
        block = decoder.blocks[0]
        mlp = block.get_submodule("mlp")
        for parameter in mlp.parameters():
            parameter.data[..., ::2] = 0.0  # biases as well, which have no pattern to keep
        before = copy.deepcopy(mlp)
        _, outcome = paths.fit(0, block, groups, is_first=True)
        assert outcome.is_accepted
        assert not any(parameter._backward_hooks for parameter in mlp.parameters())
        for found, start in zip(mlp.parameters(), before.parameters(), strict=True):
            assert not torch.equal(found, start)
            is_kept = keeps_zeros and found.ndim > 1
            assert bool((found[start == 0] == 0).all()) == is_kept
            assert bool((found[start != 0] != 0).all())


@pytest.mark.parametrize(
    ("sequences", "step_tokens"), [(1, 24), (7, 100), (8, 24), (16, 24 * 16), (17, 24 * 5), (40, 1)]
)
def test_steps_cover_all_sequences_and_part_those_kept_aside(sequences: int, step_tokens: int) -> None:
    tokens = calibration(sequences)
    paths = Paths(Decoder.of(toy("llama")), tokens.ids, torch.float32, Journal(), step_tokens=step_tokens)
    parts = list(paths.parts())
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(sequences))
    aside = [row for rows, is_held_out in parts if is_held_out for row in range(rows.start, rows.stop)]
    assert aside == list(range(sequences - len(held_out(tokens.ids)), sequences))
    assert all((rows.stop - rows.start) * 24 <= max(24, step_tokens) for rows, _ in parts)


def test_paths_of_two_names_share_a_journal(tmp_path: Path) -> None:
    decoder, journal = Decoder.of(toy("llama")), Journal(tmp_path)
    first, second = calibration(8), Calibration(calibration(8).ids.flip(0), "test", 0, "")
    cut, zeros = (
        Paths(decoder, tokens.ids, torch.float32, journal, name=name)
        for tokens, name in ((first, ""), (second, "sparse"))
    )
    cut.advance_dense(0)
    zeros.advance_dense(0)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}dense-{layer}.rows" for name in ("", "sparse-") for layer in (0, 1)
    }
    shape = (8, 24, 48)
    rows = [journal.rows(name, shape, torch.float32)[0:8] for name in ("dense-1", "sparse-dense-1")]
    torch.testing.assert_close(rows[0], rows[1].flip(0))
    zeros.forget(0)
    assert {path.name for path in tmp_path.iterdir()} == {"dense-0.rows", "dense-1.rows", "sparse-dense-1.rows"}


@pytest.mark.slow
def test_on_a_trained_model_it_wins_what_the_closed_form_leaves(stories260k: Path, data_folder: Path) -> None:
    model, fitting, judging = stories(stories260k, data_folder)
    text = Calibration(fitting, "stories", 0, "")
    settings = Settings(0.2, allocation="uniform", align=4, min_channels=16)
    plan, stats = make_plan(copy.deepcopy(model), "stories", text, settings)
    losses = {}
    for mode in ("least-squares", "reconstruct"):
        smaller = copy.deepcopy(model)
        apply_plan(smaller, replace(plan, refit=mode), stats.moments, text)
        with torch.no_grad():
            losses[mode] = float(smaller(judging, labels=judging).loss)
    assert losses["reconstruct"] < losses["least-squares"] - 0.02


def test_every_other_fitted_sequence_is_altered() -> None:
    ids = calibration(32, 400).ids
    found = altered(ids, 50_000)
    is_altered = found != ids
    assert not is_altered[1::2].any()
    assert not is_altered[28:].any()  # these judge
    shares = is_altered[:28:2].float().mean(1)
    assert (shares > 0).all()
    assert float(shares.mean()) == pytest.approx(ALTERED_TOKENS, abs=0.02)
    assert torch.equal(found, altered(ids, 50_000))
    assert (found >= 0).all()
    assert found[is_altered].max() > 40_000
