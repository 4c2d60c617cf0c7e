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
from edgeprune.budget import Cut, Heads, Judge, Problem, cut_of, keep_list, refuse_argument, removed

NEEDS_JUDGE = True


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if there is an argument.
    """
    refuse_argument("judged", argument)


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list of the best rule."""
    judge = problem.judge
    assert judge is not None, "rules are compared by something that judges candidates"
    return keep_list(problem, nearest(problem, judge, slice(None))[0])


def rules(problem: Problem) -> dict[str, Cut]:
    """What each fixed rule makes of the problem, by its name: different cuts, as far as they reach the target."""
    ways: Sequence[Heads] = ("auto", "even") if problem.heads == "auto" else (problem.heads,)
    keeps = {}
    for heads in ways:
        of_way, suffix = replace(problem, heads=heads), f", heads {heads}"
        keeps[f"uniform:mixed{suffix}"] = uniform.allocate(of_way, "mixed")
        keeps[f"protect{suffix}"] = protect.allocate(of_way, None)
        if problem.influence:
            keeps[f"influence{suffix}"] = influence.allocate(of_way, None)
    if problem.heads != "even":
        keeps[f"knapsack, heads {problem.heads}"] = knapsack.allocate(problem, None)
    cuts: dict[str, Cut] = {}
    for name, keep in keeps.items():
        if (cut := cut_of(problem, keep)) not in cuts.values():
            cuts[name] = cut
    missed = {name: abs(problem.remove - removed(problem, cut)) for name, cut in cuts.items()}
    allowed = max(min(missed.values()), problem.align * max(map(problem.channel_cost, problem.layers)))
    return {name: cut for name, cut in cuts.items() if missed[name] <= allowed}


def nearest(problem: Problem, judge: Judge, part: slice) -> tuple[Cut, float]:
    """The rule's cut with the least divergence on a part of the sequences, and that divergence."""
    cuts = rules(problem)
    divergences = {}
    for number, (name, cut) in enumerate(cuts.items(), 1):
        judge.stage = f"rule {number} of {len(cuts)} ({name})"
        divergences[name] = judge.divergence(cut, part)
    best, *others = sorted(divergences, key=divergences.__getitem__)
    behind = "".join(f"; {name} {divergences[name]:.3f}" for name in others)
    problem.remark(f"widths of {best}: {divergences[best]:.3f} nats per token from the dense model{behind}")
    return cuts[best], divergences[best]
