"""The command line. Heavy packages are imported inside the commands, so that `--help` answers at once."""

import logging
import signal
import sys
from typing import Annotated

import typer

import edgeprune_runtime
from edgeprune_runtime.errors import EdgepruneError

app = typer.Typer(
    name="edgeprune",
    help="Make a language model physically smaller, export it to ONNX, and prove what it cost and won.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


INTERRUPTED = 130
"""Exit code of a command that was interrupted, as shells give it."""


class _CurrentStderr(logging.Handler):
    """Logs to what stderr is when a record comes: a progress bar takes its place for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgeprune {edgeprune_runtime.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    logging.basicConfig(
        handlers=[_CurrentStderr()],
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )


def main() -> None:
    """Entry point: runs the app; an `EdgepruneError` or wrong usage becomes one line on stderr and its exit code.

    SIGTERM ends it as an interrupt does, so that what was half-written is cleared away.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            typer.echo("edgeprune: interrupted", err=True)
        sys.exit(code)
    except EdgepruneError as error:
        message = " ".join(str(error).split())
        typer.echo(f"edgeprune: {message}", err=True)
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        if message := error.format_message():  # empty without any argument: the help was shown
            typer.echo(f"edgeprune: {message.removesuffix('.')}; --help says what is expected", err=True)
        sys.exit(error.exit_code)


import edgeprune.cli.compress  # noqa: E402 - each command module registers itself with `app` above
import edgeprune.cli.device  # noqa: E402
import edgeprune.cli.doctor  # noqa: E402
import edgeprune.cli.export  # noqa: E402
import edgeprune.cli.inspect  # noqa: E402
import edgeprune.cli.pack  # noqa: E402, F401
