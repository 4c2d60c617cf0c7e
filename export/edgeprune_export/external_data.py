"""Weights of an ONNX graph, streamed into its external data file one tensor at a time."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

# ONNX Runtime maps an initializer into memory instead of copying it when its offset is a multiple of the allocation
# granularity, which is 64 KiB on Windows and one page elsewhere. Small tensors are not worth the gap: at 4 bits the
# gaps before scales and zero points would be a hundredth of a small model's file.
GRANULARITY_BYTES, LARGE_TENSOR_BYTES = 65536, 1 << 20
PAGE_BYTES, MAPPED_TENSOR_BYTES = 4096, 1 << 16
CACHE_LINE_BYTES = 64


def alignment_of(size_bytes: int) -> int:
    """What the offset of a tensor of so many bytes should be a multiple of."""
    if size_bytes < MAPPED_TENSOR_BYTES:
        return CACHE_LINE_BYTES
    return GRANULARITY_BYTES if size_bytes >= LARGE_TENSOR_BYTES else PAGE_BYTES


class ExternalData:
    """An external data file that grows by `add`; each array can be dropped as soon as it is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def size_bytes(self) -> int:
        """Bytes written so far."""
        return self._offset

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes written so far, as hexadecimal digits."""
        return self._sha256.hexdigest()

    def again(self, tensor: ir.ExternalTensor, name: str, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """The bytes of an array that was added, under another name and of another shape."""
        return ir.ExternalTensor(
            location=tensor.location,
            offset=tensor.offset,
            length=tensor.length,
            dtype=tensor.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )

    def add(self, name: str, array: NDArray[np.generic]) -> ir.ExternalTensor:
        """Append one array, aligned, and return the tensor that points at it."""
        self._write(bytes(-self._offset % alignment_of(array.nbytes)))
        offset = self._offset
        contiguous = np.ascontiguousarray(array)
        self._write(contiguous.reshape(-1).view(np.uint8).data)
        return ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=contiguous.nbytes,
            dtype=ir.DataType.from_numpy(contiguous.dtype),
            shape=ir.Shape(contiguous.shape),
            name=name,
            base_dir=self.path.parent,
        )

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._offset += len(data)
