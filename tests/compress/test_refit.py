"""The closed-form refit against direct least squares."""

import pytest
import torch
from observed import moments
from toys import toy
from transformers.pytorch_utils import Conv1D

from edgeprune import refit as refitting
from edgeprune.groups import Group, Kind, Slot
from edgeprune.pruning import model_groups
from edgeprune.refit import (
    DAMPING,
    RIDGES,
    Mode,
    Outcome,
    carry_intercepts,
    check_intercepts,
    refit,
    refit_linear,
    refit_unjudged,
    shapes_with_intercepts,
)
from edgeprune.shrink import linear_shapes, shrink
from edgeprune_runtime.errors import EdgepruneError

WEIGHT = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))
KEEP = torch.tensor([0, 2, 3, 5, 8, 11])
GONE = torch.tensor([1, 4, 6, 7, 9, 10])


def inputs(tokens: int = 400, width: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    return torch.randn(tokens, width, generator=generator) @ mix + mix[0]


def literal(x: torch.Tensor, damping: float, mode: Mode) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and intercept by direct least squares; the ridge is stacked as further rows."""
    x = x.double()
    weight = WEIGHT.double()
    mean = x.mean(0)
    if mode == "bias":
        return weight[:, KEEP], weight[:, GONE] @ mean[GONE]
    shifted = x - mean if mode == "intercept" else x
    lam = damping * float((x**2).sum(1).mean()) / x.shape[1]
    kept, root = shifted[:, KEEP], (lam * len(x)) ** 0.5
    left = torch.cat([kept, root * torch.eye(len(KEEP))])
    right = torch.cat([shifted @ weight.T, root * weight[:, KEEP].T])
    fitted = torch.linalg.lstsq(left, right).solution.T
    return fitted, (weight @ mean - fitted @ mean[KEEP]) * (mode == "intercept")


def lost_share(x: torch.Tensor, weight: torch.Tensor, intercept: torch.Tensor) -> float:
    x, full = x.double(), x.double() @ WEIGHT.double().T
    return float(((full - x[:, KEEP] @ weight.double().T - intercept) ** 2).sum() / (full**2).sum())


@pytest.mark.parametrize("mode", ["least-squares", "intercept", "bias"])
def test_refit_equals_direct_least_squares(mode: Mode) -> None:
    x = inputs()
    weight, intercept = literal(x, DAMPING, mode)
    found = refit(WEIGHT, moments(x), KEEP, mode)
    torch.testing.assert_close(found.weight, weight.float(), rtol=1e-4, atol=1e-4)
    if mode == "least-squares":
        assert found.intercept is None
        assert torch.equal(refit_unjudged(WEIGHT, moments(x), KEEP), found.weight)
    else:
        torch.testing.assert_close(found.intercept, intercept.float(), rtol=1e-3, atol=1e-3)
    assert found.outcome.error == pytest.approx(lost_share(x, weight, intercept), rel=1e-3)
    assert found.outcome.is_accepted
    assert found.outcome.held_out_error is None


@pytest.mark.parametrize("mode", ["least-squares", "intercept", "bias"])
@pytest.mark.parametrize("tokens", [14, 60, 400])
def test_the_ridge_is_the_one_that_misses_least_of_held_out_tokens(mode: Mode, tokens: int) -> None:
    x, held_out = inputs(tokens, seed=1), inputs(40, seed=2)
    tried = {damping: lost_share(held_out, *literal(x, damping, mode)) for damping in RIDGES}
    best = min(tried, key=lambda damping: tried[damping])
    plain = lost_share(held_out, WEIGHT[:, KEEP], torch.zeros(7))
    found = refit(WEIGHT, moments(x, held_out), KEEP, mode)
    assert found.outcome.held_out_error_before == pytest.approx(plain, rel=1e-3)
    assert found.outcome.held_out_error == pytest.approx(tried[best], rel=1e-2)
    assert found.outcome.is_accepted == (tried[best] < plain)
    assert found.outcome.damping == (None if mode == "bias" else best)
    weight, _ = literal(torch.cat([x, held_out]), best, mode)
    expected = weight.float() if found.outcome.is_accepted else WEIGHT[:, KEEP]
    torch.testing.assert_close(found.weight, expected, rtol=1e-3, atol=1e-3)


def test_little_text_wants_a_larger_ridge() -> None:
    held_out = inputs(40, seed=2)
    little, much = (refit(WEIGHT, moments(inputs(n, seed=1), held_out), KEEP).outcome for n in (7, 4000))
    assert little.damping > much.damping


@pytest.mark.parametrize("mode", ["least-squares", "intercept", "bias"])
def test_an_update_that_misses_more_of_held_out_tokens_is_not_taken(mode: Mode) -> None:
    x = inputs(40)
    held_out = torch.zeros(200, 12)
    held_out[:, KEEP] = inputs(200)[:, KEEP]  # nothing of what goes is ever there, so the plain cut is perfect
    found = refit(WEIGHT, moments(x, held_out), KEEP, mode)
    assert torch.equal(found.weight, WEIGHT[:, KEEP])
    assert found.intercept is None
    assert not found.outcome.is_accepted
    assert found.outcome.held_out_error > found.outcome.held_out_error_before == pytest.approx(0.0, abs=1e-6)


def test_without_a_refit_the_plain_cut_is_judged_all_the_same() -> None:
    x = inputs()
    found = refit(WEIGHT, moments(x), KEEP, "none")
    assert torch.equal(found.weight, WEIGHT[:, KEEP])
    assert found.outcome == Outcome(
        None, False, None, None, pytest.approx(lost_share(x, WEIGHT[:, KEEP], 0.0), rel=1e-3)
    )


def test_each_step_of_the_refit_misses_less() -> None:
    found = moments(inputs())
    none, bias, weights, both = (
        refit(WEIGHT, found, KEEP, mode).outcome.error for mode in ("none", "bias", "least-squares", "intercept")
    )
    assert both < weights < 0.8 * none
    assert both < bias < none


@pytest.mark.parametrize("mode", ["least-squares", "intercept", "bias"])
def test_nothing_changes_when_everything_stays(mode: Mode) -> None:
    found = refit(WEIGHT, moments(inputs(), inputs(seed=1)), torch.arange(12), mode)
    torch.testing.assert_close(found.weight, WEIGHT)
    assert found.outcome.error == 0.0


@pytest.mark.parametrize("mode", ["least-squares", "intercept"])
def test_a_large_ridge_keeps_the_weights(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitting, "DAMPING", 1e9)
    found = refit(WEIGHT, moments(inputs()), KEEP, mode)
    torch.testing.assert_close(found.weight, WEIGHT[:, KEEP], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["least-squares", "intercept"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_singular_gram_matrix_does_no_harm(mode: Mode, tokens: int) -> None:
    x = inputs(tokens)
    x[:, 2] = 0.0  # a dead input
    found = refit(WEIGHT, moments(x), KEEP, mode)
    assert torch.isfinite(found.weight).all()
    assert found.outcome.error < 1.0


@pytest.mark.parametrize("mode", ["none", "least-squares", "intercept", "bias"])
def test_inputs_that_are_all_zero_leave_the_weights(mode: Mode) -> None:
    for found in (moments(torch.zeros(9, 12)), moments(torch.zeros(9, 12), torch.zeros(2, 12))):
        torch.testing.assert_close(refit(WEIGHT, found, KEEP, mode).weight, WEIGHT[:, KEEP])
        assert refit(WEIGHT, found, KEEP, mode).outcome.error == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["least-squares", "bias"])
def test_inputs_that_are_not_finite_are_refused(value: float, mode: Mode) -> None:
    x = inputs()
    x[0, 3] = value
    for found in (moments(x), moments(inputs(), x)):
        with pytest.raises(EdgepruneError, match="not finite"):
            refit(WEIGHT, found, KEEP, mode)


def test_a_wide_linear_is_judged_along_fewer_directions() -> None:
    weight = torch.randn(2000, 12, generator=torch.Generator().manual_seed(5))
    x, held_out = inputs(200, seed=1), inputs(300, seed=2)
    found = refit(weight, moments(x, held_out), KEEP)
    full = held_out @ weight.T
    before = float(((full - held_out[:, KEEP] @ weight[:, KEEP].T) ** 2).sum() / (full**2).sum())
    assert found.outcome.held_out_error_before == pytest.approx(before, rel=0.1)
    assert found.weight.shape == (2000, 6)
    full, cut = (torch.cat([x, held_out]) @ w.T for w in (weight, torch.zeros_like(weight)))
    cut = torch.cat([x, held_out])[:, KEEP] @ found.weight.T
    assert found.outcome.error == pytest.approx(float(((full - cut) ** 2).sum() / (full**2).sum()), rel=0.1)


def test_a_linear_is_refitted_at_the_columns_of_its_units() -> None:
    group = Group("g", "heads", 0, 4, (Slot("o_proj", "in", 3),))
    linear, x = torch.nn.Linear(12, 7), inputs()
    linear.weight.data.copy_(WEIGHT)
    columns = torch.tensor([0, 1, 2, 9, 10, 11])
    before = linear.bias.detach().clone()
    outcome = refit_linear(linear, group, (0, 3), moments(x), "intercept")
    expected = refit(WEIGHT, moments(x), columns, "intercept")
    torch.testing.assert_close(linear.weight[:, columns], expected.weight)
    torch.testing.assert_close(linear.bias, before + expected.intercept)
    assert outcome == expected.outcome


def test_a_transposed_linear_is_refitted_as_any_other() -> None:
    group = Group("g", "heads", 0, 4, (Slot("c_proj", "in", 3),))
    linear, transposed, x = torch.nn.Linear(12, 7), Conv1D(7, 12), inputs()
    linear.weight.data.copy_(WEIGHT)
    transposed.weight.data.copy_(WEIGHT.T)
    transposed.bias.data.copy_(linear.bias.data)
    outcomes = [refit_linear(each, group, (0, 3), moments(x), "intercept") for each in (linear, transposed)]
    assert outcomes[0] == outcomes[1]
    torch.testing.assert_close(transposed.weight.T, linear.weight)
    torch.testing.assert_close(transposed.bias, linear.bias)


def test_one_switch_for_all_biases_gives_them_to_all() -> None:
    model, ids = toy("opt", enable_bias=False), torch.randint(3, 97, (2, 9))
    before = model(ids).logits
    groups = model_groups(model)
    shapes = shapes_with_intercepts("opt", linear_shapes(model, groups), groups, "bias", {"channels"})
    assert carry_intercepts(model, groups, "bias", {"channels"}) > 0
    assert linear_shapes(model, groups) == shapes
    assert type(model)(model.config).state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(model(ids).logits, before)


WITH_BIASES = ("llama-bias", "bloom", "gpt2", "gpt_neo", "gpt_neox", "opt")


@pytest.mark.parametrize("name", ["llama", "smollm3", "qwen3", "gemma3_text", *WITH_BIASES])
def test_a_model_with_intercepts_computes_the_same_and_its_config_builds_them(name: str) -> None:
    model, ids = toy(name), torch.randint(3, 97, (2, 9))
    groups = model_groups(model)
    before = model(ids).logits
    kinds = {"heads"} if name in ("qwen3", "gemma3_text") else {"heads", "channels"}
    parameters = sum(p.numel() for p in model.parameters())
    grown = carry_intercepts(model, groups, "intercept", kinds)
    torch.testing.assert_close(model(ids).logits, before)
    assert sum(p.numel() for p in model.parameters()) == parameters + grown
    assert (grown == 0) == (name in WITH_BIASES)
    rebuilt = type(model)(model.config)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()
    readers = [group.inner.module for group in groups if group.kind in kinds]
    assert all(linear_shapes(model, groups)[reader].has_bias for reader in readers)
    shrink(model, groups, {group.name: (0, 2) for group in groups if group.kind == "channels"})
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("kinds", [{"channels"}, {"heads", "channels"}])
def test_shapes_with_intercepts_are_those_of_the_model_that_carries_them(kinds: set[Kind]) -> None:
    model = toy("llama")
    groups = model_groups(model)
    before = linear_shapes(model, groups)
    expected = shapes_with_intercepts("llama", before, groups, "bias", kinds)
    assert shapes_with_intercepts("llama", before, groups, "least-squares", kinds) == before
    grown = carry_intercepts(model, groups, "bias", kinds)
    assert linear_shapes(model, groups) == expected
    assert sum(expected[name].parameters - before[name].parameters for name in before) == grown > 0


@pytest.mark.parametrize(
    ("model_type", "kind"), [("mistral", "channels"), ("qwen2", "heads"), ("qwen3", "channels"), ("phi3", "heads")]
)
def test_intercepts_are_refused_where_the_config_has_no_switch(model_type: str, kind: str) -> None:
    for mode in ("intercept", "bias"):
        with pytest.raises(EdgepruneError, match="no switch"):
            check_intercepts(model_type, mode, [kind])
    check_intercepts(model_type, "least-squares", [kind])


def test_refused_intercepts_leave_the_model_alone() -> None:
    model = toy("qwen3")
    with pytest.raises(EdgepruneError, match="down_proj"):
        carry_intercepts(model, model_groups(model), "bias", {"heads", "channels"})
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert not model.config.attention_bias


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("least-squares", ("least-squares", 0)),
        ("reconstruct", ("reconstruct", refitting.PASSES)),
        ("reconstruct:7", ("reconstruct", 7)),
    ],
)
def test_a_refit_names_its_mode_and_its_passes(text: str, expected: tuple[str, int]) -> None:
    assert refitting.parse_refit(text) == expected


@pytest.mark.parametrize(
    "text", ["best", "bias:2", "none:", "reconstruct:", "reconstruct:0", "reconstruct:1001", "reconstruct:²"]
)
def test_an_unknown_refit_is_refused(text: str) -> None:
    with pytest.raises(EdgepruneError, match=r"least-squares|reconstruct:5"):
        refitting.parse_refit(text)
