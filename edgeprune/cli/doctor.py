"""`edgeprune doctor`: what this machine has for running bundles, and whether a bundle fits it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import app
from edgeprune.cli.device import Provider

if TYPE_CHECKING:
    from edgeprune_runtime.doctor import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
LEVEL_WIDTH = max(map(len, STYLES))


@app.command(rich_help_panel="On the device")
def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]", help="Folder of a bundle to hold against it, or a .ort file in one.", show_default=False
        ),
    ] = None,
    provider: Provider = "cpu",
    variant: Annotated[
        str | None, typer.Option(help="The variant that decides; default: the manifest's.", show_default=False)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the SHA-256 of the bundle's files; reads all of them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Say what this machine has for running bundles, and whether one fits: a line for each finding, with what to do.

    Exit code 1 if the bundle has a problem here; without a bundle always 0.
    """
    from edgeprune_runtime.doctor import count_problems, examine_machine, look
    from edgeprune_runtime.doctor_bundle import examine_bundle
    from edgeprune_runtime.errors import EdgepruneError, GateError

    if folder is None and (verify or variant is not None):
        raise EdgepruneError("--verify and --variant are about a bundle, and none was given; name its folder")
    here = look(folder or Path.cwd())
    of_machine = examine_machine(here, provider)
    of_bundle = (
        () if folder is None else examine_bundle(folder, here, variant=variant, provider=provider, verify=verify)
    )
    problems = count_problems(of_bundle)
    if as_json:
        document = {
            "bundle": None if folder is None else str(folder),
            "problems": problems,
            "machine": [finding.to_dict() for finding in of_machine],
            "findings": [finding.to_dict() for finding in of_bundle],
        }
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        _show("This machine", of_machine)
        if folder is not None:
            _show(str(folder), of_bundle)
    if problems:
        what = "1 problem" if problems == 1 else f"{problems} problems"
        raise GateError(f"{what} with {folder} here; the findings say what to do")


def _show(title: str, findings: "Sequence[Finding]") -> None:
    """A table on a terminal; elsewhere a line for each finding, never folded, for grep and for logs."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        console.print(f"\n[bold]{_escaped(title)}[/]", _table(findings), sep="\n")
        return
    typer.echo(_plain(f"{title}:"))
    for finding in findings:
        advice = f"; {finding.advice}" if finding.advice else ""
        typer.echo(_plain(f"{finding.level:<{LEVEL_WIDTH}}  {finding.subject}: {finding.found}{advice}"))


def _table(findings: "Sequence[Finding]") -> object:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    for finding in findings:
        style = STYLES[finding.level]
        advice = f" [dim]→[/] [italic]{_escaped(finding.advice)}[/]" if finding.advice else ""
        table.add_row(f"[{style}]{finding.level}[/]", _escaped(finding.subject), f"{_escaped(finding.found)}{advice}")
    return table


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(_plain(text))


def _plain(text: str) -> str:
    """The text without what could steer a terminal: names in a bundle are a stranger's."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
