"""`edgeprune export`: a model, dense or pruned, becomes a bundle that is proven to compute the same."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli import app
from edgeprune.cli.extras import need
from edgeprune.cli.hints import PROMPT, say_next
from edgeprune.cli.options import GRAPH_SOURCE_HELP, TARGET_HELP
from edgeprune.cli.rounding import AccuracyLevel, BlockSize, Symmetric, TableBits

if TYPE_CHECKING:
    from edgeprune.cli.stages import Stages
    from edgeprune.sources import Source
    from edgeprune_export.gptq import RoundingData
    from edgeprune_export.targets import Target
    from edgeprune_runtime.bundle import Manifest

CALIBRATION_SEQUENCES, CALIBRATION_TOKENS = 64, 512


@app.command(rich_help_panel="On the workstation")
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Dense or pruned: folder of a checkpoint, hub id, .gguf file, or smollm2-135m.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to write.", show_default=False)],
    target: Annotated[str | None, typer.Option(help=TARGET_HELP, show_default=False)] = None,
    graph_source: Annotated[str, typer.Option(help=GRAPH_SOURCE_HELP)] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, int8, int8-dynamic, int4, or several joined by commas: one variant each, the default "
            "first; default: the target's, else fp32.",
            show_default=False,
        ),
    ] = None,
    block_size: BlockSize = None,
    symmetric: Symmetric = None,
    accuracy_level: AccuracyLevel = None,
    table_bits: TableBits = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            help=r"Text that int4 weights are fitted to while they are rounded: a .txt or .jsonl file, or "
            r"hf:DATASET\[/CONFIG][:SPLIT]; default: none, each is rounded to the nearest.",
            show_default=False,
        ),
    ] = None,
    calibration_sequences: Annotated[
        int | None,
        typer.Option(help=f"Sequences of that text; default: {CALIBRATION_SEQUENCES}.", show_default=False),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help=f"Tokens of each sequence; default: {CALIBRATION_TOKENS}.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What to call the model; default: its own name.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to compare on; default: a few built-in paragraphs.", show_default=False)
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(
            help="Gate of rounded variants: perplexity against float32; default: fp16 1.01, int8 1.03, "
            "int8-dynamic 1.05, int4 1.5.",
            show_default=False,
        ),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            help="Gate of rounded variants: share of positions with float32's likeliest token; default: fp16 0.97, "
            "int8 0.94, int8-dynamic 0.92, int4 0.5.",
            show_default=False,
        ),
    ] = None,
    max_greedy_flips: Annotated[
        float | None,
        typer.Option(
            help="Gate of rounded variants: share of greedy continuations that may differ from float32's; default: no "
            "limit.",
            show_default=False,
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that the export may take, such as 2GiB: a model that does not fit is checked block by block "
            "(one in GGUF, in torch pickles or with its own code is held whole once, to convert it); default: half of "
            "this machine's.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing bundle, once the new one is complete.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks.")] = False,
) -> None:
    """Export a model to an ONNX bundle. Exit code 1, and no bundle, if it does not compute what torch computes."""
    need("compress", "torch", "transformers", "safetensors", "onnx", "onnx_ir")
    # read once, by the imports below: bars of other libraries would run across ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    from edgeprune.cli.stages import Stages
    from edgeprune.sources import open_source
    from edgeprune_export.exporting import check_bundle
    from edgeprune_export.exporting import export as write_bundle
    from edgeprune_export.model_card import Origin
    from edgeprune_export.quantize import as_options, with_gates
    from edgeprune_export.targets import check_names, choose
    from edgeprune_runtime.errors import EdgepruneError, GateError
    from edgeprune_runtime.limits import parse_size
    from edgeprune_runtime.output import check_apart
    from edgeprune_runtime.text import read_text

    details: dict[str, Any] = {
        "block_size": block_size,
        "is_symmetric": symmetric,
        "accuracy_level": accuracy_level,
        "table_bits": table_bits,
    }
    check_names(target, precision, **details)
    source = open_source(model, trust_remote_code)
    check_apart(output, source.path, *(Path(each) for each in (calibration, text) if each))
    check_bundle(output, force=force)
    choice = choose(target, source.model_type, graph_source=graph_source, precision=precision, **details)
    precisions = with_gates(choice.precisions, max_perplexity_ratio, min_agreement, max_greedy_flips)
    if calibration is not None and not any(each.is_data_aware for each in precisions):
        raise EdgepruneError(
            f"--calibration would change nothing of {', '.join(each.name for each in precisions)}: int4 alone is "
            "fitted to text; leave it out, or name int4 in --precision"
        )
    of_calibration = {"calibration_sequences": calibration_sequences, "calibration_tokens": calibration_tokens}
    if calibration is None and (given := as_options(of_calibration)):
        raise EdgepruneError(f"{given} would change nothing without --calibration; leave it out, or give a text there")
    max_memory_bytes = None if max_memory is None else parse_size(max_memory)
    texts = None if text is None else [read_text(text).text]
    stages = Stages(quiet)
    with _stock_form(source, output, stages) as folder:
        is_as_given = folder == source.path
        rounding = None
        if calibration is not None:
            with stages.stage("calibration text"):
                rounding = _rounding_data(folder, calibration, calibration_sequences, calibration_tokens)
        with stages.stage("export to ONNX and check it against torch") as step:
            manifest = write_bundle(
                folder,
                output,
                graph_source=choice.graph_source,
                force=force,
                name=name or (None if is_as_given else Path(source.title).name.removesuffix(".gguf")),
                made_from=None if is_as_given else source.description,
                texts=texts,
                precisions=precisions,
                rounding=rounding,
                max_memory_bytes=max_memory_bytes,
                target=choice.target,
                notes=choice.notes,
                origin=Origin.of_source(source),  # `folder` may be a converted copy, which has no card
                progress=step,
            )
    if not quiet:
        _say(output, manifest, choice.target)
    if as_json:
        typer.echo(json.dumps({"bundle": str(output), **manifest.to_json()}))
    if left_out := [each.name for each in precisions if each.name not in manifest.variants]:
        raise GateError(
            f"{output} was written without {', '.join(left_out)}, whose weights lose too much; see its notes"
        )


@contextmanager
def _stock_form(source: "Source", output: Path, stages: "Stages") -> Iterator[Path]:
    """The model's own folder if it is a stock checkpoint, else a converted copy, which is there while the code runs.

    The copy lies beside the output.
    """
    from tempfile import TemporaryDirectory

    from edgeprune.cli.opening import convert
    from edgeprune.configs import unpacking
    from edgeprune.sources import gguf_read_once, load_tokenizer, stored_folder

    with stages.stage("open the model"):
        stored = stored_folder(source)
    if stored is not None and unpacking(stored) is None:
        yield stored
        return
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.", suffix=".part", dir=parent) as place:
        folder = Path(place) / "checkpoint"
        with stages.stage("convert the checkpoint"), gguf_read_once():
            convert(source, load_tokenizer(source), folder)
        yield folder


def _rounding_data(checkpoint: Path, spec: str, sequences: int | None, length_tokens: int | None) -> "RoundingData":
    """The calibration text of a checkpoint."""
    from edgeprune.calibration import gather
    from edgeprune.checkpoint import open_decoder
    from edgeprune.precision import fastest_dtype
    from edgeprune.sources import load_tokenizer, open_source
    from edgeprune_export.gptq import RoundingData

    tokenizer = load_tokenizer(open_source(str(checkpoint)))
    decoder = open_decoder(checkpoint)
    found = gather(
        spec,
        tokenizer,
        decoder,
        sequences=CALIBRATION_SEQUENCES if sequences is None else sequences,
        length_tokens=CALIBRATION_TOKENS if length_tokens is None else length_tokens,
    )
    return RoundingData(found, fastest_dtype())


def _say(output: Path, manifest: "Manifest", target: "Target | None") -> None:
    from edgeprune_export.sparsity_check import found_zeros
    from edgeprune_runtime.session import is_available

    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    widths = len(set(manifest.layers))
    layers = "all alike" if widths == 1 else f"{widths} different widths"
    typer.echo(
        f"wrote {output}: {manifest.parameters.all:,} parameters in {len(manifest.layers)} layers ({layers}), "
        f"{size_bytes / 1e6:,.1f} MB, {next(iter(manifest.variants.values())).graph_source} graph",
        err=True,
    )
    for name, variant in manifest.variants.items():
        proven = (
            "as it is computed, against torch with the same rounded weights" if variant.fidelity else "equals torch"
        )
        own_bytes = sum(manifest.files[file].size_bytes for file in (variant.graph, *variant.data))
        typer.echo(
            f"{name}, {own_bytes / 1e6:,.1f} MB, {proven}: largest difference of a logit "
            f"{variant.parity['max_abs_error']:.1e} over {variant.parity['positions']} positions",
            err=True,
        )
        if lost := variant.fidelity:
            flips = lost["greedy_flips"]
            greedy = "" if flips is None else f", another greedy continuation of {flips:.0%} of the texts"
            typer.echo(
                f"  against float32: {lost['perplexity_ratio']:.3f} times the perplexity, the same likeliest token at "
                f"{lost['argmax_agreement']:.1%} of {lost['positions']} positions, KL {lost['mean_kl']:.3g}{greedy}",
                err=True,
            )
    if (zeros := found_zeros(manifest)) is not None:
        typer.echo(
            f"zeros in the graph: {zeros.sparsity:.2%} of {zeros.weights:,} weights, at least "
            f"{zeros.expected_sparsity:.2%} expected",
            err=True,
        )
    for note in manifest.notes:
        typer.echo(f"note: {note}", err=True)
    provider = "cpu" if target is None else target.provider
    chosen = () if provider == "cpu" else ("--provider", provider)
    where = "Next" if is_available(provider) else "Next, on the device"
    say_next(("run", output, *chosen, *PROMPT), ("bench", output, *chosen), where=where)
