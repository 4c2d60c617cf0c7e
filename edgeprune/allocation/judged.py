"""Judged: of the fixed rules, the one whose cut model comes nearest to the dense one.

No rule is best for every model. With 30 blocks, whole first and last blocks and whole heads are worth what they cost
the others; with five blocks they are not, and at 20 % equal shares of heads and channels win. So the cut of each rule
is refitted and judged whole: the KL divergence of its predictions from the dense model's, on calibration sequences that
are kept aside (`edgeprune.candidates`). The rules are `uniform:mixed`, `protect` and, where the blocks' influence is
known, `influence`, each with heads that compete by lost score and with heads that give the same share as channels; and
`knapsack`.

Nor are any scores best for every model. `judged:obs` lets each rule choose by those of `obs` as well as by those of
`--method`, `judged:obs,flap` by three. They must be of methods that read no gradients: the moments that the judge fits
with tell them. A cut by other scores than the method's must be nearer by `MARGIN`: those of `obs` foresee the very
refit that is judged, and all see the moments of the sequences that judge, which a method's gradients may not reach.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgeprune import plugins
from edgeprune.allocation import influence, knapsack, protect, uniform
from edgeprune.budget import Cut, Heads, Judge, Problem, cut_of, keep_list, removed
from edgeprune_runtime.errors import EdgepruneError

NEEDS_JUDGE = True

MARGIN = 0.01
"""Share of the divergence; less is a tie on some thousand tokens. With stories260K `obs` is nearer by 2 to 19 %, and
wins in the end; with SmolLM2 by 0.3 %, and has 2 % more perplexity (and 2 points more of LAMBADA) in the end."""


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if the argument names something else than methods that read moments alone.
    """
    for name in methods(argument):
        needs = plugins.find("importance", name, "importance method").NEEDS
        if not needs <= {"inputs"}:
            raise EdgepruneError(
                f"judged:{argument} cannot compare the scores of {name}, which reads gradients; expected methods that "
                "read none, such as judged:obs"
            )


def methods(argument: str | None) -> list[str]:
    """Importance methods whose scores are compared with those of `--method`, each once."""
    return list(dict.fromkeys(argument.split(","))) if argument else []


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list of the best rule by the best scores."""
    judge = problem.judge
    assert judge is not None, "rules are compared by something that judges candidates"
    scored = {f", scores {name}": problem.scored(judge.scores(name)) for name in methods(argument)}
    best, cut, _ = nearest({"": problem, **scored}, judge, slice(None))
    return keep_list(best, cut)


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


def nearest(problems: Mapping[str, Problem], judge: Judge, part: slice) -> tuple[Problem, Cut, float]:
    """The rule's cut with the least divergence on a part of the sequences, its problem, and that divergence.

    Args:
        problems: the same one by different scores, those of the method first; a rule's name is followed by theirs.
        judge: judges the cuts.
        part: of the sequences.
    """
    candidates: dict[str, tuple[Problem, Cut]] = {}
    keeps: dict[str, dict[str, tuple[int, ...]]] = {}
    for scores, problem in problems.items():
        for rule, cut in rules(problem).items():
            keep, name = keep_list(problem, cut), f"{rule}{scores}"
            if keep not in keeps.values():
                candidates[name], keeps[name] = (problem, cut), keep
    divergences = {}
    for number, (name, keep) in enumerate(keeps.items(), 1):
        judge.stage = f"rule {number} of {len(keeps)} ({name})"
        divergences[name] = judge.divergence(keep, part)
    own = next(iter(problems.values()))

    def handicapped(name: str) -> float:
        return divergences[name] * (1.0 if candidates[name][0] is own else 1 / (1 - MARGIN))

    best, *others = sorted(divergences, key=handicapped)
    behind = "".join(f"; {name} {divergences[name]:.3f}" for name in others)
    problem, cut = candidates[best]
    problem.remark(f"widths of {best}: {divergences[best]:.3f} nats per token from the dense model{behind}")
    return problem, cut, divergences[best]
