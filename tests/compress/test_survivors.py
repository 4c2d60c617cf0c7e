"""The refit of survivors against direct least squares, row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import moments

from edgeprune import survivors
from edgeprune.patterns import Pattern
from edgeprune.refit import DAMPING, RIDGES
from edgeprune.survivors import refit_survivors
from edgeprune_runtime.errors import EdgepruneError

ROWS, COLUMNS = 7, 12
WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
HALF = Pattern.parse("2:4")
SPARSE = WEIGHT * HALF.keep(WEIGHT.abs())


@pytest.fixture
def converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps as it takes."""
    monkeypatch.setattr(survivors, "STEPS", 400)
    monkeypatch.setattr(survivors, "TOLERANCE", 1e-7)


def inputs(tokens: int = 400, seed: int = 0, width: int = COLUMNS) -> torch.Tensor:
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) @ mix + mix[0]


def literal(weight: torch.Tensor, sparse: torch.Tensor, x: torch.Tensor, damping: float) -> torch.Tensor:
    """Each row by itself: only the columns that it has kept, and the ridge stacked as further rows.

    It pulls at each weight by the size of its input.
    """
    x, found = x.double(), sparse.double().clone()
    roots = (damping * (x**2).sum(0)).sqrt()
    for row, (full, start) in enumerate(zip(weight.double(), sparse.double(), strict=True)):
        keep = start.nonzero().squeeze(1)
        left = torch.cat([x[:, keep], torch.diag(roots[keep])])
        right = torch.cat([x @ full, roots[keep] * start[keep]])
        found[row, keep] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return found


def missed(x: torch.Tensor, weight: torch.Tensor, found: torch.Tensor) -> float:
    full = x.double() @ weight.double().T
    return float(((full - x.double() @ found.double().T) ** 2).sum() / (full**2).sum())


@pytest.mark.parametrize("text", ["2:4", "1:4", "0.5"])
@pytest.mark.usefixtures("converged")
def test_survivors_equal_direct_least_squares_of_each_row(text: str) -> None:
    x, pattern = inputs(), Pattern.parse(text)
    sparse = WEIGHT * pattern.keep(WEIGHT.abs())
    found, outcome = refit_survivors(WEIGHT, sparse, moments(x))
    expected = literal(WEIGHT, sparse, x, DAMPING)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    assert outcome.error == pytest.approx(missed(x, WEIGHT, expected), rel=1e-3)
    assert outcome.damping == DAMPING
    assert outcome.is_accepted
    assert outcome.held_out_error_before is outcome.held_out_error is None


@pytest.mark.parametrize("tokens", [8, 60, 400])
@pytest.mark.usefixtures("converged")
def test_ridge_is_the_one_that_misses_least_of_held_out_tokens(tokens: int) -> None:
    x, held_out = inputs(tokens, seed=1), inputs(40, seed=2)
    tried = {damping: missed(held_out, WEIGHT, literal(WEIGHT, SPARSE, x, damping)) for damping in RIDGES}
    best = min(tried, key=lambda damping: tried[damping])
    found, outcome = refit_survivors(WEIGHT, SPARSE, moments(x, held_out))
    assert outcome.held_out_error_before == pytest.approx(missed(held_out, WEIGHT, SPARSE), rel=1e-3)
    assert outcome.held_out_error == pytest.approx(tried[best], rel=1e-2)
    assert outcome.damping == best
    assert outcome.is_accepted == (tried[best] < missed(held_out, WEIGHT, SPARSE))
    everything = torch.cat([x, held_out])
    expected = literal(WEIGHT, SPARSE, everything, best) if outcome.is_accepted else SPARSE
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    assert outcome.error == pytest.approx(missed(everything, WEIGHT, found), rel=1e-3)


def test_few_steps_win_most_of_what_there_is_to_win() -> None:
    x = inputs()
    found, outcome = refit_survivors(WEIGHT, SPARSE, moments(x))
    best = missed(x, WEIGHT, literal(WEIGHT, SPARSE, x, DAMPING))
    before = missed(x, WEIGHT, SPARSE)
    assert outcome.error - best < 0.2 * (before - best)
    assert missed(x, WEIGHT, found) == pytest.approx(outcome.error, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.sampled_from(["2:4", "1:4", "3:8", "0.5"]), st.integers(1, 60), st.integers(0, 20))
def test_zeros_stay_and_nothing_is_taken_that_does_not_help_on_held_out_tokens(
    seed: int, text: str, tokens: int, aside: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 13, generator=generator)
    sparse = weight * Pattern.parse(text).keep(torch.rand(5, 13, generator=generator))
    x, held_out = inputs(tokens, seed, 13), inputs(aside, seed + 1, 13) if aside else None
    found, outcome = refit_survivors(weight, sparse, moments(x, held_out))
    assert torch.isfinite(found).all()
    assert not found[sparse == 0].any()
    if held_out is not None:
        assert outcome.is_accepted == (outcome.held_out_error < outcome.held_out_error_before)
    if not outcome.is_accepted:
        assert torch.equal(found, sparse)


def test_update_that_misses_more_of_held_out_tokens_is_not_taken() -> None:
    keep = torch.tensor([0, 3, 5, 6, 8, 11])
    sparse = torch.zeros_like(WEIGHT)
    sparse[:, keep] = WEIGHT[:, keep]
    held_out = torch.zeros(200, COLUMNS)
    held_out[:, keep] = inputs(200)[:, keep]  # nothing of what is zero is ever read, so the sparse weight is perfect
    found, outcome = refit_survivors(WEIGHT, sparse, moments(inputs(40), held_out))
    assert torch.equal(found, sparse)
    assert not outcome.is_accepted
    assert outcome.held_out_error > outcome.held_out_error_before == pytest.approx(0.0, abs=1e-6)
    assert outcome.error == pytest.approx(missed(torch.cat([inputs(40), held_out]), WEIGHT, sparse), rel=1e-3)


def test_large_ridge_keeps_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survivors, "DAMPING", 1e9)
    found, _ = refit_survivors(WEIGHT, SPARSE, moments(inputs()))
    torch.testing.assert_close(found, SPARSE, rtol=1e-4, atol=1e-4)


def test_rows_that_lost_nothing_and_rows_that_lost_all_stay_as_they_are() -> None:
    sparse = SPARSE.clone()
    sparse[1], sparse[4] = WEIGHT[1], 0.0
    for found_moments in (moments(inputs()), moments(inputs(), inputs(50, seed=1))):
        found, _ = refit_survivors(WEIGHT, sparse, found_moments)
        torch.testing.assert_close(found[1], WEIGHT[1])
        assert not found[4].any()
        assert not torch.equal(found[0], SPARSE[0])


def test_dense_weight_has_nothing_to_mend() -> None:
    found, outcome = refit_survivors(WEIGHT, WEIGHT, moments(inputs(), inputs(50, seed=1)))
    assert torch.equal(found, WEIGHT)
    assert not outcome.is_accepted
    assert outcome.error == pytest.approx(0.0, abs=1e-30)


@pytest.mark.parametrize("tokens", [1, 4])
def test_singular_gram_matrix_does_no_harm(tokens: int) -> None:
    x = inputs(tokens)
    x[:, 2] = 0.0  # a dead input
    found, outcome = refit_survivors(WEIGHT, SPARSE, moments(x))
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 2], SPARSE[:, 2])
    assert outcome.error < missed(x, WEIGHT, SPARSE)


@pytest.mark.parametrize("share", [2, 3, 5, 7])
def test_inputs_that_are_zero_but_for_held_out_tokens_do_no_harm(share: int) -> None:
    x = inputs()
    aside = len(x) // share
    x[aside:, [2, 5]] = 0.0
    given = moments(x[aside:], x[:aside])
    fitting = given.fitting()
    assert not fitting.gram[[2, 5]].any()
    assert not fitting.gram[:, [2, 5]].any()
    assert not fitting.mean[[2, 5]].any()
    expected = moments(x[aside:])
    torch.testing.assert_close(fitting.gram, expected.gram)
    torch.testing.assert_close(fitting.mean, expected.mean)
    found, outcome = refit_survivors(WEIGHT, SPARSE, given)
    assert torch.isfinite(found).all()
    assert outcome.is_accepted


def test_inputs_that_are_all_zero_leave_the_weights() -> None:
    for nothing in (
        moments(torch.zeros(9, COLUMNS)),
        moments(torch.zeros(9, COLUMNS), torch.zeros(2, COLUMNS)),
        moments(inputs(9), torch.zeros(2, COLUMNS)),
    ):
        found, outcome = refit_survivors(WEIGHT, SPARSE, nothing)
        assert torch.isfinite(found).all()
        assert not found[SPARSE == 0].any()
        assert torch.isfinite(torch.tensor(outcome.error))
        if not nothing.gram.any():
            assert torch.equal(found, SPARSE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = inputs()
    x[0, 3] = value
    for found in (moments(x), moments(inputs(), x)):
        with pytest.raises(EdgepruneError, match=r"moments of 12 inputs are not finite; .* calibrate in float32"):
            refit_survivors(WEIGHT, SPARSE, found)


@pytest.mark.usefixtures("converged")
def test_wide_linear_is_judged_on_some_rows_and_refitted_in_all() -> None:
    rows = 2 * survivors.JUDGED_ROWS + 31
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(5))
    sparse = weight * HALF.keep(weight.abs())
    x, held_out = inputs(200, seed=1), inputs(300, seed=2)
    found, outcome = refit_survivors(weight, sparse, moments(x, held_out))
    assert outcome.held_out_error_before == pytest.approx(missed(held_out, weight, sparse), rel=0.1)
    everything = torch.cat([x, held_out])
    expected = literal(weight, sparse, everything, outcome.damping)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    assert outcome.error == pytest.approx(missed(everything, weight, found), rel=1e-3)
