"""Fisher: how many nats per token it costs to silence a unit, from the Fisher information of a mask on its output.

"Faster gaze prediction with dense networks and Fisher pruning" (arXiv 1801.05787) removes what costs least to second
order, with the empirical Fisher information for the Hessian; "A Fast Post-Training Pruning Framework for Transformers"
(arXiv 2204.09656) does so with masks on heads and channels. With h_t what o_proj or down_proj reads at token t, and L
the next-token loss of the sequence in nats, summed over its tokens, a mask m_tu on unit u at token t has the gradient

    p_tu = dL/dm_tu = sum over the channels j of u of h_tj (dL/dh_t)_j

and the score is 1/2 mean_t p_tu^2, the mean over all tokens that have a next one. The mean of p_tu itself is near zero
on a trained model, so this is the first term that counts. Channels of a unit keep their signs inside p_tu, and heads
and channels of all layers share one scale: their scores add up and compare without being normalised.

Where we differ: both papers give a unit one mask for a whole sample, so they square sum_t p_tu of each sequence; we
square token by token, as if every token had a mask of its own. That leaves out what silencing a unit at one token does
to its worth at another, but it is a mean over some ten thousand tokens instead of a few dozen sequences, and so far
less noisy. It is the diagonal alone, as in Theis et al.: nothing is known of units that make up for one another.

A KV head leaves with all its query heads, whose joint mask has p_t = sum of their p_tu. As a cut pays for the query
heads as well, a KV head's own score is what this joint cost has above theirs. It is clamped at zero: where the effects
of its query heads cancel, a KV head costs what they cost one by one, since a cut may take only some of them.
"""

import torch

from edgeprune.groups import Group
from edgeprune.importance import Evidence, known

NEEDS = frozenset({"mask-fisher"})


def scores(group: Group, evidence: Evidence, argument: str | None) -> torch.Tensor:
    """`1/2 mean_t p_tu^2` in nats per token; of KV heads, by how much their query heads cost more jointly than singly.

    float32 `(units,)`, never negative.
    """
    costs = known(evidence.mask_fisher) / 2
    if group.kind == "kv_heads":
        costs = costs - known(evidence.dependants_mask_fisher).reshape(group.units, -1).sum(1) / 2
        costs = costs.clamp_min(0.0)
    return costs.float()
