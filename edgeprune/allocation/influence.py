"""Influence: blocks that turn the hidden state more give less.

ShortGPT (arXiv 2403.03853) measures a block's influence as 1 - mean cosine of its input and output; FANG spreads a
ratio p over the blocks within [0.5 p, 1.5 p] by it. Neither says how exactly the shares follow, so this is our rule:
the share of its parameters that a block gives is proportional to 1 / influence, clamped to that range, with the
proportion chosen so that all shares together remove what is asked. Inside a block, heads and channels compete as under
`uniform`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from edgeprune.budget import Cut, Heads, Problem, cut_evenly, keep_list, refuse_argument, relative_price, settle

LEAST, MOST = 0.5, 1.5
"""A block gives at least and at most so many times the mean share."""

HALVINGS = 100


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if there is an argument.
    """
    refuse_argument("influence", argument)


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list in which each block gives its own share, cut as evenly as `uniform` cuts all blocks."""
    problem = problem.bounded(range(len(problem.layers)))
    cut: Cut = {}
    for i, share in enumerate(shares(problem)):
        of_block = replace(problem, remove=round(share * problem.layers[i].parameters))
        cut |= cut_evenly(of_block, [i], same_widths=True)
    return keep_list(problem, settle(problem, cut, relative_price))


def shares(problem: Problem) -> Sequence[float]:
    """Share of its parameters that each block gives; together `problem.remove`, as far as the blocks can."""
    assert len(problem.influence) == len(problem.layers), "the statistics know the influence of every block"
    sizes = [layer.parameters for layer in problem.layers]
    most = [problem.removable_from(layer) / size for layer, size in zip(problem.layers, sizes, strict=True)]
    mean = problem.remove / sum(sizes)

    def spread(scale: float) -> list[float]:
        wanted = [scale * mean / max(influence, 1e-9) for influence in problem.influence]
        return [min(max(share, LEAST * mean), MOST * mean, top) for share, top in zip(wanted, most, strict=True)]

    def given(scale: float) -> float:
        return sum(share * size for share, size in zip(spread(scale), sizes, strict=True))

    return spread(_least(lambda scale: given(scale) >= problem.remove, 0.0, MOST * max(problem.influence)))


def _least(is_enough: Callable[[float], bool], low: float, high: float) -> float:
    """The least number between `low` and `high` that is enough, by halving; `high` if none is."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
