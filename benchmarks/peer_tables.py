"""The tables of `runtime_peers.py`, and which of its goals are met."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import Cell, Report, Table, Verdict

LARGE_BYTES = 1 << 30
"""An array that no cache holds."""

MIN_ROUNDS = 3
RESAMPLES = 10_000
CONFIDENCE_PERCENT = 95
SIZE_GOAL, LOAD_GOAL = 0.03, 1.3
EQUAL = (1.0, 1.0)
PRUNED_GOALS = (2.0, 1.3)
"""Of prefill and decode, the pruned int4 bundle against llama.cpp's dense model."""

PACKED = ", packed here"
"""How the name of a model ends whose weights were packed on this machine."""

GENAI, MOBIUS, LLAMA = "genai builder", "mobius-onnx", "llama.cpp"
INSTALL = {
    GENAI: "pip install 'edgeprune[genai]', then --builder",
    MOBIUS: "pip install mobius-onnx==0.1.0 into an environment of its own, then --mobius-python ITS_PYTHON",
    LLAMA: "pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 into an environment of its own (see "
    "benchmarks/README.md), then --llama-python ITS_PYTHON",
    "pruned": "edgeprune compress smollm2-135m --ratio 0.2 --precision int4 -o pruned, then --pruned pruned/bundle",
}
Round = Mapping[str, Mapping[str, Any]]
"""Model -> what its two processes measured; and "read" -> milliseconds of a pass over memory by its bytes."""


@dataclass(frozen=True)
class Model:
    """What is measured: a file for an engine, under the name that tables call it.

    `unpacked_bytes` are those of the files that a packed graph was made from; None where nothing is packed.
    `writes_in_place` is that of an ONNX graph; llama.cpp always does.
    """

    name: str
    engine: str
    python: Path
    files: tuple[Path, ...]
    token_bytes: int
    vocab_size: int
    head_dim: int
    accuracy_level: int | None = None
    unpacked_bytes: int | None = None
    writes_in_place: bool = False

    @property
    def load_bytes(self) -> int:
        """What the memory of a load is held against: of a packed graph, the files that it was made from."""
        return self.size_bytes if self.unpacked_bytes is None else self.unpacked_bytes

    @property
    def size_bytes(self) -> int:
        """Of the files that are loaded."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def identity(self) -> list[Any]:
        """What tells these files from others of the same name."""
        stats = [file.stat() for file in self.files]
        files = ((stat.st_size, stat.st_mtime_ns) for stat in stats)
        return [self.engine, self.writes_in_place, str(self.files[0]), *files]


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than a peer, paired by round; no interval of fewer than `MIN_ROUNDS` rounds."""

    ratio: float
    low: float | None
    high: float | None

    @classmethod
    def paired(cls, ours: Sequence[float], peers: Sequence[float]) -> "Ratio":
        """From the milliseconds of the same rounds."""
        ratios = np.array(peers) / np.array(ours)
        median = float(np.median(ratios))
        if len(ratios) < MIN_ROUNDS:
            return cls(median, None, None)
        drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
        tail = (100 - CONFIDENCE_PERCENT) / 2
        low, high = np.percentile(np.median(drawn, axis=1), (tail, 100 - tail))
        return cls(median, float(low), float(high))

    def reaches(self, goal: float) -> bool | None:
        """Whether a goal is met: of 1, that it is not shown to be slower; of more, that all of the interval is."""
        if self.low is None or self.high is None:
            return None
        return self.high >= goal if goal == 1.0 else self.low >= goal

    def __str__(self) -> str:
        interval = "too few rounds for an interval" if self.low is None else f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.ratio:.3f} ({interval})"


@dataclass(frozen=True)
class Versus:
    """A pair of models, and how many times faster in prefill and decode the first is meant to be."""

    ours: str
    peer: str
    goals: tuple[float, float] | None


@dataclass(frozen=True)
class Size:
    """What a variant's files weigh, and what its parameters at their bits would."""

    variant: str
    parameters: int
    block_bits: float
    table_bits: float
    expected_bytes: float
    found_bytes: int

    @property
    def off(self) -> float:
        """Share that the files are too large."""
        return self.found_bytes / self.expected_bytes - 1.0


def pairs(models: Sequence[Model]) -> list[Versus]:
    """Who is held against whom, of the models that are there."""
    wanted = [Versus(f"ours {kind}", f"{peer} {kind}", EQUAL) for kind in ("fp32", "int4") for peer in (GENAI, MOBIUS)]
    llama = next((model.name for model in models if model.engine == "llama"), LLAMA)
    wanted += [Versus("pruned int4", llama, PRUNED_GOALS), Versus("ours int4", llama, None)]
    wanted += [Versus("pruned int4", "ours int4", None)]
    wanted += [Versus(f"{name}{PACKED}", name, None) for name in ("ours fp32", "ours int8", "ours int4", "pruned int4")]
    wanted += [Versus(f"ours {kind}", f"ours {kind}, level 0", None) for kind in ("int8", "int4")]
    names = {model.name for model in models}
    return [each for each in wanted if {each.ours, each.peer} <= names]


def make_report(
    models: Sequence[Model],
    rounds: Sequence[Round],
    judged: Mapping[str, Mapping[str, Any]],
    sizes: Sequence[Size],
    missing: Sequence[str],
    settings: Mapping[str, int],
) -> Report:
    """The tables and, where there is a goal, whether it is met."""
    tables, verdicts = [], []
    for table, found in (
        _speed_table(models, rounds, judged, settings),
        _pair_table(pairs(models), rounds),
        _floor_table(models, rounds),
        _size_table(sizes),
        _load_table(models, rounds),
    ):
        tables.append(table)
        verdicts += found
    if missing:
        rows = tuple((name, INSTALL[name]) for name in missing)
        tables.append(Table("Not measured", ("peer", "how to get it"), rows))
        verdicts.append(Verdict(f"not measured: {', '.join(missing)}; the last table says how to get them"))
    data = {"settings": dict(settings), "rounds": rounds, "sizes": [vars(size) | {"off": size.off} for size in sizes]}
    return Report("Runtime peers", this_machine(), tuple(tables), tuple(verdicts), {**data, "missing": list(missing)})


def _speed_table(
    models: Sequence[Model],
    rounds: Sequence[Round],
    judged: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, int],
) -> tuple[Table, list[Verdict]]:
    reference = judged["ours fp32"]
    greedy = rounds[0]["ours fp32"]["tokens"]
    rows: list[tuple[Cell, ...]] = []
    for model in models:
        nats, likeliest = judged[model.name]["nats"], judged[model.name]["likeliest"]
        positions = len(likeliest)
        same = sum(a == b for a, b in zip(likeliest, reference["likeliest"], strict=True))
        tokens = rounds[0][model.name]["tokens"]
        prefix = next((i for i, (a, b) in enumerate(zip(tokens, greedy, strict=True)) if a != b), len(greedy))
        rows.append(
            (
                model.name,
                model.accuracy_level,
                settings["prompt_tokens"] / median(rounds, model.name, prefill_ms) * 1e3,
                median(rounds, model.name, decode_ms),
                float(np.exp((nats - reference["nats"]) / positions)),
                same / positions,
                prefix,
            )
        )
    columns = (
        *("model", "accuracy level", "prefill, tokens/s", "decode, ms/token", "perplexity / ours fp32"),
        *("same likeliest token", "greedy tokens before the first that differs"),
    )
    notes = (
        f"Medians over {len(rounds)} rounds of fresh processes in turns; of a round's decode steps the median. Prompt "
        f"{settings['prompt_tokens']}, generate {settings['generate_tokens']}, threads {settings['threads']}, batch 1. "
        "Graphs compute the logits of the whole prompt, llama.cpp those of its last token.",
        f"Perplexity and likeliest tokens over {len(reference['likeliest'])} positions of text, against the dense "
        "model in float32; a pruned model differs from it by what was cut as well.",
    )
    return Table("Speed and what rounding costs", columns, tuple(rows), notes=notes), []


def _pair_table(pairs_: Sequence[Versus], rounds: Sequence[Round]) -> tuple[Table, list[Verdict]]:
    rows: list[tuple[Cell, ...]] = []
    verdicts = []
    for versus in pairs_:
        for what, figure, index in (("prefill", prefill_ms, 0), ("decode", decode_ms, 1)):
            ours, peer = ([figure(round_[name]) for round_ in rounds] for name in (versus.ours, versus.peer))
            ratio = Ratio.paired(ours, peer)
            goal = versus.goals[index] if versus.goals else None
            rows.append((versus.ours, versus.peer, what, ratio.ratio, ratio.low, ratio.high, goal))
            met = None if goal is None else ratio.reaches(goal)
            wanted = "" if goal is None else f", {'no slower' if goal == 1.0 else f'at least {goal:g}'} wanted"
            verdicts.append(Verdict(f"{what}: {versus.ours} has {ratio} times the speed of {versus.peer}{wanted}", met))
    columns = ("ours", "against", "respect", "ratio", "low", "high", "wanted")
    note = f"Above 1 is better for ours. Median of the rounds' ratios; {CONFIDENCE_PERCENT} % interval by bootstrap."
    return Table("Ours against others, paired by round", columns, tuple(rows), ("ratio",), (note,)), verdicts


def _floor_table(models: Sequence[Model], rounds: Sequence[Round]) -> tuple[Table, list[Verdict]]:
    large_ms = statistics.median(round_["read"][str(LARGE_BYTES)] for round_ in rounds)
    rows: list[tuple[Cell, ...]] = []
    for model in models:
        took = median(rounds, model.name, decode_ms)
        floor_ms = large_ms * model.token_bytes / LARGE_BYTES
        alike_ms = statistics.median(round_["read"][str(model.token_bytes)] for round_ in rounds)
        rows.append((model.name, model.token_bytes / 1e6, took, floor_ms, floor_ms / took, alike_ms, alike_ms / took))
    columns = (
        *("model", "weights read, MB/token", "decode, ms/token", "floor, ms", "share of the floor"),
        *("floor by an array of that size, ms", "share of that"),
    )
    notes = (
        f"Read bandwidth of all threads together: {LARGE_BYTES / large_ms / 1e6:.3g} GB/s (array of "
        f"{LARGE_BYTES / 1e9:.2g} GB, fastest of several passes, median over rounds). The cache of keys and values, "
        "which a token reads too, is not counted.",
    )
    return Table("Decode against the memory's floor", columns, tuple(rows), ("share of the floor",), notes), []


def _size_table(sizes: Sequence[Size]) -> tuple[Table, list[Verdict]]:
    rows = tuple(
        (s.variant, s.parameters, s.block_bits, s.table_bits, s.expected_bytes / 1e6, s.found_bytes / 1e6, s.off * 100)
        for s in sizes
    )
    columns = (
        *("variant", "parameters", "bits in the blocks", "bits in the tables", "parameters x bits, MB"),
        *("graph and weights, MB", "off, %"),
    )
    verdicts = [
        Verdict(
            f"size: {s.variant} is {s.off:+.1%} off its parameters x bits, within 3 % wanted", abs(s.off) <= SIZE_GOAL
        )
        for s in sizes
    ]
    return Table("Size", columns, rows), verdicts


def _load_table(models: Sequence[Model], rounds: Sequence[Round]) -> tuple[Table, list[Verdict]]:
    rows: list[tuple[Cell, ...]] = []
    verdicts = []
    for model in models:
        before, peak, anonymous, mapped = (
            max((round_[model.name]["cold"][f"{name}_bytes"] or 0 for round_ in rounds), default=0)
            for name in ("rss_before", "load_peak_rss", "load_peak_anonymous", "load_peak_file")
        )
        size = model.load_bytes
        rows.append(
            (
                model.name,
                model.size_bytes / 1e6,
                median(rounds, model.name, lambda found: found["cold"]["load_ms"]),
                median(rounds, model.name, lambda found: found["cold"]["first_token_ms"]),
                median(rounds, model.name, lambda found: found["load_ms"]),
                before / 1e6,
                peak / 1e6,
                (peak - before) / size,
                anonymous / size,
                mapped / size,
            )
        )
        if model.name.startswith(("ours", "pruned")) and peak and model.accuracy_level != 0:
            share = (peak - before) / size
            whose = "its files" if model.unpacked_bytes is None else "the files it was packed from"
            text = f"load: {model.name} takes {share:.2f} times {whose} beside the runtime itself"
            text += f", {anonymous / size:.2f} of them its own, at most {LOAD_GOAL} wanted"
            verdicts.append(Verdict(text, share <= LOAD_GOAL))
    columns = (
        *("model", "files, MB", "cold load, ms", "cold load and first token, ms", "warm load, ms"),
        *("RSS before, MB", "load peak RSS, MB", "(peak - before) / files", "of its own / files", "mapped / files"),
    )
    is_cold = all(round_[model.name]["cold"]["is_cold"] for round_ in rounds for model in models)
    notes = (
        "Cold: the kernel was asked to forget the files, and had."
        if is_cold
        else "The kernel did not forget all files when asked, so some of the cold figures are warm.",
        "RSS before is Python with the runtime imported. Memory of the process's own is what the system cannot take "
        "back; mapped are pages of files, which count as resident once they are read, and which it can. Each is the "
        "most that was seen, not at the same moment. Of what was packed, the files are those that it was packed from.",
    )
    return Table("Load", columns, tuple(rows), notes=notes), verdicts


def prefill_ms(found: Mapping[str, Any]) -> float:
    """Milliseconds to the first token."""
    return float(found["ttft_ms"])


def decode_ms(found: Mapping[str, Any]) -> float:
    """Milliseconds of a further token: of a round's steps the median."""
    return statistics.median(found["step_ms"])


def median(rounds: Sequence[Round], name: str, figure: Callable[[Mapping[str, Any]], float]) -> float:
    """Of a model's figure, over the rounds."""
    return statistics.median(figure(round_[name]) for round_ in rounds)
