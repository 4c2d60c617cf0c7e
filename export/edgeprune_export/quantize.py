"""Weights as small integers in blocks of inputs, in the form that ONNX Runtime multiplies and looks up as it is.

    w ~ scale * (q - zero_point)        q of 4 or 8 bits; scale and zero point for every `block_size` inputs of a row

`MatMulNBits` multiplies by such a weight, `GatherBlockQuantized` looks rows of it up, from the same bytes. Symmetric
blocks have the middle of the range as their zero point; others have one of their own, which is a whole number of the
range, so that a zero stays exactly zero either way. Of a few scales for each block, the one that misses least is taken,
as the largest weight of a block is rarely worth a step that suits it alone. Rounding is to the nearest, or, where there
is calibration text, so that later inputs make up for what was rounded (`edgeprune_export.gptq`).

A block may also be a whole row. Such weights are multiplied as they are, by inputs that are rounded just before: whole
numbers times whole numbers (dynamic quantisation), which every build of ONNX Runtime has kernels for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from edgeprune_export.weights import Weights
from edgeprune_runtime.errors import EdgepruneError

BLOCK_SIZES = (16, 32, 64, 128, 256)
WHOLE_ROW = 0
"""Block size that says: all inputs of a row share a scale."""

ROUNDED_INPUTS = 4
ACCURACY_LEVELS = (0, 1, ROUNDED_INPUTS)
"""MatMulNBits on the CPU: 0 and 1 multiply in float32, 4 rounds the inputs to 8 bits, which is faster."""

TABLE_BITS = (4, 8)

HALF_BITS = 16

FLOAT_TOLERANCES = 1e-3, 1e-5
HALF_TOLERANCES = 1.0, 1e-3
"""float16 has 11 significant bits, and every operator rounds to them."""

ROUNDED_INPUTS_TOLERANCES = 16.0, 5e-2
"""Rounded inputs alone move single logits of SmolLM2 by up to 2.8, and the mean divergence by a thousandth. What they
cost in accuracy has a gate of its own, and so has the same graph without them, which must be as exact as any."""

DYNAMIC_TOLERANCES = 1.0, 1e-4
"""Inputs in two halves of 8 bits move single logits of SmolLM2 by up to 0.07, and the mean divergence by less than a
hundred-thousandth; with one half alone it is four hundredths."""

CHUNK_WEIGHTS = 1 << 18
"""Weights that are rounded at once: their few copies in float32 stay in the processor's cache, in half the time."""

SHRINKS = tuple(1 - 0.025 * step for step in range(13))
"""Scales that are tried, as shares of the one that loses no weight."""


@dataclass(frozen=True)
class Precision:
    """How a variant stores the weights of its products and its embedding.

    Attributes:
        name: what the variant is called.
        bits: of a stored number; 32 and 16 are floats, which have no blocks.
        block_size: inputs that share a scale; `WHOLE_ROW`: all of a row.
        is_symmetric: whether the zero point is the middle of the range.
        table_bits: of the embedding and the head, which feel rounding most, one of `TABLE_BITS`; None: `bits`.
        accuracy_level: of `MatMulNBits`, one of `ACCURACY_LEVELS`; products with whole rows always round their inputs.
        max_perplexity_ratio: to the float32 model, on the parity text; a variant above it is not written.
        min_argmax_agreement: share of positions with the float32 model's likeliest token; likewise.
        max_greedy_flips: share of greedy continuations that are not the float32 model's; likewise. No limit by default:
            there are few, and one near tie turns all of one, so that good variants of 4 bits may flip every one.
    """

    name: str
    bits: int = 32
    block_size: int = 32
    is_symmetric: bool = False
    table_bits: int | None = None
    accuracy_level: int = 0
    max_perplexity_ratio: float = 1.0
    min_argmax_agreement: float = 1.0
    max_greedy_flips: float = 1.0

    @property
    def tolerances(self) -> tuple[float, float]:
        """What counts as equal to a torch model of the same rounded weights.

        The largest error of a logit, and the largest mean KL divergence in nats.
        """
        if self.bits == HALF_BITS:
            return HALF_TOLERANCES
        if self.rounds_inputs and self.is_by_row:
            return DYNAMIC_TOLERANCES
        return ROUNDED_INPUTS_TOLERANCES if self.rounds_inputs else FLOAT_TOLERANCES

    @property
    def rounds_inputs(self) -> bool:
        """Whether products round their inputs as well."""
        return self.is_quantised and self.accuracy_level == ROUNDED_INPUTS

    @property
    def is_rounded(self) -> bool:
        """Whether weights are other than float32."""
        return self.bits < 32

    @property
    def is_quantised(self) -> bool:
        """Whether weights are integers, with a scale for each block."""
        return self.bits < HALF_BITS

    @property
    def has_blocks(self) -> bool:
        """Whether weights are integers in blocks of a size that can be chosen."""
        return self.is_quantised and self.block_size != WHOLE_ROW

    @property
    def is_by_row(self) -> bool:
        """Whether weights are integers with one scale for each row."""
        return self.is_quantised and self.block_size == WHOLE_ROW

    def block_of(self, inputs: int) -> int:
        """Size of the blocks of a row of so many inputs."""
        return self.block_size or inputs

    @property
    def is_data_aware(self) -> bool:
        """Whether calibration text helps to round: with eight bits next to nothing is lost anyway."""
        return self.bits <= 4

    @property
    def tables(self) -> "Precision":
        """The precision of the embedding and the head."""
        if self.table_bits in (None, self.bits):
            return self
        return replace(self, bits=self.table_bits, table_bits=None, is_symmetric=True)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight inside the blocks takes, with its share of scale and zero point."""
        if not self.has_blocks:
            return self.bits
        return self.bits + (32 + (0 if self.is_symmetric else self.bits)) / self.block_size

    def check(self) -> None:
        """Check the numbers.

        Raises:
            EdgepruneError: naming the one that ONNX Runtime does not take.
        """
        if self.has_blocks and self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise EdgepruneError(f"--block-size is {self.block_size}; expected one of {sizes}")
        if self.accuracy_level not in ACCURACY_LEVELS:
            levels = ", ".join(map(str, ACCURACY_LEVELS))
            raise EdgepruneError(f"--accuracy-level is {self.accuracy_level}; expected one of {levels}")
        if self.table_bits not in (None, *TABLE_BITS):
            widths = " or ".join(map(str, TABLE_BITS))
            raise EdgepruneError(f"--table-bits is {self.table_bits}; expected {widths}")

    def takes(self, detail: str) -> bool:
        """Whether a user may choose this field, one of `DETAILS`."""
        return self.table_bits is not None if detail == "table_bits" else self.has_blocks


DETAILS = ("block_size", "is_symmetric", "accuracy_level", "table_bits")
"""Fields that a user may choose of the precisions that take them."""


FLOAT32 = Precision("fp32")
PRECISIONS = {
    precision.name: precision
    for precision in (
        FLOAT32,
        Precision("fp16", bits=HALF_BITS, max_perplexity_ratio=1.01, min_argmax_agreement=0.97),
        Precision("int8", 8, is_symmetric=True, accuracy_level=4, max_perplexity_ratio=1.03, min_argmax_agreement=0.94),
        Precision(
            "int8-dynamic",
            8,
            WHOLE_ROW,
            is_symmetric=True,
            accuracy_level=ROUNDED_INPUTS,
            max_perplexity_ratio=1.05,
            min_argmax_agreement=0.92,
        ),
        Precision("int4", 4, table_bits=8, accuracy_level=4, max_perplexity_ratio=1.5, min_argmax_agreement=0.5),
    )
}
"""What `--precision` knows. Inputs are rounded by default: without that, ONNX Runtime turns weights of 8 bits back into
float32 at every call on x86-64, which takes ten times as long for one token as the product itself."""


def parse_precisions(text: str, **details: Any) -> tuple[Precision, ...]:
    """The precisions of a text such as "fp32,int4", with what the user has chosen of their details.

    Args:
        text: names, joined by commas.
        details: those of `DETAILS`; None leaves one to the precision.

    Raises:
        EdgepruneError: if one is unknown or named twice, or a detail is one that ONNX Runtime does not take, or that
            none of them takes.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PRECISIONS:
            raise EdgepruneError(f"unknown precision {name!r}; expected {', '.join(PRECISIONS)}, joined by commas")
        if names.count(name) > 1:
            raise EdgepruneError(f"precision {name!r} is named twice; expected each of {', '.join(PRECISIONS)} once")
    assert set(details) <= set(DETAILS)
    given = {detail: details[detail] for detail in DETAILS if details.get(detail) is not None}
    chosen = [PRECISIONS[name] for name in names]
    useless = {detail: value for detail, value in given.items() if not any(each.takes(detail) for each in chosen)}
    if useless:
        why = "whose embedding and head have bits like the rest"
        if not any(each.has_blocks for each in chosen):
            why = "which has no blocks of a size to choose"
        takers = [name for name, precision in PRECISIONS.items() if all(map(precision.takes, useless))]
        raise EdgepruneError(
            f"{as_options(useless)} would change nothing of {', '.join(names)}, {why}; leave it out, or name "
            f"{' or '.join(takers)} in --precision"
        )
    found = tuple(
        replace(each, **{detail: value for detail, value in given.items() if each.takes(detail)}) for each in chosen
    )
    for precision in found:
        precision.check()
    return found


def as_options(details: Mapping[str, bool | int | None]) -> str:
    """Details of precisions as they were given on the command line; those that are None were not."""
    options = []
    for detail, value in details.items():
        if detail == "is_symmetric" and value is not None:
            options.append("--symmetric" if value else "--asymmetric")
        elif value is not None:
            options.append(f"--{detail.replace('_', '-')} {value}")
    return ", ".join(options)


GATE_OPTIONS = {
    "max_perplexity_ratio": "--max-perplexity-ratio",
    "min_argmax_agreement": "--min-agreement",
    "max_greedy_flips": "--max-greedy-flips",
}
"""Gates by the names that the command line has for them."""


def with_gates(
    precisions: Sequence[Precision],
    max_perplexity_ratio: float | None,
    min_argmax_agreement: float | None,
    max_greedy_flips: float | None,
) -> tuple[Precision, ...]:
    """The precisions with other gates where they round; None keeps those that they have.

    Raises:
        EdgepruneError: if a gate is out of range, or there is nothing that it could keep out.
    """
    if max_perplexity_ratio is not None and not max_perplexity_ratio > 0:
        raise EdgepruneError(f"--max-perplexity-ratio is {max_perplexity_ratio}; expected more than 0, such as 1.2")
    shares = {"min_argmax_agreement": min_argmax_agreement, "max_greedy_flips": max_greedy_flips}
    for name, share in shares.items():
        if share is not None and not 0 <= share <= 1:
            raise EdgepruneError(f"{GATE_OPTIONS[name]} is {share}; expected a share from 0 to 1")
    given = {"max_perplexity_ratio": max_perplexity_ratio, **shares}
    gates: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if gates and not any(each.is_rounded for each in precisions):
        asked = " and ".join(GATE_OPTIONS[name] for name in gates)
        raise EdgepruneError(
            f"{asked} would change nothing of {FLOAT32.name}, which rounds no weight; leave it out, or name a variant "
            "that does in --precision"
        )
    return tuple(replace(each, **gates) if each.is_rounded else each for each in precisions)


@dataclass(frozen=True)
class Quantised:
    """A weight `(N, K)` in blocks of K.

    Attributes:
        precision: its bits and blocks.
        data: `(N, blocks, block_size * bits / 8)` uint8, the lower half of a byte first.
        scales: `(N, blocks)` float32.
        zero_points: `(N, ceil(blocks * bits / 8))` uint8, packed likewise; None where all are the middle of the range.
    """

    precision: Precision
    data: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    @classmethod
    def of(
        cls, numbers: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, precision: Precision
    ) -> "Quantised":
        """Pack whole numbers `(N, blocks, block_size)`, with scales and zero points `(N, blocks)`."""
        bits = precision.bits
        points = None if precision.is_symmetric else _packed(zero_points, bits)
        return cls(precision, _packed(numbers, bits), scales.contiguous(), points)

    @classmethod
    def joined(cls, parts: "Sequence[Quantised]") -> "Quantised":
        """Weights with the same inputs as one, their rows behind each other."""
        if len(parts) == 1:
            return parts[0]
        points = [part.zero_points for part in parts if part.zero_points is not None]
        return cls(
            parts[0].precision,
            torch.cat([part.data for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(points) if points else None,
        )

    def dequantized(self, inputs: int) -> torch.Tensor:
        """The weight `(N, inputs)` float32 that a runtime multiplies by."""
        weight = torch.empty(len(self.data), inputs)
        self.write_to(weight)
        return weight

    def write_to(self, weight: torch.Tensor) -> None:
        """Make a float weight `(N, inputs)` the one that a runtime multiplies by."""
        for rows in stretches(*weight.shape):
            weight[rows] = self._exact(rows)[:, : weight.shape[1]]

    def _exact(self, rows: slice) -> torch.Tensor:
        """Some rows `(n, blocks * block_size)` float32."""
        bits, scales = self.precision.bits, self.scales[rows]
        points = torch.tensor(float(1 << (bits - 1)))
        if self.zero_points is not None:
            points = _unpacked(self.zero_points[rows], bits)[:, : scales.shape[1], None]
        return ((_unpacked(self.data[rows], bits) - points) * scales[..., None]).flatten(1)


def quantize(weight: torch.Tensor, precision: Precision) -> Quantised:
    """Round a weight `(N, K)` of any float type to the nearest numbers of a precision."""
    return Quantised.joined([_nearest(weight[rows].float(), precision) for rows in stretches(*weight.shape)])


def _nearest(weight: torch.Tensor, precision: Precision) -> Quantised:
    rows, inputs = weight.shape
    size = precision.block_of(inputs)
    blocks = -(-inputs // size)
    padded = torch.nn.functional.pad(weight, (0, blocks * size - inputs))
    values = padded.reshape(rows, blocks, size)
    grid = Grid.of(values, precision)
    return Quantised.of(grid.numbers(values), grid.scales.squeeze(2), grid.points.squeeze(2), precision)


@dataclass(frozen=True)
class Grid:
    """The values that numbers of so many bits can stand for in blocks: `scales` and `points` `(..., 1)` float32."""

    scales: torch.Tensor
    points: torch.Tensor
    levels: int

    @classmethod
    def of(cls, values: torch.Tensor, precision: Precision, importance: torch.Tensor | None = None) -> "Grid":
        """The grid that misses the values `(..., block)` least, their squares weighted by `importance` `(block,)`."""
        levels = (1 << precision.bits) - 1
        middle = float(1 << (precision.bits - 1))
        if precision.is_symmetric:
            # the weight that is largest by size gets the lower end, which has one step more than the upper
            extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True))
            widest, points = -extreme / middle, torch.full_like(extreme, middle)
        else:
            low, high = values.amin(-1, keepdim=True).clamp_max(0), values.amax(-1, keepdim=True).clamp_min(0)
            widest = (high - low) / levels
            points = (-low / _divisor(widest)).round().clamp(0, levels)
        least, best = torch.full_like(widest, math.inf), torch.ones_like(widest)
        for share in SHRINKS if precision.bits <= 4 else SHRINKS[:1]:
            grid = cls(_divisor(widest * share), points, levels)
            missed = (grid.nearest(values) - values).square()
            error = (missed if importance is None else missed * importance).sum(-1, keepdim=True)
            best = torch.where(error < least, grid.scales, best)
            least = torch.minimum(error, least)
        return cls(best, points, levels)

    def numbers(self, values: torch.Tensor) -> torch.Tensor:
        """The number of the nearest value of the grid."""
        return (values / self.scales + self.points).round().clamp(0, self.levels)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest value of the grid."""
        return (self.numbers(values) - self.points) * self.scales


Ready = Mapping[str, Callable[[], Quantised]]
"""Name of a weight that is rounded already -> what reads it."""


@dataclass(frozen=True)
class RoundedWeights:
    """The weights of a checkpoint as a precision stores them: those that are ready, all others to the nearest."""

    weights: Weights
    precision: Precision
    ready: Ready = field(default_factory=dict)

    def read(self, *names: str) -> Quantised:
        """One weight, or several with the same inputs as one."""
        return Quantised.joined([self._one(name) for name in names])

    def round_in_place(self, name: str, weight: torch.Tensor) -> None:
        """Round a weight as the checkpoint has it, float32, a stretch of rows at a time."""
        if name in self.ready:
            self.ready[name]().write_to(weight)
            return
        for rows in stretches(*weight.shape):
            _nearest(weight[rows], self._precision(name)).write_to(weight[rows])

    def _one(self, name: str) -> Quantised:
        if name in self.ready:
            return self.ready[name]()
        return quantize(self.weights.read_stored(name), self._precision(name))

    def _precision(self, name: str) -> Precision:
        is_inside = name.startswith(f"{self.weights.blocks_name}.")
        return self.precision if is_inside else self.precision.tables


@torch.no_grad()
def round_weights(model: nn.Module, rounded: RoundedWeights, prefix: str = "") -> None:
    """Round float32 weights in place, as the graph of a precision does: the torch side of its parity.

    Args:
        model: a model, of which what lies on the meta device is left out, or one of its blocks.
        rounded: the weights to take.
        prefix: what comes before its names in the checkpoint.
    """
    if not rounded.precision.is_rounded:
        return
    if not rounded.precision.is_quantised:
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.copy_(parameter.half())
        return
    done = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.is_meta or id(module.weight) in done:
            continue
        done.add(id(module.weight))  # tied ones are rounded once
        rounded.round_in_place(f"{prefix}{name}.weight", module.weight)


def stretches(rows: int, inputs: int, weights: int = CHUNK_WEIGHTS) -> list[slice]:
    """Rows of a weight, so many that they hold about `weights` numbers: what is computed of them stays small."""
    step = max(1, weights // inputs)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """A scale that may be divided by; a block of zeros has any."""
    return torch.where(scale == 0, 1.0, scale)


def _packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of so many bits along the last dimension as bytes, the first in the lowest bits."""
    whole = numbers.to(torch.uint8)
    if bits == 8:
        return whole
    each = 8 // bits
    whole = torch.nn.functional.pad(whole, (0, -whole.shape[-1] % each))
    parts = whole.reshape(*whole.shape[:-1], -1, each)
    packed = torch.zeros_like(parts[..., 0])
    for index in range(each):
        packed |= parts[..., index] << (bits * index)
    return packed


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers in bytes, float32, along the last dimension."""
    mask = (1 << bits) - 1
    parts = [packed >> shift & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(-2).float()
