"""DaSS: in a gated MLP, what a weight of gate or up is worth depends on the channel that it helps to make.

"Dependency-Aware Semi-Structured Sparsity of GLU Variants in Large Language Models" (arXiv 2405.01943). With h the
channels of the MLP, which down_proj reads:

    down_proj             S_ij = |W_ij| * ||h_j||_2                  Wanda's score
    gate_proj, up_proj    S_ij = |W_ij| * ||h_i||_2 ^ alpha          alpha = 0.5; i is the output, what comes in is not
                                                                    looked at

One statistic serves all three. What stays is not changed. We use the root mean square instead of the norm: the same
order.

Layouts: within a row of gate or up the factor ||h_i|| is one constant, so weights have to compete along a column. The
paper's blocks are therefore M consecutive *channels* of one input (layout "paper"). Sparse tensor cores want blocks of
consecutive *inputs* instead, and along a row DaSS's score is nothing but the magnitude. In the layout "hardware" we
give gate and up Wanda's score, and the method is Wanda then. So it is where an MLP has no gate, as there is no
dependency to be aware of, and in attention, which the paper does not prune.
"""

import torch

from edgeprune.groups import Side
from edgeprune.importance import known
from edgeprune.patterns import Pattern
from edgeprune.sparsity import Evidence, wanda

NEEDS = frozenset({"inputs"})
SIDES: dict[str, Side] = {"paper": "out", "hardware": "in"}
ALPHA = 0.5
"""The exponent of the channel's norm in gate and up (the paper's choice)."""


def notes(layout: str, scope: str, *, has_gate: bool) -> tuple[str, ...]:
    """Where it is not what its name says."""
    found = []
    if not has_gate:
        found.append("dass: this MLP has no gate, both its Linears are pruned by Wanda's score")
    elif layout == "hardware":
        found.append(
            "dass, layout hardware: along a row its score of gate and up is the magnitude alone, so they are pruned by "
            "Wanda's; --sparsity-layout paper is the paper's, which sparse tensor cores cannot use"
        )
    if scope == "all":
        found.append("dass: attention, which its paper leaves dense, is pruned by Wanda's score")
    if has_gate and layout == "paper":
        found.append("layout paper: blocks of gate and up lie along their outputs; no known hardware uses them")
    return tuple(found)


def prune(evidence: Evidence, pattern: Pattern, side: Side) -> torch.Tensor:
    """The weight `(D, K)` with zeros where DaSS's score is smallest."""
    if side == "in":
        return wanda.prune(evidence, pattern, side)
    factors = known(evidence.channel_sq_mean).sqrt() ** ALPHA
    return evidence.weight * pattern.keep(evidence.weight.abs() * factors[:, None], side)
