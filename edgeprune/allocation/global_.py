"""Global: one threshold for the whole model. Whatever loses the least score per parameter goes first, wherever it is.

Needs scores that are comparable across layers (Taylor and fusion estimate a change of the loss, so they are). Heads and
channels compete, heads at `HEAD_PRICE`. `global:SHARE` bounds what any one MLP may lose (default 0.75) and any one
attention likewise; the first and last blocks get no protection but their own scores.
"""

from dataclasses import replace

from edgeprune.budget import Heads, Problem, check_share, cut_cheapest, keep_list, score_price, share_argument


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if the argument is not a share above 0 and at most 1, or heads shall give an even share.
    """
    check_share("global", argument, heads)


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list by greedy removal of the step with the least lost score (of heads: times their price) per parameter."""
    problem = replace(problem, largest_share=share_argument("global", argument))
    return keep_list(problem, cut_cheapest(problem, score_price))
