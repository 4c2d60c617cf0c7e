"""FLAP: standardise the scores in each layer and kind, then one threshold for the whole model.

"Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv 2312.11983), "AL-AM". The scores of the
heads of a layer, and those of its channels, are shifted and scaled to mean 0 and standard deviation 1. The units with
the lowest standard scores go, heads and channels alike, until the parameters have left: so a head counts for as many
channels as its parameters make (512/3 in the official code, the figure of a Llama-7B without grouped queries). It does
not matter how large a layer's scores are, only how they are spread.

Where we differ: query heads go with their KV heads or evenly out of each, and channels in steps of `--align`, at the
mean of what a step removes; no MLP or attention loses more than a share (`flap:SHARE`, default 0.75), where the
official code may remove all heads of a layer.
"""

from dataclasses import replace

import torch

from edgeprune.budget import (
    HEAD_PRICE,
    Heads,
    Layer,
    Problem,
    Widths,
    check_share,
    cut_cheapest,
    keep_list,
    share_argument,
)


def check(argument: str | None, heads: Heads) -> None:
    """Check what the user wrote, before any long work.

    Raises:
        EdgepruneError: if the argument is not a share above 0 and at most 1, or heads shall give an even share.
    """
    check_share("flap", argument, heads)


def allocate(problem: Problem, argument: str | None) -> dict[str, tuple[int, ...]]:
    """Keep list by greedy removal of the step with the lowest mean standard score of its units."""
    problem = replace(
        problem,
        layers=[replace(layer, scores=_standard(layer)) for layer in problem.layers],
        largest_share=share_argument("flap", argument),
    )
    return keep_list(problem, cut_cheapest(problem, price))


def price(layer: Layer, at: Widths, to: Widths) -> float:
    """Mean score of the query heads or channels that leave on a step."""
    if at[1] != to[1]:
        return (layer.lost_channels(to[1]) - layer.lost_channels(at[1])) / (at[1] - to[1])
    heads = len(at[0].keep_heads) - len(to[0].keep_heads)
    # a step to fewer KV heads may keep as many query heads; it counts as one unit then
    return (to[0].loss - at[0].loss) / HEAD_PRICE / max(heads, 1)


def _standard(layer: Layer) -> dict[str, torch.Tensor]:
    """Scores of a layer; heads (with their part of the KV head's own score) and channels each standardised."""
    kv_heads, heads, channels = (layer.scores[group.name] for group in (layer.kv_heads, layer.heads, layer.channels))
    share = len(heads) // len(kv_heads)
    return {
        layer.kv_heads.name: torch.zeros(len(kv_heads)),
        layer.heads.name: _standardised(heads + kv_heads.repeat_interleave(share) / share),
        layer.channels.name: _standardised(channels),
    }


def _standardised(scores: torch.Tensor) -> torch.Tensor:
    """In float64, as beside an outlier float32 would make many scores equal."""
    scores = scores.double()
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)
