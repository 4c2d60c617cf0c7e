"""Packing: a variant's weights as the kernels of this machine want them, in a file instead of in memory.

    pack           BUNDLE/onnx/model_q4.onnx -> BUNDLE/packed/int4/, which sessions on this machine then map
    compare_loads  what that saves, in fresh processes

ONNX Runtime can write a graph with its packed weights, and puts them wherever the file happens to end. Kernels load
them as if every one began on a cache line: where it does not, logits are wrong or not numbers, and no error says so. So
the file is written again with each of them where it has to be, and a copy is kept only if every logit of the golden
sequences is, bit for bit, that of the variant's own graph. `packed.py` on the device's side says when a copy is run.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnxruntime

from edgeprune_export.external_data import CACHE_LINE_BYTES, alignment_of
from edgeprune_runtime.bench import largest, run_worker
from edgeprune_runtime.bundle import Bundle
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.golden import GoldenCase, load_golden
from edgeprune_runtime.limits import usable_cpus
from edgeprune_runtime.output import atomic_folder, check_output, check_space
from edgeprune_runtime.packed import (
    PACKED,
    PROVIDER,
    PackedCopy,
    find_packed,
    packed_folder,
    write_record,
)
from edgeprune_runtime.session import ORT_ERRORS, Decoder, Logits
from edgeprune_runtime.worker import Request, Round

DISK_FACTOR = 3.5
"""Bytes of a packed copy per byte of weights, at most: most CPUs want float16 as float32."""

PREPACKED = "prepacked_"
"""How the keys of packed weights begin in an initialiser's external data; `KERNEL+hash|offset;length;size|...` each."""

MIN_EXTERNAL_BYTES = 1024
COPY_BYTES = 1 << 20

_FAILURES: tuple[type[Exception], ...] = (*ORT_ERRORS, MemoryError)

Say = Callable[[str], None]
"""Hears what is being done."""


@dataclass(frozen=True)
class Load:
    """What loading takes, of several fresh processes: the median time, and the most memory.

    `before_rss_bytes` is resident before it, `peak_rss_bytes` at its peak; `own_rss_bytes` is memory of the process's
    own once the session is ready. Memory is None where the system does not tell.
    """

    load_ms: float
    before_rss_bytes: int | None
    peak_rss_bytes: int | None
    own_rss_bytes: int | None

    def times(self, size_bytes: int) -> float | None:
        """How many times so many bytes the load takes at its peak, beside what was there before."""
        if self.before_rss_bytes is None or self.peak_rss_bytes is None:
            return None
        return (self.peak_rss_bytes - self.before_rss_bytes) / size_bytes

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> "Load":
        """From what the processes measured."""
        return cls(
            statistics.median(each.load_ms for each in rounds),
            largest([each.before_rss_bytes for each in rounds]),
            largest([each.load_peak_rss_bytes for each in rounds]),
            largest([each.load_own_rss_bytes for each in rounds]),
        )


def pack(bundle: Bundle, *, say: Say = lambda what: None) -> PackedCopy:
    """Write the packed copy of the chosen variant, in place of an earlier one, and return it.

    Raises:
        GateError: if it computes something else. Nothing of it is left behind then.
        EdgepruneError: if the variant cannot be packed, or its bundle not be written to.
    """
    if bundle.ort_file is not None:
        raise EdgepruneError(f"{bundle.path} is in the ORT format, which holds no packed weights; give the folder")
    folder = packed_folder(bundle)
    # Its own words, as nobody asked for --force.
    if folder.exists() and not PACKED.includes(folder):
        raise EdgepruneError(f"{folder} is not {PACKED.what} and is in its place; move it away")
    check_output(folder, force=True, kind=PACKED)
    try:
        with atomic_folder(folder, force=True, kind=PACKED) as part:
            write_record(part, bundle, write_packed(bundle, part, say=say).name)
    finally:
        # Empty where no variant has a copy.
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
    copy = find_packed(bundle)
    assert copy is not None
    if not copy.is_usable:
        raise EdgepruneError(f"{folder} was changed while it was written ({copy.refusal}); pack again")
    return copy


def write_packed(bundle: Bundle, folder: Path, *, say: Say = lambda what: None) -> Path:
    """Write the packed graph of the chosen variant and its weights into a folder, and return the graph.

    Raises:
        GateError: if it computes something else.
        EdgepruneError: if ONNX Runtime cannot pack it, or the disk is full.
    """
    graph = folder / Path(bundle.variant.graph).name
    check_space(graph, round(DISK_FACTOR * bundle.size_bytes))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        say("packing")
        raw = Path(place) / graph.name
        _save_packed(bundle.graph_path, raw)
        check_space(graph, _data_of(raw).stat().st_size)
        say("aligning")
        align(raw, graph)
    say("comparing logits")
    _check_logits(bundle, graph)
    return graph


def compare_loads(
    bundle: Bundle, *, rounds: int, threads: int | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[Load, Load]:
    """What loading takes without and with the packed copy, in fresh processes that take turns.

    Raises:
        EdgepruneError: if a process cannot run the bundle.
    """
    if rounds < 1:
        raise EdgepruneError(f"rounds is {rounds}; at least 1 was expected")
    plain, packed = (
        Request(
            bundle=str(bundle.folder),
            variant=bundle.variant_name,
            provider=PROVIDER,
            threads=threads or usable_cpus(),
            prompt_tokens=1,
            generate_tokens=1,
            vocab_size=bundle.manifest.vocab_size,
            takes_packed=takes_packed,
        )
        for takes_packed in (False, True)
    )
    measured: dict[Request, list[Round]] = {plain: [], packed: []}
    for number in range(rounds):
        for index, request in enumerate((plain, packed) if number % 2 == 0 else (packed, plain)):
            measured[request].append(run_worker(request))
            if progress:
                progress(2 * number + index + 1, 2 * rounds)
    return Load.of(measured[plain]), Load.of(measured[packed])


def align(source: Path, target: Path) -> None:
    """Write a graph and its one file of external data again, with all weights where kernels can read them.

    Packed weights begin on a cache line; the others where ONNX Runtime can map them, as in every bundle.
    """
    model = onnx.load(source, load_external_data=False)
    with _data_of(source).open("rb") as read, _data_of(target).open("wb") as write:
        for tensor in model.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if not entries:
                continue
            entries["location"].value = _data_of(target).name
            length = int(entries["length"].value)
            offset = int(entries["offset"].value) if "offset" in entries else 0
            moved = _copy(read, write, offset, length, alignment_of(length))
            if "offset" in entries:
                entries["offset"].value = str(moved)
            else:
                tensor.external_data.append(onnx.StringStringEntryProto(key="offset", value=str(moved)))
            for key, entry in entries.items():
                if key.startswith(PREPACKED):
                    entry.value = _moved(entry.value, read, write)
    onnx.save(model, target)


def _moved(packed: str, read: BinaryIO, write: BinaryIO) -> str:
    """The entry of packed weights after each of them was copied."""
    head, *blobs = packed.split("|")
    places = []
    for blob in blobs:
        offset, length, size = blob.split(";")
        places.append(f"{_copy(read, write, int(offset), int(length), CACHE_LINE_BYTES)};{length};{size}")
    return "|".join([head, *places])


def _copy(read: BinaryIO, write: BinaryIO, offset: int, length: int, alignment: int) -> int:
    """Where so many bytes begin in the new file."""
    write.write(bytes(-write.tell() % alignment))
    begin = write.tell()
    read.seek(offset)
    for start in range(0, length, COPY_BYTES):
        write.write(read.read(min(COPY_BYTES, length - start)))
    return begin


def _data_of(graph: Path) -> Path:
    return graph.with_name(f"{graph.name}_data")


def _save_packed(graph: Path, target: Path) -> None:
    """Let ONNX Runtime write a graph as it runs it on this machine, with the weights as its kernels packed them."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = usable_cpus()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _data_of(target).name)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(MIN_EXTERNAL_BYTES)
    )
    try:
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except _FAILURES as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EdgepruneError(
            f"ONNX Runtime cannot pack {graph} ({reason}); see that there is memory and disk for it, or copy the "
            "bundle again"
        ) from error


def _check_logits(bundle: Bundle, packed: Path) -> None:
    """Do nothing if a packed graph computes the golden sequences bit for bit as the variant's own graph.

    Raises:
        GateError: if a logit differs.
    """
    cases = load_golden(bundle)
    # One after the other, so that the weights are in memory once.
    expected, found = (list(_logits(Decoder(bundle, graph=graph), cases)) for graph in (bundle.graph_path, packed))
    for ours, theirs in zip(found, expected, strict=True):
        # What is not a number equals nothing, itself included.
        if not np.array_equal(ours, theirs):
            raise GateError(
                f"the packed weights of {bundle.variant_name} give other logits (off by up to "
                f"{np.abs(ours - theirs).max():.3g}), so no packed copy is kept; the bundle runs as before"
            )


def _logits(decoder: Decoder, cases: Sequence[GoldenCase]) -> Iterator[Logits]:
    """Logits (N, V) of prompts at once, and behind them of single tokens, which other kernels compute."""
    for case in cases:
        prompt, cache = decoder.forward(case.ids[None])
        yield prompt[0, case.positions]
        for token in case.greedy[: decoder.manifest.context_tokens - len(case.ids)]:
            step, cache = decoder.step([token], cache)
            yield step
