"""Wanda: magnitude of a weight times the norm of the input that it multiplies; weights compete within an output's row.

"A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695), equation 1:
`S_ij = |W_ij| * ||x_j||_2`. What stays is not changed. We use the root mean square instead of the norm: the same order,
independent of the number of tokens.
"""

import torch

from edgeprune.groups import Side
from edgeprune.importance import known
from edgeprune.patterns import Pattern
from edgeprune.sparsity import Evidence

NEEDS = frozenset({"inputs"})


def prune(evidence: Evidence, pattern: Pattern, side: Side) -> torch.Tensor:
    """The weight `(D, K)` with zeros where `|W_ij| * rms(x_j)` is smallest."""
    scores = evidence.weight.abs() * known(evidence.input_sq_mean).sqrt()
    return evidence.weight * pattern.keep(scores, side)
