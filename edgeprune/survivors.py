"""Refit of survivors: what stays of a sparse Linear makes up for its zeros, whichever method has chosen them.

For inputs X `(tokens, K)` of weight W `(D, K)`, H = X^T X / tokens, and a sparse weight S, the survivors become

    S* = argmin_V ||X W^T - X V^T||^2 / tokens + lam ||(V - S) diag(H)^1/2||^2      over V that is zero where S is

Every row has survivors of its own, so that one factor of H does not serve all: the rows are D systems with the same H
behind different masks, solved together by conjugate gradients (Hestenes and Stiefel 1952) with the diagonal as
preconditioner. A step is one product with H for all rows. SparseGPT's update (arXiv 2301.00774) solves the same
problem, but a column's survivors only make up for zeros that lie before them; from its weights the iteration sets out
like from any others.

As in `edgeprune.refit` the ridge pulls toward the weights that are there; it pulls at each by the size of its input, so
that a few inputs with outliers, which rule the mean of the diagonal, do not hold all the others fast. The calibration
tokens kept aside choose lam out of `RIDGES`, and the update is accepted only if it misses less of them than the sparse
weight does. A method that changes weights must not have seen them, or its own would look too good.
"""

import torch

from edgeprune.refit import DAMPING, RIDGES, Outcome
from edgeprune.statistics import Moments
from edgeprune_runtime.errors import EdgepruneError

STEPS = 40
"""Steps of conjugate gradients at most."""

TOLERANCE = 1e-2
"""The residual, as a share of what it was, at which they stop."""

JUDGED_ROWS = 128
"""Of a Linear with more outputs so many, evenly spread, choose the ridge."""


def refit_survivors(weight: torch.Tensor, sparse: torch.Tensor, moments: Moments) -> tuple[torch.Tensor, Outcome]:
    """The survivors of a sparse Linear, made to miss as little as possible of its full output.

    Args:
        weight: the full weight `(D, K)` float32.
        sparse: the weight with its zeros, `(D, K)` float32.
        moments: moments of its K inputs.

    Returns:
        `(D, K)` float32 with the same zeros, and how it went.

    Raises:
        EdgepruneError: if the moments are not finite.
    """
    if not torch.isfinite(moments.gram).all():
        raise EdgepruneError(
            f"the moments of {weight.shape[1]} inputs are not finite; expected finite calibration activations: "
            "check the model on this text, or calibrate in float32"
        )
    damping, is_accepted = DAMPING, True
    before: float | None = None
    after: float | None = None
    if moments.held_out_gram is not None:
        rows = torch.linspace(0, len(weight) - 1, min(len(weight), JUDGED_ROWS)).round().long()
        full, start, fitting = weight[rows], sparse[rows], moments.fitting().gram
        before = _share(full - start, full, moments.held_out_gram)
        trials = ((_solve(full, start, fitting, ridge), ridge) for ridge in RIDGES)
        missed = ((_share(full - found, full, moments.held_out_gram), ridge) for found, ridge in trials)
        after, damping = min(missed)
        is_accepted = after < before
    fitted = _solve(weight, sparse, moments.gram, damping) if is_accepted else sparse
    error = _share(weight - fitted, weight, moments.gram)
    return fitted, Outcome(damping, is_accepted, before, after, error)


def _solve(weight: torch.Tensor, sparse: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """V `(D, K)` with `V (H + R) = W H + S R`, R = lam diag(H), in all places where S, the sparse weight, is not 0."""
    mask = (sparse != 0).to(weight.dtype)
    ridge = (damping * gram.diagonal()).clamp_min(_TINY)
    scaling = 1 / (gram.diagonal() + ridge)
    update = torch.zeros_like(weight)
    residual = (weight - sparse) @ gram * mask
    goal = TOLERANCE * residual.norm()
    direction = residual * scaling
    descent = (residual * direction).sum(1, keepdim=True)
    for _ in range(STEPS):
        curved = (direction @ gram + ridge * direction) * mask
        step = descent / (direction * curved).sum(1, keepdim=True).clamp_min(_TINY)
        update += step * direction
        residual -= step * curved
        if residual.norm() <= goal:
            break
        scaled = residual * scaling
        descent, last = (residual * scaled).sum(1, keepdim=True), descent
        direction = scaled + descent / last.clamp_min(_TINY) * direction
    return sparse + update


_TINY = torch.finfo(torch.float32).tiny  # a row that has nothing to mend stays as it is


def _share(lost: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Share of the energy of a weight's outputs that is in those of what was lost of it; 0 where there is none."""
    missed, energy = (float(((part @ gram) * part).sum(dtype=torch.float64)) for part in (lost, weight))
    return max(missed, 0.0) / energy if energy > 0 else 0.0
