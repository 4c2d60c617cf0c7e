"""`edgeprune export`: a checkpoint folder, dense or pruned, becomes a bundle that is proven to compute the same."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import app
from edgeprune.cli.extras import need

if TYPE_CHECKING:
    from edgeprune.cli.stages import Stages
    from edgeprune_runtime.bundle import Manifest


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
    from edgeprune.cli.stages import Stages
    from edgeprune.configs import load_config
    from edgeprune_export.exporting import check_bundle, graph_source_of
    from edgeprune_export.exporting import export as write_bundle
    from edgeprune_runtime.text import read_text

    check_bundle(output, force=force)
    graph_source_of(load_config(checkpoint).model_type, graph_source)
    texts = None if text is None else [read_text(text).text]
    stages = Stages(quiet)
    with _stock_form(checkpoint, output, stages) as folder:
        if folder != checkpoint:
            name = name or checkpoint.resolve().name
        with stages.stage("export to ONNX and check it against torch") as step:
            manifest = write_bundle(
                folder, output, graph_source=graph_source, force=force, name=name, texts=texts, progress=step
            )
    if not quiet:
        _say(output, manifest)
    if as_json:
        typer.echo(json.dumps({"bundle": str(output), **manifest.to_json()}))


@contextmanager
def _stock_form(checkpoint: Path, output: Path, stages: "Stages") -> Iterator[Path]:
    """The checkpoint; where it has a form of its own, a converted copy beside the output while the code inside runs."""
    from tempfile import TemporaryDirectory

    from edgeprune.cli.opening import convert
    from edgeprune.configs import unpacking
    from edgeprune.sources import load_tokenizer, open_source

    if unpacking(checkpoint) is None:
        yield checkpoint
        return
    source = open_source(str(checkpoint))
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.", suffix=".part", dir=parent) as place:
        folder = Path(place) / checkpoint.resolve().name
        with stages.stage("convert the checkpoint"):
            convert(source, load_tokenizer(source), folder)
        yield folder


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
    for note in manifest.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f'next: edgeprune run {output} --prompt "..."   or   edgeprune bench {output}', err=True)
