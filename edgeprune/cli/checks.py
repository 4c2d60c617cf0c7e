"""What `compress` checks before any long work: a wrong value must not come out after minutes."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.cli.options import DEFAULT_WINDOW, OUTPUT, Options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgeprune.journal import Journal
    from edgeprune.memory import Footprint
    from edgeprune.streaming import Decoder
    from edgeprune_runtime.text import Text

FLOAT32 = "fp32"
DTYPES = ("auto", "float32", "bfloat16")
FLOAT32_BYTES = 4
SPARE_BYTES = 128 << 20
"""Room for the graphs, tokenizers, golden data and reports beside the weights."""


def check_uncut(given: Mapping[str, object]) -> None:
    """Check that nothing is said of how to cut, where nothing is cut.

    Raises:
        EdgepruneError: naming the option that would have no effect.
    """
    from edgeprune_runtime.errors import EdgepruneError

    for name, value in given.items():
        if value is not None:
            raise EdgepruneError(
                f"--{name.replace('_', '-')} {value} says how to cut, and --ratio 0 cuts nothing; leave it out, or "
                "give a ratio above 0"
            )


def check_measuring(options: Options) -> None:
    """Check what needs no model: a wrong number must not come out after minutes of work.

    Raises:
        EdgepruneError: naming the option that is wrong.
    """
    from edgeprune_runtime.bench import MIN_ROUNDS_FOR_VERDICT
    from edgeprune_runtime.errors import EdgepruneError

    of_bundle = {"target": options.target, "precision": None if options.precision == FLOAT32 else options.precision}
    for name, wish in of_bundle.items():
        if options.checkpoint_only and wish is not None:
            raise EdgepruneError(
                f"--{name} {wish} is of the ONNX bundle, and --checkpoint-only writes none; leave one of them out"
            )
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


def check_output_folder(options: Options) -> None:
    """Check that the output can be written, and replaces nothing that is not to be replaced.

    Raises:
        EdgepruneError: if not.
    """
    from edgeprune.checkpoint import PRUNED
    from edgeprune_runtime.output import check_output

    if options.dry_run:
        return
    kind = PRUNED if options.checkpoint_only else OUTPUT
    check_output(options.output, force=options.force, kind=kind, is_locked=True)


def check_fits(
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
    from edgeprune_export.positions import context_tokens
    from edgeprune_runtime.errors import EdgepruneError
    from edgeprune_runtime.output import check_space

    limit = context_tokens(decoder.config)
    if not options.checkpoint_only and options.prompt_tokens + options.generate_tokens > limit:
        raise EdgepruneError(
            f"the latency check wants {options.prompt_tokens} + {options.generate_tokens} tokens, the model's "
            f"context holds {limit}; lower --prompt-tokens or --generate-tokens"
        )
    if text is not None:
        window = options.eval_window or min(DEFAULT_WINDOW, limit)
        if window > limit:
            raise EdgepruneError(f"--eval-window is {window}, the model's context holds {limit}; lower it")
        tokens = len(tokenizer(text.text, verbose=False)["input_ids"])
        if tokens < window:
            raise EdgepruneError(
                f"{options.eval_text} has {tokens} tokens, less than one window of {window}; give a "
                "longer text or a smaller --eval-window"
            )
    scratch_bytes = max(0, footprint.scratch_bytes - journal.size_bytes)
    if options.dry_run:
        check_space(Path(tempfile.gettempdir()), scratch_bytes)
    else:
        # The most at one time: both bundles and the pruned checkpoint.
        copies = 1.0 - options.ratio if options.checkpoint_only else 3.0 - 2.0 * options.ratio
        result = round(FLOAT32_BYTES * count_parameters(decoder.model) * copies) + SPARE_BYTES
        check_space(options.output, result + scratch_bytes)
