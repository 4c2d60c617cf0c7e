"""Global: one threshold for the whole model. Whatever loses the least score per parameter goes first, wherever it is.

Needs scores that are comparable across layers (Taylor and fusion estimate a change of the loss, so they are). Heads and
channels compete. `global:SHARE` bounds what any one MLP may lose (default 0.75) and any one attention likewise; the
first and last blocks get no protection but their own scores.
"""

import heapq
from dataclasses import replace

from edgeprune.budget import AttentionChoice, Cut, Heads, Problem, channel_loss, keep_list, settle
from edgeprune_runtime.errors import EdgepruneError

LARGEST_SHARE = 0.75
"""A score is a local estimate: it says little about a layer that has lost nearly everything."""


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if the argument is not a share above 0 and at most 1, or heads shall give an even share.
    """
    if heads == "even":
        raise EdgepruneError("--heads even has no meaning under --allocation global; expected auto or keep")
    _share(argument)


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list by greedy removal of the step with the least lost score (of heads: times their price) per parameter."""
    largest = _share(argument)
    problem = replace(problem, largest_share=largest)
    cut: Cut = {i: (layer.attention_choices[0], layer.channels.units) for i, layer in enumerate(problem.layers)}
    heap: list[tuple[float, int, str]] = []
    for i in cut:
        _push(heap, problem, cut, i, largest)
    left = problem.remove
    while left > 0 and heap:
        price, i, part = heapq.heappop(heap)
        step = _next(problem, cut, i, part, largest)
        if step is None or step[0] != price:
            continue
        _, attention, channels, parameters = step
        if parameters <= left or part == "channels":
            cut[i] = (attention, channels)
            left -= parameters
            _push(heap, problem, cut, i, largest)
    return keep_list(problem, settle(problem, cut, evenly=False))


def _share(argument: str | None) -> float:
    if argument is None:
        return LARGEST_SHARE
    try:
        share = float(argument)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise EdgepruneError(
            f"global:{argument} is not a share; expected the largest part one layer may lose, above 0 to 1"
        )
    return share


def _push(heap: list[tuple[float, int, str]], problem: Problem, cut: Cut, i: int, largest: float) -> None:
    for part in ("attention", "channels"):
        step = _next(problem, cut, i, part, largest)
        if step is not None:
            heapq.heappush(heap, (step[0], i, part))


def _next(
    problem: Problem, cut: Cut, i: int, part: str, largest: float
) -> tuple[float, AttentionChoice, int, int] | None:
    """The next step of a layer's part: (lost score per parameter, attention choice, channels, parameters)."""
    layer, (attention, channels) = problem.layers[i], cut[i]
    if part == "channels":
        counts = problem.channel_counts(layer)
        to = counts.index(channels) + 1
        if to >= len(counts):
            return None
        parameters = (channels - counts[to]) * problem.channel_cost(layer)
        return channel_loss(layer, channels, counts[to]) / parameters, attention, counts[to], parameters
    better = [
        choice
        for choice in layer.attention_choices
        if attention.parameters < choice.parameters <= largest * layer.attention_parameters
    ]
    if not better:
        return None

    def price(choice: AttentionChoice) -> float:
        return max(choice.loss - attention.loss, 0.0) / (choice.parameters - attention.parameters)

    choice = min(better, key=price)
    return price(choice), choice, channels, choice.parameters - attention.parameters
