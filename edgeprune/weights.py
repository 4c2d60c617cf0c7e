"""Weight files on disk, checked before a byte of them becomes a tensor.

A weight file is untrusted input: its header is held against the size of the file, an index may not name files outside
its folder, and pickles are read by torch's `weights_only` loader alone (which refuses code). Nothing here allocates
more than a header.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor: its dtype in the format's words ("F32"), and its shape."""

    dtype: str
    shape: tuple[int, ...]


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


def read_headers(folder: Path) -> dict[str, TensorHeader] | None:
    """Headers of every tensor in a folder's safetensors files, by name; None if the weights are torch pickles.

    Raises:
        EdgepruneError: if a file is truncated or its header damaged.
    """
    files = weight_files(folder)
    if files[0].suffix != ".safetensors":
        return None
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        tensors |= read_safetensors_header(file)
    return tensors


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
        entries.pop("__metadata__", None)
        spans = {name: _span(entry) for name, entry in entries.items()}
        tensors = {
            name: TensorHeader(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
            for name, entry in entries.items()
        }
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
    begin, stop = entry["data_offsets"]
    return int(begin), int(stop)


def _damaged(file: Path, why: str) -> EdgepruneError:
    return EdgepruneError(f"{file} is truncated or corrupted: {why}; fetch or write the file again")
