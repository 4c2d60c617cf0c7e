"""Uniform: every layer keeps the same numbers of heads and channels; which ones stay differs.

The result has a stock `config.json`. `uniform:mixed` lets channel counts differ by one step of `--align` to meet the
ratio more closely.
"""

from edgeprune.budget import Problem, cut_evenly, keep_list
from edgeprune_runtime.errors import EdgepruneError


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list with equal widths in all layers."""
    if argument not in (None, "mixed"):
        raise EdgepruneError(f"unknown uniform allocation {argument!r}; expected uniform or uniform:mixed")
    layers = range(len(problem.layers))
    return keep_list(problem, cut_evenly(problem, layers, same_widths=argument is None))
