"""Magnitude: the squared L2 norm of all weights that leave with a unit. Needs no data.

The baseline that every paper compares with; LLM-Pruner calls it "L2". Weak on language models, whose channels differ in
scale without differing in use.
"""

import torch

from edgeprune.groups import Group
from edgeprune.importance import Evidence, unit_sums

NEEDS: frozenset[str] = frozenset()


def scores(group: Group, evidence: Evidence, argument: str | None) -> torch.Tensor:
    """Sum of `w^2` over the unit's weights in every slot: float32 `(units,)`."""
    return unit_sums(group, evidence, lambda slot: slot.weight.square().sum(1))
