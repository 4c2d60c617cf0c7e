"""ALPS: which weights stay, and what they are, found together, by alternating between fitting and choosing.

After "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (arXiv 2406.07831): the
alternating direction method of multipliers for `min ||X W^T - X D^T||^2` over matrices D that obey the pattern. With H
the Gram matrix of the inputs, V multipliers and rho a penalty:

    fit      A = (W H - V + rho D) (H + rho I)^-1            all weights, drawn toward the sparse ones
    choose   D = A + V / rho, of which the largest stay      the pattern
    pull     V = V + rho (A - D),   rho = GROWTH * rho

While rho is small choices change freely; as it grows, A and D become one. One eigendecomposition of H serves all rho.
Inputs are scaled to unit mean squares first, so that what is compared in the second step is Wanda's score at the start,
and no input with outliers rules the penalty. H is damped by `DAMPING` then.

Where we differ: the paper raises rho by how much the choice still changes, and ends with conjugate gradients on what
was chosen; here rho grows at one pace, and that last step is the refit that any method may have
(`edgeprune.survivors`).
"""

import torch

from edgeprune.groups import Side
from edgeprune.importance import known
from edgeprune.patterns import Pattern
from edgeprune.sparsity import Evidence
from edgeprune_runtime.errors import EdgepruneError

NEEDS = frozenset({"gram"})

REFIT = "none"
"""What stays is fitted already. A refit is judged on an eighth of the text, which choosing then misses: on SmolLM2, at
2:4, it costs 1.6 % of perplexity."""

STEPS = 36
PENALTY, GROWTH = 0.1, 1.2
"""rho at the first step, and its growth: twice the steps at half the pace lower a Linear's error by 1 % more, half of
them at twice the pace raise it by 2 %."""

DAMPING = 0.01
"""Of the unit diagonal."""


def prune(evidence: Evidence, pattern: Pattern, side: Side) -> torch.Tensor:
    """The weight `(D, K)` with zeros, and with what stays fitted to make up for them."""
    gram = known(evidence.gram)
    if not torch.isfinite(gram).all():
        raise EdgepruneError(
            f"the Gram matrix of {len(gram)} inputs is not finite; expected finite calibration activations: check the "
            "model on this text, or calibrate in float32"
        )
    root = gram.diagonal().sqrt()
    is_dead = root == 0  # nothing depends on the weights of such an input: they must not take the place of others
    scale = root.masked_fill(is_dead, 1.0)
    system = gram / scale / scale[:, None]
    system.diagonal().add_(DAMPING)
    values, vectors = (part.float() for part in torch.linalg.eigh(system.double()))
    dense = (evidence.weight * scale).masked_fill(is_dead, 0.0)
    goal = dense @ system
    sparse = dense * pattern.keep(dense.abs(), side)
    multipliers = torch.zeros_like(dense)
    rho = PENALTY
    for _ in range(STEPS):
        fitted = ((goal - multipliers + rho * sparse) @ vectors / (values + rho)) @ vectors.T
        sparse = fitted + multipliers / rho
        sparse = sparse * pattern.keep(sparse.abs(), side)
        multipliers += rho * (fitted - sparse)
        rho *= GROWTH
    return (sparse / scale).masked_fill(is_dead, 0.0)
