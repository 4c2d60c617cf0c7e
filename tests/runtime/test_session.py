"""Cached decoding equals one full forward, batches equal their rows alone, and what the graph cannot do is refused."""

import dataclasses
import errno
import json
import math
import mmap
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny_bundle import CONTEXT, GRAPH, edit_manifest, record

from edgeprune.cli.device import evaluate
from edgeprune_runtime.bundle import Manifest, open_bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.generate import Generation
from edgeprune_runtime.limits import MAX_THREADS, own_rss_bytes
from edgeprune_runtime.session import (
    PREFILL_CHUNK_TOKENS,
    PROVIDERS,
    Decoder,
    OutOfMemoryError,
    Side,
    make_session,
    writes_in_place,
)
from edgeprune_runtime.tensorrt import MAX_TOKENS
from edgeprune_runtime.validate import validate

ATOL = 1e-4
ROWS = [list(range(5, 25)), list(range(40, 47)), [9]]


@pytest.fixture(scope="module")
def both(both_folder: Path) -> Decoder:
    return Decoder(open_bundle(both_folder), threads=1)


@pytest.fixture(scope="module")
def right(right_folder: Path) -> Decoder:
    return Decoder(open_bundle(right_folder), threads=1)


@pytest.mark.parametrize("room_tokens", [0, 19, 40])
@pytest.mark.parametrize("split", [1, 7, 19])
def test_cached_decoding_equals_full_forward(both: Decoder, right: Decoder, split: int, room_tokens: int) -> None:
    for decoder in (both, right):
        ids = np.array([ROWS[0]])
        full, _ = decoder.forward(ids)
        logits, cache = decoder.prefill([ids[0, :split]], room_tokens=room_tokens)
        np.testing.assert_allclose(logits, full[:, split - 1], atol=ATOL)
        for index in range(split, ids.shape[1]):
            logits, cache = decoder.step(ids[:, index], cache)
            np.testing.assert_allclose(logits, full[:, index], atol=ATOL)


@pytest.mark.parametrize(
    ("graph_source", "provider", "kv_type", "expected"),
    [
        ("decoder", "cpu", "tensor(float)", True),
        ("decoder", "cpu", "tensor(float16)", False),
        ("decoder", "cuda", "tensor(float)", False),
        ("traced", "cpu", "tensor(float)", False),
    ],
)
def test_only_fused_attention_on_the_cpu_in_float32_writes_in_place(
    graph_source: str, provider: str, kv_type: str, expected: bool
) -> None:
    bundle: Any = SimpleNamespace(variant=SimpleNamespace(graph_source=graph_source))
    assert writes_in_place(bundle, provider, kv_type) is expected


def test_room_ends_with_the_context(both: Decoder) -> None:
    _, cache = both.prefill([ROWS[0]], room_tokens=10**6)
    assert cache.room is not None
    assert cache.room.tokens == CONTEXT


def test_no_memory_for_the_room_is_said(both: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **_flags: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("edgeprune_runtime.session.mmap.mmap", no_memory)
    with pytest.raises(OutOfMemoryError, match="room for 30 tokens; ask for fewer new tokens"):
        both.prefill([ROWS[0]], room_tokens=10)


@pytest.mark.parametrize("room_tokens", [0, 3, 8])
@pytest.mark.parametrize(("padding", "side"), [("both", "left"), ("both", "right"), ("right", "right")])
def test_rows_of_a_padded_batch_equal_rows_alone(
    both: Decoder, right: Decoder, padding: str, side: Side, room_tokens: int
) -> None:
    decoder = both if padding == "both" else right
    batch, cache = decoder.prefill(ROWS, side=side, room_tokens=room_tokens)
    alone = [decoder.prefill([row]) for row in ROWS]
    for token in (3, 77, 200):
        np.testing.assert_allclose(batch, np.concatenate([logits for logits, _ in alone]), atol=ATOL)
        batch, cache = decoder.step([token] * len(ROWS), cache)
        alone = [decoder.step([token], past) for _, past in alone]
    np.testing.assert_allclose(batch, np.concatenate([logits for logits, _ in alone]), atol=ATOL)


def test_left_padding_is_refused_where_the_graph_is_wrong_with_it(right: Decoder) -> None:
    with pytest.raises(EdgepruneError, match="computes left-padded batches wrongly"):
        right.prefill(ROWS, side="left")
    ids, mask = right.pad(ROWS)
    with pytest.raises(EdgepruneError, match="only behind the tokens"):
        right.forward(ids[:, ::-1].copy(), mask[:, ::-1].copy())
    _, cache = right.forward(ids, mask)
    with pytest.raises(EdgepruneError, match="only behind the tokens"):
        right.forward(ids, mask, cache)


def test_long_prompt_goes_in_by_pieces(both: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PREFILL_CHUNK_TOKENS > 20
    whole, _ = both.prefill([ROWS[0]])
    monkeypatch.setattr("edgeprune_runtime.session.PREFILL_CHUNK_TOKENS", 6)
    for room_tokens in (0, 2):
        pieces, cache = both.prefill([ROWS[0]], room_tokens=room_tokens)
        np.testing.assert_allclose(pieces, whole, atol=ATOL)
        assert cache.tokens == len(ROWS[0])


def test_cache_with_room_stays_where_it_is_and_may_be_continued_anew(both: Decoder, right: Decoder) -> None:
    for decoder in (both, right):
        _, before = decoder.prefill([ROWS[0]], room_tokens=2)
        places = [value.data_ptr() for value in before.values]
        first, after = decoder.step([3], before)
        second, last = decoder.step([77], after)
        assert all([value.data_ptr() for value in cache.values] == places for cache in (after, last))
        again, after = decoder.step([3], before)
        np.testing.assert_array_equal(again, first)
        np.testing.assert_array_equal(decoder.step([77], after)[0], second)
        with pytest.raises(ValueError, match=f"{len(ROWS[0]) + 3} tokens do not fit"):
            decoder.step([3], last)


def test_cache_that_was_overwritten_in_place_is_refused(both: Decoder) -> None:
    _, before = both.prefill([ROWS[0]], room_tokens=3)
    _, once = both.step([3], before)
    _, twice = both.step([4], once)
    expected, _ = both.step([5], once)  # what overwrites the second token leaves the first
    with pytest.raises(ValueError, match="the cache was overwritten in place"):
        both.step([5], twice)
    _, otherwise = both.step([77], before)
    for lost in (once, twice):
        with pytest.raises(ValueError, match="the cache was overwritten in place"):
            both.step([5], lost)
    both.step([5], otherwise)
    np.testing.assert_array_equal(both.step([5], both.step([3], before)[1])[0], expected)


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="only Linux is asked for huge pages")
def test_room_takes_memory_as_it_is_written(both: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(both, "manifest", dataclasses.replace(both.manifest, context_tokens=1 << 18))
    before = own_rss_bytes()
    assert before is not None
    _, cache = both.prefill([ROWS[0]], room_tokens=1 << 18)
    whole = sum(math.prod(value.shape()) * 4 for value in cache.values)
    after = own_rss_bytes()
    assert after is not None
    assert after - before < whole // 100


def test_cache_without_room_is_left_as_it_was(both: Decoder) -> None:
    _, before = both.prefill([ROWS[0]])
    held = [value.numpy().copy() for value in before.values]
    _, after = both.step([3], before)
    assert not {value.data_ptr() for value in before.values} & {value.data_ptr() for value in after.values}
    for value, was in zip(before.values, held, strict=True):
        np.testing.assert_array_equal(value.numpy(), was)


def test_graph_without_fused_attention_gives_each_step_a_cache_of_its_own(plain: Path) -> None:
    _, cache = Decoder(open_bundle(plain), threads=1).prefill([ROWS[0]], room_tokens=2)
    assert cache.room is None
    assert all(value.shape()[2] == len(ROWS[0]) for value in cache.values)


@pytest.mark.parametrize("padding", ["both", "right"])
def test_long_batch_of_equal_rows_equals_rows_alone(
    both: Decoder, right: Decoder, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = both if padding == "both" else right
    monkeypatch.setattr("edgeprune_runtime.session.PREFILL_CHUNK_TOKENS", 6)
    rows = [ROWS[0], ROWS[0][::-1]]
    batch, cache = decoder.prefill(rows)
    np.testing.assert_allclose(batch, np.concatenate([decoder.prefill([row])[0] for row in rows]), atol=ATOL)
    assert cache.tokens == len(ROWS[0])


@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 12, 13])
def test_last_piece_may_be_of_any_length(both: Decoder, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[0][:tokens]
    full, _ = both.forward(np.array([row]))
    monkeypatch.setattr("edgeprune_runtime.session.PREFILL_CHUNK_TOKENS", 6)
    np.testing.assert_allclose(both.prefill([row])[0], full[:, -1], atol=ATOL)


def test_equal_rows_need_no_padding_and_are_taken_on_either_side(right: Decoder) -> None:
    left, _ = right.prefill([ROWS[0], ROWS[0]], side="left")
    np.testing.assert_allclose(left, right.prefill([ROWS[0], ROWS[0]])[0], atol=ATOL)


def test_several_tokens_of_several_rows_behind_a_cache_are_refused(both: Decoder) -> None:
    ids = np.array([ROWS[0], ROWS[0]])
    _, cache = both.forward(ids[:, :5])
    with pytest.raises(EdgepruneError, match="give the rows one by one"):
        both.forward(ids[:, 5:], cache=cache)
    both.forward(ids[:, 5:6], cache=cache)


def test_padding_on_both_sides_is_taken_and_holes_in_a_first_prompt_are_refused(both: Decoder) -> None:
    ids = np.array([ROWS[0][:6]])
    around = np.array([[0, 1, 1, 1, 1, 0]], bool)
    alone, _ = both.forward(ids[:, 1:5])
    np.testing.assert_allclose(both.forward(ids, around)[0][:, 1:5], alone, atol=ATOL)
    for mask in ([1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 0]):
        with pytest.raises(EdgepruneError, match="zeros between its tokens"):
            both.forward(ids, np.array([mask], bool))


def test_context_is_not_exceeded(both: Decoder) -> None:
    _, cache = both.prefill([[1] * CONTEXT])
    with pytest.raises(EdgepruneError, match=f"{CONTEXT + 1} tokens were asked for"):
        both.step([1], cache)
    with pytest.raises(EdgepruneError, match="shorten the prompt"):
        both.prefill([[1] * (CONTEXT + 1)])


def test_bad_tokens_are_refused(both: Decoder) -> None:
    with pytest.raises(EdgepruneError, match="outside the bundle's vocabulary"):
        both.prefill([[10**6]])
    with pytest.raises(EdgepruneError, match="outside the bundle's vocabulary"):
        both.prefill([[-1]])
    with pytest.raises(EdgepruneError, match="no tokens"):
        both.prefill([[]])


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1, 2**40])
def test_number_of_threads_that_cannot_be_is_refused(both_folder: Path, threads: int) -> None:
    with pytest.raises(EdgepruneError, match=f"threads is {threads}; 1 to {MAX_THREADS} were expected"):
        make_session(both_folder / GRAPH, threads=threads)


def test_provider_that_is_not_here_is_named(both_folder: Path) -> None:
    graph = both_folder / GRAPH
    with pytest.raises(EdgepruneError, match="unknown provider 'gpu'; known: cpu"):
        make_session(graph, provider="gpu")
    if "QNNExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(EdgepruneError, match=r"has no provider 'qnn', it has .*cpu"):
            make_session(graph, provider="qnn")


def test_fall_back_of_a_provider_is_not_silent(both_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with (
        pytest.warns(UserWarning, match="not in available provider"),
        pytest.raises(EdgepruneError, match=r"could not be started|cannot load"),
    ):
        make_session(both_folder / GRAPH, provider="cuda")


def test_provider_that_takes_no_node_is_refused(both_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune_runtime.session.nodes_by_provider", lambda _: {"OtherExecutionProvider": 9})
    with pytest.raises(EdgepruneError, match="takes no node"):
        make_session(both_folder / GRAPH)


class Accelerated:
    """A session that ran on the CPU, and says it had run where it was asked to."""

    asked: ClassVar[list[Any]] = []
    real = onnxruntime.InferenceSession

    def __init__(self, graph: str, options: Any, *, providers: list[Any], **named: Any) -> None:
        self.asked[:] = providers
        first = providers[0]
        self._name = first if isinstance(first, str) else first[0]
        self._session = self.real(graph, options, providers=["CPUExecutionProvider"], **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [self._name, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [SimpleNamespace(ep_name=self._name, get_nodes=lambda: [1])]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a session was asked to run on, of all providers that there are."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Accelerated)
    return Accelerated.asked


MLPROGRAM = {"ModelFormat": "MLProgram"}


def test_only_tensorrt_is_told_of_a_pattern_of_zeros_and_coreml_of_its_format(folder: Path, asked: list[Any]) -> None:
    assert not open_bundle(folder).is_sparse
    for provider, name in PROVIDERS.items():
        Decoder(open_bundle(folder), provider=provider, threads=1)
        assert asked == [(name, MLPROGRAM) if provider == "coreml" else name]
    edit_manifest(folder, results={"zeros": {"weights": 8, "nonzeros": 4, "allowed": 4, "broken": 0}})
    assert open_bundle(folder).is_sparse
    told = {"coreml": MLPROGRAM, "tensorrt": {"trt_sparsity_enable": "1"}}
    for provider, name in PROVIDERS.items():
        Decoder(open_bundle(folder), provider=provider, threads=1)
        assert asked == [(name, told[provider]) if provider in told else name]


Profile = dict[str, tuple[range, ...]]
"""What each input's dimensions may be."""


def pairs(shapes: str) -> list[list[str]]:
    return [each.split(":") for each in shapes.split(",")]


def profile_of(asked: list[Any]) -> Profile:
    [(name, options)] = asked
    assert name == "TensorrtExecutionProvider"
    low, high = (
        {name: tuple(map(int, shape.split("x"))) for name, shape in pairs(options[key])}
        for key in ("trt_profile_min_shapes", "trt_profile_max_shapes")
    )
    return {name: tuple(range(a, b + 1) for a, b in zip(low[name], high[name], strict=True)) for name in low}


@pytest.fixture
def plain(right_folder: Path, tmp_path: Path) -> Path:
    """A bundle of the kind that TensorRT takes as a whole, by its own account."""
    folder = shutil.copytree(right_folder, tmp_path / "plain")
    variants = json.loads((folder / "edgeprune.json").read_text())["variants"]
    variants["fp32"]["graph_source"] = "plain"
    edit_manifest(folder, variants=variants)
    return folder


@pytest.fixture
def fed(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of all inputs of every run on TensorRT; each must be what the session was asked to hold."""
    shapes: list[dict[str, tuple[int, ...]]] = []
    run = Decoder._run

    def recorded(self: Decoder, feeds: Any, cache: Any, out: Any, *, last: bool) -> Any:
        batch, past = feeds["input_ids"].shape[0], cache.tokens
        found = {name: value.shape for name, value in feeds.items()}
        for index, layer in enumerate(self.manifest.layers):
            for part in ("key", "value"):
                found[f"past_key_values.{index}.{part}"] = (batch, layer.kv_heads, past, layer.head_dim)
        profile = profile_of(asked)
        assert profile.keys() == found.keys()
        for name, shape in found.items():
            assert all(size in sizes for size, sizes in zip(shape, profile[name], strict=True)), (name, shape)
        shapes.append(found)
        return run(self, feeds, cache, out, last=last)

    monkeypatch.setattr("edgeprune_runtime.session._CACHE_DEVICE", {})
    monkeypatch.setattr(Decoder, "_run", recorded)
    return shapes


def test_whatever_is_fed_to_tensorrt_lies_in_the_profile_it_was_told(
    plain: Path, fed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text to the end of the context, a prompt in pieces, rows of a batch, and a window larger than a piece."""
    monkeypatch.setattr("edgeprune_runtime.session.PREFILL_CHUNK_TOKENS", 6)
    bundle = open_bundle(plain)
    list(Generation(Decoder(bundle, provider="tensorrt", threads=1), [7] * 20, max_new_tokens=CONTEXT))
    assert fed[-1]["past_key_values.0.key"][2] == CONTEXT - 1
    assert max(shapes["input_ids"][1] for shapes in fed) == 6
    assert validate(bundle, provider="tensorrt", threads=1).passed
    assert max(shapes["input_ids"][0] for shapes in fed) == 4
    (tmp_path / "text").write_text("some text " * 30)
    evaluate(plain, tmp_path / "text", window=64, provider="tensorrt", threads=1, quiet=True)
    assert fed[-1]["input_ids"] == (1, 64)


def test_engine_is_no_larger_than_memory_allows(plain: Path, asked: list[Any]) -> None:
    edit_manifest(plain, context_tokens=1 << 31)
    decoder = Decoder(open_bundle(plain), provider="tensorrt", threads=1)
    assert decoder.manifest.context_tokens == MAX_TOKENS
    assert profile_of(asked)["past_key_values.0.key"][2].stop == MAX_TOKENS
    with pytest.raises(EdgepruneError, match=f"{MAX_TOKENS + 1} tokens were asked for.*shorten the prompt"):
        decoder.prefill([[7] * (MAX_TOKENS + 1)])


def test_graphs_that_tensorrt_takes_in_pieces_get_no_profile(plain: Path, folder: Path, asked: list[Any]) -> None:
    """It would have to name the inputs of every piece."""
    Decoder(open_bundle(folder), provider="tensorrt", threads=1)
    assert asked == ["TensorrtExecutionProvider"]
    Decoder(open_bundle(plain), provider="cuda", threads=1)
    assert asked == ["CUDAExecutionProvider"]


def test_sparse_bundle_runs_on_the_cpu_as_any_other(folder: Path, both: Decoder) -> None:
    edit_manifest(folder, results={"zeros": {"weights": 8, "nonzeros": 4, "allowed": 4, "broken": 0}})
    found, _ = Decoder(open_bundle(folder), threads=1).prefill([ROWS[0]])
    np.testing.assert_allclose(found, both.prefill([ROWS[0]])[0], atol=ATOL)


def test_stale_kv_shapes_are_refused(folder: Path) -> None:
    layers = json.loads((folder / "edgeprune.json").read_text())["layers"]
    layers[1]["kv_heads"] = 3
    edit_manifest(folder, layers=layers)
    with pytest.raises(EdgepruneError, match=r"shape .* for past_key_values.1.key; the manifest states 3 KV heads"):
        Decoder(open_bundle(folder))
    edit_manifest(folder, layers=layers[:1])
    with pytest.raises(EdgepruneError, match=r"disagree on input 'past_key_values\.1\.key'"):
        Decoder(open_bundle(folder))


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(folder: Path, location: str) -> None:
    (folder.parent / "outside.bin").write_bytes(bytes(1 << 16))
    (folder / "outside.bin").write_bytes(bytes(1 << 16))
    model = onnx.load(folder / GRAPH, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / GRAPH).write_bytes(model.SerializeToString())
    record(folder, Manifest.load(folder))
    with pytest.raises(EdgepruneError, match="cannot load"):
        Decoder(open_bundle(folder, verify=True))


def test_corrupted_graph_is_one_line(folder: Path) -> None:
    (folder / GRAPH).write_bytes(b"\x00" * 100)
    record(folder, Manifest.load(folder))
    with pytest.raises(EdgepruneError, match="ONNX Runtime cannot load") as error:
        Decoder(open_bundle(folder))
    assert "\n" not in str(error.value)
