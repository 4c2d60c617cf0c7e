"""`edgeprune compress`: from a model to a smaller ONNX bundle and a verdict, read from top to bottom in `_compress`."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from edgeprune.cli import app
from edgeprune.cli.extras import need

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgeprune.budget import Heads
    from edgeprune.calibration import Calibration
    from edgeprune_runtime.bench import BenchResult
    from edgeprune_runtime.perplexity import Perplexity
    from edgeprune_runtime.report import Report, Verdict
    from edgeprune_runtime.text import Text

CHECKPOINT, BUNDLE, DENSE, REPORT_FILE = "checkpoint", "bundle", "dense", "report.json"
DENSE_CHECKPOINT = "dense-checkpoint"
OUTPUT_KIND = "an output of compress"
DTYPES = ("auto", "float32", "bfloat16")
FLOAT32_BYTES = 4
SPARE_BYTES = 128 << 20
"""Room for the graphs, tokenizers, golden data and reports beside the weights."""
PRUNING, CALIBRATING, MEASURING = "How to prune", "Calibration text", "Checks at the end"
DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Options:
    """What the user asked of `compress`; the names are those of the command's options."""

    model: str
    ratio: float
    output: Path
    method: str
    allocation: str
    refit: bool
    heads: str
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
    eval_window: int | None
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
            help="Importance: wanda-sp, fusion[:attention|inverse-variance|SHARE], taylor-fine, magnitude ...",
            rich_help_panel=PRUNING,
        ),
    ] = "wanda-sp",
    allocation: Annotated[
        str,
        typer.Option(
            help="Widths over the layers: protect[:FIRST,LAST], global[:SHARE], uniform[:mixed].",
            rich_help_panel=PRUNING,
        ),
    ] = "protect",
    refit: Annotated[
        bool, typer.Option(help="Refit o_proj and down_proj by least squares.", rich_help_panel=PRUNING)
    ] = True,
    heads: Annotated[
        str,
        typer.Option(
            help="Heads against channels: auto (by lost score), even (the same share of both), keep (no head).",
            rich_help_panel=PRUNING,
        ),
    ] = "auto",
    align: Annotated[
        int, typer.Option(help="Kept channel counts are multiples of this.", rich_help_panel=PRUNING)
    ] = 32,
    min_channels: Annotated[int, typer.Option(help="Channels that every MLP keeps.", rich_help_panel=PRUNING)] = 64,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            help=r"A .txt or .jsonl file, hf:DATASET\[/CONFIG][:SPLIT], or self (the model writes its own text); "
            "default: WikiText-2 train where the hub can be reached, else self.",
            show_default=False,
            rich_help_panel=CALIBRATING,
        ),
    ] = None,
    calibration_sequences: Annotated[
        int, typer.Option(help="Sequences of calibration text.", rich_help_panel=CALIBRATING)
    ] = 64,
    calibration_tokens: Annotated[
        int, typer.Option(help="Tokens of each sequence.", rich_help_panel=CALIBRATING)
    ] = 512,
    gradient_sequences: Annotated[
        int, typer.Option(help="Sequences that the loss gradients see.", rich_help_panel=PRUNING)
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the calibration text.", rich_help_panel=CALIBRATING)] = 0,
    dtype: Annotated[
        str,
        typer.Option(help="Of the statistics: auto (the fastest here), float32 or bfloat16.", rich_help_panel=PRUNING),
    ] = "auto",
    graph_source: Annotated[str, typer.Option(help="Graph builder: auto, decoder or traced.")] = "auto",
    eval_text: Annotated[
        Path | None,
        typer.Option(
            help="Text for the perplexity; default: held-out calibration text.",
            show_default=False,
            rich_help_panel=MEASURING,
        ),
    ] = None,
    eval_rows_joined: Annotated[
        bool,
        typer.Option(
            "--eval-rows-joined",
            help="Lines of the text are rows, joined by a blank line as GPTQ does.",
            rich_help_panel=MEASURING,
        ),
    ] = False,
    eval_window: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of a perplexity window of --eval-text; default: {DEFAULT_WINDOW}.",
            show_default=False,
            rich_help_panel=MEASURING,
        ),
    ] = None,
    eval_windows: Annotated[int, typer.Option(help="Perplexity windows at most.", rich_help_panel=MEASURING)] = 8,
    rounds: Annotated[
        int, typer.Option(help="Fresh processes per bundle in the latency check.", rich_help_panel=MEASURING)
    ] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt of the latency check.", rich_help_panel=MEASURING)] = 128,
    generate_tokens: Annotated[
        int, typer.Option(help="Tokens generated in the latency check.", rich_help_panel=MEASURING)
    ] = 64,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the checks.", show_default=False, rich_help_panel=MEASURING)
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory the device gives, such as 512MiB; enforced.", show_default=False, rich_help_panel=MEASURING
        ),
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(help="Gate: exit 1 if perplexity grows more.", show_default=False, rich_help_panel=MEASURING),
    ] = None,
    min_decode_speedup: Annotated[
        float | None,
        typer.Option(
            help="Gate: exit 1 if decoding is not that much faster.", show_default=False, rich_help_panel=MEASURING
        ),
    ] = None,
    keep_dense: Annotated[
        bool,
        typer.Option("--keep-dense", help="Keep the dense bundle it was measured against.", rich_help_panel=MEASURING),
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
    name = Path(model).name.removesuffix(".gguf") or "model"
    options = Options(
        output=output or Path(f"{name}-pruned"),
        model=model,
        ratio=ratio,
        method=method,
        allocation=allocation,
        refit=refit,
        heads=heads,
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
    # tqdm reads it once, when the imports below import it: bars of other libraries would run across ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    from edgeprune import calibration as calibrating
    from edgeprune.checkpoint import save
    from edgeprune.cli.stages import Stages
    from edgeprune.cli.verdict import Gates, plan_report, short, verdict_report
    from edgeprune.groups import layer_widths
    from edgeprune.pruning import Settings, apply_plan, make_plan, model_groups
    from edgeprune.sources import load, load_tokenizer, open_source
    from edgeprune_export.exporting import export, graph_source_of
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
        heads=cast("Heads", options.heads),  # check() says so if it is none
    )
    settings.check()
    _check_measuring(options)
    memory_bytes = parse_size(options.memory) if options.memory is not None else None
    text = _read_eval_text(options)
    if not options.dry_run:
        check_output(options.output, force=options.force, marker=REPORT_FILE, what=OUTPUT_KIND)
    source = open_source(options.model, options.trust_remote_code)
    graph_source = graph_source_of(source.model_type, options.graph_source)
    stages = Stages(options.quiet)

    with stages.stage("load the model"):
        model = load(source)
        tokenizer = load_tokenizer(source)
        _check_fits(options, model, tokenizer, text)
    stages.remark(source.description)
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
        held_out = gathered
        if text is None:
            gathered, held_out = calibrating.split(gathered, _held_out(options))
    stages.remark(f"{gathered.ids.shape[0]} x {gathered.ids.shape[1]} tokens of {gathered.source}")
    with stages.stage("importance of every unit") as step:
        plan, stats = make_plan(
            model,
            source.description,
            gathered,
            settings,
            dtype=_dtype(options.dtype),
            progress=lambda phase, done, total: step(phase, done / total),
        )
    groups = model_groups(model)
    before, after = layer_widths(groups, {}), layer_widths(groups, plan.keep)
    report = plan_report(plan, before, after)
    _show(report, as_json=options.as_json, is_last=options.dry_run, is_measured=False)
    if options.dry_run:
        return

    with atomic_folder(options.output, force=options.force, marker=REPORT_FILE, what=OUTPUT_KIND) as folder:
        with stages.stage("refit, cut and save") as step:
            save(model, tokenizer, None, before, folder / DENSE_CHECKPOINT)
            errors = apply_plan(
                model, plan, stats.moments, progress=lambda phase, done, total: step(phase, done / total)
            )
            save(model, tokenizer, plan, after, folder / CHECKPOINT)
            # the exports load what they need; all of it at once would be too much for a small machine
            del model, stats
        with stages.stage("export the dense model to compare with") as step:
            export(
                folder / DENSE_CHECKPOINT,
                folder / DENSE,
                graph_source=graph_source,
                name=f"{source.name} (dense)",
                progress=step,
            )
            shutil.rmtree(folder / DENSE_CHECKPOINT)
        with stages.stage("export to ONNX and check it against torch") as step:
            export(
                folder / CHECKPOINT,
                folder / BUNDLE,
                graph_source=graph_source,
                name=f"{source.name} (pruned)",
                progress=step,
            )
        with stages.counted("perplexity through ONNX Runtime") as advance:
            evaluated = str(options.eval_text or f"held-out part of the calibration text ({gathered.source})")
            perplexities = _perplexities(options, [folder / DENSE, folder / BUNDLE], text or held_out, advance)
        with stages.counted("latency and memory, in turns") as advance:
            measured, fits = _measure(options, folder / DENSE, folder / BUNDLE, memory_bytes, advance)
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
            fits=fits,
        )
        report.save(folder)
    _show(report, as_json=options.as_json, is_last=True, shown=short(report))
    if not options.quiet:
        _say_next(options)
    failed = [verdict.text for verdict in report.verdicts if verdict.passed is False]
    if failed:
        raise GateError(f"the result is in {options.output}, but misses its gate: {'; '.join(failed)}")


def _check_measuring(options: Options) -> None:
    """Check what needs no model: a wrong number must not come out after minutes of work.

    Raises:
        EdgepruneError: naming the option that is wrong.
    """
    from edgeprune_runtime.bench import MIN_ROUNDS_FOR_VERDICT
    from edgeprune_runtime.errors import EdgepruneError

    if options.dtype not in DTYPES:
        raise EdgepruneError(f"unknown dtype {options.dtype!r}; expected {', '.join(DTYPES)}")
    least = {
        "calibration-sequences": (options.calibration_sequences, 1),
        "calibration-tokens": (options.calibration_tokens, 2),
        "eval-window": (options.eval_window or DEFAULT_WINDOW, 2),
        "eval-windows": (options.eval_windows, 1),
        "rounds": (options.rounds, 1),
        "prompt-tokens": (options.prompt_tokens, 1),
        "generate-tokens": (options.generate_tokens, 1),
    }
    for name, (value, at_least) in least.items():
        if value < at_least:
            raise EdgepruneError(f"--{name} is {value}; at least {at_least} was expected")
    if options.eval_text is None and (options.eval_window is not None or options.eval_rows_joined):
        raise EdgepruneError(
            "--eval-window and --eval-rows-joined go with --eval-text; without a text, the windows are held-out "
            "calibration sequences"
        )
    gates = {
        "max-perplexity-ratio": options.max_perplexity_ratio,
        "min-decode-speedup": options.min_decode_speedup,
    }
    for name, gate in gates.items():
        if gate is not None and not 0 < gate < math.inf:
            raise EdgepruneError(f"--{name} is {gate:g}; a factor above 0 was expected, such as 1.2")
    if options.min_decode_speedup is not None and options.rounds < MIN_ROUNDS_FOR_VERDICT:
        raise EdgepruneError(
            f"--rounds is {options.rounds}; --min-decode-speedup needs at least {MIN_ROUNDS_FOR_VERDICT} to tell "
            "a speed-up from noise"
        )
    if options.min_decode_speedup is not None and options.generate_tokens < 2:
        raise EdgepruneError("--generate-tokens is 1; --min-decode-speedup needs at least 2, the first is prefill's")


def _check_fits(
    options: Options, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: "Text | None"
) -> None:
    """Hold the checks at the end against the model's context, the text's length and the disk's room, while it is cheap.

    Raises:
        EdgepruneError: naming the option that asks for too much.
    """
    from edgeprune.sources import count_parameters
    from edgeprune_runtime.errors import EdgepruneError
    from edgeprune_runtime.output import check_space

    context_tokens = model.config.max_position_embeddings
    if options.prompt_tokens + options.generate_tokens > context_tokens:
        raise EdgepruneError(
            f"the latency check wants {options.prompt_tokens} + {options.generate_tokens} tokens, the model's "
            f"context holds {context_tokens}; lower --prompt-tokens or --generate-tokens"
        )
    if text is not None:
        window = options.eval_window or DEFAULT_WINDOW
        if window > context_tokens:
            raise EdgepruneError(f"--eval-window is {window}, the model's context holds {context_tokens}; lower it")
        tokens = len(tokenizer(text.text, verbose=False)["input_ids"])
        if tokens < window:
            raise EdgepruneError(
                f"{options.eval_text} has {tokens} tokens, less than one window of {window}; give a "
                "longer text or a smaller --eval-window"
            )
    if not options.dry_run:
        # The most at one time: the dense model as checkpoint and bundle, and the pruned checkpoint.
        weights = 3.0 - options.ratio
        check_space(options.output, round(FLOAT32_BYTES * count_parameters(model) * weights) + SPARE_BYTES)


def _held_out(options: Options) -> int:
    """Calibration sequences held out for the perplexity: none if the user brings a text."""
    return 0 if options.eval_text is not None else options.eval_windows


def _dtype(name: str) -> "torch.dtype":
    import torch

    from edgeprune.precision import fastest_dtype

    found: torch.dtype = fastest_dtype() if name == "auto" else getattr(torch, name)
    return found


def _read_eval_text(options: Options) -> "Text | None":
    from edgeprune_runtime.text import read_text

    if options.eval_text is None:
        return None
    return read_text(options.eval_text, rows_joined=options.eval_rows_joined)


def _perplexities(
    options: Options,
    bundles: Sequence[Path],
    source: "Text | Calibration",
    advance: Callable[[int, int], None],
) -> "list[Perplexity]":
    """Perplexity of each bundle on the same tokens: the user's text, or held-out calibration sequences."""
    from edgeprune_runtime.bundle import open_bundle
    from edgeprune_runtime.perplexity import measure_perplexity
    from edgeprune_runtime.session import Decoder
    from edgeprune_runtime.text import Text
    from edgeprune_runtime.tokenizer import Tokenizer

    found: list[Perplexity] = []
    for folder in bundles:
        bundle = open_bundle(folder)
        if isinstance(source, Text):
            ids = Tokenizer.load(bundle).encode(source.text)
            window, text_hash, joining = options.eval_window or DEFAULT_WINDOW, source.text_hash, source.joining
        else:
            ids = source.ids.flatten().tolist()
            window, text_hash, joining = source.ids.shape[1], source.sha256, "random windows"

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


def _measure(
    options: Options, dense: Path, pruned: Path, memory_bytes: int | None, advance: Callable[[int, int], None]
) -> "tuple[BenchResult, list[Verdict]]":
    """Both bundles in turns within the memory limit; where one does not fit, that is a finding and not an end."""
    from edgeprune_runtime.bench import bench
    from edgeprune_runtime.report import Verdict
    from edgeprune_runtime.session import OutOfMemoryError

    def run(bundles: Sequence[Path], limit: int | None) -> "BenchResult":
        result = bench(
            bundles,
            prompt_tokens=options.prompt_tokens,
            generate_tokens=options.generate_tokens,
            rounds=options.rounds,
            threads=options.threads,
            memory_bytes=limit,
            progress=advance,
        )
        # The folder still has its hidden name, which a report must not keep.
        return replace(result, sides=tuple(replace(side, bundle=Path(side.bundle).name) for side in result.sides))

    fits = f"within --memory {options.memory}"
    try:
        return run([dense, pruned], memory_bytes), []
    except OutOfMemoryError:
        try:
            alone = run([pruned], memory_bytes)
        except OutOfMemoryError:
            verdict = Verdict(f"the pruned model does not run {fits}; the figures are without that limit", passed=False)
            return run([dense, pruned], None), [verdict]
        return alone, [Verdict(f"the dense model does not run {fits}; the pruned one does", passed=True)]


def _show(
    report: "Report",
    *,
    as_json: bool,
    is_last: bool,
    is_measured: bool = True,
    shown: "Report | None" = None,
) -> None:
    """Print a report as tables; with --json the tables go to stderr, and the last report as one document to stdout."""
    from rich.console import Console

    console = Console(stderr=as_json)
    (shown or report).print(console, with_machine=is_measured)
    if not is_last:
        console.print()
    if as_json and is_last:
        typer.echo(json.dumps(report.to_dict(), allow_nan=False))


def _say_next(options: Options) -> None:
    out, bundle = options.output, options.output / BUNDLE
    typer.echo(
        f"""
Wrote {out}
  {BUNDLE}/      travels to the device
  {CHECKPOINT}/  loads in torch
  report.html  the figures, to look at or to send

Next: edgeprune run {bundle} --prompt "..."
      edgeprune validate {bundle}
      edgeprune bench {bundle}""",
        err=True,
    )
