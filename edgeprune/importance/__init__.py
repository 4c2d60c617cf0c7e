"""How much each unit matters.

One file per method; to add one, imitate `taylor_fine.py`:

1. `NEEDS` names the evidence the method reads: "inputs" (moments of the inputs of o_proj and down_proj), "gradient"
   (dL/dW of the calibration loss), "fisher" (mean over samples of the squared gradient; together with "gradient"),
   "effect" (of a mask on every channel) and "mask-fisher" (of one on every unit; both take gradients of activations
   alone, so the backward pass costs less), or nothing;
2. `sampled(argument)` (optional) names methods whose scores of single samples (parts of the calibration sequences) are
   wanted as well;
3. `scores(group, evidence, argument)` returns float32 `(units,)`, higher = keep. `argument` is what the user wrote
   after the colon in `--method name:argument`, or None; a method that takes one says which in `ARGUMENT` and refuses
   a wrong one in `check(argument)`, before any long work.

Evidence is oriented so that dimension 0 is always the *channel*: rows of an "out" slot, columns of an "in" slot. A
unit of a slot is `slot.size` consecutive channels (one head = head_dim channels).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from edgeprune.groups import Group, Slot


@dataclass(frozen=True)
class SlotEvidence:
    """What is known of the channels of one slot; `C = units * slot.size` channels, `K` weights in each.

    Attributes:
        slot: where the channels lie.
        weight: `(C, K)` float32.
        gradient: `(C, K)` float32, dL/dW of the loss averaged over all calibration tokens.
        fisher: `(C, K)` float32, mean over samples of the squared gradient of each sample's mean loss.
        effect: `(C,)` float32, `sum_k w_k dL/dw_k` over the channel's weights, signs kept: what a mask on the channel
            does to the loss in first order, which is `sum over the tokens of z dL/dz` of its activation z.
        input_sq_mean: `(C,)` float32, mean square of the channel's activation; "in" slots only, as the next two.
        input_mean: `(C,)` float32, mean of the channel's activation.
        gram: `(C, C)` float32, mean over the tokens of the products of two channels' activations.
    """

    slot: Slot
    weight: torch.Tensor
    gradient: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    effect: torch.Tensor | None = None
    input_sq_mean: torch.Tensor | None = None
    input_mean: torch.Tensor | None = None
    gram: torch.Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """What is known of one group.

    Attributes:
        slots: what is known of its channels, slot by slot.
        samples: for each method in `sampled`, the scores of every sample, `(S, units)`.
        dependants: of KV heads: the slots of the query heads that read them, KV head by KV head.
        mask_fisher: `(units,)` float64, mean over the calibration tokens of `(dL/dm)^2`, where m multiplies what the
            unit gives to the Linear that reads it at one token, and L is the sequence's loss in nats, summed over its
            tokens. For KV heads m multiplies all query heads that read them at once.
        dependants_mask_fisher: of KV heads: the same of each query head that reads them, KV head by KV head.
    """

    slots: tuple[SlotEvidence, ...]
    samples: Mapping[str, torch.Tensor] = field(default_factory=dict)
    dependants: tuple[SlotEvidence, ...] = ()
    mask_fisher: torch.Tensor | None = None
    dependants_mask_fisher: torch.Tensor | None = None

    @property
    def inner(self) -> SlotEvidence | None:
        """The slot of the Linear that reads the units, for KV heads through their query heads; None if unknown."""
        return next((slot for slot in (*self.slots, *self.dependants) if slot.slot.side == "in"), None)


def unit_sums(group: Group, evidence: Evidence, channel_scores: Callable[[SlotEvidence], torch.Tensor]) -> torch.Tensor:
    """Sum channel scores `(C,)` over the channels of each unit and over the slots of the group: float32 `(units,)`."""
    total = torch.zeros(group.units)
    for slot in evidence.slots:
        total += channel_scores(slot).reshape(group.units, slot.slot.size).sum(1)
    return total


def known(value: torch.Tensor | None) -> torch.Tensor:
    """Evidence that `NEEDS` promised."""
    assert value is not None, "a method reads evidence that its NEEDS does not name"
    return value
