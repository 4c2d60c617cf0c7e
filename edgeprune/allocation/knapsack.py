"""Knapsack: whatever loses the least *relative* output error per parameter goes first, wherever it is.

Every attention and every MLP of the model has a curve: how much of its output energy is lost when so many of its units
go. With the structured-OBS scores that is the error after the refit, for every count (the sum of the scores of what
leaves over the sum of all); with another method it is the share of its scores. The curves of all layers are walked down
together, the cheapest step first; where they are convex, that solves the knapsack up to its last step.

Relative errors are comparable between layers and between heads and channels even where scores are not, but what they do
to the model is not: the error of a block that hardly turns the hidden state is small beside that state. So they are
weighted by the block's influence (1 - mean cosine of its input and output). On SmolLM2-135M at 0.2 (structured OBS, no
head cut, 6 windows of WikiText-2 valid) the weight brings perplexity from 52.9 to 37.3.

`knapsack:SHARE` bounds what any one MLP or attention may lose (default 0.75; at 0.5 it is 35.8 there).
"""

from dataclasses import replace

from edgeprune.budget import (
    Heads,
    Layer,
    Problem,
    Widths,
    check_share,
    cut_cheapest,
    keep_list,
    relative_price,
    share_argument,
)


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if the argument is not a share above 0 and at most 1, or heads shall give an even share.
    """
    check_share("knapsack", argument, heads)


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list by greedy removal of the step with the least weighted relative error per parameter."""
    problem = replace(problem, largest_share=share_argument("knapsack", argument))
    influence = problem.influence or [1.0] * len(problem.layers)
    weights = {layer.channels.name: weight for layer, weight in zip(problem.layers, influence, strict=True)}

    def price(layer: Layer, at: Widths, to: Widths) -> float:
        return weights[layer.channels.name] * relative_price(layer, at, to)

    return keep_list(problem, cut_cheapest(problem, price))
