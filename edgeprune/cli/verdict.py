"""What a person reads of a compression: the plan before the cut, and the measured verdict after it."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from edgeprune.groups import LayerWidths
from edgeprune.patterns import Found, Pattern
from edgeprune.plan import PrunePlan, SparsityRecord
from edgeprune.presets import Preset
from edgeprune.recover import Recovery
from edgeprune.refit import Outcome
from edgeprune_runtime.bench import (
    CONFIDENCE,
    DEFINITIONS,
    LABELS,
    MEGABYTE,
    MIN_ROUNDS_FOR_VERDICT,
    PEAK_MEMORY,
    BenchResult,
    Ratio,
)
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.perplexity import Perplexity
from edgeprune_runtime.report import Cell, Report, Table, Verdict, format_bytes

FLOAT32_BYTES = 4
REFIT_TABLE, SPARSE_REFIT_TABLE = "What the refit did", "What the refit of the sparse Linears did"
RECOVER_TABLE = "What the recovery did"
REFIT_DATA = {REFIT_TABLE: "refit", RECOVER_TABLE: "recover", SPARSE_REFIT_TABLE: "sparse_refit"}
"""Table -> its data in the report."""

MEASURED_TABLE, NOTES_TABLE = "Dense against pruned, both through ONNX Runtime", "Good to know of the bundle"
ZEROS_TABLE = "Zeros in the weights"
ZEROS_AND_SPEED = (
    "ONNX Runtime's CPU kernels multiply by zeros as by other numbers: zeros alone win no time and no memory there, "
    "only bytes of what is compressed; sparse tensor cores (TensorRT, provider tensorrt) can use 2:4 along inputs"
)
MEASURED = (
    *("ttft_ms", "tpot_ms", "tpot_p95_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "load_ms"),
    *("load_peak_rss_bytes", "peak_rss_bytes"),
)
"""Figures of the benchmark that the report shows, in order."""


@dataclass(frozen=True)
class Gates:
    """Limits that turn the verdict into an exit code; None sets none."""

    max_perplexity_ratio: float | None
    min_decode_speedup: float | None


def plan_report(plan: PrunePlan, before: Sequence[LayerWidths], after: Sequence[LayerWidths]) -> Report:
    """What leaves each layer, what that does to parameters, bytes and the KV cache, and where zeros are put."""
    tables = _cut_tables(plan, before, after) if plan.is_cut else []
    if plan.sparsity is not None:
        tables.append(_zeros_table(plan.sparsity))
    last = replace(tables[-1], notes=(*tables[-1].notes, *_calibration_notes(plan), *plan.notes))
    title = f"edgeprune plan: {plan.model}"
    return Report(title, this_machine(), (*tables[:-1], last), (), {"plan": plan.summary()})


def _cut_tables(plan: PrunePlan, before: Sequence[LayerWidths], after: Sequence[LayerWidths]) -> list[Table]:
    layers = Table(
        "What stays in each layer",
        ("layers", "query heads", "KV heads", "channels"),
        tuple(
            (name, _change(b.heads, a.heads), _change(b.kv_heads, a.kv_heads), _change(b.channels, a.channels))
            for name, b, a in _runs(before, after)
        ),
    )
    totals = Table(
        "Plan",
        ("", "dense", "pruned", "pruned / dense"),
        (
            _row("parameters", plan.parameters_before, plan.parameters_after),
            _row("parameters of the decoder blocks", plan.block_parameters_before, plan.block_parameters_after),
            _row(
                "weights in float32, MB",
                FLOAT32_BYTES * plan.parameters_before,
                FLOAT32_BYTES * plan.parameters_after,
                MEGABYTE,
            ),
            _row("KV cache per 1,000 tokens, MB", 1000 * _kv_bytes(before), 1000 * _kv_bytes(after), MEGABYTE),
        ),
        notes=(
            f"importance {plan.method}, allocation {plan.allocation}, heads {plan.heads}, refit {plan.refit}, "
            f"recover {plan.recover}, statistics in {plan.dtype}",
        ),
    )
    return [layers, totals]


def _zeros_table(sparsity: SparsityRecord) -> Table:
    """Where zeros are put: a row for the Linears of a kind."""
    kinds: dict[tuple[str, str], int] = {}
    for name, side in sparsity.sides.items():
        kind = name.rpartition(".")[2], side
        kinds[kind] = kinds.get(kind, 0) + 1
    pattern = Pattern.parse(sparsity.pattern)
    along = {"in": "inputs", "out": "outputs"}
    return Table(
        ZEROS_TABLE,
        ("Linears", "count", "pattern", "blocks lie along" if pattern.block_m else "ranked along", "zeros"),
        tuple(
            (kind, count, sparsity.pattern, along[side], f"{pattern.sparsity:.1%}")
            for (kind, side), count in kinds.items()
        ),
        notes=(f"method {sparsity.method}, layout {sparsity.layout}, refit {sparsity.refit}", ZEROS_AND_SPEED),
    )


def _calibration_notes(plan: PrunePlan) -> tuple[str, ...]:
    calibration = plan.calibration
    assert calibration is not None, "every plan of compress has seen calibration text"
    return (
        f"calibration: {calibration.sequences} x {calibration.length_tokens} tokens of {calibration.source}, "
        f"seed {plan.seed}, sha256 {calibration.sha256[:12]}",
    )


def with_zeros(report: Report, found: Found | None, where: str) -> Report:
    """A report with what was counted in a file that was written; the same without a count."""
    if found is None:
        return report
    text = (
        f"zeros in {where}: {found.sparsity:.2%} of {found.weights:,} weights, at least {found.expected_sparsity:.2%} "
        "expected; no block breaks the pattern"
    )
    data = dict(report.data) | {"zeros": asdict(found)}
    return replace(report, verdicts=(*report.verdicts, Verdict(text, passed=found.broken == 0)), data=data)


def with_refit(report: Report, outcomes: Mapping[str, Outcome], title: str = REFIT_TABLE) -> Report:
    """A plan's report with what a refit did: means over the Linears of a kind, and the one that ended worst."""
    key = REFIT_DATA[title]
    data = dict(report.data) | {key: {name: asdict(outcome) for name, outcome in outcomes.items()}}
    if not outcomes:
        return replace(report, data=data)
    kinds: dict[str, list[Outcome]] = {}
    for name, outcome in outcomes.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(outcome)
    worst = max(outcomes, key=lambda name: outcomes[name].error)
    table = Table(
        title,
        ("Linears and MLPs", "accepted", "ridge", "held out, before", "held out, after", "all tokens"),
        (
            *(_refit_row(f"{kind}, mean of {len(of_kind)}", of_kind) for kind, of_kind in kinds.items()),
            _refit_row(f"worst: {worst}", [outcomes[worst]]),
        ),
        notes=(
            "errors: share of the full Linear's output energy that is lost on calibration text (of an MLP: of what it "
            "should add for the block to give what the dense one gives; in the last block: of the nats that the dense "
            "model's tokens cost, those that are lost); a refit is accepted where the held-out one falls",
        ),
    )
    return replace(report, tables=(*report.tables, table), data=data)


def with_recovery(report: Report, recovery: Recovery) -> Report:
    """A plan's report with what the recovery did."""
    table = Table(
        RECOVER_TABLE,
        ("", "added to the weights", "held out, before", "held out, after"),
        (
            (
                "KL(dense || pruned), nats per token",
                "yes" if recovery.is_accepted else "no",
                recovery.divergence_before,
                recovery.divergence,
            ),
        ),
        notes=("adapters are added where the divergence on calibration text kept aside falls; else nothing changes",),
    )
    data = dict(report.data) | {REFIT_DATA[RECOVER_TABLE]: asdict(recovery)}
    return replace(report, tables=(*report.tables, table), data=data)


def only_refit(report: Report) -> Report:
    """What a terminal shows after a plan that it has shown before: refit and recovery."""
    return replace(report, tables=tuple(table for table in report.tables if table.title in REFIT_DATA))


def preset_table(presets: Mapping[str, Preset], seconds: Mapping[str, float], chosen: str) -> Table:
    """What each preset does and how long it would take, the chosen one marked."""
    return Table(
        "Presets",
        ("preset", "what it does", "values", "estimated time"),
        tuple(
            (f"{name} (chosen)" if name == chosen else name, preset.summary, str(preset), _duration(seconds[name]))
            for name, preset in presets.items()
        ),
        notes=(
            "estimated from the pace of this run, for statistics, search and refit on this machine; calibration text, "
            "--recover, export and checks come on top",
        ),
    )


def verdict_report(
    plan: PrunePlan,
    planned: Report,
    perplexities: Sequence[Perplexity],
    measured: BenchResult,
    *,
    text: str,
    seconds: Mapping[str, float],
    gates: Gates,
    fits: Sequence[Verdict] = (),
    compressed_bytes: tuple[int, int] | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """The measured table in front of the plan's, with the verdict in words.

    `perplexities` are (dense, pruned); `measured` has both sides, or only the pruned one where the dense does not fit;
    `fits` says so. `compressed_bytes` are what zstd makes of the (dense, pruned) bundle; `notes` are those of the
    pruned one's manifest, such as what ONNX Runtime's mobile usability check found.
    """
    *first, last = measured.sides
    dense = first[0].figures() if first else dict.fromkeys(MEASURED)
    pruned = last.figures()
    a, b = perplexities
    size = format_bytes(measured.memory_bytes) if measured.memory_bytes else ""
    limit = f", memory limit {size} ({measured.enforcement})" if size else ""
    variant = "" if last.variant == "fp32" else f"; pruned is the variant {last.variant}, dense is fp32"
    table = Table(
        MEASURED_TABLE,
        ("", "dense", "pruned", "pruned / dense"),
        (
            _row("parameters", plan.parameters_before, plan.parameters_after),
            *_other_than_zero(plan, planned),
            _row("bundle, MB", first[0].size_bytes if first else None, last.size_bytes, MEGABYTE),
            *([_row("bundle, compressed by zstd, MB", *compressed_bytes, MEGABYTE)] if compressed_bytes else []),
            _row("perplexity", a.perplexity, b.perplexity),
            *(_row(LABELS[name][0], dense[name], pruned[name], LABELS[name][1]) for name in MEASURED),
        ),
        notes=(
            f"perplexity: {text}; {a.joining}; {a.windows} x {a.window_tokens} tokens, {a.scored_tokens} scored",
            f"latency: prompt {measured.prompt_tokens}, generate {measured.generate_tokens} tokens, threads "
            f"{measured.threads}, provider {measured.provider}, rounds {len(last.rounds)}, in turns, each in a fresh "
            f"process{limit}{variant}",
            "the columns are each side's medians over its rounds; the verdicts compare the sides within each round, as "
            "a machine's pace changes from one to the next, so that the two may differ",
        ),
    )
    good_to_know = [Table(NOTES_TABLE, ("note",), tuple((note,) for note in notes))] if notes else []
    timing = Table(
        "Where the time went", ("stage", "seconds"), tuple((k, round(v, 1)) for k, v in seconds.items()), ("seconds",)
    )
    meanings = Table(
        "Definitions",
        ("figure", "meaning"),
        tuple((LABELS[name][0], DEFINITIONS[name]) for name in MEASURED if name in DEFINITIONS),
    )
    data = {
        "plan": plan.summary(),
        "perplexity": {"dense": asdict(a), "pruned": asdict(b), "ratio": b.perplexity / a.perplexity, "text": text},
        "bench": measured.to_dict(),
        "compressed_bytes": compressed_bytes,
        "footprint": planned.data.get("footprint"),
        "zeros": planned.data.get("zeros"),
        **{key: planned.data.get(key, {}) for key in REFIT_DATA.values()},
        "seconds": dict(seconds),
    }
    return Report(
        f"edgeprune: {plan.model}",
        measured.machine,
        (table, *good_to_know, *planned.tables, timing, meanings),
        (*_verdicts(plan, a, b, measured, gates), *planned.verdicts, *fits),
        data,
    )


def short(report: Report) -> Report:
    """What a terminal shows at the end: what was measured, what the bundle's notes say, and the verdict."""
    return replace(report, tables=tuple(each for each in report.tables if each.title in (MEASURED_TABLE, NOTES_TABLE)))


def _verdicts(
    plan: PrunePlan, dense: Perplexity, pruned: Perplexity, measured: BenchResult, gates: Gates
) -> Iterator[Verdict]:
    gone = plan.parameters_before - plan.parameters_after
    if plan.is_cut:
        yield Verdict(
            f"{100 * plan.ratio_reached:.1f} % of all parameters are gone "
            f"({100 * gone / plan.block_parameters_before:.1f} % of those of the decoder blocks)"
        )
    growth = pruned.perplexity / dense.perplexity
    words = f"perplexity: {growth:.2f} times that of dense ({dense.perplexity:.2f} became {pruned.perplexity:.2f})"
    if gates.max_perplexity_ratio is None:
        yield Verdict(words)
    else:
        yield Verdict(f"{words}; at most {gates.max_perplexity_ratio:g} allowed", growth <= gates.max_perplexity_ratio)
    if gates.min_decode_speedup is not None and not measured.ratios:
        yield Verdict("decode: the dense model does not run here, so its speed-up cannot be judged")
    for ratio in measured.ratios:
        if ratio.name == "decode" and gates.min_decode_speedup is not None:
            # the lower end of the interval must hold the gate: a speed-up that noise could have made is none
            low = ratio.low or 0.0
            words = f"{in_words(ratio)}; at least {gates.min_decode_speedup:g} wanted of the interval's lower end"
            yield Verdict(words, low >= gates.min_decode_speedup)
        else:
            yield Verdict(in_words(ratio))


def in_words(ratio: Ratio) -> str:
    """How the pruned model (B) compares with the dense one (A), as a sentence."""
    low, high = ratio.low, ratio.high
    if ratio.name == PEAK_MEMORY:
        # a person asks how much of the dense model's memory is left to pay
        words = f"{1 / ratio.ratio:.3f} of the dense model's"
        ends = (1 / high, 1 / low) if low and high else None
    else:
        words = f"{ratio.ratio:.2f} times as fast as dense"
        ends = (low, high) if low is not None and high is not None else None
    if ends is None:
        return f"{ratio.name}: undecided, {words} (at least {MIN_ROUNDS_FOR_VERDICT} rounds would make an interval)"
    digits = 3 if ratio.name == PEAK_MEMORY else 2
    words += f" ({100 * CONFIDENCE:.0f} % interval {ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
    is_decided = ends[0] > 1.0 or ends[1] < 1.0
    return f"{ratio.name}: {words}" if is_decided else f"{ratio.name}: no difference shown, {words}"


def _other_than_zero(plan: PrunePlan, planned: Report) -> Iterator[tuple[Cell, ...]]:
    zeros = planned.data.get("zeros")
    if isinstance(zeros, Mapping):
        left = plan.parameters_after - (zeros["weights"] - zeros["nonzeros"])
        yield _row("parameters other than zero", plan.parameters_before, left)


def _runs(
    before: Sequence[LayerWidths], after: Sequence[LayerWidths]
) -> Iterator[tuple[str, LayerWidths, LayerWidths]]:
    """Neighbouring layers of the same sizes as one row: ("4-7", before, after)."""
    rows = enumerate(zip(before, after, strict=True))
    for (b, a), run in itertools.groupby(rows, lambda row: row[1]):
        numbers = [number for number, _ in run]
        yield (str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"), b, a


def _refit_row(name: str, outcomes: Sequence[Outcome]) -> tuple[Cell, ...]:
    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    accepted = sum(outcome.is_accepted for outcome in outcomes)
    return (
        name,
        f"{accepted} of {len(outcomes)}",
        mean(outcome.damping for outcome in outcomes),
        mean(outcome.held_out_error_before for outcome in outcomes),
        mean(outcome.held_out_error for outcome in outcomes),
        mean(outcome.error for outcome in outcomes),
    )


def _duration(seconds: float) -> str:
    """A duration as a person says it; an estimate has no more digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _kv_bytes(widths: Sequence[LayerWidths]) -> int:
    """Bytes of keys and values that one token adds to the cache, in float32."""
    return sum(2 * FLOAT32_BYTES * width.kv_heads * width.head_dim for width in widths)


def _row(name: str, dense: float | None, pruned: float | None, unit: float = 1.0) -> tuple[Cell, ...]:
    """A row of a figure, in multiples of `unit`, with the share of dense that it is."""
    share = pruned / dense if dense and pruned is not None else None
    return name, *(value if value is None or unit == 1.0 else value / unit for value in (dense, pruned)), share
