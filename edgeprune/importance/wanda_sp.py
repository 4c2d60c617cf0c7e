"""Wanda-sp: mean magnitude of the weights that read a channel, times the norm of the channel's activation.

The structured form of Wanda ("A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695)
that FLAP (arXiv 2312.11983) compares with: score of input j of o_proj or down_proj = mean_i |W_ij| * ||x_j||_2, and a
head is the sum over its channels. Keys and values have no reader of their own kind, so a KV head counts through its
query heads. We use the root mean square instead of the norm: the same order, independent of the number of tokens.
"""

import torch

from edgeprune.groups import Group
from edgeprune.importance import Evidence, SlotEvidence, known, unit_sums

NEEDS = frozenset({"inputs"})


def scores(group: Group, evidence: Evidence, argument: str | None) -> torch.Tensor:
    """`mean_i |W_ij| * rms(x_j)`, summed over the channels of a unit: float32 `(units,)`; zero for KV heads."""

    def channel_scores(slot: SlotEvidence) -> torch.Tensor:
        if slot.slot.side == "out":
            return torch.zeros(slot.weight.shape[0])
        return slot.weight.abs().mean(1) * known(slot.input_sq_mean).sqrt()

    return unit_sums(group, evidence, channel_scores)
