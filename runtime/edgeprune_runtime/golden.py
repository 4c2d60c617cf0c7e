"""Golden sequences: what the torch model computed, so that a device without torch can check that it computes the same.

`golden.npz` holds for each case n: `ids_{n}` int64 (T,), `positions_{n}` int64 (P,), `logits_{n}` float32 (P, V), the
torch model's logits at these positions of a full prefill, and `greedy_{n}` int64 (G,), its greedy continuation.
"""

import itertools
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeprune_runtime.bundle import Bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.session import Ids, Logits
from edgeprune_runtime.untrusted import blaming

MAX_GOLDEN_BYTES = 1 << 30


@dataclass(frozen=True)
class GoldenCase:
    """One sequence: ids (T,), positions (P,), the torch model's logits (P, V) there, its greedy continuation (G,)."""

    ids: Ids
    positions: Ids
    logits: Logits
    greedy: Ids


def save_golden(path: Path, cases: Sequence[GoldenCase]) -> None:
    """Write the cases as `golden.npz`."""
    arrays: dict[str, npt.NDArray[np.int64 | np.float32]] = {}
    for index, case in enumerate(cases):
        arrays[f"ids_{index}"] = case.ids.astype(np.int64)
        arrays[f"positions_{index}"] = case.positions.astype(np.int64)
        arrays[f"logits_{index}"] = case.logits.astype(np.float32)
        arrays[f"greedy_{index}"] = case.greedy.astype(np.int64)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_golden(bundle: Bundle) -> list[GoldenCase]:
    """The golden cases of a bundle.

    Raises:
        EdgepruneError: if the file is broken, or a case does not fit the bundle's vocabulary or itself.
    """
    path = bundle.file(bundle.golden)
    # zipfile, its decompressors and numpy's parser of headers raise a dozen kinds of errors, SyntaxError among them
    with blaming(f"{path} is not golden data", "copy the bundle again"), zipfile.ZipFile(path) as archive:
        names = {Path(info.filename).stem: info for info in archive.infolist()}
        if sum(info.file_size for info in names.values()) > MAX_GOLDEN_BYTES:
            raise EdgepruneError(f"{path} unpacks to more than {MAX_GOLDEN_BYTES >> 20} MiB; it is not golden data")
        cases = []
        for index in itertools.count():
            if f"ids_{index}" not in names:
                break
            ids, positions, greedy = (
                _read_array(archive, names[f"{part}_{index}"], np.int64, 1).astype(np.int64)
                for part in ("ids", "positions", "greedy")
            )
            logits = _read_array(archive, names[f"logits_{index}"], np.float32, 2).astype(np.float32)
            cases.append(GoldenCase(ids, positions, logits, greedy))
    if not cases:
        raise EdgepruneError(f"{path} holds no golden sequence; make the bundle again")
    for index, case in enumerate(cases):
        _check_case(case, bundle, f"{path} case {index}")
    return cases


def _read_array(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, dtype: npt.DTypeLike, ndim: int
) -> npt.NDArray[np.generic]:
    """An array whose header promises no more than its entry holds (`numpy.load` would take the memory first)."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{info.filename} is of npy version {version}")
        shape, is_fortran, found = np.lib.format.read_array_header_1_0(file)
        size_bytes = math.prod(shape) * found.itemsize
        if found != dtype or len(shape) != ndim or is_fortran or size_bytes > info.file_size:
            raise ValueError(f"{info.filename} is {found} of shape {shape}, not {dtype} of {ndim} dimensions")
        return np.frombuffer(file.read(size_bytes), found).reshape(shape)


def _check_case(case: GoldenCase, bundle: Bundle, where: str) -> None:
    vocab, context = bundle.manifest.vocab_size, bundle.manifest.context_tokens
    tokens = np.concatenate([case.ids, case.greedy])
    problems = {
        "its sequence is empty or longer than the context": not 1 <= len(tokens) <= context or not len(case.ids),
        "it has token ids outside the vocabulary": bool(((tokens < 0) | (tokens >= vocab)).any()),
        "its positions are outside its sequence": bool(
            ((case.positions < 0) | (case.positions >= len(case.ids))).any()
        ),
        "its logits do not fit its positions": case.logits.shape != (len(case.positions), vocab)
        or not len(case.logits),
        "its logits are not finite": not np.isfinite(case.logits).all(),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise EdgepruneError(f"{where}: {problem}; make the bundle again")
