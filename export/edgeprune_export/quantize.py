"""Weights as small integers in blocks of inputs, in the form that ONNX Runtime multiplies and looks up as it is.

    w ~ scale * (q - zero_point)        q of 4 or 8 bits; scale and zero point for every `block_size` inputs of a row

`MatMulNBits` multiplies by such a weight, `GatherBlockQuantized` looks rows of it up, from the same bytes. Symmetric
blocks have the middle of the range as their zero point; others have one of their own, which is a whole number of the
range, so that a zero stays exactly zero either way. Rounding is to the nearest; of a few scales for each block, the one
that misses least is taken, as the largest weight of a block is rarely worth a step that suits it alone.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from edgeprune_runtime.errors import EdgepruneError

BLOCK_SIZES = (16, 32, 64, 128, 256)
ROUNDED_INPUTS = 4
ACCURACY_LEVELS = (0, 1, ROUNDED_INPUTS)
"""MatMulNBits on the CPU: 0 and 1 multiply in float32, 4 rounds the inputs to 8 bits, which is faster."""

FLOAT_TOLERANCE = 1e-3
ROUNDED_INPUTS_TOLERANCE = 3.0
"""Rounded inputs alone move logits of SmolLM2 by up to 1.3; what that costs in accuracy has a gate of its own."""

SHRINKS = tuple(1 - 0.025 * step for step in range(13))
"""Scales that are tried, as shares of the one that loses no weight."""


@dataclass(frozen=True)
class Precision:
    """How a variant stores the weights of its products and its embedding.

    Attributes:
        name: what the variant is called.
        bits: of a stored number; 32 are float32, which nothing else here applies to.
        block_size: inputs that share a scale.
        is_symmetric: whether the zero point is the middle of the range.
        accuracy_level: of `MatMulNBits`, one of `ACCURACY_LEVELS`.
        max_perplexity_ratio: to the float32 model, on the parity text; a variant above it is not written.
        min_argmax_agreement: share of positions with the float32 model's likeliest token; likewise.
    """

    name: str
    bits: int = 32
    block_size: int = 32
    is_symmetric: bool = False
    accuracy_level: int = 0
    max_perplexity_ratio: float = 1.0
    min_argmax_agreement: float = 1.0

    @property
    def tolerance(self) -> float:
        """Largest error of a logit against a torch model with the same rounded weights."""
        return ROUNDED_INPUTS_TOLERANCE if self.accuracy_level == ROUNDED_INPUTS else FLOAT_TOLERANCE

    @property
    def is_quantised(self) -> bool:
        """Whether weights are rounded."""
        return self.bits < 32

    def check(self) -> None:
        """Check the numbers.

        Raises:
            EdgepruneError: naming the one that ONNX Runtime does not take.
        """
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise EdgepruneError(f"--block-size is {self.block_size}; expected one of {sizes}")
        if self.accuracy_level not in ACCURACY_LEVELS:
            levels = ", ".join(map(str, ACCURACY_LEVELS))
            raise EdgepruneError(f"--accuracy-level is {self.accuracy_level}; expected one of {levels}")


FLOAT32 = Precision("fp32")
PRECISIONS = {
    precision.name: precision
    for precision in (
        FLOAT32,
        Precision("int8", bits=8, is_symmetric=True, max_perplexity_ratio=1.03, min_argmax_agreement=0.94),
        Precision("int4", bits=4, max_perplexity_ratio=1.5, min_argmax_agreement=0.5),
    )
}
"""What `--precision` knows. Small models lose more: on dense SmolLM2-135M rounding to 4 bits gives 1.3 to 1.5 times its
perplexity and another likeliest token at four of ten positions; to 8 bits next to nothing changes."""


def parse_precisions(
    text: str, *, block_size: int | None = None, is_symmetric: bool | None = None, accuracy_level: int | None = None
) -> tuple[Precision, ...]:
    """The precisions of a text such as "fp32,int4", with what the user has chosen of their details.

    Raises:
        EdgepruneError: if one is unknown or named twice, or a detail is one that ONNX Runtime does not take.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PRECISIONS:
            raise EdgepruneError(f"unknown precision {name!r}; expected {', '.join(PRECISIONS)}, joined by commas")
        if names.count(name) > 1:
            raise EdgepruneError(f"precision {name!r} is named twice; expected each of {', '.join(PRECISIONS)} once")
    given = {"block_size": block_size, "is_symmetric": is_symmetric, "accuracy_level": accuracy_level}
    details: dict[str, Any] = {detail: value for detail, value in given.items() if value is not None}
    found = tuple(
        replace(PRECISIONS[name], **details) if PRECISIONS[name].is_quantised else PRECISIONS[name] for name in names
    )
    for precision in found:
        precision.check()
    return found


@dataclass(frozen=True)
class Quantised:
    """A weight `(N, K)` in blocks of K.

    Attributes:
        data: `(N, blocks, block_size * bits / 8)` uint8, the lower half of a byte first.
        scales: `(N, blocks)` float32.
        zero_points: `(N, ceil(blocks * bits / 8))` uint8, packed likewise; None where all are the middle of the range.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


def quantize(weight: torch.Tensor, precision: Precision) -> Quantised:
    """Round a weight `(N, K)` float32 to the nearest numbers of a precision."""
    values, scales, zero_points = _rounded(weight, precision)
    bits = precision.bits
    points = None if precision.is_symmetric else _packed(zero_points.reshape(len(weight), -1), bits)
    return Quantised(_packed(values, bits), scales, points)


def dequantized(weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """What a runtime makes of a weight `(N, K)` float32 that was rounded."""
    values, scales, zero_points = _rounded(weight, precision)
    exact = (values - zero_points) * scales[..., None]
    return exact.reshape(len(weight), -1)[:, : weight.shape[1]]


@torch.no_grad()
def round_weights(model: PreTrainedModel, precision: Precision) -> None:
    """Round the weights of a float32 model in place, as the graph of a precision does: the torch side of its parity."""
    done = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and id(module.weight) not in done:
            done.add(id(module.weight))  # tied ones are rounded once
            module.weight.copy_(dequantized(module.weight, precision))


def _rounded(weight: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers `(N, blocks, block_size)`, scales `(N, blocks)` and zero points `(N, blocks, 1)`, all float32."""
    rows, inputs = weight.shape
    blocks = -(-inputs // precision.block_size)
    padded = torch.nn.functional.pad(weight, (0, blocks * precision.block_size - inputs))
    values = padded.reshape(rows, blocks, precision.block_size)
    levels = (1 << precision.bits) - 1
    middle = float(1 << (precision.bits - 1))
    if precision.is_symmetric:
        # the weight that is largest by size gets the lower end, which has one step more than the upper
        extreme = values.gather(2, values.abs().argmax(2, keepdim=True))
        widest, points = -extreme / middle, torch.full_like(extreme, middle)
    else:
        low, high = values.amin(2, keepdim=True).clamp_max(0), values.amax(2, keepdim=True).clamp_min(0)
        widest = (high - low) / levels
        points = (-low / _divisor(widest)).round().clamp(0, levels)
    best_error = torch.full_like(widest, math.inf)
    best = torch.zeros_like(values)
    scales = torch.ones_like(widest)
    for share in SHRINKS if precision.bits <= 4 else SHRINKS[:1]:
        scale = _divisor(widest * share)
        found = (values / scale + points).round().clamp(0, levels)
        error = ((found - points) * scale - values).square().sum(2, keepdim=True)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best = torch.where(is_better, found, best)
        scales = torch.where(is_better, scale, scales)
    return best, scales.squeeze(2), points


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
