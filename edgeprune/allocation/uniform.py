"""Uniform: every layer keeps the same numbers of heads and channels; which ones stay differs.

The result has a stock `config.json`. `uniform:mixed` lets channel counts differ by one step of `--align` to meet the
ratio more closely.
"""

from edgeprune.budget import Heads, Problem, cut_evenly, keep_list
from edgeprune_runtime.errors import EdgepruneError


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if the argument is not `mixed`.
    """
    if argument not in (None, "mixed"):
        raise EdgepruneError(f"unknown uniform allocation {argument!r}; expected uniform or uniform:mixed")


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list with equal widths in all layers (layers that came with different widths keep differing)."""
    layers = range(len(problem.layers))
    return keep_list(problem, cut_evenly(problem, layers, same_widths=argument is None))
