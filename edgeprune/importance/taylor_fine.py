"""Fine (element-wise) Taylor, first order: the loss change of every single weight, signs dropped.

LLM-Pruner (arXiv 2305.11627), "param_first" or Element-1: `sum_k |w_k g_k|`, with g = dL/dW of the loss averaged over
the calibration tokens. It is the fine-grained estimate of arXiv 2403.10799.
"""

import torch

from edgeprune.groups import Group
from edgeprune.importance import Evidence, known, unit_sums

NEEDS = frozenset({"gradient"})


def scores(group: Group, evidence: Evidence, argument: str | None) -> torch.Tensor:
    """`sum_k |w_k g_k|` per channel, summed over a unit's channels: float32 `(units,)`."""
    return unit_sums(group, evidence, lambda slot: (slot.weight * known(slot.gradient)).abs().sum(1))
