"""`edgeprune compress`: from a model to a smaller ONNX bundle and a verdict, read from top to bottom in `_prune`."""

import json
import logging
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli import app
from edgeprune.cli.checks import check_fits, check_measuring, check_output_folder, check_uncut
from edgeprune.cli.extras import need
from edgeprune.cli.hints import PROMPT, say_next
from edgeprune.cli.measuring import hold_gates, judge
from edgeprune.cli.opening import (
    calibrate,
    find_dtype,
    fit_memory,
    open_dense,
    open_journal_of,
    read_eval_text,
)
from edgeprune.cli.options import (
    BUNDLE,
    CHECKPOINT,
    DEFAULT_WINDOW,
    DENSE,
    GRAPH_SOURCE_HELP,
    NO_RECOVERY,
    OUTPUT,
    TARGET_HELP,
    Options,
    chosen_preset,
    graded_sequences,
    settings_of,
    sparsity_of,
)
from edgeprune.cli.rounding import AccuracyLevel, BlockSize, Symmetric, TableBits
from edgeprune.presets import DEFAULT_PRESET, PRESETS

if TYPE_CHECKING:
    from edgeprune.checkpoint import SavedCheckpoint
    from edgeprune.cli.stages import Clock, Stages
    from edgeprune.distributed import Ranks
    from edgeprune.pruning import Settings
    from edgeprune.sources import Source
    from edgeprune.streaming import Decoder
    from edgeprune_export.gptq import RoundingData
    from edgeprune_export.targets import Choice
    from edgeprune_runtime.report import Report

PRUNING, ZEROS, CALIBRATING, MEASURING = "How to prune", "Zeros", "Calibration text", "Checks at the end"


def _of_presets(option: str) -> str:
    """What the presets set an option to, for its help."""
    return f"default: {', '.join(f'{name} {preset.values()[option]}' for name, preset in PRESETS.items())}."


@app.command(rich_help_panel="On the workstation")
def compress(
    model: Annotated[
        str, typer.Argument(help="A model folder, a .gguf file, a hub id, or smollm2-135m.", show_default=False)
    ],
    ratio: Annotated[
        float,
        typer.Option("--ratio", "-r", help="Share of all parameters to remove, up to 0.9; 0 only with --sparsity."),
    ] = 0.2,
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
            help="Widths over the layers: protect[:FIRST,LAST], judged[:METHOD,...], search[:ROUNDS], "
            f"uniform[:mixed] ...; {_of_presets('allocation')}",
            show_default=False,
            rich_help_panel=PRUNING,
        ),
    ] = None,
    refit: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="Of o_proj and down_proj: least-squares; reconstruct[:PASSES] (then the whole MLP); intercept (and a "
            f"bias), bias (alone), none; {_of_presets('refit')} Of sparse Linears: none after alps, else "
            "least-squares.",
            show_default=False,
            rich_help_panel=PRUNING,
        ),
    ] = None,
    recover: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Train the cut model: none, or lora[:PASSES] (adapters, added to the weights in the end; needs the "
            "extra recover, and memory for the whole model in float32).",
            rich_help_panel=PRUNING,
        ),
    ] = NO_RECOVERY,
    heads: Annotated[
        str,
        typer.Option(
            help="Heads against channels: auto (by lost score), even (the same share of both), keep (no head).",
            rich_help_panel=PRUNING,
        ),
    ] = "auto",
    widths: Annotated[
        str,
        typer.Option(
            help="per-layer, or uniform: the same in every layer, a stock config that loads without custom code.",
            rich_help_panel=PRUNING,
        ),
    ] = "per-layer",
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="N:M",
            help="Zeros in the weights that stay: N kept of M (2:4, 4:8 ...), or a share of zeros such as 0.5; --ratio "
            "0 cuts nothing else.",
            show_default=False,
            rich_help_panel=ZEROS,
        ),
    ] = None,
    sparsity_method: Annotated[
        str | None,
        typer.Option(
            help="Which weights become zero: alps, sparsegpt, wanda, dass or magnitude; default: alps.",
            show_default=False,
            rich_help_panel=ZEROS,
        ),
    ] = None,
    sparsity_scope: Annotated[
        str | None,
        typer.Option(
            help="mlp, or all Linears of the blocks; default: mlp.", show_default=False, rich_help_panel=ZEROS
        ),
    ] = None,
    sparsity_layout: Annotated[
        str | None,
        typer.Option(
            help="hardware (blocks of inputs, for sparse tensor cores), or paper (dass alone: blocks of channels); "
            "default: hardware.",
            show_default=False,
            rich_help_panel=ZEROS,
        ),
    ] = None,
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
    target: Annotated[str | None, typer.Option(help=TARGET_HELP, show_default=False)] = None,
    graph_source: Annotated[str, typer.Option(help=f"Graph builder: {GRAPH_SOURCE_HELP}")] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the pruned bundle: fp32, fp16, int8, int8-dynamic, int4, several joined by commas; the first is "
            "measured, against the dense model in float32; default: the target's, else fp32.",
            show_default=False,
        ),
    ] = None,
    block_size: BlockSize = None,
    symmetric: Symmetric = None,
    accuracy_level: AccuracyLevel = None,
    table_bits: TableBits = None,
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
            help=f"Tokens of a perplexity window of --eval-text; default: {DEFAULT_WINDOW}, or the model's context.",
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
    if recover != NO_RECOVERY:
        need("recover", "peft")
    name = Path(model).name.removesuffix(".gguf") or "model"
    given = {
        "method": method,
        "allocation": allocation,
        "refit": refit,
        "calibration_sequences": calibration_sequences,
        "calibration_tokens": calibration_tokens,
        "gradient_sequences": gradient_sequences,
    }
    if ratio == 0:
        recovery = recover if recover != NO_RECOVERY else None
        cutting = {"method": method, "allocation": allocation, "gradient_sequences": gradient_sequences}
        check_uncut(cutting | {"recover": recovery})
    chosen = chosen_preset(preset, given, widths)
    options = Options(
        output=output or Path(f"{name}-pruned"),
        model=model,
        ratio=ratio,
        preset=preset,
        method=chosen.method,
        allocation=chosen.allocation,
        refit=chosen.refit,
        recover=recover,
        heads=heads,
        widths=widths,
        sparsity=sparsity,
        sparsity_method=sparsity_method,
        sparsity_scope=sparsity_scope,
        sparsity_layout=sparsity_layout,
        sparsity_refit=refit,
        align=align,
        min_channels=min_channels,
        calibration=calibration,
        calibration_sequences=chosen.calibration_sequences,
        calibration_tokens=chosen.calibration_tokens,
        gradient_sequences=chosen.gradient_sequences,
        seed=seed,
        dtype=dtype,
        target=target,
        graph_source=graph_source,
        precision=precision,
        block_size=block_size,
        symmetric=symmetric,
        accuracy_level=accuracy_level,
        table_bits=table_bits,
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
    """Open, calibrate, plan, cut, put in zeros, save, export, measure, report."""
    from edgeprune.checkpoint import CARD_FILE, save
    from edgeprune.cli.stages import Clock, Stages
    from edgeprune.cli.verdict import (
        SPARSE_REFIT_TABLE,
        only_refit,
        plan_report,
        short,
        with_recovery,
        with_refit,
        with_zeros,
    )
    from edgeprune.groups import layer_widths
    from edgeprune.licences import licence_file_of
    from edgeprune.pruning import apply_plan, keep_all, make_plan, progress_so_far
    from edgeprune.recover import ask_teacher, not_recovered, recover
    from edgeprune.sources import count_parameters, gguf_read_once, load_licences, load_tokenizer, open_source
    from edgeprune.sparsify import sparsify
    from edgeprune_export.exporting import check_precisions
    from edgeprune_export.gptq import RoundingData
    from edgeprune_export.model_card import Origin, add_results, checkpoint_card, measured_results
    from edgeprune_export.targets import check_names, choose
    from edgeprune_runtime.limits import parse_size
    from edgeprune_runtime.output import atomic_folder, check_apart

    settings, sparsity = settings_of(options), sparsity_of(options)
    if sparsity is not None:
        sparsity.check()
        sparsity.check_sequences(options.calibration_sequences)
    if options.ratio or sparsity is None:
        settings.check()
        settings.check_sequences(options.calibration_sequences)
    details: dict[str, Any] = {
        "block_size": options.block_size,
        "is_symmetric": options.symmetric,
        "accuracy_level": options.accuracy_level,
        "table_bits": options.table_bits,
    }
    check_names(options.target, options.precision, **details)
    check_measuring(options)
    memory_bytes = parse_size(options.memory) if options.memory is not None else None
    max_memory_bytes = parse_size(options.max_memory) if options.max_memory is not None else None
    text = read_eval_text(options)
    check_output_folder(options)
    source = open_source(options.model, options.trust_remote_code)
    if not options.dry_run:
        texts = [Path(text) for text in (options.calibration, options.eval_text) if text]
        check_apart(options.output, source.path, *texts)
    settings.check_for(source.model_type)
    choice = choose(
        options.target, source.model_type, graph_source=options.graph_source, precision=options.precision, **details
    )
    stages = Stages(options.quiet)
    judged: Report | None = None

    with open_journal_of(options, source, settings, sparsity, ranks) as journal:
        with stages.stage("open the model"):
            with gguf_read_once():
                tokenizer, licences = load_tokenizer(source), load_licences(source)
                decoder, dense = open_dense(
                    source, tokenizer, journal, exports=not (options.checkpoint_only or options.dry_run)
                )
            dtype = find_dtype(options.dtype, journal, ranks)
            footprint = fit_memory(options, settings, sparsity, decoder, dtype, max_memory_bytes)
            decoder.keeps_blocks = footprint.keeps_blocks
            check_precisions(choice.precisions, choice.graph_source, decoder.config)
            if choice.target is not None:
                kept_parameters = round((1 - options.ratio) * count_parameters(decoder.model))
                choice.target.check_size(kept_parameters, choice.precisions)
            if sparsity is not None:
                sparsity.check_for(decoder.config, decoder.groups)
            check_fits(options, decoder, tokenizer, text, footprint, journal)
            decoder.load_outside()
        stages.remark(source.description)
        with stages.counted("calibration text") as advance:
            gathered, held_out = calibrate(options, decoder, tokenizer, journal, ranks, advance)
        stages.remark(f"{gathered.ids.shape[0]} x {gathered.ids.shape[1]} tokens of {gathered.source}")
        if (so_far := progress_so_far(journal, decoder.layers)) is not None:
            stages.remark(so_far)
        if options.ratio:
            with stages.phased("importance of every unit") as told:
                clock = Clock(told)
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
        else:
            plan, clock, stats = keep_all(decoder, source.description, gathered, dtype=dtype), None, None
        if sparsity is not None:
            notes = (*plan.notes, *sparsity.notes(decoder.groups))
            plan = replace(plan, sparsity=sparsity.record(decoder.groups), notes=notes)
        if not ranks.is_first:
            ranks.meet()
            return
        before, after = layer_widths(decoder.groups, {}), layer_widths(decoder.groups, plan.keep)
        report = plan_report(plan, before, after)
        report = replace(report, data=dict(report.data) | {"footprint": asdict(footprint)})
        if options.dry_run and clock is not None:
            report = _with_estimates(report, options, settings, decoder, clock)
        _show(report, as_json=options.as_json, is_last=options.dry_run, is_measured=False)
        if not options.dry_run:
            if settings.recover_passes:
                with stages.counted("recover: ask the dense model") as advance:
                    ask_teacher(
                        decoder,
                        gathered,
                        journal,
                        dtype=dtype,
                        step_tokens=footprint.step_tokens,
                        progress=lambda phase, done, total: advance(done, total),
                    )
            if stats is not None:
                with stages.stage("refit and cut") as step:
                    outcomes = apply_plan(
                        decoder,
                        plan,
                        stats.moments,
                        gathered,
                        dtype=dtype,
                        step_tokens=footprint.step_tokens,
                        journal=journal,
                        progress=lambda phase, done, total: step("", done / total),
                    )
                report = with_refit(report, outcomes)
            if settings.recover_passes:
                with stages.counted("recover (LoRA)") as advance:
                    recovery = recover(
                        decoder,
                        settings.recover_passes,
                        gathered,
                        journal,
                        dtype=dtype,
                        progress=lambda phase, done, total: advance(done, total),
                    )
                report = with_recovery(report, recovery)
                if not recovery.is_accepted:
                    plan = replace(plan, recover=NO_RECOVERY, notes=(*plan.notes, not_recovered(plan.recover)))
            if sparsity is not None:
                with stages.stage("zeros in the weights") as step:
                    outcomes = sparsify(
                        decoder,
                        sparsity,
                        gathered,
                        dtype=dtype,
                        step_tokens=footprint.step_tokens,
                        journal=journal,
                        progress=lambda phase, done, total: step("", done / total),
                    )
                report = with_refit(report, outcomes, SPARSE_REFIT_TABLE)
            card = checkpoint_card(source, plan, after, licence_file=licence_file_of(licences))
            beside = {CARD_FILE: card.encode(), **licences}
            if options.checkpoint_only:
                with stages.stage("save and read back"):
                    saved = save(decoder, tokenizer, plan, after, options.output, force=options.force, beside=beside)
                _check_form(options, saved)
                report = with_zeros(report, saved.zeros, "the checkpoint")
                _show(report, as_json=options.as_json, is_last=True, is_measured=False, shown=only_refit(report))
                _say_next(options)
            else:
                with atomic_folder(options.output, force=options.force, kind=OUTPUT) as folder:
                    with stages.stage("save and read back"):
                        saved = save(decoder, tokenizer, plan, after, folder / CHECKPOINT, beside=beside)
                    _check_form(options, saved)
                    report = with_zeros(report, saved.zeros, "the checkpoint")
                    # the exports load what they need; all of it at once would be too much for a small machine
                    del decoder, stats
                    rounding = RoundingData(gathered, dtype, journal)
                    _export(folder, dense, source, choice, rounding, stages)
                    variants = [precision.name for precision in choice.precisions]
                    report = judge(options, folder, plan, report, text or held_out, memory_bytes, stages, variants)
                    add_results(folder / BUNDLE, measured_results(report), Origin.of_source(source))
                _show(report, as_json=options.as_json, is_last=True, shown=short(report))
                _say_next(options)
                judged = report
        if ranks.size > 1:
            ranks.meet()  # the others have waited for this
    if judged is not None:
        hold_gates(options, judged)


def _check_form(options: Options, saved: "SavedCheckpoint") -> None:
    """Hold that uniform widths ended in a stock config: the plan took only counts that stock code takes."""
    if options.widths == "uniform" and saved.form != "uniform":
        raise RuntimeError(f"--widths uniform gave no stock config: {'; '.join(saved.notes)}")


def _export(
    folder: Path,
    dense: Path,
    source: "Source",
    choice: "Choice",
    rounding: "RoundingData",
    stages: "Stages",
) -> None:
    """The ONNX bundles of the pruned checkpoint, and of the dense model to compare with."""
    from edgeprune_export.exporting import export
    from edgeprune_export.model_card import Origin

    origin = Origin.of_source(source)
    with stages.stage("export the dense model to compare with") as step:
        export(
            dense,
            folder / DENSE,
            graph_source=choice.graph_source,
            name=f"{source.title} (dense)",
            origin=origin,
            progress=step,
        )
    with stages.stage("export to ONNX and check it against torch") as step:
        export(
            folder / CHECKPOINT,
            folder / BUNDLE,
            graph_source=choice.graph_source,
            name=f"{source.title} (pruned)",
            precisions=choice.precisions,
            rounding=rounding,
            target=choice.target,
            notes=choice.notes,
            origin=origin,
            progress=step,
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
        clock.seconds("gradients") if graded_sequences(options, settings) else None,
        graded_sequences(options, settings),
        had_grams=settings.gathers_moments,
    )
    usual = PRESETS[options.preset].values()
    given = {name: getattr(options, name) for name in usual if getattr(options, name) != usual[name]}
    presets = {name: chosen_preset(name, given) for name in PRESETS}
    seconds = {name: estimate_seconds(each, pace) for name, each in presets.items()}
    data = dict(report.data) | {"preset": options.preset, "estimated_seconds": seconds}
    return replace(report, tables=(*report.tables, preset_table(presets, seconds, options.preset)), data=data)


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
        typer.echo(f"\nWrote {out}, which loads in torch\n", err=True)
        say_next(("export", out, "-o", f"{out}-{BUNDLE}"))
        return
    typer.echo(
        f"""
Wrote {out}
  {BUNDLE}/      travels to the device
  {CHECKPOINT}/  loads in torch
  report.html  the figures, to look at or to send
""",
        err=True,
    )
    say_next(("run", bundle, *PROMPT), ("validate", bundle), ("bench", bundle))
