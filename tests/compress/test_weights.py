"""A safetensors file written in pieces is one that the library wrote."""

import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgeprune.weights import (
    SafetensorsWriter,
    TensorHeader,
    read_headers,
    read_safetensors_header,
    read_tensor,
    tensor_files,
)
from edgeprune_runtime.errors import EdgepruneError

TENSORS = {
    "b.half": torch.randn(3, 5).bfloat16(),
    "a.float": torch.randn(4, 2),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "flag": torch.tensor([True, False, True]),
}
HEADERS = {name: TensorHeader.of(tensor) for name, tensor in TENSORS.items()}


def test_any_order_of_writing_gives_the_same_file(tmp_path: Path) -> None:
    for file, names in (("one", list(TENSORS)), ("two", list(reversed(TENSORS)))):
        (tmp_path / file).mkdir()
        with SafetensorsWriter(tmp_path / file / "model.safetensors", HEADERS, {"format": "pt"}) as writer:
            for name in names:
                writer.write(name, TENSORS[name])
    one, two = (tmp_path / file / "model.safetensors" for file in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    found = load_file(one)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(one, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}
    assert read_headers(tmp_path / "one") == HEADERS
    assert set(tensor_files(tmp_path / "one").values()) == {one}


def test_not_contiguous_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    with SafetensorsWriter(tmp_path / "x", {"m": TensorHeader.of(matrix.T)}, {}) as writer:
        writer.write("m", matrix.T)
    assert torch.equal(read_tensor(tmp_path / "x", "m"), matrix.T)


def test_file_without_all_tensors_is_a_mistake(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", HEADERS, {})
    for name in TENSORS.keys() - {"b.half"}:
        writer.write(name, TENSORS[name])
    with pytest.raises(AssertionError, match=r"b\.half was not written"):
        writer.__exit__(None)


def test_tensor_that_was_read_is_no_window_into_the_file(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "x")
    found = read_tensor(tmp_path / "x", "x")
    found.zero_()
    assert read_tensor(tmp_path / "x", "x").sum() == 3
    with pytest.raises(EdgepruneError, match="holds no tensor 'y'"):
        read_tensor(tmp_path / "x", "y")


def test_header_that_only_the_library_refuses_is_one_line(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % 10**30
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    assert read_safetensors_header(tmp_path / "x")["x"].size_bytes == 0
    with pytest.raises(EdgepruneError, match="is truncated or corrupted: ") as error:
        read_tensor(tmp_path / "x", "x")
    assert "\n" not in str(error.value)
