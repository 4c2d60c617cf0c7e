"""What the Linears of a block read on the calibration text, summed up in one pass of the block."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from edgeprune.reconstruct import Paths
from edgeprune.shrink import linear_of
from edgeprune.statistics import InputSums, Moments, moments_of, shown
from edgeprune.streaming import Decoder


class Inputs:
    """Sums over the tokens that a Linear with K inputs has read: of squares always, of products where asked for."""

    def __init__(self, inputs: int, *, with_gram: bool) -> None:
        self._squares = torch.zeros(inputs, dtype=torch.float64)
        self._tokens = 0
        self._parts = (InputSums(inputs), InputSums(inputs)) if with_gram else None

    def add(self, x: torch.Tensor, *, is_held_out: bool) -> None:
        """Add inputs `(..., K)` of any precision."""
        x = x.reshape(-1, x.shape[-1]).float()
        self._squares += x.square().sum(0)
        self._tokens += len(x)
        if self._parts is not None:
            self._parts[is_held_out].add(x)

    @property
    def sq_mean(self) -> torch.Tensor:
        """`(K,)` float32, mean square of each input."""
        return (self._squares / self._tokens).float()

    def moments(self) -> Moments | None:
        """Moments of the inputs, where products were summed; the sums are used up."""
        return None if self._parts is None else moments_of(*self._parts)


def sum_inputs(
    decoder: Decoder, paths: Paths, layer: int, block: nn.Module, names: Iterable[str], *, with_gram: bool
) -> dict[tuple[str, ...], Inputs]:
    """Sums over what Linears of a block read on the pruned path; those that read the same thing share one.

    Args:
        decoder: the model.
        paths: the hidden states in front of the block.
        layer: its number.
        block: the block, in memory.
        names: names of Linears in the model, all of this block.
        with_gram: sum up products of inputs as well.
    """
    with paths.ready(block) as ready:
        linears = {name: linear_of(ready, name.removeprefix(decoder.prefix(layer))) for name in names}
        read: dict[str, torch.Tensor] = {}
        with shown((linear, "in", partial(read.__setitem__, name)) for name, linear in linears.items()):
            paths.show(layer, ready, slice(0, 1), is_first=layer == 0)
        same: dict[int, list[str]] = {}
        for name in linears:
            same.setdefault(id(read[name]), []).append(name)
        sums = {tuple(members): Inputs(read[members[0]].shape[-1], with_gram=with_gram) for members in same.values()}
        for rows, is_held_out in paths.parts():
            watchers = (
                (linears[members[0]], "in", partial(of_inputs.add, is_held_out=is_held_out))
                for members, of_inputs in sums.items()
            )
            with shown(watchers):
                paths.show(layer, ready, rows, is_first=layer == 0)
    return sums
