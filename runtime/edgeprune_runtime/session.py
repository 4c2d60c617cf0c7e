"""ONNX Runtime sessions over a bundle, and the decoder that keeps their KV cache."""

import contextlib
import math
import mmap
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime
import onnxruntime.capi.onnxruntime_pybind11_state as ort_errors

from edgeprune_runtime.bundle import ORT_SUFFIX, Bundle, Manifest
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.limits import MAX_THREADS, usable_cpus
from edgeprune_runtime.packed import PackedCopy, usable_packed
from edgeprune_runtime.tensorrt import for_engine, shape_profile

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, OrtValue

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Side = Literal["left", "right"]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cann": "CANNExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
"""Short names of ONNX Runtime's execution providers."""

_PACKAGES = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "directml": "onnxruntime-directml",
    "openvino": "onnxruntime-openvino",
    "coreml": "onnxruntime for macOS",
}
"""What carries an execution provider, where a Python package does."""

# The KV cache stays where the provider computes; every other provider takes it from ordinary memory.
_CACHE_DEVICE = {"cuda": "cuda", "tensorrt": "cuda", "tensorrt-rtx": "cuda"}
_DTYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

# A long prompt goes in by pieces, so that its logits (tokens x vocabulary x 4 bytes) never take much memory.
PREFILL_CHUNK_TOKENS = 512

LOGITS_TO_KEEP = "num_logits_to_keep"
"""An initializer of a graph that a caller may override: of how many last positions there are logits. 0, its own value,
is all of them; runtimes that know nothing of it get these. A prompt needs the last one's alone."""

# ONNX Runtime derives its errors from Exception one by one and shares no parent between them.
ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,  # a kernel's failure under IO binding
)


class OutOfMemoryError(EdgepruneError):
    """The memory at hand, or the limit set, does not hold the model and its cache."""


# What a provider is told beside the graph is ours or follows from widths: no option comes from a bundle, which is not
# trusted, and options name folders and libraries too.
_OPTIONS = {"coreml": {"ModelFormat": "MLProgram"}}
"""What a provider is told whatever it runs; CoreML's older format, its default, takes fewer products."""
_SPARSE_OPTIONS = {"tensorrt": {"trt_sparsity_enable": "1"}}
"""What lets a provider use kernels for weights of which two in four are zero; it takes them where they are faster."""


def make_session(
    graph: Path,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    is_sparse: bool = False,
    shapes: Mapping[str, str] | None = None,
    keeps_memory: bool = True,
) -> "InferenceSession":
    """A session over a graph, at the optimisation level that ships, on exactly the provider asked for.

    Args:
        graph: The ONNX file, its external data in its folder; or one in the ORT format, for the CPU alone.
        provider: A key of `PROVIDERS`.
        threads: Threads inside an operator, 1 to `MAX_THREADS`; None takes `usable_cpus()`, which heeds affinity and
            container quota.
        is_sparse: Weights have zeros in a pattern, which TensorRT is told.
        shapes: Provider options with the shapes that will come (see `tensorrt.py`).
        keeps_memory: What a run has used stays for the next one, which is faster, and takes more.

    Raises:
        EdgepruneError: if the provider is unknown, is not in this build of ONNX Runtime or did not start, or if the
            graph cannot be loaded.
    """
    name = provider_name(provider)
    told = {**_OPTIONS.get(provider, {}), **(_SPARSE_OPTIONS.get(provider, {}) if is_sparse else {}), **(shapes or {})}
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise EdgepruneError(f"threads is {threads}; 1 to {MAX_THREADS} were expected")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = keeps_memory
    # Only fatal ones: warnings are for ONNX Runtime's developers, and errors reach the person as exceptions.
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if is_ort := graph.suffix == ORT_SUFFIX:
        if provider != "cpu":
            raise EdgepruneError(
                f"provider {provider!r} was asked for, and {graph} does not say which of its nodes that would take; "
                "give the bundle's folder, or ask for --provider cpu"
            )
        # Its weights stay in the file, mapped into memory.
        options.add_session_config_entry("session.use_memory_mapped_ort_model", "1")
        options.add_session_config_entry("session.use_ort_model_bytes_for_initializers", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(graph), options, providers=[(name, told) if told else name], enable_fallback=0
        )
    except MemoryError as error:
        raise OutOfMemoryError(f"not enough memory to load {graph}") from error
    except ORT_ERRORS as error:
        raise _ort_error(f"ONNX Runtime cannot load {graph}", error) from error
    if session.get_providers()[0] != name:
        raise EdgepruneError(
            f"provider {provider!r} could not be started here, ONNX Runtime would use {session.get_providers()[0]}; "
            "check its driver and libraries, or ask for --provider cpu"
        )
    if not is_ort and name not in nodes_by_provider(session):
        raise EdgepruneError(
            f"provider {provider!r} takes no node of {graph}, all would run on the CPU; ask for --provider cpu"
        )
    return session


def nodes_by_provider(session: "InferenceSession") -> dict[str, int]:
    """How many of the graph's nodes each execution provider runs; what one cannot take goes to the CPU.

    Empty for a file in the ORT format, which does not say.
    """
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def package_of(provider: str) -> str:
    """What to install for a provider, in words."""
    return _PACKAGES.get(provider, f"an onnxruntime with {provider}")


def is_available(provider: str) -> bool:
    """Whether this build of ONNX Runtime has a provider of `PROVIDERS`."""
    return PROVIDERS[provider] in onnxruntime.get_available_providers()


def provider_name(provider: str) -> str:
    """ONNX Runtime's name of a provider that this build has.

    Raises:
        EdgepruneError: if the short name is unknown or this build lacks the provider.
    """
    if provider not in PROVIDERS:
        raise EdgepruneError(f"unknown provider {provider!r}; known: {', '.join(PROVIDERS)}")
    if not is_available(provider):
        here = [short for short in PROVIDERS if is_available(short)]
        raise EdgepruneError(
            f"this ONNX Runtime {onnxruntime.__version__} has no provider {provider!r}, it has {', '.join(here)}; "
            f"install {package_of(provider)}, or take --provider cpu"
        )
    return PROVIDERS[provider]


@dataclass
class Room:
    """Slots for tokens to come, and what binds them to the graph, as they stay where they are.

    All caches that grow in it are the same memory. `stamps` are those of the caches whose tokens it still holds, each
    grown from the one before.
    """

    tokens: int
    binding: "IOBinding"
    stamps: list[int] = field(default_factory=lambda: [0])
    newest: int = 0

    def continue_from(self, stamp: int) -> int:
        """The stamp of what a cache grows into; what has grown from it before is overwritten.

        Raises:
            ValueError: if the cache itself was overwritten.
        """
        place = bisect(self.stamps, stamp)
        if self.stamps[:place][-1:] != [stamp]:
            raise ValueError("the cache was overwritten in place, as one that it grew from was continued otherwise")
        self.newest += 1
        self.stamps[place:] = [self.newest]
        return self.newest


@dataclass(frozen=True)
class KvCache:
    """Keys and values of a batch, as ONNX Runtime left them, and which of their slots are real tokens.

    `mask` is (B, S) bool. With `room`, new tokens are written in place behind the old ones, and `stamp` is this cache's
    among those that share it; without, each run gives values of its own.
    """

    values: tuple["OrtValue", ...]
    mask: npt.NDArray[np.bool_]
    room: Room | None = None
    stamp: int = 0

    @property
    def tokens(self) -> int:
        """Slots taken, padding included."""
        return int(self.mask.shape[1])


class Decoder:
    """A bundle's graph in a session: `prefill` takes prompts, `step` one more token for each row.

    The KV cache goes from a run's outputs to the next run's inputs inside ONNX Runtime, without a copy through numpy.
    ONNX Runtime itself copies all of it at every token, unless it was given room for the tokens to come.

    How padding reaches the graph depends on the manifest's `padding`. With "both" a row's prompt may stand anywhere in
    the first mask, with zeros before and behind it but none between its tokens: in a first prompt the fused attention
    counts positions by slot. New tokens are the mask's last columns; the zeros that a right-padded prompt then has
    before them are no harm. With "right" a row's mask is ones, then zeros, because the graph (GroupQueryAttention's
    `seqlens_k`) only counts them: it writes a new token right behind the row's last one, over the padding. What a graph
    would compute wrongly without any error is refused.

    `packed` is the packed copy that is run instead of the variant's own graph, None where there is none for this
    machine (see `packed.py`). `manifest` is the bundle's; on TensorRT its context may be shorter (see `tensorrt.py`).
    `writes_in_place` says whether a cache can have room for new tokens (see `prefill`).
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        graph: Path | None = None,
        rows: int = 1,
        tokens: int | None = None,
    ) -> None:
        """Open the session.

        Args:
            bundle: The bundle, its variant chosen.
            provider: A key of `PROVIDERS`.
            threads: As `make_session` takes them.
            graph: What to run; None takes the variant's packed copy where that is for this machine, else its graph.
            rows: The most that will come at once; TensorRT takes no more than it was told.
            tokens: The most new ones that a row will have at once, likewise; None: as `prefill` feeds one row.

        Raises:
            EdgepruneError: if it cannot be loaded, or is not what the manifest promises.
        """
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.provider = provider
        self.threads = threads or usable_cpus()
        self.packed: PackedCopy | None = usable_packed(bundle, provider) if graph is None else None
        graph = graph or (self.packed.graph if self.packed else bundle.graph_path)
        shapes = None
        if provider == "tensorrt" and bundle.variant.graph_source == "plain":  # of others it takes pieces
            tokens = tokens or PREFILL_CHUNK_TOKENS
            self.manifest = for_engine(bundle.manifest, tokens=tokens)
            shapes = shape_profile(self.manifest, rows=rows, tokens=tokens)
        self.session = make_session(
            graph, provider=provider, threads=self.threads, is_sparse=bundle.is_sparse, shapes=shapes
        )
        self._inputs = _check_signature(bundle.manifest, graph, self.session)
        self._keeps_logits = keeps_logits(self.session)
        # values, since ONNX Runtime binds an array by the name of an input alone
        self._kept = tuple(onnxruntime.OrtValue.ortvalue_from_numpy(np.array([count], np.int64)) for count in (0, 1))
        self._cache_device = _CACHE_DEVICE.get(provider, "cpu")
        kv_type = self._inputs["past_key_values.0.key"]
        self._cache_dtype = _DTYPES[kv_type]
        self.writes_in_place = writes_in_place(bundle, provider, kv_type)

    def prefill(
        self, rows: Sequence[Sequence[int] | Ids], *, side: Side | None = None, room_tokens: int = 0
    ) -> tuple[Logits, KvCache]:
        """Logits (B, V) float32 behind the last token of each row, and the cache that holds the rows.

        With `room_tokens` the cache has room for so many tokens more, as far as the context goes, and takes them in
        place, which is faster the more tokens it holds. Then a cache and the one that continues it are the same memory:
        a cache may be continued anew, which overwrites what it was continued with before. Where the graph or the
        provider cannot do it, each step gives a cache of its own.

        Rows of unequal lengths are padded on `side`; None takes the side that the bundle's graph is right with. One row
        goes in by pieces, which bounds its logits; several go in at once, because the fused attention of the CPU takes
        no second piece of a batch.

        Raises:
            EdgepruneError: if a row is empty or too long, the graph does not take padding on that side, or there is no
                memory for the room.
        """
        if not rows or min(map(len, rows)) < 1:
            raise EdgepruneError("a prompt has no tokens; give at least one")
        width = max(map(len, rows))
        check_context(self.manifest, width)
        ids, mask = self.pad(rows, side)
        piece_tokens = PREFILL_CHUNK_TOKENS if len(rows) == 1 else width
        empty = None
        if room_tokens > 0 and self.writes_in_place:
            empty = self._empty_cache(len(rows), min(width + room_tokens, self.manifest.context_tokens))
        last = bool(mask[:, -1].all())
        logits, cache = self.forward(ids[:, :piece_tokens], mask[:, :piece_tokens], empty, last=last)
        for start in range(piece_tokens, width, piece_tokens):
            logits, cache = self.forward(ids[:, start : start + piece_tokens], cache=cache, last=last)
        columns = logits.shape[1] - 1 - mask[:, : -logits.shape[1] - 1 : -1].argmax(1)
        return logits[np.arange(len(rows)), columns], cache

    def step(self, ids: Sequence[int] | Ids, cache: KvCache) -> tuple[Logits, KvCache]:
        """Logits (B, V) float32 after one more token per row, `ids` (B,), and the cache that holds it too."""
        logits, cache = self.forward(np.asarray(ids, np.int64)[:, None], cache=cache)
        return logits[:, 0], cache

    def pad(self, rows: Sequence[Sequence[int] | Ids], side: Side | None = None) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """The rows as one batch, ids (B, T) int64 and mask (B, T) bool, padded on `side`.

        Raises:
            EdgepruneError: if the bundle's graph does not take padding on that side.
        """
        side = side or ("right" if self.manifest.padding == "right" else "left")
        width = max(map(len, rows))
        if side == "left" and self.manifest.padding == "right" and min(map(len, rows)) < width:
            raise EdgepruneError(
                "left padding was asked for, but this bundle's graph computes left-padded batches wrongly; pad right"
            )
        ids = np.full((len(rows), width), self.manifest.pad_token_id or 0, np.int64)
        mask = np.zeros((len(rows), width), bool)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[index, place], mask[index, place] = row, True
        return ids, mask

    def forward(
        self,
        ids: Ids,
        mask: npt.NDArray[np.bool_] | None = None,
        cache: KvCache | None = None,
        *,
        last: bool = False,
        out: Logits | None = None,
    ) -> tuple[Logits, KvCache]:
        """Logits (B, T, V) float32 of new tokens behind a cache, and the cache with them.

        Args:
            ids: (B, T) int64.
            mask: (B, T) bool, False at padding; None means none is padding.
            cache: What came before; None at the start.
            last: Logits of the last column alone, (B, 1, V): most of the time the head needs for a prompt is saved.
            out: A float32 buffer of the shape of all logits, C-contiguous, to take them; not for `last`.

        Raises:
            EdgepruneError: if the context length is exceeded, a token id is outside the vocabulary, or the graph does
                not take such a mask, or several rows of several tokens behind a cache.
            ValueError: if the cache has no room for them, or was overwritten, as another was continued in its place.
        """
        batch, width = ids.shape
        cache = cache or self._empty_cache(batch)
        past = cache.tokens
        check_context(self.manifest, past + width)
        if cache.room and past + width > cache.room.tokens:
            raise ValueError(f"{past + width} tokens do not fit a cache with room for {cache.room.tokens}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.manifest.vocab_size:
            raise EdgepruneError(
                f"token id {int(ids.max())} is outside the bundle's vocabulary of {self.manifest.vocab_size}; "
                "the tokens are of another tokenizer"
            )
        new = np.ones((batch, width), bool) if mask is None else mask
        before = cache.mask
        full = self._full_mask(before, new)
        if past and min(batch, width) > 1 and self.bundle.variant.graph_source == "decoder":
            raise EdgepruneError(
                f"{batch} rows of {width} new tokens behind a cache were given; this bundle's fused attention takes "
                "one row or one token there, so give the rows one by one"
            )
        feeds = {"input_ids": np.ascontiguousarray(ids, np.int64), "attention_mask": full.astype(np.int64)}
        if "position_ids" in self._inputs:
            positions = before.sum(1, keepdims=True) + new.cumsum(1) - 1
            feeds["position_ids"] = np.maximum(positions, 0).astype(np.int64)
        stamp = cache.room.continue_from(cache.stamp) if cache.room else 0
        logits, values = self._run(feeds, cache, out, last=last)
        return logits[:, -1:] if last else logits, KvCache(values, full, cache.room, stamp)

    def _full_mask(self, before: npt.NDArray[np.bool_], new: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        if self.manifest.padding == "both":
            begins = np.diff(new, axis=1, prepend=False) & new
            if not before.shape[1] and begins.sum(1).max() > 1:
                raise EdgepruneError(
                    "the mask of a first prompt has zeros between its tokens; only padding before or behind them is "
                    "taken, so leave those tokens out"
                )
            return np.concatenate([before, new], axis=1)
        lengths = new.sum(1)
        is_ones_then_zeros = bool((new == (np.arange(new.shape[1]) < lengths[:, None])).all())
        if not is_ones_then_zeros or (before.shape[1] and not new.all()):
            raise EdgepruneError(
                "this bundle's graph takes padding only behind the tokens of a first prompt; pad right"
            )
        filled: npt.NDArray[np.bool_] = np.arange(before.shape[1] + new.shape[1]) < (before.sum(1) + lengths)[:, None]
        return filled

    def _run(
        self, feeds: dict[str, Ids], cache: KvCache, out: Logits | None, *, last: bool
    ) -> tuple[Logits, tuple["OrtValue", ...]]:
        batch, width = feeds["input_ids"].shape
        binding = cache.room.binding if cache.room else self._bind(cache.values, in_place=False)
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        if self._keeps_logits:
            binding.bind_ortvalue_input(LOGITS_TO_KEEP, self._kept[last])
        shape = (batch, 1 if last and self._keeps_logits else width, self.manifest.vocab_size)
        logits = out if out is not None else np.empty(shape, np.float32)
        if logits.shape != shape or not logits.flags.c_contiguous:
            raise ValueError(f"out has shape {logits.shape}, not that of the logits")
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        try:
            self.session.run_with_iobinding(binding)
        except MemoryError as error:
            raise OutOfMemoryError(f"not enough memory for {batch} x {width} tokens") from error
        except ORT_ERRORS as error:
            raise _ort_error(f"ONNX Runtime failed on {batch} x {width} tokens", error) from error
        return logits, cache.values if cache.room else tuple(binding.get_outputs()[:-1])

    def _bind(self, values: tuple["OrtValue", ...], *, in_place: bool) -> "IOBinding":
        """A binding of the cache, to which a run adds the rest; logits come last among its outputs."""
        binding = self.session.io_binding()
        for index, value in enumerate(values):
            layer, part = divmod(index, 2)
            name = f"{layer}.{'value' if part else 'key'}"
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            if in_place:
                binding.bind_ortvalue_output(f"present.{name}", value)
            else:
                binding.bind_output(f"present.{name}", self._cache_device)
        return binding

    def _empty_cache(self, batch: int, room_tokens: int | None = None) -> KvCache:
        slots = room_tokens or 0
        shapes = [(batch, layer.kv_heads, slots, layer.head_dim) for layer in self.manifest.layers for _ in range(2)]
        try:
            arrays = [_taken_by_pages(shape, self._cache_dtype) for shape in shapes]
        except (MemoryError, OSError) as error:
            raise OutOfMemoryError(
                f"not enough memory for a cache with room for {slots} tokens; ask for fewer new tokens"
            ) from error
        values = tuple(onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays)
        room = Room(room_tokens, self._bind(values, in_place=True)) if room_tokens else None
        return KvCache(values, np.zeros((batch, 0), bool), room)


def _taken_by_pages(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array that takes memory page by page, as it is written.

    numpy asks Linux for huge pages: each head of a long, nearly empty cache would take 2 MB with its first token.

    Raises:
        OSError, MemoryError: if there is no memory for it.
    """
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not size_bytes or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel that has no huge pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


def keeps_logits(session: "InferenceSession") -> bool:
    """Whether a graph computes the logits of the last position alone if it is asked to."""
    return LOGITS_TO_KEEP in {node.name for node in session.get_overridable_initializers()}


def writes_in_place(bundle: Bundle, provider: str, kv_type: str) -> bool:
    """Whether new keys and values, of this ONNX type, can be written behind the old ones.

    Only GroupQueryAttention does so. It was tried on the CPU alone, and in float32: a CPU that has no kernel for
    another type turns all of it into float32 and back, room that is empty included.
    """
    return bundle.variant.graph_source == "decoder" and provider == "cpu" and _DTYPES.get(kv_type) is np.float32


def check_context(manifest: Manifest, tokens: int) -> None:
    """Do nothing if so many tokens fit the model's context.

    Raises:
        EdgepruneError: if they do not.
    """
    if tokens > manifest.context_tokens:
        raise EdgepruneError(
            f"{tokens} tokens were asked for, the context holds {manifest.context_tokens}; shorten the prompt"
        )


def _check_signature(manifest: Manifest, graph: Path, session: "InferenceSession") -> dict[str, str]:
    """Input names and their ONNX types, once the graph's inputs and outputs are those that the manifest promises.

    Raises:
        EdgepruneError: naming the first input or output that differs.
    """
    found: dict[str, Sequence[int | str]] = {node.name: node.shape for node in session.get_inputs()}
    cache_names = set()
    for index, layer in enumerate(manifest.layers):
        for part in ("key", "value"):
            name = f"past_key_values.{index}.{part}"
            cache_names.add(name)
            shape = found.get(name)
            if shape is None or len(shape) != 4 or [shape[1], shape[3]] != [layer.kv_heads, layer.head_dim]:
                has = "no input" if shape is None else f"shape {list(shape)} for"
                raise EdgepruneError(
                    f"{graph} has {has} {name}; the manifest states {layer.kv_heads} KV heads of {layer.head_dim} "
                    "for that layer; make the bundle again"
                )
    plain = {"input_ids", "attention_mask"}
    wrong = sorted((plain | cache_names) - found.keys()) or sorted(
        found.keys() - plain - cache_names - {"position_ids"}
    )
    if wrong:
        raise EdgepruneError(f"{graph} and the manifest disagree on input {wrong[0]!r}; make the bundle again")
    outputs = {node.name: node for node in session.get_outputs()}
    wanted = {"logits"} | {name.replace("past_key_values", "present") for name in cache_names}
    if missing := sorted(wanted - outputs.keys()):
        raise EdgepruneError(f"{graph} has no output {missing[0]!r}; make the bundle again")
    vocab = outputs["logits"].shape[-1]
    if outputs["logits"].type != "tensor(float)" or (isinstance(vocab, int) and vocab != manifest.vocab_size):
        raise EdgepruneError(
            f"{graph} gives logits {outputs['logits'].type} of width {vocab}; "
            f"tensor(float) of {manifest.vocab_size} was expected"
        )
    types = {node.name: node.type for node in session.get_inputs()}
    if (dtype := types["past_key_values.0.key"]) not in _DTYPES:
        raise EdgepruneError(f"{graph} keeps its KV cache as {dtype}; one of {', '.join(_DTYPES)} was expected")
    return types


def _ort_error(what: str, error: Exception) -> EdgepruneError:
    reason = " ".join(str(error).split())
    if "bad_alloc" in reason or "Failed to allocate" in reason or "Cannot allocate memory" in reason:
        return OutOfMemoryError(f"not enough memory: {what} ({reason[:200]})")
    return EdgepruneError(f"{what}: {reason[:400]}; copy or make the bundle again")
