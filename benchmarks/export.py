"""What the two ways to ONNX cost, and how well they agree: `decoder` (declarative) and `traced` (torch.onnx.export).

    python benchmarks/export.py                                  # the dense smollm2-135m
    python benchmarks/export.py --checkpoint pruned/checkpoint   # a pruned checkpoint: other widths in every layer

The two graphs share no code below the checkpoint reader, so what both compute alike is right; that is why their largest
difference is reported beside each one's difference from torch. It is taken over every logit of WikiText-2 validation
windows, read in one pass without a cache (cached decoding and padding are the parity gate's, which each export runs).

An export is timed in a fresh process: with imports as a person waits for it, and without them as a program that exports
several models pays for it. The stage "graph" writes the graph and its weights; the rest proves them (parity, golden
sequences, hashes). The sources take turns, medians over --rounds; sessions are measured by `edgeprune bench`, in turns
too.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import common

from edgeprune.cli.stages import Stages
from edgeprune_runtime.bench import BenchResult, bench
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.limits import peak_rss_bytes
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import Cell, Report, Table

SOURCES = ("decoder", "traced")
WORKER = "--worker"
PROMPT_TOKENS, GENERATE_TOKENS = 64, 16
SESSION_FIGURES = ("load_ms", "load_peak_rss_bytes", "peak_rss_bytes", "ttft_ms", "tpot_ms")


@dataclass(frozen=True)
class Export:
    """One export in a fresh process: seconds (of the whole process, of its imports, of each stage) and peak RSS."""

    process_s: float
    imports_s: float
    stages_s: dict[str, float]
    peak_rss_bytes: int | None


def main() -> Report:
    """Export by both sources, compare what they compute, and load both."""
    parser = common.make_parser(__doc__)
    common.add_data_argument(parser)
    parser.add_argument("--checkpoint", type=Path, help="dense or pruned checkpoint (default: made from --model)")
    parser.add_argument("--model", default=common.MODEL, help="the dense model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="exports, and session loads, of each (default: 3)")
    parser.add_argument("--windows", type=int, default=4, help="windows of real text to compare on (default: 4)")
    parser.add_argument("--window", type=int, default=256, help="tokens of each (default: 256)")
    args = parser.parse_args()
    text = common.data_file(args.data, common.WIKITEXT2["valid"])
    stages = Stages(quiet=False)
    checkpoint = args.checkpoint
    if checkpoint is None:
        checkpoint = common.OUT / "dense-checkpoint"
        with stages.stage("dense checkpoint"):
            common.save_dense(args.model, checkpoint)
    bundles = {source: common.OUT / f"export-{source}" for source in SOURCES}
    exports: dict[str, list[Export]] = {source: [] for source in SOURCES}
    with stages.counted("exports in turns") as advance:
        for done in range(args.rounds * len(SOURCES)):
            source = SOURCES[done % len(SOURCES)]
            exports[source].append(export_in_fresh_process(source, checkpoint, bundles[source]))
            advance(done + 1, args.rounds * len(SOURCES))
    with stages.counted("logits on real text") as advance:
        differences = largest_differences(checkpoint, bundles, text, args.windows, args.window, advance)
    with stages.counted("sessions in turns") as advance:
        measured = bench(
            list(bundles.values()),
            rounds=args.rounds,
            prompt_tokens=PROMPT_TOKENS,
            generate_tokens=GENERATE_TOKENS,
            progress=advance,
        )
    return make_report(checkpoint, exports, bundles, differences, measured, args.windows * args.window)


def export_in_fresh_process(source: str, checkpoint: Path, bundle: Path) -> Export:
    """Run one export as a process of its own.

    Raises:
        EdgepruneError: if it failed, with the last line that it wrote to standard error.
    """
    began = time.perf_counter()
    command = [sys.executable, __file__, WORKER, source, str(checkpoint), str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    process_s = time.perf_counter() - began
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EdgepruneError(f"the {source} export of {checkpoint} failed: {reason}")
    return Export(process_s, **json.loads(done.stdout.splitlines()[-1]))


def worker(source: str, checkpoint: str, bundle: str) -> None:
    """The fresh process: import, export, and print what it took."""
    began = time.perf_counter()
    from edgeprune_export.exporting import export

    imported = time.perf_counter()
    starts: dict[str, float] = {}

    def note(stage: str, _share: float) -> None:
        starts.setdefault(stage, time.perf_counter())

    export(
        Path(checkpoint),
        Path(bundle),
        graph_source=source,
        force=True,
        progress=note,
    )
    # A stage lasts until the next begins; what comes before the first (reading the headers) belongs to the first.
    begins = [imported, *list(starts.values())[1:]]
    ends = [*begins[1:], time.perf_counter()]
    taken = {stage: end - begin for stage, begin, end in zip(starts, begins, ends, strict=True)}
    print(json.dumps({"imports_s": imported - began, "stages_s": taken, "peak_rss_bytes": peak_rss_bytes()}))


def largest_differences(
    checkpoint: Path,
    bundles: dict[str, Path],
    text: Path,
    count: int,
    window: int,
    advance: Callable[[int, int], None],
) -> dict[str, float]:
    """Pair of torch, decoder and traced -> largest absolute difference of a logit over `count` windows of a text."""
    import numpy as np

    from edgeprune.checkpoint import load_pruned
    from edgeprune_export.reference import logits_of
    from edgeprune_runtime.bundle import open_bundle
    from edgeprune_runtime.session import Decoder
    from edgeprune_runtime.text import read_text
    from edgeprune_runtime.tokenizer import Tokenizer

    model = load_pruned(checkpoint)
    decoders = {source: Decoder(open_bundle(folder)) for source, folder in bundles.items()}
    ids = Tokenizer.load(open_bundle(bundles["decoder"])).encode(read_text(text, rows_joined=True).text)
    if len(ids) < count * window:
        raise EdgepruneError(f"{text} has {len(ids)} tokens, less than {count} windows of {window}; ask for fewer")
    worst = {f"{a} - {b}": 0.0 for a, b in combinations(("torch", *SOURCES), 2)}
    for done, start in enumerate(range(0, count * window, window)):
        part = np.array([ids[start : start + window]], np.int64)
        logits = {"torch": logits_of(model, part[0].tolist())}
        logits |= {source: decoder.forward(part)[0][0] for source, decoder in decoders.items()}
        for a, b in combinations(logits, 2):
            worst[f"{a} - {b}"] = max(worst[f"{a} - {b}"], float(np.abs(logits[a] - logits[b]).max()))
        advance(done + 1, count)
    return worst


def make_report(
    checkpoint: Path,
    exports: dict[str, list[Export]],
    bundles: dict[str, Path],
    differences: dict[str, float],
    measured: BenchResult,
    positions: int,
) -> Report:
    """The tables: one column per source."""
    rows: list[tuple[Cell, ...]] = []

    def row(name: str, value: Callable[[Export], float]) -> None:
        rows.append((name, *(statistics.median(map(value, exports[source])) for source in SOURCES)))

    row("export_s, imports included", lambda export: export.process_s)
    row("export_s, imports excluded", lambda export: sum(export.stages_s.values()))
    for stage in exports[SOURCES[0]][0].stages_s:

        def stage_s(export: Export, stage: str = stage) -> float:
            return export.stages_s[stage]

        row(f"{stage}_s", stage_s)
    row("export_peak_rss_bytes", lambda export: export.peak_rss_bytes or 0)
    for name in ("model.onnx", "model.onnx_data"):
        rows.append((f"{name}_bytes", *((bundles[source] / "onnx" / name).stat().st_size for source in SOURCES)))
    figures = [side.figures() for side in measured.sides]
    rows += [(f"session {name}", *(side[name] for side in figures)) for name in SESSION_FIGURES]
    data = {"exports": {s: [vars(e) for e in exports[s]] for s in SOURCES}, "differences": differences}
    note = (
        f"Medians of {len(exports[SOURCES[0]])} exports, each in a fresh process. Sessions: prompt {PROMPT_TOKENS}, "
        f"generate {GENERATE_TOKENS} tokens, {measured.threads} threads, provider {measured.provider}."
    )
    return Report(
        f"Export of {checkpoint.name} by decoder and traced",
        this_machine(),
        (
            Table("Cost", ("", *SOURCES), tuple(rows), notes=(note,)),
            Table(
                f"Largest difference of a logit over {positions:,} positions of WikiText-2 valid",
                ("between", "max_abs_difference"),
                tuple(differences.items()),
            ),
        ),
        data={**data, "bench": measured.to_dict()},
    )


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        worker(*sys.argv[2:])
    else:
        common.run(main)
