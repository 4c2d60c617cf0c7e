"""The entry point: how it ends, and where its log goes."""

import contextlib
import io
import logging
import os
import signal
import time
from pathlib import Path

import pytest
from commandline import invoke

from edgeprune import cli
from edgeprune_runtime.output import Kind, atomic_folder


def test_being_told_to_end_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(**_: object) -> None:
        with atomic_folder(tmp_path / "out", force=False, kind=Kind("a thing", ("marker",))):
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "toy", "-o", "out", "--block-size", "16,32"), "Invalid value for '--block-size': "),
        (("run", "bundle", "-p", "x", "--seed", "-1"), "Invalid value for '--seed': "),
        (("export",), "Missing argument 'MODEL'"),
        (("doctor", "--probe"), "No such option: --probe"),
        (("exprot",), "No such command 'exprot'. Did you mean 'export'?"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = invoke(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"edgeprune: {message}")
    assert done.err.endswith("; --help says what is expected\n")


def test_without_arguments_the_help_is_shown() -> None:
    done = invoke()
    assert (done.code, done.err) == (2, "")
    assert "Usage: edgeprune" in done.out


def test_what_a_command_ends_with_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    assert invoke("--version").code == 0
    monkeypatch.setattr("edgeprune_runtime.doctor.look", interrupted)
    done = invoke("doctor")
    assert (done.code, done.err) == (130, "edgeprune: interrupted\n")
