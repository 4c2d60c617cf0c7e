"""Folders that appear complete under their name, or not at all."""

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeprune_runtime.errors import EdgepruneError


def check_output(out: Path, *, force: bool, marker: str, what: str) -> None:
    """Check that a folder may be written as `out`; call it before the long work.

    Args:
        out: the folder.
        force: an earlier one may be replaced.
        marker: a file that every folder of this kind holds; a folder without it is never replaced.
        what: what a person calls the kind ("a bundle").

    Raises:
        EdgepruneError: if something stands there that may not be replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise EdgepruneError(f"{out} exists already; choose another name, or replace it with --force")
    is_ours = (out / marker).is_file() and not out.is_symlink()
    if not is_ours and not (out.is_dir() and not any(out.iterdir())):
        raise EdgepruneError(f"{out} is not {what}, so --force does not replace it; choose another name")


def check_space(out: Path, wanted_bytes: int) -> None:
    """Check that the disk has room for what will be written.

    Raises:
        EdgepruneError: if it has not.
    """
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < wanted_bytes:
        raise EdgepruneError(
            f"no disk space left for {out}: {wanted_bytes:,} bytes are needed, {free_bytes:,} are free; "
            "make room or choose another disk"
        )


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        EdgepruneError: if the system refuses to write; an earlier folder is untouched then.
    """
    out = out.absolute()
    token = secrets.token_hex(4)
    part, old = (out.with_name(f".{out.name}.{token}.{end}") for end in ("part", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EdgepruneError(f"no disk space left for {out}; make room or choose another disk") from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise EdgepruneError(f"cannot write {out} ({error.strerror}); choose a folder you may write to") from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
