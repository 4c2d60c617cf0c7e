"""The entry point: how it ends, and where its log goes."""

import contextlib
import io
import logging
import os
import signal
import time
from pathlib import Path

import pytest

from edgeprune import cli
from edgeprune_runtime.output import atomic_folder


def test_being_told_to_end_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job() -> None:
        with atomic_folder(tmp_path / "out", force=False, marker="marker", what="a thing"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    monkeypatch.setattr(cli, "app", job)
    earlier = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert stop.value.code == 143
    assert not list(tmp_path.iterdir())


def test_log_goes_where_stderr_is_now() -> None:
    logger = logging.Logger("test")
    logger.addHandler(cli._CurrentStderr())
    for _ in range(2):
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            logger.warning("a %s", "word")
        assert stream.getvalue() == "a word\n"
