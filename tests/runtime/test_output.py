"""A folder appears whole or not at all, whatever goes wrong, and an earlier one is never lost."""

import contextlib
import errno
import logging
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.output import Kind, atomic_folder, check_apart, check_output, check_space, remove_parts

MARKER = "marker.json"
THING = Kind("a thing", (MARKER,))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def earlier(folder: Path, marker: str = MARKER) -> Path:
    folder.mkdir()
    (folder / marker).write_text("earlier")
    return folder


def atomic(out: Path, *, force: bool = True) -> contextlib.AbstractContextManager[Path]:
    return atomic_folder(out, force=force, kind=THING)


def check(out: Path, *, force: bool = False) -> None:
    check_output(out, force=force, kind=THING)


def test_folder_is_hidden_until_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with atomic(out) as part:
        (part / "file").write_text("content")
        assert part.parent == out.parent
        assert part.name.startswith(".out.")
        assert not out.exists()
    assert names(out) == {"file"}
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing_and_keeps_the_earlier_one(tmp_path: Path, error: type[BaseException]) -> None:
    out = earlier(tmp_path / "out")

    def write_half() -> None:
        with atomic(out) as part:
            (part / "file").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == {"out"}
    assert (out / MARKER).read_text() == "earlier"


def test_new_one_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    out = earlier(tmp_path / "out")
    with atomic(out) as part:
        (part / MARKER).write_text("new")
    assert names(tmp_path) == {"out"}
    assert (out / MARKER).read_text() == "new"


def test_failed_swap_brings_the_earlier_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = earlier(tmp_path / "out")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"), atomic(out):
        pass
    assert names(tmp_path) == {"out"}
    assert (out / MARKER).read_text() == "earlier"


@pytest.mark.parametrize("next_run", ["check", "write"])
def test_next_run_puts_back_what_a_dead_run_moved_aside(
    tmp_path: Path, next_run: str, caplog: pytest.LogCaptureFixture
) -> None:
    earlier(tmp_path / ".out.0123abcd.old")
    (tmp_path / ".out.0123abcd.part").mkdir()
    (tmp_path / ".out.notours.old").mkdir()
    with caplog.at_level(logging.WARNING):
        if next_run == "check":
            with pytest.raises(EdgepruneError, match="exists already"):
                check(tmp_path / "out")
        else:
            with pytest.raises(RuntimeError), atomic(tmp_path / "out"):
                raise RuntimeError
    assert (tmp_path / "out" / MARKER).read_text() == "earlier"
    assert "put back" in caplog.text


def test_what_a_killed_run_left_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".out.0123abcd.part", ".other.0123abcd.part", ".outer.0123abcd.part"):
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.WARNING):
        check(tmp_path / "out")
    assert ".out.0123abcd.part" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no disk space left"),
        (errno.EDQUOT, "no disk space left"),
        (errno.EROFS, "you may write to"),
        (errno.EACCES, "you may write to"),
    ],
)
def test_what_the_system_refuses_is_one_line(tmp_path: Path, code: int, message: str) -> None:
    with pytest.raises(EdgepruneError, match=message), atomic(tmp_path / "out"):
        raise OSError(code, "no")
    assert not names(tmp_path)


def test_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgepruneError, match="no folder to write to"):
        check(tmp_path / "file" / "out")
    with pytest.raises(EdgepruneError, match="cannot write"), atomic(tmp_path / "file" / "out"):
        pass


def test_only_a_folder_of_the_same_kind_is_replaced_and_only_by_force(tmp_path: Path) -> None:
    check(tmp_path / "absent")
    ours, foreign = earlier(tmp_path / "ours"), earlier(tmp_path / "foreign", "thesis.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(ours)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for out in (ours, foreign, tmp_path / "empty", tmp_path / "link", tmp_path / "dangling"):
        with pytest.raises(EdgepruneError, match="exists already"):
            check(out)
    check(ours, force=True)
    check(tmp_path / "empty", force=True)
    for out in (foreign, tmp_path / "link", tmp_path / "dangling"):
        with pytest.raises(EdgepruneError, match="is not a thing, so --force does not replace it"):
            check(out, force=True)


def test_room_is_that_of_the_disk_the_folder_will_lie_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []

    def disk_usage(path: Path) -> object:
        asked.append(path)
        return usage(100, 0, 10**6)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    check_space(tmp_path / "not" / "yet" / "out", 10**6)
    with pytest.raises(EdgepruneError, match="2 MB are needed, 1 MB are free"):
        check_space(tmp_path / "not" / "yet" / "out", 2 * 10**6)
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize(
    ("marker", "force", "message"), [(MARKER, False, "exists already"), ("thesis.txt", True, "is not a thing")]
)
def test_what_appears_during_the_run_is_not_replaced(tmp_path: Path, marker: str, force: bool, message: str) -> None:
    check(tmp_path / "out", force=force)

    def write_while_another_does() -> None:
        with atomic(tmp_path / "out", force=force):
            earlier(tmp_path / "out", marker)

    with pytest.raises(EdgepruneError, match=message):
        write_while_another_does()
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / marker).read_text() == "earlier"


def test_name_too_long_for_the_system_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError, match="too long"):
        check(tmp_path / ("x" * 300))


def test_parts_of_dead_runs_are_removed_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".out.0123abcd.part", ".out.0123abcd.old", ".output.0123abcd.part", ".out.mine.part", "out"):
        earlier(tmp_path / name)
    check_output(tmp_path / "out", force=True, kind=THING, is_locked=True)
    assert not caplog.text
    remove_parts(tmp_path / "out")
    assert names(tmp_path) == {".out.0123abcd.old", ".output.0123abcd.part", ".out.mine.part", "out"}
    remove_parts(tmp_path / "absent" / "out")


def test_folder_that_holds_more_than_its_kind_is_not_replaced(tmp_path: Path) -> None:
    out, kind = earlier(tmp_path / "out"), Kind("a thing", (MARKER,), frozenset({MARKER, "more"}))
    (out / "more").touch()
    check_output(out, force=True, kind=kind)
    (out / "thesis.txt").touch()
    with pytest.raises(EdgepruneError, match="is not a thing"):
        check_output(out, force=True, kind=kind)
    check_output(out, force=True, kind=THING)


@pytest.mark.parametrize("read", [".", "inside", "inside/file"])
def test_what_is_read_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    out = tmp_path / "out"
    (out / "inside").mkdir(parents=True)
    (out / "inside/file").touch()
    (tmp_path / "link").symlink_to(out)
    for path in (out / read, tmp_path / "link" / read):
        with pytest.raises(EdgepruneError, match=r"is or holds .*, which is read; choose another output"):
            check_apart(out, tmp_path / "other", path)
    monkeypatch.chdir(out)
    check_apart(Path(), Path("self"))  # no file, but a word of --calibration
    check_apart(out / "new", out, out / "inside")


def test_root_is_refused_in_one_line() -> None:
    with pytest.raises(EdgepruneError):
        check(Path("/"))
