"""Weight files on disk, checked before a byte of them becomes a tensor, and read and written one tensor at a time.

A weight file is untrusted input: its header is held against the size of the file, an index may not name files outside
its folder, and pickles are read by torch's `weights_only` loader alone (which refuses code). Checking allocates no more
than a header, reading and writing no more than one tensor.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Self
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from edgeprune_runtime.errors import EdgepruneError

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_FILE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DTYPES = FLOATS | {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_ALIGNMENT = 8  # the tensors begin at a multiple of it

Change = Callable[[torch.Tensor], torch.Tensor]
"""Makes a tensor of a model out of one that is stored; a view where it can be, of the same dtype."""

Unpack = Callable[[str], Mapping[str, Change]]
"""For the name of a stored tensor, the tensors of the model that are made of it, and how."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor: its dtype in the format's words ("F32"), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorHeader":
        """Header of a tensor; its values are not looked at, so it may lie on the meta device."""
        return cls(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def size_bytes(self) -> int:
        """Bytes that the values take."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class SafetensorsWriter:
    """A safetensors file written one tensor at a time, in any order.

    The header stands first in the file, and needs only dtypes and shapes: a model that is made block by block can be
    written block by block. On leaving without an error every tensor must have been written; the file is on the disk
    then.
    """

    def __init__(self, file: Path, headers: Mapping[str, TensorHeader], metadata: Mapping[str, str]) -> None:
        # Wide dtypes first keeps every tensor aligned, the name makes the file the same whatever the order of writing.
        order = sorted(headers, key=lambda name: (-DTYPE_BITS[headers[name].dtype], name))
        entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in order:
            begin, end = end, end + headers[name].size_bytes
            entries[name] = {
                "dtype": headers[name].dtype,
                "shape": list(headers[name].shape),
                "data_offsets": [begin, end],
            }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % HEADER_ALIGNMENT)
        self._start = 8 + len(header)
        self._offsets = {name: self._start + entries[name]["data_offsets"][0] for name in order}
        self._headers = dict(headers)
        self._missing = set(order)
        self._stream = file.open("wb")
        self._stream.write(struct.pack("<Q", len(header)) + header)
        self._stream.truncate(self._start + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the values of one tensor."""
        assert TensorHeader.of(tensor) == self._headers[name], f"{name} is not as its header says"
        self._stream.seek(self._offsets[name])
        self._stream.write(bytes_of(tensor.detach().cpu().contiguous()))
        self._missing.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        try:
            if error_type is None:
                assert not self._missing, f"{min(self._missing)} was not written"
                self._stream.flush()
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be written from or read into."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers


def read_tensor(file: Path, name: str, change: Change | None = None) -> torch.Tensor:
    """One tensor of a safetensors file, copied out of a mapping that is closed again: only the tensor stays in memory.

    With `change` it is what that makes of the stored tensor; of a view, only the viewed part is read.

    Raises:
        EdgepruneError: if the file has no such tensor, or the library refuses it.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            if name not in tensors.keys():  # noqa: SIM118 - it is no mapping, `in` would not work
                raise EdgepruneError(f"{file} holds no tensor {name!r}; fetch or write the file again")
            tensor: torch.Tensor = tensors.get_tensor(name)
            return (tensor if change is None else change(tensor)).clone()
    except SafetensorError as error:
        raise _damaged(file, str(error)) from error


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a folder in Hugging Face form: safetensors if there are any, else `pytorch_model*.bin`.

    Raises:
        EdgepruneError: if there are none, or an index names a file that is missing or lies outside the folder.
    """
    for single, index in ((SAFETENSORS_FILE, SAFETENSORS_INDEX), (BIN_FILE, BIN_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder, index, suffix=Path(single).suffix)
    raise EdgepruneError(f"{folder} holds no weights; expected {SAFETENSORS_FILE} (or its shards) or {BIN_FILE}")


def read_headers(folder: Path, unpack: Unpack | None = None) -> dict[str, TensorHeader] | None:
    """Headers of every tensor in a folder's safetensors files, by name; None if the weights are torch pickles.

    With `unpack` they are those of the tensors that it makes of the stored ones.

    Raises:
        EdgepruneError: if a file is truncated or its header damaged.
    """
    files = weight_files(folder)
    if files[0].suffix != ".safetensors":
        return None
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        tensors |= read_safetensors_header(file)
    return tensors if unpack is None else _unpacked_headers(folder, tensors, unpack)


def tensor_readers(folder: Path, unpack: Unpack | None = None) -> dict[str, Callable[[], torch.Tensor]]:
    """How to read each tensor of a folder's safetensors files, or each that `unpack` makes of these.

    Raises:
        EdgepruneError: if a file is truncated or its header damaged.
    """
    files = tensor_files(folder)
    if unpack is None:
        return {name: partial(read_tensor, file, name) for name, file in files.items()}
    return {
        made: partial(read_tensor, file, name, change)
        for name, file in files.items()
        for made, change in unpack(name).items()
    }


def read_pickles(folder: Path, unpack: Unpack) -> dict[str, torch.Tensor]:
    """All tensors that `unpack` makes of those in a folder's torch pickles, which stay on the disk until they are read.

    Raises:
        pickle.UnpicklingError: if a file wants to run code, and what else torch raises on damaged files.
        EdgepruneError: if a file holds something that is no tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        stored: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        if not isinstance(stored, dict) or not all(isinstance(each, torch.Tensor) for each in stored.values()):
            raise EdgepruneError(f"{file} holds more than named tensors; fetch or write the file again")
        for name, tensor in stored.items():
            for made, change in unpack(str(name)).items():
                tensors[made] = _changed(folder, str(name), tensor, made, change)
    return tensors


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which of a folder's safetensors files holds each tensor.

    Raises:
        EdgepruneError: if a file is truncated or its header damaged.
    """
    return {name: file for file in weight_files(folder) for name in read_safetensors_header(file)}


def read_safetensors_header(file: Path) -> dict[str, TensorHeader]:
    """Header of one safetensors file, checked against the file's size: no gap, no overlap, no byte missing.

    Raises:
        EdgepruneError: if the file is truncated or its header damaged.
    """
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(size_bytes - 8, MAX_HEADER_BYTES):
            raise _damaged(file, f"its header claims {header_bytes} bytes in a file of {size_bytes}")
        text = stream.read(header_bytes)
    try:
        entries = json.loads(text)
        if not all(isinstance(value, str) for value in entries.pop("__metadata__", {}).values()):
            raise TypeError
        spans = {name: _span(entry) for name, entry in entries.items()}
        tensors = {name: TensorHeader(str(entry["dtype"]), _counts(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"its header cannot be read ({type(error).__name__})") from None
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        header = tensors[name]
        if any(size < 0 for size in header.shape) or header.dtype not in DTYPE_BITS:
            raise _damaged(file, f"tensor {name!r} has shape {header.shape} and dtype {header.dtype!r}")
        if begin != end or stop - begin != prod(header.shape) * DTYPE_BITS[header.dtype] // 8:
            raise _damaged(file, f"tensor {name!r} does not lie where its header says")
        end = stop
    if 8 + header_bytes + end != size_bytes:
        raise _damaged(file, f"it has {size_bytes} bytes, its header promises {8 + header_bytes + end}")
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        EdgepruneError: if the file is not a JSON object.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise EdgepruneError(f"{file} is not readable JSON; expected one JSON object, fetch the file again") from None
    if not isinstance(data, dict):
        raise EdgepruneError(f"{file} holds a JSON {type(data).__name__}; expected one JSON object")
    return data


def _unpacked_headers(folder: Path, headers: Mapping[str, TensorHeader], unpack: Unpack) -> dict[str, TensorHeader]:
    """Headers of what `unpack` makes: it is asked on the meta device, which has shapes and no values."""
    unpacked = {}
    for name, header in headers.items():
        stored = torch.empty(header.shape, device="meta")
        for made, change in unpack(name).items():
            unpacked[made] = TensorHeader(header.dtype, tuple(_changed(folder, name, stored, made, change).shape))
    return unpacked


def _changed(folder: Path, name: str, stored: torch.Tensor, made: str, change: Change) -> torch.Tensor:
    try:
        return change(stored)
    except (IndexError, RuntimeError) as error:
        raise EdgepruneError(
            f"{folder}: {name} has the shape {tuple(stored.shape)}, of which no {made} can be made; config and weights "
            "do not belong together"
        ) from error


def _shards(folder: Path, index: str, suffix: str) -> list[Path]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise EdgepruneError(f"{folder / index} has no weight_map; expected tensor names and the files they lie in")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name or "\\" in name or Path(name).suffix != suffix:
            raise EdgepruneError(
                f"{folder / index} names the file {name!r}; expected a {suffix} file in the same folder"
            )
        if not (folder / name).is_file():
            raise EdgepruneError(f"{folder} lacks the weight file {name}, which {index} names; fetch it again")
        files.append(folder / name)
    return files


def _span(entry: Mapping[str, Any]) -> tuple[int, int]:
    begin, stop = _counts(entry["data_offsets"])
    return begin, stop


def _counts(values: object) -> tuple[int, ...]:
    """A list of whole numbers, raise TypeError for anything else: the library takes neither 97.0 nor true for one."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError
    return tuple(values)


def _damaged(file: Path, why: str) -> EdgepruneError:
    return EdgepruneError(f"{file} is truncated or corrupted: {why}; fetch or write the file again")
