"""Which number format this CPU multiplies matrices fastest in, and models in it."""

import copy
import functools
import time
from typing import Any, TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)

_SIDE = 768  # large enough to leave the caches of one core, small enough for dozens of repeats in half a second
_ROUNDS = 4  # the formats take turns, so that a burst of other work does not hit only one of them
_WORTH_IT = 1.5  # bfloat16 rounds; a gain below this is within the noise of the probe and not worth its error
_HOPELESS = 4.0  # so many times slower in one round, and no other round would change the answer


@functools.cache
def fastest_dtype(seconds: float = 0.5) -> torch.dtype:
    """`torch.bfloat16` where this CPU multiplies it clearly faster than float32, else `torch.float32`.

    Measured once per process: CPUs with AMX or AVX512-BF16 gain several times, the others emulate it and lose.
    """
    share = seconds / (2 * _ROUNDS)
    best = dict.fromkeys((torch.bfloat16, torch.float32), 0.0)
    for _ in range(_ROUNDS):
        for dtype in best:
            best[dtype] = max(best[dtype], _products_per_second(dtype, share))
        if _HOPELESS * best[torch.bfloat16] < best[torch.float32]:
            break  # emulated: one product takes longer than the whole probe should
    return torch.bfloat16 if best[torch.bfloat16] > _WORTH_IT * best[torch.float32] else torch.float32


def copy_in(model: AnyModule, dtype: torch.dtype) -> AnyModule:
    """A copy of a model whose parameters have this dtype; it shares those that have it already.

    Buffers keep theirs: rotary frequencies that were rounded to bfloat16 would put tokens in wrong places.
    """
    replaced: dict[int, Any] = {
        id(parameter): parameter
        if parameter.dtype == dtype
        else nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, replaced)


def _products_per_second(dtype: torch.dtype, seconds: float) -> float:
    matrix = torch.full((_SIDE, _SIDE), 0.5, dtype=dtype)
    out = torch.mm(matrix, matrix)  # the first product of a format compiles its kernel
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or count == 0:
        torch.mm(matrix, matrix, out=out)
        count += 1
    return count / max(passed, 1e-9)
