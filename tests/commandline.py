"""The command line called in this process, and a tiny model to compress."""

import contextlib
import io
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import toys
from exported import letter_tokenizer

from edgeprune import checkpoint
from edgeprune.cli import main
from edgeprune.groups import layer_widths
from edgeprune.journal import Entry, Journal
from edgeprune.pruning import model_groups

SENTENCES = (
    "The cook put salt on the eggs. A ship came home at noon, and the wind fell. Who sold the red hat? 12 cats!\n"
)


@dataclass(frozen=True)
class Outcome:
    """What a command printed and its exit code."""

    code: int
    out: str
    err: str


Invoke = Callable[..., Outcome]


def invoke(*arguments: object) -> Outcome:
    """Run `edgeprune ARGUMENTS` as the installed command would."""
    return _call(main, "edgeprune", *arguments)


def run_script(path: Path, *arguments: object) -> Outcome:
    """Run `python PATH ARGUMENTS` in this process, which has imported already what takes seconds."""
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        return _call(lambda: runpy.run_path(str(path), run_name="__main__"), path, *arguments)


def _call(main: Callable[[], object], *argv: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", list(map(str, argv))),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def killed_after(step: str, run: Callable[[], object]) -> None:
    """Run in a process of its own, which is killed as soon as its journal has put a step.

    Some steps are there for too short a time to be waited for from outside.
    """
    put = Journal.put

    def put_and_die(journal: Journal, name: str, entry: Entry) -> None:
        put(journal, name, entry)
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def begin() -> None:
        with mock.patch.object(Journal, "put", put_and_die):
            run()

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"the run ended without {step}"


def save_toy(folder: Path, **changes: Any) -> Path:
    """A tiny Llama in Hugging Face form, with a tokenizer of letters and a chat template."""
    sizes = {"head_dim": 16, "num_hidden_layers": 4, "max_position_embeddings": 160} | changes
    model = toys.toy("llama", **sizes)
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    checkpoint.save(model, tokenizer, None, layer_widths(model_groups(model), {}), folder)
    return folder
