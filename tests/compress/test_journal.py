"""What is remembered is there whole or not at all, belongs to one command, and to one run at a time."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprune.journal import Entry, Journal, open_journal, work_folder
from edgeprune.weights import SafetensorsWriter
from edgeprune_runtime.errors import EdgepruneError

FINGERPRINT = {"model": ["a", 1], "setting": 0.2}


def cut_off(out: Path, error: BaseException, fingerprint: Any = FINGERPRINT) -> None:
    """A run that ends with an error after its first step."""
    with open_journal(out, fingerprint) as journal:
        assert journal.is_empty
        journal.put("step", made(1.0))
        journal.rows("states", (2, 2), torch.float32)
        (work_folder(out) / "other.part").touch()
        raise error


def made(value: float) -> Entry:
    return Entry({"x": torch.full((2, 3), value), "one": torch.tensor(3, dtype=torch.int64)}, {"value": value})


@pytest.fixture(params=["folder", "memory"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Journal:
    return Journal(tmp_path if request.param == "folder" else None)


def test_finished_step_is_not_made_again(journal: Journal) -> None:
    assert journal.is_empty
    first = journal.remember("step", lambda: made(0.1))
    again = journal.remember("step", lambda: pytest.fail("made again"))
    for entry in (first, again, journal.entry("step")):
        assert entry.facts == {"value": 0.1}
        assert torch.equal(entry.tensors["x"], torch.full((2, 3), 0.1))
        assert entry.tensors["one"].item() == 3
    assert torch.equal(journal.tensor("step", "x"), torch.full((2, 3), 0.1))
    assert journal.facts("step") == {"value": 0.1}
    assert not journal.is_empty
    journal.forget("step", "unknown")
    assert "step" not in journal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_and_written_in_slices(journal: Journal, dtype: torch.dtype) -> None:
    values = torch.randn(7, 3, 5).to(dtype)
    rows = journal.rows("states", (7, 3, 5), dtype)
    for start in range(0, 7, 3):
        rows[start : start + 3] = values[start : start + 3]
    rows.flush()
    again = journal.rows("states", (7, 3, 5), dtype)
    assert torch.equal(again[slice(0, 7)], values)
    assert torch.equal(again[slice(2, 5)], values[2:5])
    again[slice(1, 2)].zero_()
    assert torch.equal(again[slice(1, 2)], values[1:2])


def test_half_written_entry_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path), SafetensorsWriter.write

    def killed(self: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor)
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        journal.put("step", made(1.0))
    assert "step" not in journal


def test_same_command_finds_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        cut_off(out, KeyboardInterrupt())
    with open_journal(out, FINGERPRINT) as journal:
        assert "step" in journal
        assert not (work_folder(out) / "other.part").exists()
    assert not list(tmp_path.iterdir())


def test_another_command_discards_it_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        cut_off(out, KeyboardInterrupt())
    caplog.clear()
    with open_journal(out, FINGERPRINT | {"setting": 0.3}) as journal:
        assert journal.is_empty
        assert not list(work_folder(out).glob("*.rows"))
    (record,) = caplog.records
    assert "with another setting; it is discarded" in record.message


def test_interrupt_before_anything_is_done_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path / "out", FINGERPRINT):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_error_that_the_user_mends_takes_the_work_with_it(tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError):
        cut_off(tmp_path / "out", EdgepruneError("ask for less"))
    assert not list(tmp_path.iterdir())


def test_full_disk_keeps_the_work(tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError, match="the same command continues"):
        cut_off(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"))
    with open_journal(tmp_path / "out", FINGERPRINT) as journal:
        assert "step" in journal


def test_two_runs_do_not_share_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        open_journal(out, FINGERPRINT),
        pytest.raises(EdgepruneError, match="another run is writing"),
        open_journal(out, FINGERPRINT),
    ):
        pass
    with (
        open_journal(out, FINGERPRINT),
        open_journal(out, FINGERPRINT, rank=1),
    ):  # but processes of one run have each one
        assert {path.name for path in tmp_path.iterdir()} == {work_folder(out).name, work_folder(out, 1).name}
    assert not list(tmp_path.iterdir())


def test_killed_process_lets_go_of_the_lock(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom edgeprune.journal import *\n"
        f"with open_journal(Path(sys.argv[1]), {json.dumps(FINGERPRINT)}) as journal:\n"
        "    journal.put('step', Entry(facts=1))\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert done.returncode < 0
    with open_journal(tmp_path / "out", FINGERPRINT) as journal:
        assert journal.facts("step") == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EdgepruneError, match="choose another output"), open_journal(tmp_path / "out", FINGERPRINT):
        pass


def test_folder_of_another_is_left_alone(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "precious.txt").touch()
    with pytest.raises(EdgepruneError, match=r"holds precious\.txt"), open_journal(tmp_path / "out", FINGERPRINT):
        pass
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EdgepruneError, match="is a link"), open_journal(tmp_path / "out", FINGERPRINT):
        pass
    assert (tmp_path / "elsewhere/precious.txt").exists()


def test_work_whose_discarding_was_cut_off_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        cut_off(tmp_path / "out", KeyboardInterrupt())

    def dies(_: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("edgeprune.journal._remove", dies)
        with pytest.raises(SystemExit):
            cut_off(tmp_path / "out", KeyboardInterrupt(), {**FINGERPRINT, "model": "another"})
    with open_journal(tmp_path / "out", FINGERPRINT) as journal:
        assert journal.is_empty


def test_damaged_fingerprint_counts_as_another(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "out")
    folder.mkdir()
    for text in ("{", "[]", ""):
        (folder / "journal.json").write_text(text)
        (folder / "step.safetensors").touch()
        (folder / "dense").mkdir()
        with pytest.raises(KeyboardInterrupt):
            cut_off(tmp_path / "out", KeyboardInterrupt())
        assert not (folder / "dense").exists()
