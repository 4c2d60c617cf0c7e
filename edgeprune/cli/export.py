"""`edgeprune export`: a checkpoint folder, dense or pruned, becomes a bundle that is proven to compute the same."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from edgeprune.cli import app
from edgeprune.cli.extras import need

if TYPE_CHECKING:
    from edgeprune_runtime.bundle import Manifest

TITLES = {
    "graph": "write the graph and its weights",
    "parity": "compare with the torch model",
    "golden": "write golden sequences",
    "manifest": "write the manifest",
}


@app.command(rich_help_panel="On the workstation")
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a dense or pruned checkpoint.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to write.", show_default=False)],
    graph_source: Annotated[
        str, typer.Option(help="auto, decoder (fused operators, fast) or traced (standard operators).")
    ] = "auto",
    name: Annotated[
        str | None, typer.Option(help="What to call the model; default: from the checkpoint.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to compare on; default: a few built-in paragraphs.", show_default=False)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing bundle, once the new one is complete.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks.")] = False,
) -> None:
    """Export a checkpoint to an ONNX bundle. Exit code 1, and no bundle, if it does not compute what torch computes."""
    need("compress", "torch", "transformers", "safetensors", "onnx", "onnx_ir")
    from edgeprune_export.exporting import GRAPH_SOURCES, check_output, read_text
    from edgeprune_export.exporting import export as write_bundle
    from edgeprune_runtime.errors import EdgepruneError

    if graph_source not in GRAPH_SOURCES:
        raise EdgepruneError(f"unknown graph source {graph_source!r}; expected {', '.join(GRAPH_SOURCES)}")
    check_output(output, force=force)
    texts = None if text is None else [read_text(text)]
    with _Bars(quiet) as bars:
        manifest = write_bundle(
            checkpoint,
            output,
            graph_source=cast("Literal['auto', 'decoder', 'traced']", graph_source),
            force=force,
            name=name,
            texts=texts,
            progress=bars.update,
        )
    if not quiet:
        _say(output, manifest)
    if as_json:
        typer.echo(json.dumps({"bundle": str(output), **manifest.to_json()}))


def _say(output: Path, manifest: "Manifest") -> None:
    variant = manifest.variants[manifest.default_variant]
    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    widths = len(set(manifest.layers))
    layers = "all alike" if widths == 1 else f"{widths} different widths"
    typer.echo(
        f"wrote {output}: {manifest.parameters.all:,} parameters in {len(manifest.layers)} layers ({layers}), "
        f"{size_bytes / 1e6:,.0f} MB, {variant.graph_source} graph",
        err=True,
    )
    typer.echo(
        f"equals torch: largest difference of a logit {variant.parity['max_abs_error']:.1e} "
        f"over {variant.parity['positions']} positions",
        err=True,
    )
    typer.echo(f'next: edgeprune run {output} --prompt "..."   or   edgeprune bench {output}', err=True)


class _Bars:
    """One bar per stage on stderr, with an estimate of what is left."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, stage: str, share: float) -> None:
        """Move the bar of a stage."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(TITLES[stage], total=1.0)
        self._progress.update(self._tasks[stage], completed=share)
