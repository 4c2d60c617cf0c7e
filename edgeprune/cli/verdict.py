"""What a person reads of a compression: the plan before the cut, and the measured verdict after it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from edgeprune.groups import LayerWidths
from edgeprune.plan import PrunePlan
from edgeprune_runtime.bench import DEFINITIONS, BenchResult
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.perplexity import Perplexity
from edgeprune_runtime.report import Cell, Report, Table, Verdict

FLOAT32_BYTES = 4
MEASURED = (
    "ttft_ms",
    "tpot_ms",
    "tpot_p95_ms",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "load_ms",
    "load_peak_rss_bytes",
    "peak_rss_bytes",
)


@dataclass(frozen=True)
class Gates:
    """Limits that turn the verdict into an exit code; None sets none."""

    max_perplexity_ratio: float | None
    min_decode_speedup: float | None


def plan_report(plan: PrunePlan, before: Sequence[LayerWidths], after: Sequence[LayerWidths]) -> Report:
    """What leaves each layer, and what that does to parameters, bytes and the KV cache."""
    layers = Table(
        "What stays in each layer",
        ("layers", "query heads", "KV heads", "channels"),
        tuple(
            (name, _change(b.heads, a.heads), _change(b.kv_heads, a.kv_heads), _change(b.channels, a.channels))
            for name, b, a in _runs(before, after)
        ),
    )
    calibration = plan.calibration
    assert calibration is not None, "every plan of compress has seen calibration text"
    totals = Table(
        "Plan",
        ("", "dense", "pruned", "pruned / dense"),
        (
            _row("parameters", plan.parameters_before, plan.parameters_after),
            _row("parameters of the decoder blocks", plan.block_parameters_before, plan.block_parameters_after),
            _row(
                "float32 weights_bytes",
                FLOAT32_BYTES * plan.parameters_before,
                FLOAT32_BYTES * plan.parameters_after,
            ),
            _row("KV cache_bytes per 1,000 tokens", 1000 * _kv_bytes(before), 1000 * _kv_bytes(after)),
        ),
        notes=(
            f"importance {plan.method}, allocation {plan.allocation}, refit {plan.refit}, statistics in {plan.dtype}",
            f"calibration: {calibration.sequences} x {calibration.length_tokens} tokens of {calibration.source}, "
            f"seed {plan.seed}, sha256 {calibration.sha256[:12]}",
            *plan.notes,
        ),
    )
    return Report(f"edgeprune plan: {plan.model}", this_machine(), (layers, totals), (), {"plan": plan_summary(plan)})


def verdict_report(
    plan: PrunePlan,
    planned: Report,
    perplexities: Sequence[Perplexity],
    measured: BenchResult,
    *,
    text: str,
    errors: Mapping[str, float],
    seconds: Mapping[str, float],
    gates: Gates,
) -> Report:
    """The measured table in front of the plan's, with the verdict in words; `perplexities` are (dense, pruned)."""
    dense, pruned = (side.figures() for side in measured.sides)
    a, b = perplexities
    limit = f", memory limit {measured.memory_bytes} bytes ({measured.enforcement})" if measured.memory_bytes else ""
    table = Table(
        "Dense against pruned, both through ONNX Runtime",
        ("", "dense", "pruned", "pruned / dense"),
        (
            _row("parameters", plan.parameters_before, plan.parameters_after),
            _row("bundle size_bytes", measured.sides[0].size_bytes, measured.sides[1].size_bytes),
            _row("perplexity", a.perplexity, b.perplexity),
            *(_row(name, dense[name], pruned[name]) for name in MEASURED),
        ),
        notes=(
            f"perplexity: {text}; {a.joining}; {a.windows} windows of {a.window_tokens} tokens, "
            f"{a.scored_tokens} scored",
            f"latency: prompt {measured.prompt_tokens}, generate {measured.generate_tokens} tokens, {measured.threads} "
            f"threads, provider {measured.provider}, {len(measured.sides[0].rounds)} rounds in turns, each a "
            f"fresh process" + limit,
        ),
    )
    timing = Table(
        "Where the time went", ("stage", "seconds"), tuple((k, round(v, 1)) for k, v in seconds.items()), ("seconds",)
    )
    meanings = Table("Definitions", ("figure", "meaning"), tuple(DEFINITIONS.items()))
    data = {
        "plan": plan_summary(plan),
        "perplexity": {"dense": asdict(a), "pruned": asdict(b), "ratio": b.perplexity / a.perplexity, "text": text},
        "bench": measured.to_dict(),
        "refit_lost_energy": dict(errors),
        "seconds": dict(seconds),
    }
    return Report(
        f"edgeprune: {plan.model}",
        measured.machine,
        (table, *planned.tables, timing, meanings),
        tuple(_verdicts(plan, a, b, measured, gates)),
        data,
    )


def plan_summary(plan: PrunePlan) -> dict[str, object]:
    """A plan without its long lists of units."""
    summary = asdict(plan)
    del summary["keep"], summary["units"]
    return summary


def _verdicts(
    plan: PrunePlan, dense: Perplexity, pruned: Perplexity, measured: BenchResult, gates: Gates
) -> Iterator[Verdict]:
    gone = plan.parameters_before - plan.parameters_after
    yield Verdict(
        f"{plan.ratio_reached:.1%} of all parameters are gone ({gone / plan.block_parameters_before:.1%} of the "
        f"decoder blocks')"
    )
    growth = pruned.perplexity / dense.perplexity
    words = f"perplexity {dense.perplexity:.2f} became {pruned.perplexity:.2f}, {growth:.2f} times dense"
    if gates.max_perplexity_ratio is None:
        yield Verdict(words)
    else:
        yield Verdict(f"{words}; at most {gates.max_perplexity_ratio:g} allowed", growth <= gates.max_perplexity_ratio)
    for ratio in measured.ratios:
        words = f"{ratio.verdict} [A dense, B pruned]"
        if ratio.name == "decode" and gates.min_decode_speedup is not None:
            # the lower end of the interval must hold the gate: a speed-up that noise could have made is none
            low = ratio.ratio if ratio.low is None else ratio.low
            yield Verdict(f"{words}; at least {gates.min_decode_speedup:g} wanted", low >= gates.min_decode_speedup)
        else:
            yield Verdict(words)


def _runs(
    before: Sequence[LayerWidths], after: Sequence[LayerWidths]
) -> Iterator[tuple[str, LayerWidths, LayerWidths]]:
    """Neighbouring layers of the same sizes as one row: ("4-7", before, after)."""
    rows = enumerate(zip(before, after, strict=True))
    for (b, a), run in itertools.groupby(rows, lambda row: row[1]):
        numbers = [number for number, _ in run]
        yield (str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"), b, a


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _kv_bytes(widths: Sequence[LayerWidths]) -> int:
    """Bytes of keys and values that one token adds to the cache, in float32."""
    return sum(2 * FLOAT32_BYTES * width.kv_heads * width.head_dim for width in widths)


def _row(name: str, dense: float | None, pruned: float | None) -> tuple[Cell, ...]:
    return name, dense, pruned, pruned / dense if dense and pruned is not None else None
