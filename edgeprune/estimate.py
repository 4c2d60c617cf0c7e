"""How long a pruning would take here, from what one walk over this model took: an estimate, to choose a preset by.

    time of a preset = tokens x (forward + Gram matrices + gradients on a share of them + reconstruction)
                       + refit + rounds of the search

The pace of the walk was measured; what was not is a multiple of it. Text, recovery, export and checks are not in it.
"""

import math
from dataclasses import dataclass
from typing import Self

from edgeprune.allocation import judged
from edgeprune.allocation.search import budget
from edgeprune.candidates import judging_sequences
from edgeprune.memory import Sizes
from edgeprune.presets import Preset
from edgeprune.refit import parse_refit
from edgeprune.statistics import GRAM_STRIP, HELD_OUT_EVERY, Method

BACKWARD = 2.5
"""Loss and gradients take so many times the forward pass, where they were not measured: the block once more, and two
matrix products for each of its own."""

SOLVES = 5
"""Systems that a refit solves for each Linear: one for each ridge on trial, and the last on all tokens."""

PATHS, PRODUCTS = 2, 1
"""A reconstruction runs each block on two paths; and an epoch takes so many times a forward pass: three products for
each one of the MLP, which is narrower by then, not all of the block, and fast as nothing else in it."""

LOGITS = 4
"""The last block takes the logits of the dense model, and of the fitted one with their gradients; what is no product,
over a whole vocabulary, takes as long as one of these."""

DOUBLE = 4
"""Float64 takes so many times as long per operation as the walk's own dtype."""

RULES = 7
"""So many cuts of fixed rules are refitted and judged, also by a search before its first round."""

JUDGED_LOGITS = 2
"""A cut is judged by its logits and the dense model's."""

SCORE_SOLVES = 12
"""Scores of another method that are compared: at most (`obs`) as long as so many systems."""

ROUND_FORWARDS, ROUND_SOLVES = 10, 3
"""What one round of a search costs: a candidate forward and backward with the options of its blocks, and the judging of
a few more; and the refit of about so many widths of each Linear."""


@dataclass(frozen=True)
class Pace:
    """Seconds that this machine takes for this model.

    Attributes:
        forward: per token, through all blocks.
        grams: per token, the Gram matrices of all Linears that read units.
        backward: per token, the loss and the gradients of all blocks.
        logits: per token, from what leaves the last block.
        solve: of one refit of all Linears that read units.
    """

    forward: float
    grams: float
    backward: float
    logits: float
    solve: float

    @classmethod
    def of(
        cls, sizes: Sizes, statistics_seconds: float, gradient_seconds: float | None, graded: int, *, had_grams: bool
    ) -> Self:
        """The pace of a walk.

        Args:
            sizes: of the model and of the tokens that were walked.
            statistics_seconds: how long the forward pass took.
            gradient_seconds: how long loss and gradients took; None without them.
            graded: sequences that these saw.
            had_grams: Gram matrices were summed on the way.
        """
        walked = statistics_seconds / (sizes.sequences * sizes.length_tokens)
        # strips of a symmetric matrix, from the diagonal on
        products = sum(inputs * (inputs + min(inputs, GRAM_STRIP)) / 2 for inputs in sizes.inner)
        share = products / sizes.block_parameters
        forward = walked / (1 + share) if had_grams else walked
        seconds_per_product = forward / (sizes.layers * sizes.block_parameters)
        # a Cholesky factor of K inputs takes K^3 / 6 products, and hidden_size right-hand sides K^2 each
        systems = sum(inputs**3 / 6 + sizes.hidden_size * inputs**2 for inputs in sizes.inner)
        return cls(
            forward=forward,
            grams=forward * share,
            backward=BACKWARD * forward
            if gradient_seconds is None
            else gradient_seconds / (graded * sizes.length_tokens),
            logits=sizes.hidden_size * sizes.vocabulary * seconds_per_product,
            solve=DOUBLE * sizes.layers * systems * seconds_per_product,
        )


def estimate_seconds(preset: Preset, pace: Pace) -> float:
    """How long statistics, search and refit would take with these values."""
    graded = Method.parse(preset.method).graded(preset.gradient_sequences, preset.calibration_sequences)
    seconds = (pace.forward + pace.grams) * preset.calibration_sequences * preset.calibration_tokens
    seconds += pace.backward * graded * preset.calibration_tokens
    seconds += SOLVES * pace.solve if preset.refit != "none" else 0.0
    mode, passes = parse_refit(preset.refit)
    if mode == "reconstruct":
        tokens = preset.calibration_sequences * preset.calibration_tokens
        seconds += ((PATHS + PRODUCTS * passes) * pace.forward + LOGITS * pace.logits) * tokens
    return seconds + _search_seconds(preset, pace)


def _search_seconds(preset: Preset, pace: Pace) -> float:
    name, _, argument = preset.allocation.partition(":")
    if name not in ("judged", "search"):
        return 0.0
    held_out = preset.calibration_sequences // HELD_OUT_EVERY
    tokens = judging_sequences(held_out, preset.calibration_tokens) * preset.calibration_tokens
    of_rules = RULES * (tokens * (pace.forward + JUDGED_LOGITS * pace.logits) + pace.solve)
    if name == "judged":
        others = len(judged.methods(argument or None))
        return (1 + others) * of_rules + others * SCORE_SOLVES * pace.solve
    rounds, seconds = budget(argument or None)
    if seconds < math.inf:
        return seconds
    return of_rules + rounds * (ROUND_FORWARDS * tokens * pace.forward + ROUND_SOLVES * pace.solve)
