"""Protect: the first and last blocks stay whole, the others give the same share.

LLM-Pruner's habit (arXiv 2305.11627): the first blocks make the features that all others read, the last ones feed the
output, and both are far more sensitive. By default an eighth of the blocks at the front and a sixteenth at the back
(4 and 2 of 32) are protected, to the nearest whole number; of fewer than eight blocks none, since sparing one of five
costs the others more than it saves. At large ratios the others alone would be left with next to nothing: no MLP and no
attention loses more than 0.75, the protected blocks give the rest in equal shares, and only where that is not enough
does the bound rise for all. `protect:F,L` sets how many blocks stay whole, and they do, at any ratio.
"""

from dataclasses import replace

from edgeprune.budget import Heads, Problem, cut_evenly, keep_list, removed
from edgeprune_runtime.errors import EdgepruneError

FEWEST_LAYERS = 8
"""Fewer are not protected by default."""


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if the argument is not two counts.
    """
    if argument is not None:
        _counts(argument)


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list that leaves the protected layers alone, as far as the others can give.

    Raises:
        EdgepruneError: if no layer is left to give.
    """
    layers = len(problem.layers)
    first, last = _default(layers) if argument is None else _counts(argument)
    if first + last >= layers:
        raise EdgepruneError(
            f"protect:{first},{last} leaves none of the {layers} layers to cut; expected FIRST+LAST below {layers}"
        )
    inner = range(first, layers - last)
    outer = [i for i in range(layers) if i not in inner]
    problem = problem.bounded(inner if argument is not None else range(layers))
    most = sum(problem.removable_from(problem.layers[i]) for i in inner)
    cut = cut_evenly(replace(problem, remove=min(problem.remove, most)), inner, same_widths=False)
    if problem.remove > most and argument is None:
        rest = replace(problem, remove=problem.remove - removed(problem, cut))
        cut |= cut_evenly(rest, outer, same_widths=False)
    return keep_list(problem, cut)


def _default(layers: int) -> tuple[int, int]:
    """How many first and last blocks of so many stay whole if nobody says."""
    return (0, 0) if layers < FEWEST_LAYERS else (round(layers / 8), round(layers / 16))


def _counts(argument: str) -> tuple[int, int]:
    first, _, last = argument.partition(",")
    if not (first.isdecimal() and last.isdecimal()):
        raise EdgepruneError(f"protect:{argument} is not two counts; expected protect:FIRST,LAST such as protect:4,2")
    return int(first), int(last)
