"""The checks at the end of `compress`: perplexity and latency of both bundles, and the verdict."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.cli.options import BUNDLE, DEFAULT_WINDOW, DENSE, Options

if TYPE_CHECKING:
    from edgeprune.calibration import Calibration
    from edgeprune.cli.stages import Stages
    from edgeprune.plan import PrunePlan
    from edgeprune_runtime.bench import BenchResult
    from edgeprune_runtime.perplexity import Perplexity
    from edgeprune_runtime.report import Report, Verdict
    from edgeprune_runtime.text import Text


def judge(
    options: Options,
    folder: Path,
    plan: "PrunePlan",
    planned: "Report",
    text: "Text | Calibration",
    memory_bytes: int | None,
    stages: "Stages",
    variants: Sequence[str],
) -> "Report":
    """Measure both bundles, and write the verdict beside them; `variants` are what the pruned one was to have."""
    from edgeprune.cli.verdict import Gates, verdict_report, with_zeros
    from edgeprune_export.sparsity_check import found_zeros
    from edgeprune_runtime.bundle import open_bundle
    from edgeprune_runtime.report import Verdict

    with stages.counted("perplexity through ONNX Runtime") as advance:
        perplexities = _perplexities(options, [folder / DENSE, folder / BUNDLE], text, advance)
    with stages.counted("latency and memory, in turns") as advance:
        measured, fits = _measure(options, folder / DENSE, folder / BUNDLE, memory_bytes, advance)
    manifest = open_bundle(folder / BUNDLE).manifest
    fits += [
        Verdict(f"{name} is not in the bundle: its rounded weights lose too much", passed=False)
        for name in variants
        if name not in manifest.variants
    ]
    compressed = None
    if plan.sparsity is not None:
        planned = with_zeros(planned, found_zeros(manifest), "the ONNX graph")
        with stages.stage("size of the compressed bundles"):
            compressed = _compressed_bytes(folder / DENSE), _compressed_bytes(folder / BUNDLE)
    if not options.keep_dense:
        shutil.rmtree(folder / DENSE)
    report = verdict_report(
        plan,
        planned,
        perplexities,
        measured,
        text=options.eval_text.name if options.eval_text else f"held-out part of the calibration text ({text.source})",
        seconds=stages.seconds,
        gates=Gates(options.max_perplexity_ratio, options.min_decode_speedup),
        fits=fits,
        compressed_bytes=compressed,
        notes=manifest.notes,
    )
    report.save(folder)
    return report


def hold_gates(options: Options, report: "Report") -> None:
    """Fail if the result misses a gate that the user has set.

    Raises:
        GateError: if so; the result is written all the same.
    """
    from edgeprune_runtime.errors import GateError

    failed = [verdict.text for verdict in report.verdicts if verdict.passed is False]
    if failed:
        raise GateError(f"the result is in {options.output}, but misses its gate: {'; '.join(failed)}")


def _compressed_bytes(bundle: Path) -> int:
    """Bytes of a bundle in a package or a download: each of its files compressed by zstd at its default level."""
    import zstandard

    total = 0
    for file in bundle.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                total += sum(len(chunk) for chunk in zstandard.ZstdCompressor(threads=-1).read_to_iter(stream))
    return total


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
            window = options.eval_window or min(DEFAULT_WINDOW, bundle.manifest.context_tokens)
            text_hash, joining = source.text_hash, source.joining
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
