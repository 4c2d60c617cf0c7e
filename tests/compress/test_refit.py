"""The closed-form refit against direct least squares."""

import pytest
import torch

from edgeprune.refit import output_error, refit
from edgeprune.statistics import Moments
from edgeprune_runtime.errors import EdgepruneError


def inputs(tokens: int = 400, width: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(tokens, width, generator=generator) @ mix + torch.randn(width, generator=generator)


def moments(x: torch.Tensor) -> Moments:
    return Moments(x.T @ x / len(x))


WEIGHT = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))
KEEP = torch.tensor([0, 2, 3, 5, 8, 11])


def test_refit_equals_least_squares_with_a_ridge_toward_the_weights() -> None:
    x, damping = inputs(), 0.05
    lam = damping * float((x**2).sum(1).mean()) / x.shape[1]
    kept, root = x[:, KEEP], (lam * len(x)) ** 0.5
    # stack the ridge as further rows: sqrt(lam n) I V^T = sqrt(lam n) I W_S^T
    left = torch.cat([kept, root * torch.eye(len(KEEP))]).double()
    right = torch.cat([x @ WEIGHT.T, root * WEIGHT[:, KEEP].T]).double()
    expected = torch.linalg.lstsq(left, right).solution.T.float()
    torch.testing.assert_close(refit(WEIGHT, moments(x), KEEP, damping), expected, rtol=1e-4, atol=1e-4)


def test_refit_misses_less_of_the_output_than_the_plain_cut() -> None:
    found = moments(inputs())
    fitted = refit(WEIGHT, found, KEEP)
    assert output_error(WEIGHT, found, KEEP, fitted) < 0.8 * output_error(WEIGHT, found, KEEP, WEIGHT[:, KEEP])


def test_output_error_is_the_lost_share_of_energy() -> None:
    x = inputs()
    fitted = refit(WEIGHT, moments(x), KEEP)
    full, cut = x @ WEIGHT.T, x[:, KEEP] @ fitted.T
    expected = float(((full - cut) ** 2).sum() / (full**2).sum())
    assert output_error(WEIGHT, moments(x), KEEP, fitted) == pytest.approx(expected, rel=1e-3)


def test_nothing_changes_when_everything_stays() -> None:
    everything = torch.arange(12)
    torch.testing.assert_close(refit(WEIGHT, moments(inputs()), everything), WEIGHT, rtol=1e-5, atol=1e-5)


def test_a_large_ridge_keeps_the_weights() -> None:
    torch.testing.assert_close(refit(WEIGHT, moments(inputs()), KEEP, 1e9), WEIGHT[:, KEEP], rtol=1e-4, atol=1e-4)


def test_a_singular_gram_matrix_does_no_harm() -> None:
    x = inputs(tokens=4)  # rank 4 of 12
    x[:, 2] = 0.0  # a dead input
    fitted = refit(WEIGHT, moments(x), KEEP)
    assert torch.isfinite(fitted).all()
    assert output_error(WEIGHT, moments(x), KEEP, fitted) < 1.0


def test_inputs_that_are_all_zero_leave_the_weights() -> None:
    torch.testing.assert_close(refit(WEIGHT, moments(torch.zeros(9, 12)), KEEP), WEIGHT[:, KEEP])


def test_inputs_that_are_not_finite_are_refused() -> None:
    x = inputs()
    x[0, 3] = float("nan")
    with pytest.raises(EdgepruneError, match="singular"):
        refit(WEIGHT, moments(x), KEEP)
