"""Folders that appear complete under their name, or not at all.

    .NAME.<token>.part   being written; becomes NAME
    .NAME.<token>.old    the earlier NAME while the new one takes its place; back under its name if that fails

No call swaps two folders at once everywhere, so a power cut between the two renames leaves no NAME: then the next run
that means to write NAME puts the earlier one back first. A `.part` may belong to a run that still goes on, so it is
named, and deleting it is left to the user; except where a lock keeps a second writer of NAME out (`remove_parts`).
"""

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeprune_runtime.errors import EdgepruneError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A sort of folder, of which one may be replaced by another of the same sort and by nothing else.

    Attributes:
        what: what a person calls it ("a bundle").
        markers: files that every one holds, by their paths inside.
        parts: all that one may hold; None where that differs from one to the next.
    """

    what: str
    markers: tuple[str, ...]
    parts: frozenset[str] | None = None

    def includes(self, folder: Path) -> bool:
        """Whether a folder is of this sort."""
        is_marked = not folder.is_symlink() and all((folder / marker).is_file() for marker in self.markers)
        return is_marked and (self.parts is None or {path.name for path in folder.iterdir()} <= self.parts)


def check_output(out: Path, *, force: bool, kind: Kind, is_locked: bool = False) -> None:
    """Check that a folder may be written as `out`; call it before the long work.

    Args:
        out: the folder.
        force: an earlier one may be replaced.
        kind: its sort; a folder of another is never replaced.
        is_locked: a lock keeps a second writer out, and the caller will remove what a dead one left (`remove_parts`).

    Raises:
        EdgepruneError: if something stands there that may not be replaced, or nothing may be written there.
    """
    try:
        out.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _refused(out, error) from error
    _put_back(out.absolute())
    for part in [] if is_locked else _siblings(out.absolute(), "part"):
        logger.warning("%s belongs to a run that still goes on or was cut off; if none goes on, delete it", part)
    existing = _nearest_folder(out)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise EdgepruneError(f"cannot write {out}: {existing} is no folder to write to; choose another")
    _check_replaceable(out, force=force, kind=kind)


def check_apart(out: Path, *inputs: Path) -> None:
    """Check that writing `out` takes nothing away that is read for it.

    Raises:
        EdgepruneError: if it is one of the inputs, or holds one.
    """
    for path in inputs:
        is_there = os.path.exists(path)  # noqa: PTH110 - Path's own fails on a name that is too long
        if is_there and path.resolve().is_relative_to(out.resolve()):
            raise EdgepruneError(f"{out} is or holds {path}, which is read; choose another output")


def remove_parts(out: Path) -> None:
    """Delete what runs that were cut off left half-written beside `out`; hold the lock of its writers meanwhile."""
    for part in _siblings(out.absolute(), "part"):
        shutil.rmtree(part, ignore_errors=True)


def _check_replaceable(out: Path, *, force: bool, kind: Kind) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise EdgepruneError(f"{out} exists already; choose another name, or replace it with --force")
    if not kind.includes(out) and not (out.is_dir() and not any(out.iterdir())):
        raise EdgepruneError(f"{out} is not {kind.what}, so --force does not replace it; choose another name")


def check_space(out: Path, wanted_bytes: int) -> None:
    """Check that the disk has room for what will be written.

    Raises:
        EdgepruneError: if it has not.
    """
    free_bytes = shutil.disk_usage(_nearest_folder(out)).free
    if free_bytes < wanted_bytes:
        raise EdgepruneError(
            f"no disk space left for {out}: {wanted_bytes / 1e6:,.0f} MB are needed, {free_bytes / 1e6:,.0f} MB are "
            "free; make room or choose another disk"
        )


@contextmanager
def atomic_folder(out: Path, *, force: bool, kind: Kind) -> Iterator[Path]:
    """A hidden sibling of `out` that takes its place when the block ends well, and vanishes when it does not.

    The block may take hours, so what stands at `out` by its end is held against the rules of `check_output` again.

    Args:
        out: the folder.
        force: an earlier one may be replaced.
        kind: its sort; a folder of another is never replaced.

    Raises:
        EdgepruneError: if the system refuses to write, or something stands there that may not be replaced; it is
            untouched then.
    """
    out = out.absolute()
    _put_back(out)
    token = secrets.token_hex(4)
    part, old = (out.with_name(f".{out.name}.{token}.{end}") for end in ("part", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except OSError as error:
        raise _refused(out, error) from error
    try:
        yield part
        _check_replaceable(out, force=force, kind=kind)
        if out.exists():
            out.rename(old)
        try:
            part.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise _refused(out, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _nearest_folder(out: Path) -> Path:
    """What exists on the way to `out` and is nearest to it."""
    out = out.absolute()
    return next(parent for parent in (*out.parents, out) if parent.exists())


def _refused(out: Path, error: OSError) -> EdgepruneError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EdgepruneError(f"no disk space left for {out}; make room or choose another disk")
    return EdgepruneError(f"cannot write {out} ({error.strerror}); choose a folder you may write to")


def _siblings(out: Path, end: str) -> list[Path]:
    """Hidden folders `.NAME.<token>.<end>` beside `out`."""
    if not out.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.{end}")
    return [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)]


def _put_back(out: Path) -> None:
    """Give an earlier folder its name back that a run moved aside and then died."""
    left = [] if os.path.lexists(out) else _siblings(out, "old")
    if left:
        newest = max(left, key=lambda path: path.stat().st_mtime)
        newest.rename(out)
        logger.warning("put back %s, which a run that was cut off had moved aside as %s", out, newest.name)
