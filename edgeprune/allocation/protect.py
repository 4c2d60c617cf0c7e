"""Protect: the first and last blocks stay whole, the others give the same share.

LLM-Pruner's habit (arXiv 2305.11627): the first blocks make the features that all others read, the last ones feed the
output, and both are far more sensitive. `protect:F,L` sets how many; by default an eighth of the blocks at the front
and a sixteenth at the back (4 and 2 of 32), rounded up.
"""

import math

from edgeprune.budget import Problem, cut_evenly, keep_list
from edgeprune_runtime.errors import EdgepruneError


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list that leaves the protected layers alone.

    Raises:
        EdgepruneError: if the argument is not two counts, or too few layers are left to give what is asked.
    """
    layers = len(problem.layers)
    first, last = protected(layers, argument)
    cut = cut_evenly(problem, range(first, layers - last), same_widths=False)
    return keep_list(problem, cut)


def protected(layers: int, argument: str | None) -> tuple[int, int]:
    """Numbers of first and last blocks that stay whole."""
    if argument is None:
        return math.ceil(layers / 8), math.ceil(layers / 16)
    first, _, last = argument.partition(",")
    if not (first.isdigit() and last.isdigit()) or int(first) + int(last) >= layers:
        raise EdgepruneError(
            f"protect:{argument} does not leave a layer to cut; expected protect:FIRST,LAST with FIRST+LAST "
            f"below {layers}"
        )
    return int(first), int(last)
