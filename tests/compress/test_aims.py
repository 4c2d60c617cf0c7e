"""What a reconstruction aims at: squared errors between blocks, and at the last block what the dense model says."""

import copy
import math
from typing import Any

import pytest
import torch
from observed import block_outputs
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from toys import NAMES, per_layer_lists, toy

from edgeprune import reconstruct, streaming
from edgeprune.aims import SquaredError
from edgeprune.calibration import Calibration
from edgeprune.pruning import Settings, apply_plan, make_plan
from edgeprune.reconstruct import altered
from edgeprune.refit import Outcome

FAMILIES = [name for name in NAMES if name != "opt-narrow"]
ASIDE = 4
"""Of 32 sequences so many are kept aside."""


def calibration() -> Calibration:
    return Calibration(torch.randint(3, 97, (32, 24), generator=torch.Generator().manual_seed(1)), "test", 0, "")


def reconstructed(model: Any, passes: int = 3, allocation: str = "protect:1,1") -> dict[str, Outcome]:
    settings = Settings(0.2, refit=f"reconstruct:{passes}", allocation=allocation, align=4, min_channels=8)
    plan, stats = make_plan(model, "toy", calibration(), settings)
    return apply_plan(model, plan, stats.moments, calibration())


def read_by(model: Any) -> torch.Tensor:
    return altered(calibration().ids, model.config.get_text_config().vocab_size)


@torch.no_grad()
def share_lost(dense: Any, cut: Any, ids: torch.Tensor) -> float:
    """Divergence of two models by their own logits, as a share of their cross-entropy."""
    expected, found = (log_softmax(model(ids).logits.flatten(0, 1), -1) for model in (dense, cut))
    divergence = kl_div(found, expected, reduction="sum", log_target=True)
    return float(divergence / cross_entropy(found, expected.exp(), reduction="sum"))


@pytest.mark.parametrize("name", FAMILIES)
def test_last_block_is_judged_by_what_the_whole_models_say(name: str) -> None:
    model = toy(name, num_hidden_layers=4, **per_layer_lists(name, 4))
    dense = copy.deepcopy(model)
    outcomes = reconstructed(model)
    *_, last = outcomes.values()
    assert last.error == pytest.approx(share_lost(dense, model, read_by(model)[-ASIDE:]), rel=1e-3)
    assert last.error in (last.held_out_error, last.held_out_error_before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_last_block_is_fitted_to_the_divergence_as_a_plain_loop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "STEP_TOKENS", 10_000)  # all tokens in every step, so that no order matters
    monkeypatch.setattr(reconstruct, "LAST_PASSES", 12)
    model = toy("llama", num_hidden_layers=4, intermediate_size=96)
    dense = copy.deepcopy(model)
    assert reconstructed(model, passes=12)["model.layers.3.mlp"].is_accepted

    ids = read_by(model)[:-ASIDE]
    mlp = copy.deepcopy(dense.model.layers[3].mlp)  # the last block is protected
    plain = copy.deepcopy(model)
    plain.model.layers[3].mlp = mlp
    with torch.no_grad():
        expected = log_softmax(dense(ids).logits, -1)
    weights = list(mlp.parameters())
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(
        [{"params": [w], "lr": reconstruct.LEARNING_RATE * float(w.detach().square().mean().sqrt())} for w in weights],
        betas=reconstruct.BETAS,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(12):
        share = min(1, (step + 1) / 1.2) * (1 + math.cos(math.pi * step / 12)) / 2
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        optimizer.zero_grad()
        kl_div(log_softmax(plain(ids).logits, -1), expected, reduction="batchmean", log_target=True).backward()
        optimizer.step()
    for weight, start, found in zip(weights, before, model.model.layers[3].mlp.parameters(), strict=True):
        # Adam turns rounding into steps where a gradient is next to nothing, so not weight by weight
        assert float((found - weight).detach().norm() / (weight - start).detach().norm()) < 1e-2


def test_tokens_compared_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [toy("llama", num_hidden_layers=4) for _ in "ab"]
    outcomes = [reconstructed(models[0])]
    monkeypatch.setattr(streaming, "LOGIT_BYTES", 2 * 7 * streaming.LOGIT_COPIES * 4 * models[0].config.vocab_size)
    outcomes.append(reconstructed(models[1]))
    assert outcomes[1]["model.layers.3.mlp"].error == pytest.approx(outcomes[0]["model.layers.3.mlp"].error, rel=1e-4)
    one, other = (torch.cat([w.flatten() for w in model.model.layers[3].mlp.parameters()]) for model in models)
    assert float((one - other).detach().norm() / one.detach().norm()) < 1e-4


def test_a_model_whose_last_block_is_cut_says_more_of_what_the_dense_one_says() -> None:
    model = toy("llama", num_hidden_layers=3, intermediate_size=96)
    last = reconstructed(model, allocation="uniform")["model.layers.2.mlp"]
    assert last.is_accepted
    assert last.held_out_error is not None
    assert last.held_out_error_before is not None
    assert last.held_out_error < last.held_out_error_before


def test_squared_error_is_that_of_the_targets_energy() -> None:
    given, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    expected = torch.tensor([[4.0, 25.0], [1.0, 25.0]])
    torch.testing.assert_close(SquaredError(2).lost(given, target), expected)


def test_blocks_before_the_last_go_on_as_they_did() -> None:
    """Their errors are shares of the energy of their targets."""
    model = toy("llama", num_hidden_layers=4, intermediate_size=96)
    dense = copy.deepcopy(model)
    outcomes = reconstructed(model)
    ids = read_by(model)
    found, wanted = (block_outputs(each, ids)[1] for each in (model, dense))
    read: list[torch.Tensor] = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    with torch.no_grad():
        model(ids)
    hook.remove()
    target = wanted - found + read[0]
    share = float((wanted - found).square().sum() / target.square().sum())
    assert outcomes["model.layers.1.mlp"].error == pytest.approx(share, rel=1e-3)
