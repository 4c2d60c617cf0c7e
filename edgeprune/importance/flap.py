"""FLAP: how much a channel's activation fluctuates, weighted by the weights that read it.

"Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv 2312.11983): a channel that hardly
departs from its mean can leave, since a constant bias replaces it. With x_j the inputs of o_proj and down_proj:

    channel   Var(x_j) * ||W_:j||^2
    head      mean over its channels of (Var(x_j) * ||W_:j||^2)^2

The second square is the official code's, which spreads heads further apart before it compares them with channels.
Scores mean little across layers: FLAP standardises them (`--allocation flap`) and adds the bias (refit mode `bias`).

Where we differ: the variance is that of all calibration tokens (the official running variance counts nothing for the
first batch), and heads are averaged before the allocation standardises them, not after, because a score is one number
per unit. Keys and values have no reader of their own kind, so a KV head counts through its query heads.
"""

import torch

from edgeprune.groups import Group
from edgeprune.importance import Evidence, SlotEvidence, known, unit_sums

NEEDS = frozenset({"inputs"})


def scores(group: Group, evidence: Evidence, argument: str | None) -> torch.Tensor:
    """Weighted fluctuation of each unit: float32 `(units,)`; zero for KV heads."""

    def channel_scores(slot: SlotEvidence) -> torch.Tensor:
        if slot.slot.side == "out":
            return torch.zeros(slot.weight.shape[0])
        variance = (known(slot.input_sq_mean) - known(slot.input_mean).square()).clamp_min(0.0)
        fluctuation = variance * slot.weight.square().sum(1)
        return fluctuation if group.kind == "channels" else fluctuation.square() / slot.slot.size

    return unit_sums(group, evidence, channel_scores)
