"""The arithmetic of a cut: what the units of a layer cost in parameters, and which whole choices a layer has.

Attention of a layer has few choices, (KV heads, query heads per KV head) pairs; an MLP has many, channel counts in
steps of `align`. Every choice keeps the units with the highest scores, so a choice is named by its counts.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch

from edgeprune.groups import Group, Keep, heads_per_kv_head, kept
from edgeprune_runtime.errors import EdgepruneError

Heads = Literal["auto", "even", "keep"]

HEAD_PRICE = 3.0
"""A head's score counts so many times that of channels when the two compete.

Scores are local estimates, and a head is a large and hardly redundant thing to lose: at a price of 1, the same
parameters cost SmolLM2-135M a tenth more perplexity (WikiText-2 valid) than at 2 and above. Where losses are shares of
what an attention or an MLP has (`relative_error`), it cancels out.
"""

LARGEST_SHARES = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""No attention and no MLP loses a larger share than the first, or than the first that lets the ratio be reached.

A score is a local estimate: it says little about a layer that has lost nearly everything.
"""


Pair = tuple[int, int]
"""Counts of KV heads and of query heads per KV head."""


@dataclass(frozen=True)
class AttentionChoice:
    """One way to cut the attention of a layer: which heads stay, what leaves, and the lost score times `HEAD_PRICE`."""

    kv_heads: int
    heads_each: int
    parameters: int
    loss: float
    keep_kv_heads: tuple[int, ...]
    keep_heads: tuple[int, ...]

    @property
    def counts(self) -> Pair:
        """KV heads, and query heads per KV head."""
        return self.kv_heads, self.heads_each


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
    def parameters(self) -> int:
        """Parameters of all heads and channels."""
        return self.attention_parameters + self.channels.units * self.unit_parameters[self.channels.name]

    @cached_property
    def attention_score(self) -> float:
        """What the loss of all heads would be."""
        return HEAD_PRICE * float(self.scores[self.kv_heads.name].sum() + self.scores[self.heads.name].sum())

    @cached_property
    def attention_choices(self) -> list[AttentionChoice]:
        """All (KV heads, query heads per KV head) pairs, each with its best units; the uncut one is the first.

        Inside each KV head the best query heads stay; KV heads are then ranked by their own score plus that of the
        query heads they keep.
        """
        kv_scores, share = self.scores[self.kv_heads.name], heads_per_kv_head(self.heads, self.kv_heads)
        scores = self.scores[self.heads.name].reshape(self.kv_heads.units, share)
        kv_cost, head_cost = self.unit_parameters[self.kv_heads.name], self.unit_parameters[self.heads.name]
        choices = []
        for each in range(share, 0, -1):
            best = scores.topk(each, dim=1)
            value = kv_scores + best.values.sum(1)
            for count in range(self.kv_heads.units, 0, -1):
                kept = sorted(value.topk(count).indices.tolist())
                heads = sorted(kv * share + int(head) for kv in kept for head in best.indices[kv])
                parameters = (self.kv_heads.units - count) * kv_cost + (self.heads.units - count * each) * head_cost
                loss = self.attention_score - HEAD_PRICE * float(value[kept].sum())
                choices.append(AttentionChoice(count, each, parameters, loss, tuple(kept), tuple(heads)))
        return choices[:1] if self.keeps_heads else choices

    @cached_property
    def channel_order(self) -> torch.Tensor:
        """Channel indices from the least to the most important."""
        return self.scores[self.channels.name].argsort(stable=True)

    @cached_property
    def channel_losses(self) -> list[float]:
        """Score that is lost with the n least important channels, for n from 0 to all."""
        scores = self.scores[self.channels.name][self.channel_order].double()
        return [0.0, *scores.cumsum(0).tolist()]

    def lost_channels(self, channels: int) -> float:
        """Score that is lost where `channels` channels are kept."""
        return self.channel_losses[self.channels.units - channels]

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


def any_counts(kv_heads: int, heads: int) -> bool:
    """Every layer may keep any counts of heads, as a checkpoint can say those of each layer."""
    return True


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
        largest_share: no MLP loses a larger share of its channels than this, and no attention of its parameters.
        fits: whether layers may keep the counts of an attention choice (KV heads, query heads).
        tolerance: how far from `remove` a cut with equal widths may end where several come near, in parameters.
        influence: of each layer, how much it turns the hidden state (see `statistics.Stats`); empty if unknown.
        judge: judges whole cuts; only for allocations that say `NEEDS_JUDGE`.
        remark: told what the user should know of the choice, in one sentence.
    """

    layers: Sequence[Layer]
    remove: int
    align: int
    min_channels: int
    heads: Heads = "auto"
    largest_share: float = 1.0
    influence: Sequence[float] = ()
    judge: "Judge | None" = None
    fits: Callable[[int, int], bool] = any_counts
    tolerance: float = math.inf
    remark: Callable[[str], None] = lambda text: None

    def scored(self, scores: Mapping[str, torch.Tensor]) -> "Problem":
        """The same problem with other scores, by group."""
        return replace(self, layers=[replace(layer, scores=scores) for layer in self.layers])

    def channel_cost(self, layer: Layer) -> int:
        """Parameters of one channel."""
        return layer.unit_parameters[layer.channels.name]

    def channel_counts(self, layer: Layer) -> list[int]:
        """Channel counts the layer may keep, descending, the uncut one first."""
        units = layer.channels.units
        floor = min(max(self.min_channels, math.ceil((1 - self.largest_share) * units)), units)
        first = -(-floor // self.align) * self.align
        return [units, *reversed(range(first, units, self.align))]

    def attention_choices(self, layer: Layer) -> list[AttentionChoice]:
        """Attention choices that the layer may take, the uncut one first."""
        most = self.largest_share * layer.attention_parameters
        return [
            choice
            for choice in layer.attention_choices
            if choice.parameters <= most and self.fits(choice.kv_heads, choice.kv_heads * choice.heads_each)
        ]

    def removable_from(self, layer: Layer) -> int:
        """Most parameters that can leave a layer."""
        return max(choice.parameters for choice in self.attention_choices(layer)) + (
            layer.channels.units - self.channel_counts(layer)[-1]
        ) * self.channel_cost(layer)

    @property
    def removable(self) -> int:
        """Most parameters that can leave."""
        return sum(map(self.removable_from, self.layers))

    def bounded(self, chosen: Sequence[int]) -> "Problem":
        """The problem under the first of `LARGEST_SHARES` that lets the chosen layers give all."""
        trials = [replace(self, largest_share=share) for share in LARGEST_SHARES]
        enough = (trial for trial in trials if sum(trial.removable_from(self.layers[i]) for i in chosen) >= self.remove)
        return next(enough, trials[-1])


Widths = tuple[AttentionChoice, int]
"""What one layer keeps: an attention choice and a number of channels."""

Cut = dict[int, Widths]
"""Layer index -> what the layer keeps."""

Price = Callable[[Layer, Widths, Widths], float]
"""What a step of a layer costs, from widths to narrower ones of its attention or of its channels."""


@dataclass(frozen=True)
class Effect:
    """What one step would change the divergence by: both terms of its Taylor series, nats per token."""

    first: float
    second: float

    @property
    def total(self) -> float:
        """The prediction."""
        return self.first + self.second


class Judge(Protocol):
    """Judges what stays of a whole model, on calibration sequences (`candidates.Candidates`).

    Attributes:
        proposing: the part of the sequences to ask for effects on.
        accepting: the part on which candidates are compared.
        stage: what the next question is for, in words; a search says it for whoever watches.
    """

    proposing: slice
    accepting: slice
    stage: str

    def scores(self, method: str) -> Mapping[str, torch.Tensor]:
        """Scores `(units,)` of each group by an importance method that reads weights and moments of inputs alone."""
        ...

    def divergence(self, keep: Keep, part: slice) -> float:
        """KL(dense || cut model), mean over the tokens of a part, nats."""
        ...

    def effects(self, keep: Keep, options: Mapping[int, Sequence[Keep]], part: slice) -> Mapping[int, Sequence[Effect]]:
        """For each layer what each of its options would change that divergence by."""
        ...


def removed(problem: Problem, cut: Cut) -> int:
    """Parameters that leave with a cut."""
    return sum(
        attention.parameters + (problem.layers[i].channels.units - channels) * problem.channel_cost(problem.layers[i])
        for i, (attention, channels) in cut.items()
    )


def cut_of(problem: Problem, keep: Keep) -> Cut:
    """The cut whose keep list this is."""
    cut = {}
    for i, layer in enumerate(problem.layers):
        heads = tuple(kept(keep, layer.kv_heads)), tuple(kept(keep, layer.heads))
        choices = layer.attention_choices
        (choice,) = (choice for choice in choices if (choice.keep_kv_heads, choice.keep_heads) == heads)
        cut[i] = choice, len(kept(keep, layer.channels))
    return cut


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
    pairs = list(dict.fromkeys(choice.counts for layer in layers for choice in problem.attention_choices(layer)))
    if problem.heads == "even":
        pairs = [_nearest_pair(problem, layers, pairs)]
    candidates = [_even_candidate(problem, chosen, pair) for pair in pairs]
    steps = [problem.align * problem.channel_cost(layer) for layer in layers]
    if not same_widths:
        candidates = [settle(problem, cut) for cut in candidates]
    misses = [abs(problem.remove - removed(problem, cut)) for cut in candidates]
    reachable = max(min(misses), min(problem.tolerance, (sum(steps) if same_widths else max(steps)) / 2))
    return min(
        (cut for cut, miss in zip(candidates, misses, strict=True) if miss <= reachable),
        key=lambda cut: lost_score(problem, cut),
    )


def _nearest_pair(problem: Problem, layers: Sequence[Layer], pairs: Sequence[Pair]) -> Pair:
    """The counts that take nearly the same share of all attention as of all; of equal ones the cheaper."""
    share = problem.remove / sum(layer.parameters for layer in layers)

    def distance(pair: Pair) -> tuple[float, float]:
        choices = [(layer, _nearest_choice(problem, layer, pair)) for layer in layers]
        off = sum(abs(choice.parameters - share * layer.attention_parameters) for layer, choice in choices)
        return off, sum(choice.loss for _, choice in choices)

    return min(pairs, key=distance)


def _nearest_choice(problem: Problem, layer: Layer, pair: Pair) -> AttentionChoice:
    """The choice of these counts, or the nearest one of a layer that has other heads."""
    kv_heads, heads_each = pair
    return min(
        problem.attention_choices(layer),
        key=lambda choice: (abs(choice.kv_heads - kv_heads), abs(choice.heads_each - heads_each)),
    )


def _even_candidate(problem: Problem, chosen: Sequence[int], pair: Pair) -> Cut:
    """The chosen layers with these counts of heads, and the channel level that comes nearest to the target."""
    layers = [problem.layers[i] for i in chosen]
    choices = [_nearest_choice(problem, layer, pair) for layer in layers]
    counts = [problem.channel_counts(layer) for layer in layers]
    cuts = [
        {
            i: (choice, of_layer[min(level, len(of_layer) - 1)])
            for i, choice, of_layer in zip(chosen, choices, counts, strict=True)
        }
        for level in range(max(map(len, counts)))
    ]
    return min(cuts, key=lambda cut: abs(problem.remove - removed(problem, cut)))


def lost_score(problem: Problem, cut: Cut) -> float:
    """Score that a cut loses in all."""
    return sum(attention.loss + problem.layers[i].lost_channels(channels) for i, (attention, channels) in cut.items())


def cut_cheapest(problem: Problem, price: Price) -> Cut:
    """Cut greedily over the whole model, the cheapest step first, until `problem.remove` has left.

    A step narrows the attention of one layer to another choice, or its channels by one step of `align`. Of several
    attention choices that do not take more than is left to remove, the one with the least price is next, so that a
    layer walks down the lower convex hull of its choices.
    """
    cut: Cut = {i: (layer.attention_choices[0], layer.channels.units) for i, layer in enumerate(problem.layers)}
    left = problem.remove
    heap: list[tuple[float, int, str, Widths]] = []

    def push(i: int, part: str) -> None:
        layer, at = problem.layers[i], cut[i]
        steps = _attention_steps(problem, layer, at, left) if part == "attention" else _channel_step(problem, layer, at)
        if steps:
            cost, to = min(((price(layer, at, to), to) for to in steps), key=lambda step: step[0])
            heapq.heappush(heap, (cost, i, part, to))

    for i in cut:
        push(i, "attention")
        push(i, "channels")
    while left > 0 and heap:
        _, i, part, (attention, channels) = heapq.heappop(heap)
        # the other part of the layer may have moved on since this step was found
        to = (attention, cut[i][1]) if part == "attention" else (cut[i][0], channels)
        parameters = parameters_between(problem.layers[i], cut[i], to)
        if parameters <= left or part == "channels":
            cut[i] = to
            left -= parameters
        push(i, part)
    return settle(problem, cut, price)


def _attention_steps(problem: Problem, layer: Layer, at: Widths, most: int) -> list[Widths]:
    choices = problem.attention_choices(layer)
    return [(choice, at[1]) for choice in choices if 0 < choice.parameters - at[0].parameters <= most]


def _channel_step(problem: Problem, layer: Layer, at: Widths) -> list[Widths]:
    counts = problem.channel_counts(layer)
    to = counts.index(at[1]) + 1
    return [(at[0], counts[to])] if to < len(counts) else []


def parameters_between(layer: Layer, at: Widths, to: Widths) -> int:
    """Parameters that leave a layer on a step from widths to narrower ones."""
    return to[0].parameters - at[0].parameters + (at[1] - to[1]) * layer.unit_parameters[layer.channels.name]


def share_argument(allocation: str, argument: str | None) -> float:
    """The largest share that one layer may lose, as the user wrote it, else the first of `LARGEST_SHARES`.

    Raises:
        EdgepruneError: if it is not a share above 0 and at most 1.
    """
    if argument is None:
        return LARGEST_SHARES[0]
    try:
        share = float(argument)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise EdgepruneError(
            f"{allocation}:{argument} is not a share; expected the largest part one layer may lose, above 0 to 1"
        )
    return share


def check_share(allocation: str, argument: str | None, heads: Heads) -> None:
    """Check an allocation by price whose argument is the largest share that one layer may lose.

    Raises:
        EdgepruneError: if the argument is no such share, or heads shall give an even share.
    """
    refuse_even(allocation, heads)
    share_argument(allocation, argument)


def refuse_argument(allocation: str, argument: str | None) -> None:
    """Check that nothing follows the name of an allocation.

    Raises:
        EdgepruneError: if something does.
    """
    if argument is not None:
        raise EdgepruneError(
            f"{allocation} takes no argument; expected --allocation {allocation}, got {allocation}:{argument}"
        )


def refuse_even(allocation: str, heads: Heads) -> None:
    """Refuse `--heads even` where heads and channels compete by price.

    Raises:
        EdgepruneError: if heads shall give an even share.
    """
    if heads == "even":
        raise EdgepruneError(f"--heads even has no meaning under --allocation {allocation}; expected auto or keep")


def settle(problem: Problem, cut: Cut, price: Price | None = None) -> Cut:
    """Meet the target within half a step by moving single layers one channel step.

    The cheapest step goes first (or, to give back, the dearest); without a price the widest layer narrows first (the
    narrowest widens), so that widths stay within one step of each other, and lost scores decide between equals.
    """
    cut = dict(cut)
    counts = {i: problem.channel_counts(problem.layers[i]) for i in cut}
    while True:
        gap = problem.remove - removed(problem, cut)
        sign = 1 if gap > 0 else -1
        moves = []
        for i, (attention, channels) in cut.items():
            layer = problem.layers[i]
            at = counts[i].index(channels) + sign
            if not 0 <= at < len(counts[i]):
                continue
            to = counts[i][at]
            parameters = (channels - to) * problem.channel_cost(layer)
            if abs(gap - parameters) < abs(gap):
                wide, narrow = (attention, max(channels, to)), (attention, min(channels, to))
                rank = -sign * channels if price is None else 0
                moves.append((rank, sign * (price or score_price)(layer, wide, narrow), i, attention, to))
        if not moves:
            return cut
        _, _, i, attention, to = min(moves, key=lambda move: move[:3])
        cut[i] = (attention, to)


def score_price(layer: Layer, at: Widths, to: Widths) -> float:
    """Score (of heads: times `HEAD_PRICE`) lost per parameter on a step."""
    lost = to[0].loss - at[0].loss + layer.lost_channels(to[1]) - layer.lost_channels(at[1])
    return max(lost, 0.0) / parameters_between(layer, at, to)


def relative_price(layer: Layer, at: Widths, to: Widths) -> float:
    """Relative error per parameter on a step."""
    lost = relative_error(layer, to) - relative_error(layer, at)
    return max(lost, 0.0) / parameters_between(layer, at, to)


def relative_error(layer: Layer, widths: Widths) -> float:
    """Shares of its scores that the attention and the MLP lose, added up; a part that scores nothing loses nothing."""
    attention, channels = widths
    parts = (attention.loss, layer.attention_score), (layer.lost_channels(channels), layer.channel_losses[-1])
    return sum(lost / whole for lost, whole in parts if whole > 0)
