"""Coarse (vector-wise) Taylor: the first-order loss change if a whole channel goes, signs kept inside the channel.

LLM-Pruner (arXiv 2305.11627), "vectorize": `|sum_k w_k g_k|` for each channel of each Linear, with g = dL/dW of the
loss averaged over the calibration tokens; summed over the Linears of the group and over the channels of a head. It is
the coarse-grained estimate of arXiv 2403.10799. The sum inside is the gradient of a mask on the channel, so that
activations and their gradients are enough: `sum_k w_k g_k = sum over the tokens of z dL/dz`.
"""

import torch

from edgeprune.groups import Group
from edgeprune.importance import Evidence, known, unit_sums

NEEDS = frozenset({"effect"})


def scores(group: Group, evidence: Evidence, argument: str | None) -> torch.Tensor:
    """`|sum_k w_k g_k|` per channel, summed over a unit's channels: float32 `(units,)`."""
    return unit_sums(group, evidence, lambda slot: known(slot.effect).abs())
