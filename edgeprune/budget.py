"""The arithmetic of a cut: what the units of a layer cost in parameters, and which whole choices a layer has.

Attention of a layer has few choices, (KV heads, query heads per KV head) pairs; an MLP has many, channel counts in
steps of `align`. Every choice keeps the units with the highest scores, so a choice is named by its counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from edgeprune.groups import Group, heads_per_kv_head

Heads = Literal["auto", "even", "keep"]

HEAD_PRICE = 3.0
"""A head's score counts so many times that of channels when the two compete.

Scores are local estimates, and a head is a large and hardly redundant thing to lose: at a price of 1, the same
parameters cost SmolLM2-135M a tenth more perplexity (WikiText-2 valid) than at 2 and above.
"""


@dataclass(frozen=True)
class AttentionChoice:
    """One way to cut the attention of a layer: which heads stay, what leaves, and the lost score times `HEAD_PRICE`."""

    kv_heads: int
    heads_each: int
    parameters: int
    loss: float
    keep_kv_heads: tuple[int, ...]
    keep_heads: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One decoder block's groups with their scores `(units,)` and the parameters one unit takes with it."""

    kv_heads: Group
    heads: Group
    channels: Group
    scores: Mapping[str, torch.Tensor]
    unit_parameters: Mapping[str, int]
    keeps_heads: bool = False

    @cached_property
    def attention_parameters(self) -> int:
        """Parameters of all heads."""
        return sum(group.units * self.unit_parameters[group.name] for group in (self.kv_heads, self.heads))

    @cached_property
    def attention_choices(self) -> list[AttentionChoice]:
        """All (KV heads, query heads per KV head) pairs, each with its best units; the uncut one is the first.

        Inside each KV head the best query heads stay; KV heads are then ranked by their own score plus that of the
        query heads they keep.
        """
        kv_scores, share = self.scores[self.kv_heads.name], heads_per_kv_head(self.heads, self.kv_heads)
        scores = self.scores[self.heads.name].reshape(self.kv_heads.units, share)
        total = float(kv_scores.sum() + scores.sum())
        kv_cost, head_cost = self.unit_parameters[self.kv_heads.name], self.unit_parameters[self.heads.name]
        choices = []
        for each in range(share, 0, -1):
            best = scores.topk(each, dim=1)
            value = kv_scores + best.values.sum(1)
            for count in range(self.kv_heads.units, 0, -1):
                kept = sorted(value.topk(count).indices.tolist())
                heads = sorted(kv * share + int(head) for kv in kept for head in best.indices[kv])
                parameters = (self.kv_heads.units - count) * kv_cost + (self.heads.units - count * each) * head_cost
                loss = HEAD_PRICE * (total - float(value[kept].sum()))
                choices.append(AttentionChoice(count, each, parameters, loss, tuple(kept), tuple(heads)))
        return choices[:1] if self.keeps_heads else choices

    @cached_property
    def channel_order(self) -> torch.Tensor:
        """Channel indices from the least to the most important."""
        return self.scores[self.channels.name].argsort(stable=True)

    def keep_channels(self, count: int) -> tuple[int, ...]:
        """Sorted indices of the `count` most important channels."""
        return tuple(sorted(self.channel_order[self.channels.units - count :].tolist()))

    def keep(self, attention: AttentionChoice, channels: int) -> dict[str, tuple[int, ...]]:
        """Keep list of this layer."""
        return {
            self.kv_heads.name: attention.keep_kv_heads,
            self.heads.name: attention.keep_heads,
            self.channels.name: self.keep_channels(channels),
        }


@dataclass(frozen=True)
class Problem:
    """What an allocation decides on.

    Attributes:
        layers: the decoder blocks in order.
        remove: parameters to remove in all.
        align: kept channel counts are multiples of it, except in layers that are not cut.
        min_channels: no MLP keeps fewer channels than this (or than it has).
        heads: how heads compete with channels: "auto" by lost score, "even" by the same share of both ("global" has
            no such share), "keep" not at all.
        largest_share: no MLP loses a larger share of its channels than this.
    """

    layers: Sequence[Layer]
    remove: int
    align: int
    min_channels: int
    heads: Heads = "auto"
    largest_share: float = 1.0

    def channel_cost(self, layer: Layer) -> int:
        """Parameters of one channel."""
        return layer.unit_parameters[layer.channels.name]

    def channel_counts(self, layer: Layer) -> list[int]:
        """Channel counts the layer may keep, descending, the uncut one first."""
        units = layer.channels.units
        floor = min(max(self.min_channels, math.ceil((1 - self.largest_share) * units)), units)
        first = -(-floor // self.align) * self.align
        aligned = list(range(first, units, self.align)) or ([] if first >= units else [first])
        return [units, *reversed(aligned)]

    @property
    def removable(self) -> int:
        """Most parameters that can leave."""
        return sum(
            max(choice.parameters for choice in layer.attention_choices)
            + (layer.channels.units - self.channel_counts(layer)[-1]) * self.channel_cost(layer)
            for layer in self.layers
        )


Cut = dict[int, tuple[AttentionChoice, int]]
"""Layer index -> (attention choice, channels kept)."""


def removed(problem: Problem, cut: Cut) -> int:
    """Parameters that leave with a cut."""
    return sum(
        attention.parameters + (problem.layers[i].channels.units - channels) * problem.channel_cost(problem.layers[i])
        for i, (attention, channels) in cut.items()
    )


def keep_list(problem: Problem, cut: Cut) -> dict[str, tuple[int, ...]]:
    """Keep list of the whole model; layers that the cut does not name stay whole."""
    keep: dict[str, tuple[int, ...]] = {}
    for i, (attention, channels) in cut.items():
        keep |= problem.layers[i].keep(attention, channels)
    return keep


def cut_evenly(problem: Problem, chosen: Sequence[int], *, same_widths: bool) -> Cut:
    """Cut the same numbers of heads and channels out of each chosen layer, so that `problem.remove` leaves in all.

    How the heads share the loss with the channels is `problem.heads`: "even" takes the attention choice nearest to the
    share of parameters that the layers must give, "auto" tries all and takes the one with the least lost score (of
    those that come as near to the target as steps of `align` allow). The channels make up the rest. With `same_widths`
    all chosen layers keep one channel count, else neighbouring counts are mixed to meet the target within one step.
    """
    layers = [problem.layers[i] for i in chosen]
    # choices of layers with the same heads stand in the same order, so that one index is one pair of counts
    pairs = range(min(len(layer.attention_choices) for layer in layers))
    if problem.heads == "even":
        whole = sum(layer.attention_parameters + layer.channels.units * problem.channel_cost(layer) for layer in layers)
        share = problem.remove / whole
        pairs = range(*_nearest_pair(layers, share, len(pairs)))
    candidates = [_even_candidate(problem, chosen, pair) for pair in pairs]
    misses = [abs(problem.remove - removed(problem, cut)) for cut in candidates]
    step = problem.align * sum(problem.channel_cost(layer) for layer in layers)
    reachable = max(min(misses), step / 2)
    cut = min(
        (cut for cut, miss in zip(candidates, misses, strict=True) if miss <= reachable),
        key=lambda cut: lost_score(problem, cut),
    )
    return cut if same_widths else settle(problem, cut, evenly=True)


def _nearest_pair(layers: Sequence[Layer], share: float, pairs: int) -> tuple[int, int]:
    """Index range of the one choice that removes nearly `share` of all attention; of equal ones the cheaper."""

    def distance(pair: int) -> tuple[float, float]:
        choices = [(layer, layer.attention_choices[pair]) for layer in layers]
        off = sum(abs(choice.parameters - share * layer.attention_parameters) for layer, choice in choices)
        return off, sum(choice.loss for _, choice in choices)

    best = min(range(pairs), key=distance)
    return best, best + 1


def _even_candidate(problem: Problem, chosen: Sequence[int], pair: int) -> Cut:
    """The chosen layers with one attention choice, and the channel level that comes nearest to the target."""
    layers = [problem.layers[i] for i in chosen]
    counts = [problem.channel_counts(layer) for layer in layers]
    cuts = [
        {
            i: (layer.attention_choices[pair], of_layer[min(level, len(of_layer) - 1)])
            for i, layer, of_layer in zip(chosen, layers, counts, strict=True)
        }
        for level in range(max(map(len, counts)))
    ]
    return min(cuts, key=lambda cut: abs(problem.remove - removed(problem, cut)))


def lost_score(problem: Problem, cut: Cut) -> float:
    """Score that a cut loses in all."""
    return sum(
        attention.loss + channel_loss(problem.layers[i], problem.layers[i].channels.units, channels)
        for i, (attention, channels) in cut.items()
    )


def settle(problem: Problem, cut: Cut, *, evenly: bool) -> Cut:
    """Meet the target within half a step by moving single layers one channel step.

    `evenly` moves the widest (or, to give back, the narrowest) layers first, so that widths stay within one step of
    each other; otherwise the step that loses the least score per parameter (or wins the most back) goes first.
    """
    cut = dict(cut)
    while True:
        gap = problem.remove - removed(problem, cut)
        moves = []
        for i, (attention, channels) in cut.items():
            layer = problem.layers[i]
            counts = problem.channel_counts(layer)
            at = counts.index(channels) + (1 if gap > 0 else -1)
            if not 0 <= at < len(counts):
                continue
            to = counts[at]
            parameters = (channels - to) * problem.channel_cost(layer)
            if abs(gap - parameters) < abs(gap):
                price = channel_loss(layer, channels, to) / parameters
                rank = -channels if gap > 0 else channels
                moves.append((rank if evenly else 0, price if gap > 0 else -price, i, attention, to))
        if not moves:
            return cut
        _, _, i, attention, to = min(moves, key=lambda move: move[:3])
        cut[i] = (attention, to)


def channel_loss(layer: Layer, channels: int, to: int) -> float:
    """Score that a layer loses when it goes from `channels` to `to` channels; negative where channels come back."""
    if to > channels:
        return -channel_loss(layer, to, channels)
    scores = layer.scores[layer.channels.name][layer.channel_order]
    units = layer.channels.units
    return float(scores[units - channels : units - to].sum())
