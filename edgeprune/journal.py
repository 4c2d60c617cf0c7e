"""What a run has finished, on disk, so that the same command continues where a killed one stopped.

A run is a chain of steps with names ("statistics-17", "plan", "cut-3"). A step that is done is *remembered* as one
entry: a few tensors and a few facts (JSON). `remember` is the whole idea: it makes the entry, or finds it made:

    entry = journal.remember("cut-3", lambda: Entry(tensors, facts))

On disk an entry is one safetensors file (facts in its metadata) in the hidden folder `.NAME.work` beside the output
NAME. It is written under another name, flushed to the disk, and renamed, so that it is there whole or not at all, at
whatever point the process or the machine dies. What a later step reads is what was written, so that a run that was cut
off ends with the same bytes as one that was not. Large things are read back when they are needed and not held.

Between the steps flow hidden states, too large to be rewritten for every step: `rows` is a plain file of rows that is
read and written in slices. It counts for something only once the entry of the step that wrote it exists.

The folder belongs to one fingerprint (model, settings, calibration, version, number of processes). Unfinished work
with another fingerprint is discarded, which is said. A lock keeps a second run with the same output out. The folder
goes when the run succeeds, and when it ends with an error that another command has to mend; it stays after a kill, an
interrupt, a crash, a full disk, or a gate that said no.

Without a folder a journal remembers in memory: the same code serves callers that want no files.
"""

import errno
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from edgeprune.weights import SafetensorsWriter, TensorHeader, bytes_of, read_tensor
from edgeprune_runtime.errors import EdgepruneError, GateError

FINGERPRINT_FILE = "journal.json"
LOCK_FILE = "lock"
ENTRY_SUFFIX, ROWS_SUFFIX, PART_SUFFIX = ".safetensors", ".rows", ".part"
FACTS = "facts"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What a finished step leaves: named tensors, and facts that JSON can hold."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Any = None


class Rows(Protocol):
    """Rows of one tensor `(N, ...)`, read and written in slices; what is read is a copy."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> torch.Tensor: ...
    def __setitem__(self, rows: slice, values: torch.Tensor) -> None: ...
    def flush(self) -> None:
        """Bring everything written so far to the disk."""


class Journal:
    """Finished steps by name, in a folder, or in memory where `folder` is None."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._entries: dict[str, Entry] = {}
        self._rows: dict[str, Rows] = {}

    def __contains__(self, name: str) -> bool:
        return self._file(name).is_file() if self.folder else name in self._entries

    @property
    def is_empty(self) -> bool:
        """Whether no step is done."""
        return not any(self.folder.glob(f"*{ENTRY_SUFFIX}")) if self.folder else not self._entries

    @property
    def size_bytes(self) -> int:
        """What its entries and rows take on disk; folders that others keep inside it are theirs."""
        files = self.folder.glob("*") if self.folder else ()
        return sum(file.stat().st_size for file in files if file.is_file())

    def remember(self, name: str, make: Callable[[], Entry]) -> Entry:
        """The entry of a step: read back if it is there, else made and put."""
        if name not in self:
            self.put(name, make())
        return self.entry(name)

    def put(self, name: str, entry: Entry) -> None:
        """Keep an entry; on disk it appears whole or not at all."""
        if self.folder is None:
            self._entries[name] = entry
            return
        file = self._file(name)
        part = file.with_suffix(PART_SUFFIX)
        headers = {key: TensorHeader.of(tensor) for key, tensor in entry.tensors.items()}
        with SafetensorsWriter(part, headers, {FACTS: json.dumps(entry.facts)}) as writer:
            for key, tensor in entry.tensors.items():
                writer.write(key, tensor)
        part.replace(file)  # also one of this name that was put before
        _sync_folder(self.folder)

    def entry(self, name: str) -> Entry:
        """The entry of a finished step."""
        if self.folder is None:
            return self._entries[name]
        with safe_open(self._file(name), framework="pt") as stored:
            tensors = {key: stored.get_tensor(key).clone() for key in stored.keys()}  # noqa: SIM118 - no mapping
            return Entry(tensors, json.loads(stored.metadata()[FACTS]))

    def facts(self, name: str) -> Any:
        """The facts of a finished step, without its tensors."""
        if self.folder is None:
            return self._entries[name].facts
        with safe_open(self._file(name), framework="pt") as stored:
            return json.loads(stored.metadata()[FACTS])

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """One tensor of a finished step."""
        return self._entries[name].tensors[key] if self.folder is None else read_tensor(self._file(name), key)

    def rows(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Rows:
        """Rows by name, with what was written to them before."""
        if self.folder is not None:
            return _FileRows(self._file(name, ROWS_SUFFIX), tuple(shape), dtype)
        return self._rows.setdefault(name, _MemoryRows(torch.empty(tuple(shape), dtype=dtype)))

    def forget(self, *names: str) -> None:
        """Drop entries and rows that no later step reads; unknown names do no harm."""
        for name in names:
            self._entries.pop(name, None)
            self._rows.pop(name, None)
            if self.folder is not None:
                for suffix in (ENTRY_SUFFIX, ROWS_SUFFIX):
                    self._file(name, suffix).unlink(missing_ok=True)

    def _file(self, name: str, suffix: str = ENTRY_SUFFIX) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{suffix}"


@contextmanager
def open_journal(out: Path, fingerprint: Mapping[str, Any], *, rank: int = 0) -> Iterator[Journal]:
    """The journal of the run that writes `out`, locked while the block inside runs.

    Args:
        out: the output; the journal's folder lies beside it.
        fingerprint: named parts of what the steps depend on; of JSON values.
        rank: number of this process among those that share the work; each has a folder of its own.

    Raises:
        EdgepruneError: if another run holds the journal, or nothing may be written there.
    """
    folder = work_folder(out, rank)
    with _locked(folder, out):
        _claim(folder, json.loads(json.dumps(fingerprint)))
        journal = Journal(folder)
        try:
            with _full_disk_is_said(folder):
                yield journal
        except EdgepruneError as error:
            # Another command has to mend it, and that has another fingerprint. After a full disk the same one goes on,
            # and where a gate said no, one with the same fingerprint may get through, such as with a --precision.
            if not isinstance(error, GateError) and not isinstance(error.__cause__, OSError):
                shutil.rmtree(folder)
            raise
        except BaseException:
            if journal.is_empty:
                shutil.rmtree(folder)
            else:
                logger.warning("what is done so far lies in %s; the same command continues from there", folder)
            raise
        shutil.rmtree(folder)


def work_folder(out: Path, rank: int = 0) -> Path:
    """Where the journal of `out` lies."""
    out = out.absolute()
    return out.with_name(f".{out.name}.work" if rank == 0 else f".{out.name}.work-{rank}")


def _claim(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Make the folder that of this fingerprint; what another one left is discarded."""
    file = folder / FINGERPRINT_FILE
    part = file.with_suffix(PART_SUFFIX)
    found, strange = None, set[str]()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        strange = {path.name for path in folder.iterdir()} - {LOCK_FILE, part.name}
    except ValueError:
        logger.warning("%s is damaged", file)
    if found == fingerprint:
        for path in folder.glob(f"*{PART_SUFFIX}"):
            _remove(path)
        return
    if strange:
        raise EdgepruneError(
            f"{folder} holds {min(strange)}, and nothing says that a run of edgeprune has left it there; delete the "
            "folder, or choose another output"
        )
    if isinstance(found, dict) and found:
        other = sorted(name for name in found.keys() | fingerprint.keys() if found.get(name) != fingerprint.get(name))
        logger.warning(
            "%s holds unfinished work of a command with another %s; it is discarded", folder, ", another ".join(other)
        )
    _put_fingerprint(part, {})  # from here on what is left is nobody's, even if this run dies before it is gone
    for path in folder.iterdir():
        if path not in (folder / LOCK_FILE, file):
            _remove(path)
    _put_fingerprint(part, fingerprint)


def _put_fingerprint(part: Path, fingerprint: Mapping[str, Any]) -> None:
    part.write_text(json.dumps(fingerprint), encoding="utf-8")
    part.rename(part.with_name(FINGERPRINT_FILE))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def passing_journal() -> Iterator[Journal]:
    """A journal in a temporary folder, for a run that leaves nothing: it goes when the block inside ends."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as name, _full_disk_is_said(Path(name)):
        yield Journal(Path(name))


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it when the process dies, however it dies."""
    if folder.is_symlink():
        raise EdgepruneError(f"{folder} is a link, and unfinished work wants a folder of its own; remove the link")
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = (folder / LOCK_FILE).open("wb")
        except FileNotFoundError:
            continue  # a run that just ended took the folder with it between our two calls
        except OSError as error:
            raise EdgepruneError(f"cannot write {folder} ({error.strerror}); choose another output") from error
        with stream:
            if not _try_lock(stream.fileno()):
                raise EdgepruneError(f"another run is writing {out} just now; wait for it, or choose another output")
            if _is_same_file(folder / LOCK_FILE, stream.fileno()):  # or a run that just ended took it with it
                yield
                return


def _is_same_file(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def _full_disk_is_said(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EdgepruneError(
            f"no disk space left for {folder}; make room, the same command continues from what is done"
        ) from error


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _MemoryRows:
    """Rows in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self._tensor = tensor

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._tensor[rows].clone()

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        self._tensor[rows] = values.to(self._tensor.dtype)

    def flush(self) -> None:
        pass


class _FileRows:
    """Rows in a file, by plain reads and writes: a mapping would count as this process' memory."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self._dtype = dtype
        self._file = file
        self._row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()
        with file.open("ab") as stream:
            stream.truncate(shape[0] * self._row_bytes)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        values = torch.empty((stop - start, *self.shape[1:]), dtype=self._dtype)
        with self._file.open("rb") as stream:
            stream.seek(start * self._row_bytes)
            read = stream.readinto(bytes_of(values))
        assert read == values.nbytes, f"{self._file} is shorter than its shape"
        return values

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        start, stop, _ = rows.indices(self.shape[0])
        assert values.shape == (stop - start, *self.shape[1:]), "rows of another shape"
        with self._file.open("r+b") as stream:
            stream.seek(start * self._row_bytes)
            stream.write(bytes_of(values.detach().to(self._dtype).contiguous()))

    def flush(self) -> None:
        with self._file.open("rb") as stream:
            os.fsync(stream.fileno())
