"""The command line. Heavy packages are imported inside the commands, so that `--help` answers at once."""

import logging
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
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )


def main() -> None:
    """Entry point: runs the app; an `EdgepruneError` becomes one line on stderr and its exit code."""
    try:
        app()
    except EdgepruneError as error:
        message = " ".join(str(error).split())
        typer.echo(f"edgeprune: {message}", err=True)
        sys.exit(error.exit_code)


import edgeprune.cli.compress  # noqa: E402 - each command module registers itself with `app` above
import edgeprune.cli.device  # noqa: E402
import edgeprune.cli.export  # noqa: E402, F401
