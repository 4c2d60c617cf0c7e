"""Latency, throughput and memory of bundles, measured so that two of them can be compared.

Every figure comes from a fresh process (`worker.py`), the sides take turns (A, B, B, A, A, B, ...) so that a machine
that drifts drifts for both and neither is always the first, and a comparison is made per round: the interval is
Student's t on the logarithms of the rounds' ratios.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from edgeprune_runtime.bundle import Bundle, open_bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.limits import memory_group, usable_cpus
from edgeprune_runtime.machine import Machine, this_machine
from edgeprune_runtime.report import Cell, Report, Table, Verdict, format_bytes
from edgeprune_runtime.session import OutOfMemoryError, provider_name
from edgeprune_runtime.worker import Request, Round

MEGABYTE = 1e6
LABELS = {
    "load_ms": ("load, ms", 1.0),
    "ttft_ms": ("time to first token (ttft), ms", 1.0),
    "ttft_p95_ms": ("ttft, 95th percentile, ms", 1.0),
    "tpot_ms": ("time per output token (tpot), ms", 1.0),
    "tpot_p95_ms": ("tpot, 95th percentile, ms", 1.0),
    "prefill_tokens_per_s": ("prefill, tokens/s", 1.0),
    "decode_tokens_per_s": ("decode, tokens/s", 1.0),
    "load_peak_rss_bytes": ("peak memory (RSS) once loaded, MB", MEGABYTE),
    "load_own_rss_bytes": ("memory of its own once loaded, MB", MEGABYTE),
    "peak_rss_bytes": ("peak memory (RSS) in all, MB", MEGABYTE),
    "cpu_ms": ("processor time of a request, ms", 1.0),
}
"""Figure -> what a person reads of it, and the unit that it is divided by."""

RATIO = "ratio, low, high"
DEFINITIONS = {
    "load_ms": "making the ONNX Runtime session in a fresh process; the files may be in the page cache",
    "ttft_ms": "time to first token: from the prompt's token ids to the first generated id (prefill, greedy choice)",
    "ttft_p95_ms": "95th percentile of ttft over the rounds, one sample each; of few rounds that is nearly the largest",
    "tpot_ms": "time per output token: each further token by itself, with the KV cache, batch 1, greedy choice",
    "prefill_tokens_per_s": "prompt tokens / ttft",
    "decode_tokens_per_s": "tokens after the first / the time they took together",
    "load_peak_rss_bytes": "largest resident set until the session is ready, as the kernel counted it (VmHWM)",
    "load_own_rss_bytes": "memory of the process's own once the session is ready (RssAnon); the system cannot take it "
    "back, as it can pages of a mapped file",
    "peak_rss_bytes": "largest resident set of the process over its whole life (VmHWM)",
    "cpu_ms": "processor time of the measured request, all threads together",
    RATIO: "geometric mean over the rounds of A's time or memory / B's in the same round, and its 95 % "
    "interval: Student's t on the logarithms",
}
"""What each figure means; printed with every report. Tokenizing is in none of them."""

PEAK_MEMORY = "peak memory"
MIN_ROUNDS_FOR_VERDICT = 3
CONFIDENCE = 0.95
# Quantiles of Student's t for CONFIDENCE on both sides, with 1, 2, ... 30 degrees of freedom.
_STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_WORKER_TIMEOUT_S = 1800.0
_STDERR_TAIL = 200

Progress = Callable[[int, int], None]
"""Called with (worker processes done, in all)."""


@dataclass(frozen=True)
class Side:
    """One bundle's rounds."""

    label: str
    bundle: str
    model: str
    variant: str
    parameters: int
    size_bytes: int
    prompt_tokens: int
    rounds: tuple[Round, ...]

    @property
    def is_packed(self) -> bool:
        """Whether a packed copy of the variant was measured."""
        return all(round_.is_packed for round_ in self.rounds)

    def figures(self) -> dict[str, float | None]:
        """The side's figures by name: medians over rounds, p95 over all samples, memory as the largest round."""
        steps = [step for round_ in self.rounds for step in round_.step_ms]
        ttft = [round_.ttft_ms for round_ in self.rounds]
        return {
            "load_ms": statistics.median(round_.load_ms for round_ in self.rounds),
            "ttft_ms": statistics.median(ttft),
            "ttft_p95_ms": _percentile(ttft, 95),
            "tpot_ms": statistics.median(steps) if steps else None,
            "tpot_p95_ms": _percentile(steps, 95) if steps else None,
            "prefill_tokens_per_s": self.prompt_tokens / statistics.median(ttft) * 1e3,
            "decode_tokens_per_s": len(steps) / sum(steps) * 1e3 if steps else None,
            "load_peak_rss_bytes": largest([round_.load_peak_rss_bytes for round_ in self.rounds]),
            "load_own_rss_bytes": largest([round_.load_own_rss_bytes for round_ in self.rounds]),
            "peak_rss_bytes": largest([round_.peak_rss_bytes for round_ in self.rounds]),
            "cpu_ms": statistics.median(round_.cpu_ms for round_ in self.rounds),
        }


@dataclass(frozen=True)
class Ratio:
    """How many times better B is than A in one respect: above 1 is better; the interval is None with too few rounds."""

    name: str
    ratio: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """The ratio in words; better or worse only where the interval excludes 1."""
        if self.low is None or self.high is None:
            return (
                f"{self.name}: {self.ratio:.2f}, undecided; at least {MIN_ROUNDS_FOR_VERDICT} rounds make an interval"
            )
        interval = f"({CONFIDENCE:.0%} interval {self.low:.3f} to {self.high:.3f})"
        is_memory = self.name == PEAK_MEMORY
        better, worse = ("needs less", "needs more") if is_memory else ("is faster", "is slower")
        figure = f"A's peak is {self.ratio:.3f} times B's" if is_memory else f"{self.ratio:.3f} times A's speed"
        if self.low > 1.0:
            return f"{self.name}: B {better}, {figure} {interval}"
        if self.high < 1.0:
            return f"{self.name}: B {worse}, {figure} {interval}"
        return f"{self.name}: no difference shown, {figure} {interval}"


@dataclass(frozen=True)
class BenchResult:
    """Sides measured in one interleaved run, and with two of them how B compares with A."""

    machine: Machine
    provider: str
    threads: int
    prompt_tokens: int
    generate_tokens: int
    memory_bytes: int | None
    enforcement: str | None
    sides: tuple[Side, ...]
    ratios: tuple[Ratio, ...]

    def to_dict(self) -> dict[str, object]:
        """The result as plain values, with the definitions of its figures."""
        sides = [{**asdict(side), "is_packed": side.is_packed, "figures": side.figures()} for side in self.sides]
        ratios = [{**asdict(ratio), "verdict": ratio.verdict} for ratio in self.ratios]
        return {**asdict(self), "sides": sides, "ratios": ratios, "definitions": DEFINITIONS}


def bench(
    bundles: Sequence[Path],
    *,
    variant: str | None = None,
    prompt_tokens: int = 128,
    generate_tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    memory_bytes: int | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> BenchResult:
    """Measure one bundle, or two against each other.

    Raises:
        EdgepruneError: if a bundle cannot be run, the request does not fit its context, or `memory_bytes` is exceeded.
    """
    if not 1 <= len(bundles) <= 2:
        raise EdgepruneError(f"{len(bundles)} bundles were given; one, or two to compare, were expected")
    for name, value in (("rounds", rounds), ("prompt-tokens", prompt_tokens), ("generate-tokens", generate_tokens)):
        if value < 1:
            raise EdgepruneError(f"{name} is {value}; at least 1 was expected")
    provider_name(provider)
    opened = [open_bundle(folder, variant) for folder in bundles]
    for bundle in opened:
        if prompt_tokens + generate_tokens > bundle.manifest.context_tokens:
            raise EdgepruneError(
                f"{prompt_tokens} + {generate_tokens} tokens were asked for, the context of {bundle.folder} holds "
                f"{bundle.manifest.context_tokens}; lower --prompt-tokens or --generate-tokens"
            )
    threads = threads or usable_cpus()
    # The same prompt for both sides, whatever their vocabularies.
    vocab_size = min(bundle.manifest.vocab_size for bundle in opened)
    requests = [
        Request(
            bundle=str(bundle.path),
            variant=bundle.variant_name,
            provider=provider,
            threads=threads,
            prompt_tokens=prompt_tokens,
            generate_tokens=generate_tokens,
            vocab_size=vocab_size,
            memory_bytes=memory_bytes,
        )
        for bundle in opened
    ]
    measured: list[list[Round]] = [[] for _ in opened]
    total = rounds * len(opened)
    done = 0
    for number in range(rounds):
        turn = list(zip(requests, measured, strict=True))
        for request, rounds_ in turn if number % 2 == 0 else reversed(turn):
            rounds_.append(run_worker(request))
            done += 1
            if progress:
                progress(done, total)
    sides = tuple(
        _side(label, bundle, prompt_tokens, rounds_)
        for label, bundle, rounds_ in zip("AB", opened, measured, strict=False)
    )
    return BenchResult(
        machine=this_machine(),
        provider=provider,
        threads=threads,
        prompt_tokens=prompt_tokens,
        generate_tokens=generate_tokens,
        memory_bytes=memory_bytes,
        enforcement=sides[0].rounds[0].enforcement,
        sides=sides,
        ratios=compare(*sides) if len(sides) == 2 else (),
    )


def run_worker(request: Request) -> Round:
    """One round in a fresh process.

    Raises:
        OutOfMemoryError: if the request's memory limit was exceeded.
        EdgepruneError: if the worker refused the request.
    """
    if request.memory_bytes is None:
        return _run_worker(request)
    with memory_group(request.memory_bytes) as group:
        round_ = _run_worker(replace(request, group=str(group) if group else None))
    # Pages of a mapped file are in no rlimit; a device would still have to hold them.
    if group is None and (round_.peak_rss_bytes or 0) > request.memory_bytes:
        raise _exceeded(request, f"its peak RSS was {round_.peak_rss_bytes or 0:,} bytes")
    return round_


def _run_worker(request: Request) -> Round:
    command = [sys.executable, "-m", "edgeprune_runtime.worker"]
    # numpy's BLAS is not used here, and its buffers for each thread would count as ours.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(request)),
            capture_output=True,
            text=True,
            env=environment,
            timeout=_WORKER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EdgepruneError(
            f"{request.bundle} took more than {_WORKER_TIMEOUT_S:.0f} s for one round; ask for fewer tokens"
        ) from error
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or [""])[-1][:_STDERR_TAIL]
        if request.memory_bytes is not None:
            # Under a limit anything may be the first to find no memory: the loader, a thread's stack, the allocator.
            raise _exceeded(request, f"its process ended with {done.returncode}{f': {tail}' if tail else ''}")
        raise RuntimeError(f"the worker for {request.bundle} ended with {done.returncode}: {done.stderr}")
    outcome = json.loads(done.stdout.splitlines()[-1])
    if "error" in outcome:
        if outcome["out_of_memory"] and request.memory_bytes is not None:
            raise _exceeded(request, outcome["error"])
        raise EdgepruneError(outcome["error"])
    return Round.from_json(outcome)


def _exceeded(request: Request, reason: str) -> OutOfMemoryError:
    limit_mib = (request.memory_bytes or 0) / (1 << 20)
    return OutOfMemoryError(f"{request.bundle} does not run within --memory {limit_mib:g}MiB ({reason}); allow it more")


def compare(a: Side, b: Side) -> tuple[Ratio, ...]:
    """How many times better B is than A, from rounds paired by their number."""
    samples: Mapping[str, tuple[list[float], list[float]]] = {
        "prefill": ([r.ttft_ms for r in a.rounds], [r.ttft_ms for r in b.rounds]),
        "decode": ([_mean(r.step_ms) for r in a.rounds], [_mean(r.step_ms) for r in b.rounds]),
        "load": ([r.load_ms for r in a.rounds], [r.load_ms for r in b.rounds]),
        PEAK_MEMORY: (
            [float(r.peak_rss_bytes or 0) for r in a.rounds],
            [float(r.peak_rss_bytes or 0) for r in b.rounds],
        ),
    }
    return tuple(_ratio(name, *sides) for name, sides in samples.items() if all(map(all, sides)))


def report_bench(result: BenchResult) -> Report:
    """A benchmark as a report: the figures of each side, B against A, and what every figure means."""
    figures = [side.figures() for side in result.sides]
    labels = tuple(
        f"{side.label}: {Path(side.bundle).name or side.bundle}{' (packed copy)' if side.is_packed else ''}"
        for side in result.sides
    )
    rows: list[tuple[Cell, ...]] = [
        ("parameters", *(side.parameters for side in result.sides)),
        ("bundle, MB", *(side.size_bytes / MEGABYTE for side in result.sides)),
    ]
    for name, (label, unit) in LABELS.items():
        found = [side[name] for side in figures]
        rows.append((label, *(None if figure is None else figure / unit for figure in found)))
    limit = (
        f"memory limit {format_bytes(result.memory_bytes)} ({result.enforcement})"
        if result.memory_bytes
        else "no memory limit"
    )
    settings = (
        f"Prompt tokens {result.prompt_tokens}, generated tokens {result.generate_tokens}, batch 1, "
        f"threads {result.threads}, provider {result.provider}, {limit}, rounds {len(result.sides[0].rounds)}, "
        f"each in a fresh process{', sides taking turns' if len(result.sides) == 2 else ''}."
    )
    nodes = "; ".join(
        f"{side.label}: "
        + (", ".join(f"{count} on {name}" for name, count in side.rounds[0].nodes_by_provider.items()) or "not said")
        for side in result.sides
    )
    tables = [Table("Figures", ("figure", *labels), tuple(rows), notes=(settings, f"Graph nodes of {nodes}."))]
    if result.ratios:
        tables.append(
            Table(
                "B against A, paired by round (above 1 is better for B)",
                ("respect", "ratio", "low", "high"),
                tuple((ratio.name, ratio.ratio, ratio.low, ratio.high) for ratio in result.ratios),
                bars=("ratio",),
            )
        )
    meanings = [(LABELS[name][0], meaning) for name, meaning in DEFINITIONS.items() if name in LABELS]
    if result.ratios:
        meanings.append((RATIO, DEFINITIONS[RATIO]))
    tables.append(Table("Definitions", ("figure", "meaning"), tuple(meanings)))
    verdicts = tuple(Verdict(ratio.verdict) for ratio in result.ratios)
    return Report("edgeprune bench", result.machine, tuple(tables), verdicts, {"bench": result.to_dict()})


def _ratio(name: str, a: Sequence[float], b: Sequence[float]) -> Ratio:
    logs = np.log(np.array(a) / np.array(b))
    if len(logs) < MIN_ROUNDS_FOR_VERDICT:
        return Ratio(name, float(np.exp(logs.mean())), None, None)
    mean, error = logs.mean(), logs.std(ddof=1) / math.sqrt(len(logs))
    reach = _student_t(len(logs) - 1) * error
    return Ratio(name, float(np.exp(mean)), float(np.exp(mean - reach)), float(np.exp(mean + reach)))


def _student_t(degrees: int) -> float:
    """Standard errors from the mean to the end of the interval; with many rounds those of the normal distribution."""
    if degrees <= len(_STUDENT_T):
        return _STUDENT_T[degrees - 1]
    return statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2.0)


def _side(label: str, bundle: Bundle, prompt_tokens: int, rounds: Sequence[Round]) -> Side:
    return Side(
        label=label,
        bundle=str(bundle.path),
        model=bundle.manifest.model.name,
        variant=bundle.variant_name,
        parameters=bundle.manifest.parameters.all,
        size_bytes=bundle.size_bytes,
        prompt_tokens=prompt_tokens,
        rounds=tuple(rounds),
    )


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(np.array(values), percent))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def largest(values: Sequence[int | None]) -> int | None:
    """The largest of what is known; None where nothing is."""
    return max((value for value in values if value is not None), default=None)
