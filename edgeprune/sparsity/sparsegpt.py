"""SparseGPT: columns go one after the other, and those behind a column make up for what it lost.

"SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv 2301.00774), algorithm 1. With H the
Gram matrix of the inputs and U the upper Cholesky factor of its inverse (U^T U = H^-1), row by row:

    score        S_ij = W_ij^2 / U_jj^2                      what setting W_ij to zero costs, given what is done before
    update       W_i,j: -= (W_ij - kept W_ij) / U_jj * U_j,j:   the optimal brain surgeon's, for all later columns

Masks are chosen for M columns at a time (with blocks), or for `COLUMNS` columns and all rows at once (without), from
the weights as they have become by then. H is damped by `DAMPING` of its mean diagonal. An input that was never seen to
differ from zero loses its weights.
"""

import torch

from edgeprune.groups import Side
from edgeprune.importance import known
from edgeprune.patterns import Pattern
from edgeprune.sparsity import Evidence
from edgeprune_runtime.errors import EdgepruneError

NEEDS = frozenset({"gram"})

COLUMNS = 128
"""Updates reach the columns of so wide a stretch at once, and those behind it in one product afterwards."""

DAMPING = 0.01
"""The paper's."""


def prune(evidence: Evidence, pattern: Pattern, side: Side) -> torch.Tensor:
    """The weight `(D, K)` with zeros, and with what stays changed to make up for them."""
    assert side == "in", "columns are blocks of inputs"
    upper, is_dead = inverse_factor(known(evidence.gram))
    weight = evidence.weight.masked_fill(is_dead, 0.0)
    for begin in range(0, weight.shape[1], COLUMNS):
        end = min(begin + COLUMNS, weight.shape[1])
        stretch, factor = weight[:, begin:end], upper[begin:end, begin:end]  # a view: what happens to it stays
        lost = torch.zeros_like(stretch)
        step = pattern.block_m or COLUMNS
        for first in range(0, end - begin, step):
            block = slice(first, min(first + step, end - begin))
            keep = pattern.keep_anywhere(stretch[:, block].square() / factor.diagonal()[block].square())
            for column, is_kept in enumerate(keep.T, first):
                value = stretch[:, column].clone()
                error = torch.where(is_kept, 0.0, value) / factor[column, column]
                stretch[:, column:] -= torch.outer(error, factor[column, column:])
                stretch[:, column] = torch.where(is_kept, value, 0.0)  # exactly
                lost[:, column] = error
        weight[:, end:] -= lost @ upper[begin:end, end:]
    return weight


def inverse_factor(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper Cholesky factor of the inverse of damped H `(K, K)` float32, and which inputs are dead `(K,)`."""
    system = gram.double()
    diagonal = system.diagonal()
    is_dead = diagonal == 0
    scale = float(diagonal.mean())
    diagonal[is_dead] = 1.0
    diagonal += DAMPING * scale
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed or not torch.isfinite(factor).all():
        raise EdgepruneError(
            f"the Gram matrix of {len(gram)} inputs is singular even with a ridge of {DAMPING:g}, or not finite; "
            "expected more calibration text, or calibrate in float32"
        )
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper.float(), is_dead
