"""`edgeprune compress`: from a model to a smaller ONNX bundle and a verdict, read from top to bottom in `_compress`."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import app
from edgeprune.cli.extras import need

if TYPE_CHECKING:
    import torch

    from edgeprune.calibration import Calibration
    from edgeprune_runtime.perplexity import Perplexity
    from edgeprune_runtime.report import Report

CHECKPOINT, BUNDLE, DENSE, REPORT_FILE = "checkpoint", "bundle", "dense", "report.json"
HELD_OUT_SHARE = 8
"""One of so many calibration sequences is held out to measure perplexity on when no --eval-text is given."""


@dataclass(frozen=True)
class Options:
    """What the user asked of `compress`; the names are those of the command's options."""

    model: str
    ratio: float
    output: Path
    method: str
    allocation: str
    refit: bool
    align: int
    min_channels: int
    calibration: str | None
    calibration_sequences: int
    calibration_tokens: int
    gradient_sequences: int
    seed: int
    dtype: str
    graph_source: str
    eval_text: Path | None
    eval_rows_joined: bool
    eval_window: int
    eval_windows: int
    rounds: int
    prompt_tokens: int
    generate_tokens: int
    threads: int | None
    memory: str | None
    max_perplexity_ratio: float | None
    min_decode_speedup: float | None
    keep_dense: bool
    dry_run: bool
    force: bool
    trust_remote_code: bool
    as_json: bool
    quiet: bool


@app.command(rich_help_panel="On the workstation")
def compress(
    model: Annotated[
        str, typer.Argument(help="A model folder, a .gguf file, a hub id, or smollm2-135m.", show_default=False)
    ],
    ratio: Annotated[float, typer.Option("--ratio", "-r", help="Share of all parameters to remove, up to 0.9.")] = 0.2,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; default: NAME-pruned.", show_default=False)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Importance: fusion[:attention|inverse-variance|SHARE], taylor-fine, wanda-sp, magnitude ..."
        ),
    ] = "fusion",
    allocation: Annotated[
        str, typer.Option(help="Widths over the layers: protect[:FIRST,LAST], global[:SHARE], uniform[:mixed].")
    ] = "protect",
    refit: Annotated[bool, typer.Option(help="Refit o_proj and down_proj by least squares.")] = True,
    align: Annotated[int, typer.Option(help="Kept channel counts are multiples of this.")] = 32,
    min_channels: Annotated[int, typer.Option(help="Channels that every MLP keeps.")] = 64,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            help="A .txt or .jsonl file, hf:DATASET[/CONFIG][:SPLIT], or self (the model writes its own text); "
            "default: WikiText-2 train where the hub can be reached, else self.",
            show_default=False,
        ),
    ] = None,
    calibration_sequences: Annotated[int, typer.Option(help="Sequences of calibration text.")] = 128,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 512,
    gradient_sequences: Annotated[int, typer.Option(help="Sequences that the loss gradients see.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the calibration text.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the statistics: auto (the fastest here), float32 or bfloat16.")
    ] = "auto",
    graph_source: Annotated[str, typer.Option(help="Graph builder: auto, decoder or traced.")] = "auto",
    eval_text: Annotated[
        Path | None,
        typer.Option(help="Text for the perplexity; default: held-out calibration text.", show_default=False),
    ] = None,
    eval_rows_joined: Annotated[
        bool,
        typer.Option("--eval-rows-joined", help="Lines of the text are rows, joined by a blank line as GPTQ does."),
    ] = False,
    eval_window: Annotated[int, typer.Option(help="Tokens of a perplexity window.")] = 1024,
    eval_windows: Annotated[int, typer.Option(help="Perplexity windows at most.")] = 8,
    rounds: Annotated[int, typer.Option(help="Fresh processes per bundle in the latency check.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt of the latency check.")] = 128,
    generate_tokens: Annotated[int, typer.Option(help="Tokens generated in the latency check.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the checks.", show_default=False)] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory the device gives, such as 512MiB; enforced.", show_default=False)
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option(help="Gate: exit 1 if perplexity grows more.", show_default=False)
    ] = None,
    min_decode_speedup: Annotated[
        float | None, typer.Option(help="Gate: exit 1 if decoding is not that much faster.", show_default=False)
    ] = None,
    keep_dense: Annotated[
        bool, typer.Option("--keep-dense", help="Keep the dense bundle it was measured against.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing output, once the new one is complete.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Prune a model, export it to ONNX, and measure what it cost and what it won."""
    need("compress", "torch", "transformers", "safetensors", "onnx", "onnxscript")
    from edgeprune_runtime.errors import EdgepruneError

    if dtype not in ("auto", "float32", "bfloat16"):
        raise EdgepruneError(f"unknown dtype {dtype!r}; expected auto, float32 or bfloat16")
    name = Path(model).name.removesuffix(".gguf") or "model"
    options = Options(
        output=output or Path(f"{name}-pruned"),
        model=model,
        ratio=ratio,
        method=method,
        allocation=allocation,
        refit=refit,
        align=align,
        min_channels=min_channels,
        calibration=calibration,
        calibration_sequences=calibration_sequences,
        calibration_tokens=calibration_tokens,
        gradient_sequences=gradient_sequences,
        seed=seed,
        dtype=dtype,
        graph_source=graph_source,
        eval_text=eval_text,
        eval_rows_joined=eval_rows_joined,
        eval_window=eval_window,
        eval_windows=eval_windows,
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        generate_tokens=generate_tokens,
        threads=threads,
        memory=memory,
        max_perplexity_ratio=max_perplexity_ratio,
        min_decode_speedup=min_decode_speedup,
        keep_dense=keep_dense,
        dry_run=dry_run,
        force=force,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
        quiet=quiet,
    )
    _compress(options)


def _compress(options: Options) -> None:
    """The whole job: load, calibrate, plan, cut, save, export, measure, report."""
    from edgeprune import calibration as calibrating
    from edgeprune.checkpoint import save
    from edgeprune.cli.stages import Stages
    from edgeprune.cli.verdict import Gates, plan_report, verdict_report
    from edgeprune.groups import layer_widths
    from edgeprune.pruning import Settings, apply_plan, make_plan, model_groups
    from edgeprune.sources import load, load_tokenizer, open_source
    from edgeprune_export.exporting import export
    from edgeprune_runtime.bench import bench
    from edgeprune_runtime.errors import GateError
    from edgeprune_runtime.limits import parse_size
    from edgeprune_runtime.output import atomic_folder, check_output

    settings = Settings(
        ratio=options.ratio,
        method=options.method,
        allocation=options.allocation,
        refit=options.refit,
        align=options.align,
        min_channels=options.min_channels,
        gradient_sequences=options.gradient_sequences,
    )
    settings.check()
    memory_bytes = parse_size(options.memory) if options.memory is not None else None
    if not options.dry_run:
        check_output(options.output, force=options.force, marker=REPORT_FILE, what="an output of compress")
    stages = Stages(options.quiet)

    with stages.stage("load the model"):
        source = open_source(options.model, options.trust_remote_code)
        model = load(source)
        tokenizer = load_tokenizer(source)
    with stages.counted("calibration text") as advance:
        gathered = calibrating.gather(
            options.calibration,
            tokenizer,
            model,
            sequences=options.calibration_sequences + _held_out(options),
            length_tokens=options.calibration_tokens,
            seed=options.seed,
            progress=advance,
        )
        held_out = None
        if _held_out(options):
            gathered, held_out = calibrating.split(gathered, _held_out(options))
    with stages.stage("importance of every unit") as step:
        phases: dict[str, float] = {}

        def progress(phase: str, done: int, total: int) -> None:
            phases[phase] = done / total
            step(sum(phases.values()) / 2 if "gradients" in phases else phases["statistics"] / 2)

        plan, stats = make_plan(
            model, source.description, gathered, settings, dtype=_dtype(options.dtype), progress=progress
        )
    groups = model_groups(model)
    before, after = layer_widths(groups, {}), layer_widths(groups, plan.keep)
    report = plan_report(plan, before, after)
    _show(report, as_json=options.as_json, is_last=options.dry_run)
    if options.dry_run:
        return

    with atomic_folder(options.output) as folder:
        with stages.stage("save and export the dense model to compare with"):
            save(model, tokenizer, None, before, folder / "dense-checkpoint")
            export(
                folder / "dense-checkpoint",
                folder / DENSE,
                graph_source=options.graph_source,
                name=f"{source.name} (dense)",
            )
            shutil.rmtree(folder / "dense-checkpoint")
        with stages.counted("cut and refit") as advance:
            errors = apply_plan(model, plan, stats.moments, progress=lambda _, done, total: advance(done, total))
            del stats
            save(model, tokenizer, plan, after, folder / CHECKPOINT)
            del model
        with stages.stage("export to ONNX and check it against torch") as step:
            export(
                folder / CHECKPOINT,
                folder / BUNDLE,
                graph_source=options.graph_source,
                name=f"{source.name} (pruned)",
                progress=lambda _, share: step(share),
            )
        with stages.counted("perplexity through ONNX Runtime") as advance:
            evaluated = str(options.eval_text or f"held-out part of the calibration text ({gathered.source})")
            perplexities = _perplexities(options, [folder / DENSE, folder / BUNDLE], held_out, advance)
        with stages.counted("latency and memory, in turns") as advance:
            measured = bench(
                [folder / DENSE, folder / BUNDLE],
                prompt_tokens=options.prompt_tokens,
                generate_tokens=options.generate_tokens,
                rounds=options.rounds,
                threads=options.threads,
                memory_bytes=memory_bytes,
                progress=advance,
            )
        if not options.keep_dense:
            shutil.rmtree(folder / DENSE)
        report = verdict_report(
            plan,
            report,
            perplexities,
            measured,
            text=evaluated,
            errors=errors,
            seconds=stages.seconds,
            gates=Gates(options.max_perplexity_ratio, options.min_decode_speedup),
        )
        report.save(folder)
    _show(report, as_json=options.as_json, is_last=True)
    _say_next(options)
    failed = [verdict.text for verdict in report.verdicts if verdict.passed is False]
    if failed:
        raise GateError(f"the result is in {options.output}, but misses its gate: {'; '.join(failed)}")


def _held_out(options: Options) -> int:
    """Calibration sequences held out for the perplexity: none if the user brings a text."""
    return 0 if options.eval_text is not None else max(1, options.calibration_sequences // HELD_OUT_SHARE)


def _dtype(name: str) -> "torch.dtype":
    import torch

    from edgeprune.precision import fastest_dtype

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return dtypes[name] if name in dtypes else fastest_dtype()


def _perplexities(
    options: Options, bundles: Sequence[Path], held_out: "Calibration | None", advance: Callable[[int, int], None]
) -> "list[Perplexity]":
    """Perplexity of each bundle on the same tokens: the user's text, or held-out calibration sequences."""
    from edgeprune_runtime.bundle import open_bundle
    from edgeprune_runtime.perplexity import measure_perplexity
    from edgeprune_runtime.session import Decoder
    from edgeprune_runtime.text import read_text
    from edgeprune_runtime.tokenizer import Tokenizer

    found: list[Perplexity] = []
    for folder in bundles:
        bundle = open_bundle(folder)
        if options.eval_text is not None:
            text = read_text(options.eval_text, rows_joined=options.eval_rows_joined)
            ids = Tokenizer.load(bundle).encode(text.text)
            window, text_hash, joining = options.eval_window, text.text_hash, text.joining
        else:
            assert held_out is not None
            ids = held_out.ids.flatten().tolist()
            window, text_hash, joining = held_out.ids.shape[1], held_out.sha256, "random windows"

        def windows_done(done: int, total: int) -> None:
            advance(len(found) * total + done, len(bundles) * total)

        found.append(
            measure_perplexity(
                Decoder(bundle, threads=options.threads),
                ids,
                window=window,
                max_windows=options.eval_windows,
                text_hash=text_hash,
                joining=joining,
                progress=windows_done,
            )
        )
    return found


def _show(report: "Report", *, as_json: bool, is_last: bool) -> None:
    """Print a report: as tables, or with --json the last one as one document on stdout and the tables on stderr."""
    from rich.console import Console

    report.print(Console(stderr=as_json))
    if as_json and is_last:
        typer.echo(json.dumps(report.to_dict(), allow_nan=False))


def _say_next(options: Options) -> None:
    bundle = options.output / BUNDLE
    lines = [
        f"Written to {options.output}: {BUNDLE}/ travels to the device, {CHECKPOINT}/ reloads in torch, "
        f"report.html to look at.",
        f'Next: edgeprune run {bundle} --prompt "..."   |   edgeprune validate {bundle}   |   edgeprune bench {bundle}',
    ]
    if not options.quiet:
        typer.echo("\n".join(lines), err=True)
