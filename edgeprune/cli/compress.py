"""`edgeprune compress`: from a model to a smaller ONNX bundle and a verdict, read from top to bottom in `_prune`."""

import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgeprune.cli import app
from edgeprune.cli.extras import need
from edgeprune.presets import DEFAULT_PRESET, PRESETS, Preset

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from edgeprune.budget import Heads
    from edgeprune.calibration import Calibration
    from edgeprune.cli.stages import Clock, Stages
    from edgeprune.distributed import Ranks
    from edgeprune.journal import Entry, Journal
    from edgeprune.memory import Footprint
    from edgeprune.plan import PrunePlan
    from edgeprune.pruning import Settings
    from edgeprune.refit import Mode
    from edgeprune.sources import Source
    from edgeprune.streaming import Decoder
    from edgeprune_runtime.bench import BenchResult
    from edgeprune_runtime.perplexity import Perplexity
    from edgeprune_runtime.report import Report, Verdict
    from edgeprune_runtime.text import Text

CHECKPOINT, BUNDLE, DENSE, REPORT_FILE = "checkpoint", "bundle", "dense", "report.json"
DENSE_CHECKPOINT = "dense"  # in the journal's folder: a model that was not stored as safetensors, converted
OUTPUT_KIND = "an output of compress"
DTYPES = ("auto", "float32", "bfloat16")
FLOAT32_BYTES = 4
SPARE_BYTES = 128 << 20
"""Room for the graphs, tokenizers, golden data and reports beside the weights."""
PRUNING, CALIBRATING, MEASURING = "How to prune", "Calibration text", "Checks at the end"
DEFAULT_WINDOW = 1024


def _of_presets(option: str) -> str:
    """What the presets set an option to, for its help."""
    return f"default: {', '.join(f'{name} {preset.values()[option]}' for name, preset in PRESETS.items())}."


@dataclass(frozen=True)
class Options:
    """What the user asked of `compress`; the names are those of the command's options."""

    model: str
    ratio: float
    output: Path
    preset: str
    method: str
    allocation: str
    refit: str
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
    max_memory: str | None
    checkpoint_only: bool
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
    preset: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(PRESETS)}: quick to careful; sets what the defaults below name. --dry-run estimates the "
            "times.",
            rich_help_panel=PRUNING,
        ),
    ] = DEFAULT_PRESET,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"Importance: wanda-sp, fisher, obs, flap, taylor-fine, fusion, magnitude ...; "
            f"{_of_presets('method')}",
            show_default=False,
            rich_help_panel=PRUNING,
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="Widths over the layers: protect[:FIRST,LAST], search[:ROUNDS], uniform[:mixed], global ...; "
            f"{_of_presets('allocation')}",
            show_default=False,
            rich_help_panel=PRUNING,
        ),
    ] = None,
    refit: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="Of o_proj and down_proj: least-squares, intercept (and a bias), bias (alone), none.",
            rich_help_panel=PRUNING,
        ),
    ] = "least-squares",
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
        int | None,
        typer.Option(
            help=f"Sequences of calibration text; {_of_presets('calibration_sequences')}",
            show_default=False,
            rich_help_panel=CALIBRATING,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of each sequence; {_of_presets('calibration_tokens')}",
            show_default=False,
            rich_help_panel=CALIBRATING,
        ),
    ] = None,
    gradient_sequences: Annotated[
        int | None,
        typer.Option(
            help=f"Sequences that the loss gradients see; {_of_presets('gradient_sequences')}",
            show_default=False,
            rich_help_panel=PRUNING,
        ),
    ] = None,
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
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that pruning itself may take, such as 6GiB; default: half of this machine's.",
            show_default=False,
        ),
    ] = None,
    checkpoint_only: Annotated[
        bool, typer.Option("--checkpoint-only", help="Write the pruned checkpoint and stop: no ONNX, no checks.")
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
    given = {
        "method": method,
        "allocation": allocation,
        "calibration_sequences": calibration_sequences,
        "calibration_tokens": calibration_tokens,
        "gradient_sequences": gradient_sequences,
    }
    chosen = _chosen(preset, given)
    options = Options(
        output=output or Path(f"{name}-pruned"),
        model=model,
        ratio=ratio,
        preset=preset,
        method=chosen.method,
        allocation=chosen.allocation,
        refit=refit,
        heads=heads,
        align=align,
        min_channels=min_channels,
        calibration=calibration,
        calibration_sequences=chosen.calibration_sequences,
        calibration_tokens=chosen.calibration_tokens,
        gradient_sequences=chosen.gradient_sequences,
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
        max_memory=max_memory,
        checkpoint_only=checkpoint_only,
        dry_run=dry_run,
        force=force,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
        quiet=quiet,
    )
    _compress(options)


def _chosen(preset: str, given: Mapping[str, str | int | None]) -> Preset:
    """The preset of this name, with what the user gave himself.

    Raises:
        EdgepruneError: if there is no such preset.
    """
    from edgeprune_runtime.errors import EdgepruneError

    if preset not in PRESETS:
        raise EdgepruneError(f"unknown --preset {preset!r}; expected {', '.join(PRESETS)}")
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(PRESETS[preset], **changes)


def _compress(options: Options) -> None:
    """The whole job on this process, or on each of those that torchrun started."""
    # tqdm reads it once, when the imports below import it: bars of other libraries would run across ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    from edgeprune.distributed import joined
    from edgeprune_runtime.errors import EdgepruneError

    is_first = os.environ.get("RANK", "0") == "0"
    try:
        with joined() as ranks:
            _prune(options if is_first else _silenced(options), ranks)
    except EdgepruneError as error:
        if is_first:
            raise
        sys.exit(error.exit_code)  # the first process says why


def _silenced(options: Options) -> Options:
    """The options of a process that only lends a hand."""
    logging.disable(logging.WARNING)
    return replace(options, quiet=True)


def _prune(options: Options, ranks: "Ranks") -> None:
    """Open, calibrate, plan, cut, save, export, measure, report."""
    from edgeprune.checkpoint import save
    from edgeprune.cli.stages import Clock, Stages
    from edgeprune.cli.verdict import only_refit, plan_report, short, with_refit
    from edgeprune.groups import layer_widths
    from edgeprune.pruning import apply_plan, make_plan, progress_so_far
    from edgeprune.sources import load_tokenizer, open_source
    from edgeprune_export.exporting import graph_source_of
    from edgeprune_runtime.limits import parse_size
    from edgeprune_runtime.output import atomic_folder

    settings = _settings(options)
    settings.check()
    _check_measuring(options)
    memory_bytes = parse_size(options.memory) if options.memory is not None else None
    max_memory_bytes = parse_size(options.max_memory) if options.max_memory is not None else None
    text = _read_eval_text(options)
    _check_output(options)
    source = open_source(options.model, options.trust_remote_code)
    settings.check_for(source.model_type)
    graph_source = graph_source_of(source.model_type, options.graph_source)
    stages = Stages(options.quiet)

    with _journal(options, source, settings, ranks) as journal:
        with stages.stage("open the model"):
            tokenizer = load_tokenizer(source)
            decoder, dense = _open_decoder(source, tokenizer, journal)
            dtype = _dtype(options.dtype, journal, ranks)
            footprint = _fit(options, settings, decoder, dtype, max_memory_bytes)
            decoder.keeps_blocks = footprint.keeps_blocks
            _check_fits(options, decoder, tokenizer, text, footprint, journal)
            decoder.load_outside()
        stages.remark(source.description)
        with stages.counted("calibration text") as advance:
            gathered, held_out = _calibrate(options, decoder, tokenizer, journal, ranks, advance)
        stages.remark(f"{gathered.ids.shape[0]} x {gathered.ids.shape[1]} tokens of {gathered.source}")
        if (so_far := progress_so_far(journal, decoder.layers)) is not None:
            stages.remark(so_far)
        with stages.stage("importance of every unit") as step:
            clock = Clock(lambda phase, done, total: step(phase, done / total))
            plan, stats = make_plan(
                decoder,
                source.description,
                gathered,
                settings,
                dtype=dtype,
                with_moments=settings.refit != "none" and not options.dry_run,
                step_tokens=footprint.step_tokens,
                journal=journal,
                ranks=ranks,
                progress=clock,
            )
        if not ranks.is_first:
            ranks.meet()
            return
        before, after = layer_widths(decoder.groups, {}), layer_widths(decoder.groups, plan.keep)
        report = plan_report(plan, before, after)
        if options.dry_run:
            report = _with_estimates(report, options, settings, decoder, clock)
        _show(report, as_json=options.as_json, is_last=options.dry_run, is_measured=False)
        if not options.dry_run:
            with stages.stage("refit and cut") as step:
                outcomes = apply_plan(
                    decoder,
                    plan,
                    stats.moments,
                    journal=journal,
                    progress=lambda phase, done, total: step("", done / total),
                )
            report = with_refit(report, outcomes)
            if options.checkpoint_only:
                with stages.stage("save and read back"):
                    save(decoder, tokenizer, plan, after, options.output, force=options.force)
                _show(report, as_json=options.as_json, is_last=True, is_measured=False, shown=only_refit(report))
                _say_next(options)
            else:
                with atomic_folder(options.output, force=options.force, marker=REPORT_FILE, what=OUTPUT_KIND) as folder:
                    with stages.stage("save and read back"):
                        save(decoder, tokenizer, plan, after, folder / CHECKPOINT)
                    # the exports load what they need; all of it at once would be too much for a small machine
                    del decoder, stats
                    _export(folder, dense, source, graph_source, stages)
                    report = _judge(options, folder, plan, report, text or held_out, memory_bytes, stages)
                _show(report, as_json=options.as_json, is_last=True, shown=short(report))
                _say_next(options)
                _hold_gates(options, report)
        if ranks.size > 1:
            ranks.meet()  # the others have waited for this


def _export(folder: Path, dense: Path, source: "Source", graph_source: str, stages: "Stages") -> None:
    """The ONNX bundles of the pruned checkpoint, and of the dense model to compare with."""
    from edgeprune_export.exporting import export

    with stages.stage("export the dense model to compare with") as step:
        export(dense, folder / DENSE, graph_source=graph_source, name=f"{source.name} (dense)", progress=step)
    with stages.stage("export to ONNX and check it against torch") as step:
        export(
            folder / CHECKPOINT,
            folder / BUNDLE,
            graph_source=graph_source,
            name=f"{source.name} (pruned)",
            progress=step,
        )


def _judge(
    options: Options,
    folder: Path,
    plan: "PrunePlan",
    planned: "Report",
    text: "Text | Calibration",
    memory_bytes: int | None,
    stages: "Stages",
) -> "Report":
    """Measure both bundles, and write the verdict beside them."""
    from edgeprune.calibration import Calibration
    from edgeprune.cli.verdict import Gates, verdict_report

    with stages.counted("perplexity through ONNX Runtime") as advance:
        perplexities = _perplexities(options, [folder / DENSE, folder / BUNDLE], text, advance)
    with stages.counted("latency and memory, in turns") as advance:
        measured, fits = _measure(options, folder / DENSE, folder / BUNDLE, memory_bytes, advance)
    if not options.keep_dense:
        shutil.rmtree(folder / DENSE)
    is_held_out = isinstance(text, Calibration)
    report = verdict_report(
        plan,
        planned,
        perplexities,
        measured,
        text=f"held-out part of the calibration text ({text.source})" if is_held_out else str(options.eval_text),
        seconds=stages.seconds,
        gates=Gates(options.max_perplexity_ratio, options.min_decode_speedup),
        fits=fits,
    )
    report.save(folder)
    return report


def _hold_gates(options: Options, report: "Report") -> None:
    """Fail if the result misses a gate that the user has set.

    Raises:
        GateError: if so; the result is written all the same.
    """
    from edgeprune_runtime.errors import GateError

    failed = [verdict.text for verdict in report.verdicts if verdict.passed is False]
    if failed:
        raise GateError(f"the result is in {options.output}, but misses its gate: {'; '.join(failed)}")


def _settings(options: Options) -> "Settings":
    from edgeprune.pruning import Settings

    return Settings(
        ratio=options.ratio,
        method=options.method,
        allocation=options.allocation,
        refit=cast("Mode", options.refit),  # check() says so if it is none
        align=options.align,
        min_channels=options.min_channels,
        gradient_sequences=options.gradient_sequences,
        heads=cast("Heads", options.heads),  # check() says so if it is none
    )


def _with_estimates(
    report: "Report", options: Options, settings: "Settings", decoder: "Decoder", clock: "Clock"
) -> "Report":
    """The report of a dry run, with the time that each preset would take here."""
    from edgeprune.cli.verdict import preset_table
    from edgeprune.estimate import Pace, estimate_seconds
    from edgeprune.memory import Sizes

    sizes = Sizes.of(decoder, options.calibration_sequences, options.calibration_tokens)
    pace = Pace.of(
        sizes,
        clock.seconds("statistics"),
        clock.seconds("gradients") if _graded(options, settings) else None,
        _graded(options, settings),
        had_grams=settings.gathers_moments,
    )
    chosen = _chosen(options.preset, {name: getattr(options, name) for name in PRESETS[options.preset].values()})
    presets = dict(PRESETS) | {options.preset: chosen}
    seconds = {name: estimate_seconds(each, pace, refits=settings.refit != "none") for name, each in presets.items()}
    data = dict(report.data) | {"preset": options.preset, "estimated_seconds": seconds}
    return replace(report, tables=(*report.tables, preset_table(presets, seconds, options.preset)), data=data)


def _check_output(options: Options) -> None:
    from edgeprune.checkpoint import FOLDER_KIND
    from edgeprune.configs import CONFIG_FILE
    from edgeprune_runtime.output import check_output

    if options.dry_run:
        return
    marker, what = (CONFIG_FILE, FOLDER_KIND) if options.checkpoint_only else (REPORT_FILE, OUTPUT_KIND)
    check_output(options.output, force=options.force, marker=marker, what=what, is_locked=True)


@contextmanager
def _journal(options: Options, source: "Source", settings: "Settings", ranks: "Ranks") -> "Iterator[Journal]":
    """The journal of this command: beside the output, or in memory for a dry run, which writes nothing."""
    import edgeprune_runtime
    from edgeprune.journal import Journal, open_journal
    from edgeprune.sources import identity
    from edgeprune_runtime.output import remove_parts

    if options.dry_run:
        yield Journal()
        return
    text = Path(options.calibration) if options.calibration is not None else None
    fingerprint = {
        "model": identity(source),
        "setting": [asdict(settings), options.dtype, options.max_memory],
        "calibration text": [
            options.calibration,
            hashlib.sha256(text.read_bytes()).hexdigest() if text is not None and text.is_file() else None,
            options.calibration_sequences,
            options.calibration_tokens,
            options.seed,
            _held_out(options),
        ],
        "version of edgeprune": edgeprune_runtime.__version__,
        "number of processes": ranks.size,
    }
    with open_journal(options.output, fingerprint, rank=ranks.rank) as journal:
        if ranks.is_first:
            remove_parts(options.output)
        yield journal


def _open_decoder(source: "Source", tokenizer: "PreTrainedTokenizerBase", journal: "Journal") -> "tuple[Decoder, Path]":
    """The dense model, and its folder of safetensors; a model of another form is converted into one first."""
    from edgeprune.checkpoint import open_decoder, save
    from edgeprune.groups import layer_widths
    from edgeprune.sources import load, stored_folder
    from edgeprune.streaming import Decoder, model_groups

    folder = stored_folder(source)
    if folder is not None:
        return open_decoder(folder), folder
    if journal.folder is None:
        return Decoder.of(load(source)), source.path
    folder = journal.folder / DENSE_CHECKPOINT
    if not folder.is_dir():
        model = load(source)
        save(model, tokenizer, None, layer_widths(model_groups(model), {}), folder)
    return open_decoder(folder), folder


def _fit(
    options: Options, settings: "Settings", decoder: "Decoder", dtype: "torch.dtype", limit_bytes: int | None
) -> "Footprint":
    """How the run stays within --max-memory."""
    from edgeprune.memory import Sizes, Work, fit
    from edgeprune.statistics import Method

    work = Work(
        Method.parse(settings.method),
        refits=settings.refit != "none" and not options.dry_run,
        dtype=dtype,
        graded=_graded(options, settings),
        journal_in_memory=options.dry_run,
        searches=settings.reads_moments,
    )
    return fit(Sizes.of(decoder, options.calibration_sequences, options.calibration_tokens), work, limit_bytes)


def _graded(options: Options, settings: "Settings") -> int:
    """Calibration sequences that the loss gradients see."""
    from edgeprune.statistics import Method

    reads = Method.parse(settings.method).reads_gradients
    return min(settings.gradient_sequences, options.calibration_sequences) if reads else 0


def _calibrate(
    options: Options,
    decoder: "Decoder",
    tokenizer: "PreTrainedTokenizerBase",
    journal: "Journal",
    ranks: "Ranks",
    advance: Callable[[int, int], None],
) -> "tuple[Calibration, Calibration]":
    """The calibration text, and what of it is held out for the perplexity (all of it, if the user brings a text)."""
    from edgeprune import calibration as calibrating

    def gather() -> "Entry":
        return calibrating.gather(
            options.calibration,
            tokenizer,
            decoder,
            sequences=options.calibration_sequences + _held_out(options),
            length_tokens=options.calibration_tokens,
            seed=options.seed,
            progress=advance,
        ).entry()

    gathered = ranks.share(lambda: calibrating.Calibration.from_entry(journal.remember("calibration", gather)))
    return calibrating.split(gathered, _held_out(options)) if _held_out(options) else (gathered, gathered)


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
    options: Options,
    decoder: "Decoder",
    tokenizer: "PreTrainedTokenizerBase",
    text: "Text | None",
    footprint: "Footprint",
    journal: "Journal",
) -> None:
    """Hold the checks at the end against the model's context, the text's length and the disk's room, while it is cheap.

    Raises:
        EdgepruneError: naming the option that asks for too much.
    """
    from edgeprune.sources import count_parameters
    from edgeprune_runtime.errors import EdgepruneError
    from edgeprune_runtime.output import check_space

    context_tokens = decoder.config.max_position_embeddings
    if not options.checkpoint_only and options.prompt_tokens + options.generate_tokens > context_tokens:
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
        # The most at one time: both bundles and the pruned checkpoint.
        copies = 1.0 - options.ratio if options.checkpoint_only else 3.0 - 2.0 * options.ratio
        result = round(FLOAT32_BYTES * count_parameters(decoder.model) * copies) + SPARE_BYTES
        check_space(options.output, result + max(0, footprint.scratch_bytes - journal.size_bytes))


def _held_out(options: Options) -> int:
    """Calibration sequences held out for the perplexity: none if the user brings a text."""
    return 0 if options.eval_text is not None else options.eval_windows


def _dtype(name: str, journal: "Journal", ranks: "Ranks") -> "torch.dtype":
    """The dtype of this name; what "auto" has found once stays for all processes, and when the command continues."""
    import torch

    from edgeprune.journal import Entry
    from edgeprune.precision import fastest_dtype

    def probe() -> Entry:
        return Entry(facts=str(fastest_dtype()).removeprefix("torch."))

    if name == "auto":
        name = ranks.share(lambda: str(journal.remember("dtype", probe).facts))
    found: torch.dtype = getattr(torch, name)
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
    if options.quiet:
        return
    out, bundle = options.output, options.output / BUNDLE
    if options.checkpoint_only:
        typer.echo(f"\nWrote {out}, which loads in torch\n\nNext: edgeprune export {out}", err=True)
        return
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
