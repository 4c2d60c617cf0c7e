"""What the user asked of `compress`. Imports little, as `--help` does."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeprune.presets import PRESETS, Preset
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.limits import MAX_THREADS
from edgeprune_runtime.output import Kind

if TYPE_CHECKING:
    from edgeprune.budget import Heads
    from edgeprune.pruning import Settings, Widths
    from edgeprune.sparsify import Sparsity

CHECKPOINT, BUNDLE, DENSE = "checkpoint", "bundle", "dense"
OUTPUT = Kind("an output of compress", (f"{CHECKPOINT}/plan.json",))
DEFAULT_WINDOW = 1024
MAX_SEED = 2**63 - 1  # a signed number of 64 bits, which every generator takes
NO_RECOVERY = "none"
TARGETS = ("cpu", "cuda", "tensorrt", "directml", "coreml", "webgpu", "wasm", "mobile", "genai")
"""The files of `edgeprune_export.targets`, which a device's commands must not import."""

TARGET_HELP = (
    f"What the bundle is for: {', '.join(TARGETS)}; chooses variants, operators and packaging. An unknown name lists "
    "what each does."
)
GRAPH_SOURCE_HELP = (
    "auto, decoder (fused operators, fast), traced (standard operators) or plain (the simplest operators)."
)


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
    recover: str
    heads: str
    widths: str
    sparsity: str | None
    sparsity_method: str | None
    sparsity_scope: str | None
    sparsity_layout: str | None
    sparsity_refit: str | None
    align: int
    min_channels: int
    calibration: str | None
    calibration_sequences: int
    calibration_tokens: int
    gradient_sequences: int
    seed: int
    dtype: str
    target: str | None
    graph_source: str
    precision: str | None
    block_size: int | None
    symmetric: bool | None
    accuracy_level: int | None
    table_bits: int | None
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

    def __post_init__(self) -> None:
        """Refuse at once what would come out only when it is used, after long work."""
        most = {"seed": (self.seed, MAX_SEED), "threads": (self.threads or 1, MAX_THREADS)}
        for name, (value, at_most) in most.items():
            if value > at_most:
                raise EdgepruneError(f"--{name} is {value}; at most {at_most} was expected")


def chosen_preset(preset: str, given: Mapping[str, str | int | None], widths: str = "per-layer") -> Preset:
    """The preset of this name, with what the user gave himself; uniform widths take the allocation that makes them.

    Raises:
        EdgepruneError: if there is no such preset.
    """
    if preset not in PRESETS:
        raise EdgepruneError(f"unknown --preset {preset!r}; expected {', '.join(PRESETS)}")
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if widths == "uniform":
        changes.setdefault("allocation", "uniform")
    return replace(PRESETS[preset], **changes)


def settings_of(options: Options) -> "Settings":
    """How to cut; not checked yet. With a ratio of 0 nothing is looked at and nothing refitted."""
    from edgeprune.pruning import Settings

    if options.ratio == 0:
        return Settings(0.0, method="magnitude", allocation="uniform", refit="none")
    return Settings(
        ratio=options.ratio,
        method=options.method,
        allocation=options.allocation,
        refit=options.refit,
        recover=options.recover,
        align=options.align,
        min_channels=options.min_channels,
        gradient_sequences=options.gradient_sequences,
        heads=cast("Heads", options.heads),  # check() says so if it is none
        widths=cast("Widths", options.widths),
    )


def sparsity_of(options: Options) -> "Sparsity | None":
    """How to put zeros into the weights, if that is asked for; not checked yet.

    Raises:
        EdgepruneError: if something of it is asked for, but no pattern.
    """
    from edgeprune.sparsify import Sparsity, default_refit

    given = {
        "method": options.sparsity_method,
        "scope": options.sparsity_scope,
        "layout": options.sparsity_layout,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.sparsity is None:
        if changes:
            raise EdgepruneError(
                f"--sparsity-{next(iter(changes))} goes with --sparsity, which is missing; give a pattern such as "
                "--sparsity 2:4"
            )
        return None
    refit = options.sparsity_refit or default_refit(changes.get("method", Sparsity.method))
    return Sparsity(options.sparsity, **changes, refit=refit)


def held_out_sequences(options: Options) -> int:
    """Calibration sequences held out for the perplexity: none if the user brings a text, or none is measured."""
    return 0 if options.eval_text is not None or options.checkpoint_only else options.eval_windows


def graded_sequences(options: Options, settings: "Settings") -> int:
    """Calibration sequences that the loss gradients see."""
    from edgeprune.statistics import Method

    return Method.parse(settings.method).graded(settings.gradient_sequences, options.calibration_sequences)
