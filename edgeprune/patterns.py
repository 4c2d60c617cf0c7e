"""Patterns of zeros: which weights of a Linear may differ from zero.

    2:4     of 4 consecutive inputs (columns of a row) at most 2 weights are not zero
    0.5     half of the weights are zero, wherever they lie

`N:M` names what is *kept*, as NVIDIA does; the code of SparseGPT, Wanda and DaSS counts the zeros instead, and the two
agree only at 2:4 and 4:8. Blocks run along the inputs (side "in"), which sparse tensor cores need, or along the outputs
(side "out"), as DaSS has them for gate and up. A last block that is shorter than M keeps at most N as well.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from edgeprune.groups import Side
from edgeprune.plan import SparsityRecord
from edgeprune_runtime.errors import EdgepruneError, GateError

BLOCKS = (4, 8, 16)


@dataclass(frozen=True)
class Found:
    """What lies in one or more matrices: weights, those that are not zero, and how many a pattern allows of these.

    `broken` counts the blocks (of an unstructured pattern: the matrices) with more than that.
    """

    weights: int
    nonzeros: int
    allowed: int
    broken: int

    def __add__(self, other: "Found") -> "Found":
        """Both together."""
        return Found(
            self.weights + other.weights,
            self.nonzeros + other.nonzeros,
            self.allowed + other.allowed,
            self.broken + other.broken,
        )

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.nonzeros / self.weights

    @property
    def expected_sparsity(self) -> float:
        """Least share of zeros that the pattern asks for."""
        return 1 - self.allowed / self.weights


@dataclass(frozen=True)
class Pattern:
    """At most `keep_n` non-zero of `block_m` neighbours; with `block_m` 0, the share `sparsity` of a matrix zero."""

    sparsity: float
    keep_n: int = 0
    block_m: int = 0

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """The pattern of a text such as "2:4" or "0.5".

        Raises:
            EdgepruneError: if it is none.
        """
        blocks = ", ".join(map(str, BLOCKS))
        if match := re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", text):
            keep_n, block_m = int(match[1]), int(match[2])
            if block_m not in BLOCKS or not 0 < keep_n < block_m:
                raise EdgepruneError(
                    f"pattern {text!r} is out of range; expected N:M, N weights kept of M in {blocks}, and 0 < N < M"
                )
            return cls(1 - keep_n / block_m, keep_n, block_m)
        if re.fullmatch(r"0?\.[0-9]{1,9}", text) and float(text) > 0:
            return cls(float(text))
        raise EdgepruneError(
            f"unknown sparsity pattern {text!r}; expected N:M such as 2:4 (N kept of M in {blocks}), or a share of "
            "zeros between 0 and 1 such as 0.5"
        )

    def __str__(self) -> str:
        """As the user writes it."""
        return f"{self.keep_n}:{self.block_m}" if self.block_m else f"{self.sparsity:g}"

    def keep(self, scores: torch.Tensor, side: Side = "in") -> torch.Tensor:
        """Which weights of a Linear stay: those with the highest scores of each block, or of each line.

        Args:
            scores: `(out, in)`, higher = keep.
            side: along which dimension blocks lie, and weights without blocks compete.

        Returns:
            `(out, in)` bool.
        """
        if side == "out":
            return self.keep(scores.T).T
        if not self.block_m:
            count = scores.shape[1] - int(self.sparsity * scores.shape[1])
            return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)
        blocks = _blocks(scores, self.block_m, float("-inf"))
        best = blocks.topk(self.keep_n, dim=2).indices
        kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, best, True)
        return kept.flatten(1)[:, : scores.shape[1]]

    def keep_anywhere(self, scores: torch.Tensor, side: Side = "in") -> torch.Tensor:
        """As `keep`, but without blocks all weights of the matrix compete with each other, not those of a line."""
        return self.keep(scores, side) if self.block_m else self.keep(scores.reshape(1, -1)).reshape(scores.shape)

    def find(self, weight: torch.Tensor, side: Side = "in") -> Found:
        """What lies in a weight `(out, in)`, and what this pattern allows."""
        if side == "out":
            weight = weight.T
        is_nonzero = weight != 0
        nonzeros = int(is_nonzero.sum())
        if not self.block_m:
            # ranks are whole numbers: each row, or each column of blocks, may keep a part of a weight more
            allowed = weight.numel() - int(self.sparsity * weight.numel()) + max(weight.shape)
            return Found(weight.numel(), nonzeros, allowed, int(nonzeros > allowed))
        counts = _blocks(is_nonzero, self.block_m, False).sum(2)
        last = weight.shape[1] - (counts.shape[1] - 1) * self.block_m
        allowed = weight.shape[0] * ((counts.shape[1] - 1) * self.keep_n + min(self.keep_n, last))
        return Found(weight.numel(), nonzeros, allowed, int((counts > self.keep_n).sum()))


def check_pattern(record: SparsityRecord, read: Callable[[str], torch.Tensor], where: str) -> Found:
    """Count the zeros of all Linears that a record names.

    Args:
        record: which, and in what pattern.
        read: the weight `(out, in)` of the Linear of this name.
        where: what messages call the place that is read.

    Raises:
        GateError: naming the first Linear that breaks the pattern.
    """
    pattern, total = Pattern.parse(record.pattern), Found(0, 0, 0, 0)
    for name, side in record.sides.items():
        found = pattern.find(read(name), side)
        if found.broken:
            raise GateError(
                f"{where}: {name} breaks the pattern {record.pattern} in {found.broken:,} places, {found.nonzeros:,} "
                f"weights are not zero where {found.allowed:,} may be; it must not be used"
            )
        total += found
    return total


def _blocks(values: torch.Tensor, size: int, padding: float) -> torch.Tensor:
    """Rows `(R, K)` as blocks `(R, ceil(K / size), size)`."""
    padded: torch.Tensor = nn.functional.pad(values, (0, -values.shape[1] % size), value=padding)
    return padded.reshape(len(values), -1, size)
