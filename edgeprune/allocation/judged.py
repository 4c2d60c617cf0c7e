"""Judged: of the fixed rules, the one whose cut model comes nearest to the dense one.

No rule is best for every model. With 30 blocks, whole first and last blocks and whole heads are worth what they cost
the others; with five blocks they are not, and at 20 % equal shares of heads and channels win. So the cut of each rule
is refitted and judged whole: the KL divergence of its predictions from the dense model's, on calibration sequences that
are kept aside (`edgeprune.candidates`). The rules are `uniform:mixed`, `protect` and, where the blocks' influence is
known, `influence`, each with heads that compete by lost score and with heads that give the same share as channels; and
`knapsack`.
"""

from collections.abc import Sequence
from dataclasses import replace

from edgeprune.allocation import influence, knapsack, protect, uniform
from edgeprune.budget import Cut, Heads, Judge, Problem, cut_of, keep_list, removed
from edgeprune_runtime.errors import EdgepruneError

NEEDS_JUDGE = True


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if there is an argument.
    """
    if argument is not None:
        raise EdgepruneError(f"judged takes no argument; expected --allocation judged, got judged:{argument}")


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list of the best rule."""
    judge = problem.judge
    assert judge is not None, "rules are compared by something that judges candidates"
    cut, _ = nearest(judge, rules(problem), slice(None))
    return keep_list(problem, cut)


def rules(problem: Problem) -> list[Cut]:
    """What the fixed rules make of the problem, each different one once, as far as they reach the target."""
    ways: Sequence[Heads] = ("auto", "even") if problem.heads == "auto" else (problem.heads,)
    keeps = []
    for heads in ways:
        of_way = replace(problem, heads=heads)
        keeps += [uniform.allocate(of_way, "mixed"), protect.allocate(of_way, None)]
        if problem.influence:
            keeps.append(influence.allocate(of_way, None))
    if problem.heads != "even":
        keeps.append(knapsack.allocate(problem, None))
    cuts: list[Cut] = []
    for keep in keeps:
        if (cut := cut_of(problem, keep)) not in cuts:
            cuts.append(cut)
    missed = [abs(problem.remove - removed(problem, cut)) for cut in cuts]
    allowed = max(min(missed), problem.align * max(map(problem.channel_cost, problem.layers)))
    return [cut for cut, miss in zip(cuts, missed, strict=True) if miss <= allowed]


def nearest(judge: Judge, cuts: Sequence[Cut], part: slice) -> tuple[Cut, float]:
    """The cut with the least divergence on a part of the sequences, and that divergence."""
    found = []
    for number, cut in enumerate(cuts, 1):
        judge.stage = f"rule {number} of {len(cuts)}"
        found.append(judge.divergence(cut, part))
    best = min(found)
    return cuts[found.index(best)], best
