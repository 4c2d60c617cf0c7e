"""A packed copy computes what the variant does, bit for bit, loads with less memory, or is not there."""

import errno
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import pruned
from onnx import TensorProto, helper
from packing import packed_offsets
from tiny_bundle import GRAPH, write_bundle

from edgeprune_export import packing
from edgeprune_export.exporting import export
from edgeprune_export.packing import align, compare_loads, pack
from edgeprune_export.quantize import PRECISIONS
from edgeprune_runtime.bench import run_worker
from edgeprune_runtime.bundle import Layer, open_bundle
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.packed import find_packed
from edgeprune_runtime.session import Decoder
from edgeprune_runtime.validate import validate
from edgeprune_runtime.worker import Request

IDS = np.array([[5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("key")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_copy_computes_the_same_and_leaves_the_bundle_as_it_was(folder: Path) -> None:
    before = names_in(folder)
    bundle = open_bundle(folder)
    copy = pack(bundle)
    assert names_in(folder) - before == {
        *("packed", "packed/fp32", "packed/fp32/packed.json"),
        *("packed/fp32/model.onnx", "packed/fp32/model.onnx_data"),
    }
    assert copy.is_usable
    assert copy.size_bytes > bundle.size_bytes
    assert open_bundle(folder, verify=True).manifest == bundle.manifest
    packed, plain = Decoder(bundle, threads=1), Decoder(bundle, threads=1, graph=bundle.graph_path)
    assert (packed.packed, plain.packed) == (copy, None)
    assert np.array_equal(packed.forward(IDS)[0], plain.forward(IDS)[0])
    result = validate(bundle, threads=1)
    assert (result.passed, result.is_packed) == (True, True)
    assert "2 of the packed copy" in result.checks[0].detail


@pytest.mark.parametrize(
    ("toy", "name"),
    [
        ("llama", "int8"),
        ("llama", "int4"),
        ("llama", "int8-dynamic"),
        pytest.param("gpt2", "fp32", marks=pytest.mark.slow),
    ],
)
def test_packed_weights_of_odd_widths_begin_where_kernels_read_them(toy: str, name: str, tmp_path: Path) -> None:
    """In graphs of both sources: that of gpt2 is traced."""
    pruned(tmp_path / "checkpoint", toy, hidden_size=96, num_hidden_layers=1)
    precision = replace(PRECISIONS[name], max_perplexity_ratio=1e9, min_argmax_agreement=0.0)
    export(tmp_path / "checkpoint", tmp_path / "bundle", precisions=[precision])
    bundle = open_bundle(tmp_path / "bundle")
    offsets = packed_offsets(pack(bundle).graph)
    assert offsets
    assert not any(offset % 64 for offset in offsets)
    result = validate(bundle, threads=1)
    assert (result.passed, result.is_packed) == (True, True)


def test_every_weight_is_moved_with_its_bytes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = random.bytes(200_000)
    places = {"large": (3, 70_000), "small": (70_001, 100), "first": (0, 40)}
    blobs = [(100_001, 333), (150_007, 64)]
    weights = []
    for name, (offset, length) in places.items():
        tensor = TensorProto(name=name, data_type=TensorProto.UINT8, dims=[length])
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": "a.onnx_data", "offset": str(offset), "length": str(length)}
        if name == "first":
            del entries["offset"]  # which is then 0
        if name == "small":
            entries["prepacked_0"] = "|".join(["Kernel+7", *(f"{at};{length};0" for at, length in blobs)])
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=entries[key]) for key in entries)
        weights.append(tensor)
    inside = onnx.numpy_helper.from_array(np.ones(3, np.float32), "inside")
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [*weights, inside])), tmp_path / "a.onnx")
    (tmp_path / "a.onnx_data").write_bytes(data)
    align(tmp_path / "a.onnx", tmp_path / "b.onnx")
    moved = (tmp_path / "b.onnx_data").read_bytes()
    model = onnx.load(tmp_path / "b.onnx", load_external_data=False)
    found = {
        weight.name: {entry.key: entry.value for entry in weight.external_data} for weight in model.graph.initializer
    }
    assert found.pop("inside") == {}
    for name, (offset, length) in places.items():
        assert (found[name]["location"], found[name]["length"]) == ("b.onnx_data", str(length))
        begin = int(found[name]["offset"])
        assert begin % (4096 if name == "large" else 64) == 0
        assert moved[begin : begin + length] == data[offset : offset + length]
    head, *entries_ = found["small"]["prepacked_0"].split("|")
    assert head == "Kernel+7"
    for entry, (offset, length) in zip(entries_, blobs, strict=True):
        begin, *rest = map(int, entry.split(";"))
        assert (begin % 64, rest) == (0, [length, 0])
        assert moved[begin : begin + length] == data[offset : offset + length]


def test_what_computes_something_else_is_not_kept_and_an_earlier_copy_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, bundle = names_in(folder), open_bundle(folder)

    def spoil(source: Path, target: Path) -> None:
        align(source, target)
        data = target.with_name("model.onnx_data")
        spoiled = np.frombuffer(data.read_bytes(), np.uint8) ^ np.uint8(1)
        data.write_bytes(spoiled.tobytes())

    with monkeypatch.context() as patch:
        patch.setattr(packing, "align", spoil)
        with pytest.raises(GateError, match=r"packed weights of fp32 give other logits .*the bundle runs as before"):
            pack(bundle)
        assert names_in(folder) == before
        patch.undo()
    copy = pack(bundle)
    kept = names_in(folder)
    monkeypatch.setattr(packing, "align", spoil)
    with pytest.raises(GateError):
        pack(bundle)
    assert names_in(folder) == kept
    assert find_packed(bundle) == copy


def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names_in(folder)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing, "align", full)
    with pytest.raises(EdgepruneError, match="no disk space left"):
        pack(open_bundle(folder))
    assert names_in(folder) == before


def test_little_disk_is_refused_before_anything_is_packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "DISK_FACTOR", 1e12)
    monkeypatch.setattr(packing, "_save_packed", lambda *_: pytest.fail("packed"))
    with pytest.raises(EdgepruneError, match="no disk space left"):
        pack(open_bundle(folder))
    assert "packed" not in names_in(folder)


def test_a_copy_is_replaced_and_copies_of_other_variants_stay(folder: Path) -> None:
    bundle = open_bundle(folder)
    pack(bundle)
    (folder / "packed/fp32/left").touch()
    shutil.copytree(folder / "packed/fp32", folder / "packed/int4")
    assert pack(bundle).is_usable
    assert {"packed/int4/left", "packed/fp32/left"} & names_in(folder) == {"packed/int4/left"}


def test_what_cannot_be_packed_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    bundle = open_bundle(folder)
    with pytest.raises(EdgepruneError, match="ORT format"):
        pack(replace(bundle, ort_file="ort/model.ort"))
    (folder / "packed/fp32").mkdir(parents=True)
    (folder / "packed/fp32/mine").touch()
    with pytest.raises(EdgepruneError, match="is not a packed copy and is in its place"):
        pack(bundle)
    shutil.rmtree(folder / "packed")
    (tmp_path / "elsewhere").mkdir()
    (folder / "packed").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EdgepruneError, match="reached through a link"):
        pack(bundle)
    assert not names_in(tmp_path / "elsewhere")
    (folder / "packed").unlink()
    (folder / GRAPH).write_bytes(b"no graph")
    with pytest.raises(EdgepruneError, match=r"cannot pack .*model\.onnx"):
        pack(bundle)
    assert "packed" not in names_in(folder)


def test_key_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(EdgepruneError, match="set XDG_DATA_HOME"):
        pack(open_bundle(folder))
    assert "packed" not in names_in(folder)


def test_loads_are_compared_in_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(folder)
    pack(bundle)
    asked: list[bool] = []

    def observed(request: Request) -> Any:
        done = run_worker(request)
        asked.append(request.takes_packed)
        assert done.is_packed == request.takes_packed
        return done

    monkeypatch.setattr(packing, "run_worker", observed)
    progress: list[tuple[int, int]] = []
    plain, packed = compare_loads(bundle, rounds=2, threads=1, progress=lambda *done: progress.append(done))
    assert asked == [False, True, True, False]
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert min(plain.load_ms, packed.load_ms) > 0
    with pytest.raises(EdgepruneError, match="rounds is 0"):
        compare_loads(bundle, rounds=0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_packed_weights_are_no_memory_of_the_process(tmp_path: Path) -> None:
    wide = Layer(heads=4, kv_heads=2, head_dim=16, channels=120_000)
    bundle = open_bundle(write_bundle(tmp_path / "bundle", layers=(wide, wide)))
    pack(bundle)
    plain, packed = compare_loads(bundle, rounds=1, threads=1)
    assert plain.own_rss_bytes is not None
    assert packed.own_rss_bytes is not None
    assert plain.own_rss_bytes - packed.own_rss_bytes > 0.7 * bundle.size_bytes
    times = [load.times(bundle.size_bytes) for load in (plain, packed)]
    assert times[0] is not None
    assert times[1] is not None
    assert times[1] < 0.8 * times[0]


def test_a_device_needs_no_torch_to_pack() -> None:
    code = "import sys, edgeprune_export.packing, edgeprune.cli.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_trained_model_of_narrow_layers_is_right_packed(stories260k: Path, tmp_path: Path, name: str) -> None:
    """Written as ONNX Runtime leaves them, its packed weights begin anywhere, and logits are not numbers."""
    export(stories260k, tmp_path / "bundle", precisions=[PRECISIONS[name]])
    bundle = open_bundle(tmp_path / "bundle")
    raw = tmp_path / "raw.onnx"
    packing._save_packed(bundle.graph_path, raw)
    assert any(offset % 64 for offset in packed_offsets(raw))
    copy = pack(bundle)
    assert not any(offset % 64 for offset in packed_offsets(copy.graph))
    logits, _ = Decoder(bundle).forward(np.arange(1, 200)[None])
    expected, _ = Decoder(bundle, graph=bundle.graph_path).forward(np.arange(1, 200)[None])
    assert np.isfinite(logits).all()
    assert np.array_equal(logits, expected)
    assert validate(bundle).passed
