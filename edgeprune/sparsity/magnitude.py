"""Magnitude: the smallest weights become zero, whatever reads them; the baseline that every paper compares with.

In a pattern with blocks they compete within a block, without blocks within the whole matrix (as SparseGPT and Wanda
have their baseline).
"""

import torch

from edgeprune.groups import Side
from edgeprune.patterns import Pattern
from edgeprune.sparsity import Evidence

NEEDS: frozenset[str] = frozenset()


def prune(evidence: Evidence, pattern: Pattern, side: Side) -> torch.Tensor:
    """The weight `(D, K)` without its smallest entries."""
    return evidence.weight * pattern.keep_anywhere(evidence.weight.abs(), side)
