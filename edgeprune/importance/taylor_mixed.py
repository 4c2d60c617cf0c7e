"""Fine (element-wise) Taylor with the diagonal of the empirical Fisher information as its second-order term.

LLM-Pruner (arXiv 2305.11627), "param_mix" or Element-2: `sum_k |w_k g_k - 1/2 w_k^2 F_k|`, where F is the mean over the
calibration samples of the squared gradient of each sample's loss.
"""

import torch

from edgeprune.groups import Group
from edgeprune.importance import Evidence, SlotEvidence, known, unit_sums

NEEDS = frozenset({"gradient", "fisher"})


def scores(group: Group, evidence: Evidence, argument: str | None) -> torch.Tensor:
    """`sum_k |w_k g_k - 1/2 w_k^2 F_k|` per channel, summed over a unit's channels: float32 `(units,)`."""

    def channel_scores(slot: SlotEvidence) -> torch.Tensor:
        first = slot.weight * known(slot.gradient)
        second = 0.5 * slot.weight.square() * known(slot.fisher)
        return (first - second).abs().sum(1)

    return unit_sums(group, evidence, channel_scores)
