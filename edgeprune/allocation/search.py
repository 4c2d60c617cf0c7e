"""Search: start from the best fixed rule (`judged`), then move widths while the model's output gets nearer.

What is judged is the whole cut model: the KL divergence of its predictions from the dense model's, on calibration
sequences that are kept aside (`edgeprune.candidates`). A round

    1. asks for the effect of every small step: some channels more or less in each MLP, a KV head or a query head of
       each KV head more or less in each attention;
    2. takes the steps that together lower the divergence most while the same number of parameters leaves: at one price
       per parameter, the best step of each MLP and of each attention (the Lagrangian of that problem);
    3. judges the whole candidate on other sequences, and keeps it if it is better there; if not, it tries the better
       half of the steps, and so on. Where no part of them helps, the next round's steps are half as large.

Effects are predicted for single steps and the candidate is judged whole, so heads and channels, early and late layers
are traded by what they do to the output; heads count `HEAD_PRICE` times. `search:ROUNDS`
sets how many rounds (default 6), and `search:MINUTESmin` judges no further candidate after so many minutes: how far it
comes then depends on the machine, and on when it was interrupted.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgeprune.allocation.judged import nearest
from edgeprune.budget import (
    HEAD_PRICE,
    AttentionChoice,
    Cut,
    Effect,
    Heads,
    Judge,
    Layer,
    Problem,
    Widths,
    keep_list,
    parameters_between,
    refuse_even,
    settle,
)
from edgeprune_runtime.errors import EdgepruneError

NEEDS_JUDGE = True
HOLDS_MODELS = True

ROUNDS = 6
LARGEST_STEP = 12
"""A first step moves a twelfth of an MLP's channels: 128 of 1,536. Larger ones leave the range of the prediction."""

FRACTIONS = (1.0, 0.5, 0.25, 0.125)
"""Of the steps that a round found, the parts that are tried, until one of them helps."""

LEAST_GAIN = 1e-3
"""Share of the divergence that a candidate must win: less is noise of some thousand tokens."""


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if the argument is neither a number of rounds nor of minutes, or heads shall give an even share.
    """
    refuse_even("search", heads)
    budget(argument)


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list of the best candidate that was found."""
    judge = problem.judge
    assert judge is not None, "a search needs something that judges candidates"
    rounds, seconds = budget(argument)
    began = time.monotonic()
    starting = replace(problem, remark=lambda text: problem.remark(f"the search began with {text}"))
    _, cut, best = nearest({"": starting}, judge, judge.accepting)
    step = max(1, max(layer.channels.units for layer in problem.layers) // LARGEST_STEP // problem.align)
    for number in range(1, rounds + 1):
        if step == 0 or time.monotonic() - began > seconds:
            break
        # minutes set no number of rounds that anyone could see the end of
        round_name = f"round {number}" if seconds < math.inf else f"round {number} of {rounds}"
        judge.stage = f"{round_name}, steps"
        moves = _moves(problem, judge, cut, step, judge.proposing)
        for trial, fraction in enumerate(FRACTIONS, 1):
            if time.monotonic() - began > seconds:
                break
            candidate = _apply(problem, cut, moves, fraction)
            judge.stage = f"{round_name}, candidate {trial}"
            divergence = judge.divergence(keep_list(problem, candidate), judge.accepting)
            if divergence < best * (1 - LEAST_GAIN):
                cut, best = candidate, divergence
                break
        else:
            step //= 2
    return keep_list(problem, cut)


def budget(argument: str | None) -> tuple[int, float]:
    """Rounds and seconds.

    Raises:
        EdgepruneError: if the argument is neither a number of rounds nor of minutes.
    """
    text = argument or str(ROUNDS)
    if text.isdecimal() and int(text) > 0:
        return int(text), math.inf
    minutes = text.removesuffix("min")
    if minutes != text and minutes.isdecimal() and int(minutes) > 0:
        return 1000, 60.0 * int(minutes)
    raise EdgepruneError(
        f"search:{argument} is no budget; expected a number of rounds such as search:6, or minutes such as search:10min"
    )


@dataclass(frozen=True)
class _Step:
    """One step of an MLP or of an attention: where it leads, its effect, and the parameters that leave with it."""

    to: Widths
    effect: float
    parameters: int


@dataclass(frozen=True)
class _Moves:
    """All steps of a round.

    Attributes:
        steps: for each part, (layer, "attention") or (layer, "channels"), those that it may take.
        worth: by name of a layer's channels, the divergence that they cost per parameter.
    """

    steps: Mapping[tuple[int, str], Sequence[_Step]]
    worth: Mapping[str, float]

    def price(self, layer: Layer, at: Widths, to: Widths) -> float:
        """Divergence that a channel step costs, per parameter."""
        return self.worth[layer.channels.name]


def _moves(problem: Problem, judge: Judge, cut: Cut, step: int, part: slice) -> _Moves:
    """The steps of every layer, with their effects."""
    channels = {i: _channel_options(problem, i, cut[i], step) for i in cut}
    attention = {i: _attention_options(problem, i, cut[i]) for i in cut}
    options = {i: [problem.layers[i].keep(*to) for to in (*channels[i], *attention[i])] for i in cut}
    effects = judge.effects(keep_list(problem, cut), options, part)
    steps: dict[tuple[int, str], list[_Step]] = {}
    worth = {}
    for i, at in cut.items():
        layer = problem.layers[i]
        of_channels, of_attention = effects[i][: len(channels[i])], effects[i][len(channels[i]) :]
        steps[i, "channels"] = [
            _Step(to, effect.total, parameters_between(layer, at, to))
            for to, effect in zip(channels[i], of_channels, strict=True)
        ]
        steps[i, "attention"] = [
            _Step(to, _head_price(effect, parameters_between(layer, at, to)), parameters_between(layer, at, to))
            for to, effect in zip(attention[i], of_attention, strict=True)
        ]
        # the mean slope of narrowing and widening
        slopes = [step.effect / step.parameters for step in steps[i, "channels"]]
        worth[layer.channels.name] = max(sum(slopes) / len(slopes), 0.0) if slopes else 0.0
    return _Moves(steps, worth)


def _head_price(effect: Effect, parameters: int) -> float:
    """What a step of an attention counts: `HEAD_PRICE` times its effect, at least the second term if it narrows.

    What the first term promises for the loss of a head is a matter of the text: on SmolLM2-135M heads that C4 did not
    miss cost WikiText-2 more than all that was won with their parameters.
    """
    return HEAD_PRICE * (max(effect.total, effect.second) if parameters > 0 else effect.total)


def _channel_options(problem: Problem, i: int, at: Widths, step: int) -> list[Widths]:
    """A step narrower and a step wider, as far as there is room."""
    counts = problem.channel_counts(problem.layers[i])
    index = counts.index(at[1])
    reached = {min(index + step, len(counts) - 1), max(index - step, 0)} - {index}
    return [(at[0], counts[to]) for to in sorted(reached)]


def _attention_options(problem: Problem, i: int, at: Widths) -> list[Widths]:
    """One KV head, or one query head of every KV head, more or less."""
    if problem.heads != "auto":
        return []

    def is_next(choice: AttentionChoice) -> bool:
        return abs(choice.kv_heads - at[0].kv_heads) + abs(choice.heads_each - at[0].heads_each) == 1

    return [(choice, at[1]) for choice in problem.attention_choices(problem.layers[i]) if is_next(choice)]


def _apply(problem: Problem, cut: Cut, moves: _Moves, fraction: float) -> Cut:
    """The cut after the best part of the steps, with the same number of parameters gone."""
    chosen, price = _choose(moves.steps)
    gains = {part: price * step.parameters - step.effect for part, step in chosen.items()}
    best = sorted(gains, key=lambda part: -gains[part])[: max(2, round(fraction * len(gains)))]
    chosen, _ = _choose({part: moves.steps[part] for part in best})
    moved = dict(cut)
    for (i, part), step in chosen.items():
        attention, channels = moved[i]
        moved[i] = (step.to[0], channels) if part == "attention" else (attention, step.to[1])
    return settle(problem, moved, moves.price)


def _choose(steps: Mapping[tuple[int, str], Sequence[_Step]]) -> tuple[dict[tuple[int, str], _Step], float]:
    """The step of each part that is best at one price per parameter, at which about as much leaves as comes back."""

    def at_price(price: float) -> dict[tuple[int, str], _Step]:
        best = {
            part: min(of_part, key=lambda step: step.effect - price * step.parameters)
            for part, of_part in steps.items()
            if of_part
        }
        return {part: step for part, step in best.items() if step.effect < price * step.parameters}

    slopes = [abs(step.effect / step.parameters) for of_part in steps.values() for step in of_part]
    low, high = 0.0, 2 * max(slopes, default=0.0)
    for _ in range(50):
        price = (low + high) / 2
        if sum(step.parameters for step in at_price(price).values()) > 0:
            high = price
        else:
            low = price
    return at_price(low), low
