"""One model in a fresh process, by the same plain loop whatever runs it: JSON in, JSON out.

Standard input holds a request, the last line of standard output what came of it. Other people's runtimes have
environments of their own, so this file needs numpy and the one package that its engine is made of, nothing of ours:

    onnx    a graph in ONNX Runtime; the cache is written in place where the graph can, as llama.cpp does, and else
            goes from outputs to inputs by IO binding; logits of the last token alone where the graph can, too
    llama   a GGUF file in llama.cpp, through the C functions of llama-cpp-python
    read    no model: how long two passes of memory take, for the floor under decoding
"""

import contextlib
import ctypes
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]

DTYPES: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
LOGITS_TO_KEEP = "num_logits_to_keep"
WARM_STEPS = 4
READ_PASSES = 12
SEED = 0
PAGE_BYTES = 1 << 16
PROBES = 64
"""Places of a file that are looked up in the page cache to see whether it is gone from there."""

RESIDENT = {"anonymous": "RssAnon", "file": "RssFile"}
"""Kinds of memory of a process: its own, and pages of files, which the system can drop and read again."""
SAMPLE_SECONDS = 0.005


class Engine(Protocol):
    """A model with a cache that it is now in."""

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def forward(self, ids: npt.NDArray[np.int64], *, every: bool = False) -> Logits:
        """Logits (T, V) of new tokens (T,); of the last one alone, (1, V), unless `every` is asked for."""
        ...


class Onnx:
    """Any decoder graph with `input_ids`, an attention mask, and past and present keys and values."""

    def __init__(self, request: dict[str, Any]) -> None:
        import onnxruntime

        self._ort = onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = request["threads"], 1
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(request["file"], options, providers=["CPUExecutionProvider"])
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._fed = [name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs]
        self._past = [name for name in inputs if name.startswith("past_key_values.")]
        if unknown := inputs.keys() - {*self._fed, *self._past}:
            raise ValueError(f"{request['file']} has inputs that the loop does not know: {sorted(unknown)}")
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        overridable = [value.name for value in self._session.get_overridable_initializers()]
        self._can_keep_last = LOGITS_TO_KEEP in overridable
        self._in_place = request["writes_in_place"]
        slots = request["context_tokens"] if self._in_place else 0
        # The heads are numbers in every graph; some leave the last dimension to a name.
        self._shapes = {
            name: (1, inputs[name].shape[1], slots, _number(inputs[name].shape[3], request["head_dim"]))
            for name in self._past
        }
        self._vocabulary = request["vocab_size"]
        # Every value inside such a graph has the type of its cache; logits are float32 in some that are float16.
        self._dtype = DTYPES[inputs[self._past[0]].type]
        logits = next(value for value in self._session.get_outputs() if value.name == "logits")
        self._logits_dtype = DTYPES[logits.type]
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        empty = self._ort.OrtValue.ortvalue_from_numpy
        self._cache = [empty(np.empty(self._shapes[name], self._dtype)) for name in self._past]
        self._binding = self._bind() if self._in_place else None
        self._tokens = 0

    def forward(self, ids: npt.NDArray[np.int64], *, every: bool = False) -> Logits:
        """Logits (T, V) of new tokens (T,); of the last one alone, (1, V), unless `every` is asked for."""
        total = self._tokens + len(ids)
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._tokens, total)[None],
        }
        binding = self._binding or self._bind()
        for name in self._fed:
            binding.bind_cpu_input(name, feeds[name])
        rows = len(ids)
        if self._can_keep_last:
            rows = rows if every else 1
            keep = self._ort.OrtValue.ortvalue_from_numpy(np.array([rows], np.int64))
            binding.bind_ortvalue_input(LOGITS_TO_KEEP, keep)  # bind_cpu_input knows inputs alone
        logits = np.empty((1, rows, self._vocabulary), self._logits_dtype)
        binding.bind_ortvalue_output("logits", self._ort.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(binding)
        if not self._in_place:
            self._cache = binding.get_outputs()[:-1]
        self._tokens = total
        return logits[0] if every else logits[0, -1:]

    def _bind(self) -> Any:
        """A binding of the cache, which stays where it is if it is written in place."""
        binding = self._session.io_binding()
        for past, present, value in zip(self._past, self._present, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            if self._in_place:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, "cpu")
        return binding


class Llama:
    """A GGUF file in llama.cpp, without the sampling and the copies of its Python loop."""

    def __init__(self, request: dict[str, Any]) -> None:
        llama_cpp: Any = importlib.import_module("llama_cpp")  # not in the environment that types are checked in
        self._api = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(request["file"].encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise ValueError(f"llama.cpp cannot load {request['file']}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = request["context_tokens"]
        settings.n_threads = settings.n_threads_batch = request["threads"]
        self._context = llama_cpp.llama_init_from_model(model, settings)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(request["context_tokens"], 0, 1)
        self._tokens = 0

    def reset(self) -> None:
        """Forget all tokens."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._tokens = 0

    def forward(self, ids: npt.NDArray[np.int64], *, every: bool = False) -> Logits:
        """Logits (T, V) of new tokens (T,); of the last one alone, (1, V), unless `every` is asked for."""
        batch, last = self._batch, len(ids) - 1
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids.tolist()):
            batch.token[index], batch.pos[index] = token, self._tokens + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index == last
        if self._api.llama_decode(self._context, batch):
            raise ValueError(f"llama.cpp failed on {len(ids)} tokens")
        self._tokens += len(ids)
        rows = len(ids) if every else 1
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (rows, self._vocabulary)).copy()


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load a model, from the disk if `cold`; then a first request, then the measured one, or texts to judge it by."""
    is_cold = None
    if request["cold"]:
        evicted = [_evict(Path(file)) for file in request["files"]]
        is_cold = all(evicted)
    make: Callable[[dict[str, Any]], Engine] = Onnx if request["engine"] == "onnx" else Llama
    # What the engine is made of is no part of loading a model.
    importlib.import_module("onnxruntime" if request["engine"] == "onnx" else "llama_cpp")
    before = _status("VmRSS")
    kinds_before = {kind: _status(name) or 0 for kind, name in RESIDENT.items()}
    with _peaks() as peaks:
        began = time.perf_counter()
        engine = make(request)
        load_ms = _ms_since(began)
    found: dict[str, Any] = {
        "load_ms": load_ms,
        "rss_before_bytes": before,
        "load_peak_rss_bytes": _status("VmHWM"),
        **{f"load_peak_{kind}_bytes": peak - kinds_before[kind] for kind, peak in peaks.items()},
        "is_cold": is_cold,
    }
    if request["texts"]:
        return found | {"texts": [_judge(engine, np.array(text, np.int64)) for text in request["texts"]]}
    prompt = np.random.default_rng(SEED).integers(0, request["vocab_size"], request["prompt_tokens"])
    _, first_ms, *_ = _generate(engine, prompt, min(WARM_STEPS, request["generate_tokens"]))
    found["first_token_ms"] = found["load_ms"] + first_ms
    if not request["cold"]:
        tokens, ttft_ms, *step_ms = _generate(engine, prompt, request["generate_tokens"])
        found |= {"ttft_ms": ttft_ms, "step_ms": step_ms, "tokens": tokens}
    return found | {"peak_rss_bytes": _status("VmHWM")}


def _generate(engine: Engine, prompt: npt.NDArray[np.int64], count: int) -> Any:
    """Tokens generated greedily, milliseconds to the first one, then of each further one."""
    engine.reset()
    ids, tokens, times = prompt, [], []
    for _ in range(count):
        began = time.perf_counter()
        token = int(engine.forward(ids)[-1].argmax())
        times.append(_ms_since(began))
        tokens.append(token)
        ids = np.array([token], np.int64)
    return tokens, *times


def _judge(engine: Engine, ids: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Nats of each token behind those before it, and the likeliest token at each place."""
    engine.reset()
    logits = engine.forward(ids, every=True)[:-1].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    nats = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), ids[1:]]
    return {"nats": float(nats.sum()), "likeliest": logits.argmax(1).tolist()}


def read_memory(request: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the fastest pass over an array of each size, by so many threads at once."""
    threads: int = request["threads"]
    fastest = {}
    with ThreadPoolExecutor(threads) as pool:
        for size in request["sizes"]:
            # A product of a vector with itself does nothing but read, and lets go of Python's lock.
            parts = [np.ones(size // (4 * threads), np.float32) for _ in range(threads)]
            passes = []
            for _ in range(READ_PASSES):
                began = time.perf_counter()
                list(pool.map(np.dot, parts, parts))
                passes.append(_ms_since(began))
            fastest[str(size)] = min(passes)
            del parts
    return {"pass_ms": fastest}


def _evict(file: Path) -> bool:
    """Ask the kernel to forget a file's pages, which needs no rights; whether it did."""
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return False
    with file.open("rb") as opened:
        handle, size = opened.fileno(), file.stat().st_size
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        # To look a page up may bring it in; without read-ahead only that page, which is then thrown out again.
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        is_gone = not any(_is_cached(handle, place) for place in range(0, size, max(PAGE_BYTES, size // PROBES)))
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return is_gone


def _is_cached(handle: int, place: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return os.preadv(handle, [bytearray(1)], place, os.RWF_NOWAIT) > 0
    return False


@contextlib.contextmanager
def _peaks() -> Iterator[dict[str, int]]:
    """The most memory of each kind while the code inside runs; the kernel keeps the peak of their sum alone."""
    peaks = dict.fromkeys(RESIDENT, 0)
    ended = threading.Event()

    def look() -> None:
        for kind, name in RESIDENT.items():
            peaks[kind] = max(peaks[kind], _status(name) or 0)

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()
        look()


def _number(dimension: int | str, otherwise: int) -> int:
    return dimension if isinstance(dimension, int) else otherwise


def _status(name: str) -> int | None:
    """A line of the kernel's account of this process, in bytes; None where there is none."""
    path = Path("/proc/self/status")
    lines: Sequence[str] = path.read_text("ascii").splitlines() if path.exists() else ()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), None)


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


@contextlib.contextmanager
def _only_results() -> Iterator[Any]:
    """Standard output for the result alone: C libraries write to it as they like."""
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "w", encoding="utf-8") as out:
        yield out


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    with _only_results() as out:
        json.dump(read_memory(request) if request["engine"] == "read" else measure(request), out)


if __name__ == "__main__":
    main()
