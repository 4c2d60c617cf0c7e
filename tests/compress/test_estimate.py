"""The estimated time of a preset follows what was measured, and what the preset asks for."""

from dataclasses import asdict, replace

import pytest

from edgeprune.estimate import BACKWARD, LOGITS, PATHS, PRODUCTS, RULES, SCORE_SOLVES, Pace, estimate_seconds
from edgeprune.memory import Sizes
from edgeprune.presets import Preset
from edgeprune.refit import PASSES
from edgeprune.statistics import GRAM_STRIP

SIZES = Sizes(
    outside_bytes=0,
    outside_parameters=0,
    behind_parameters=0,
    block_bytes=0,
    block_parameters=1000,
    mlp_parameters=700,
    blocks_bytes=0,
    layers=5,
    hidden_size=16,
    vocabulary=100,
    inner=(16, 40),
    linear_parameters=30_000,
    linear_lines=1_000,
    sequences=8,
    length_tokens=50,
)
PLAIN = Preset("", "wanda-sp", "protect", "least-squares", 64, 100, 32)
PACE = Pace(forward=1e-3, grams=5e-4, backward=3e-3, logits=1e-4, solve=2.0)


def test_pace_is_seconds_per_token() -> None:
    pace = Pace.of(SIZES, 4.0, 1.0, 2, had_grams=True)
    assert pace.forward + pace.grams == pytest.approx(4.0 / 400)
    assert pace.grams == pytest.approx(pace.forward * (16**2 + 40**2) / 1000)
    assert pace.backward == pytest.approx(1.0 / 100)
    assert pace.logits == pytest.approx(pace.forward * 16 * 100 / (5 * 1000))
    assert pace.solve > 0


def test_what_was_not_measured_is_a_multiple_of_what_was() -> None:
    pace = Pace.of(SIZES, 4.0, None, 0, had_grams=False)
    assert pace.backward == pytest.approx(BACKWARD * 4.0 / 400)
    assert pace.forward == pytest.approx(4.0 / 400)
    with_grams = Pace.of(SIZES, 400 * (pace.forward + pace.grams), None, 0, had_grams=True)
    assert asdict(pace) == pytest.approx(asdict(with_grams))


def test_a_large_gram_matrix_takes_half_of_its_products() -> None:
    pace = Pace.of(replace(SIZES, inner=(4 * GRAM_STRIP,)), 4.0, None, 0, had_grams=True)
    assert pace.grams == pytest.approx(pace.forward * 10 * GRAM_STRIP**2 / 1000)


def test_time_of_a_preset_without_gradients() -> None:
    assert estimate_seconds(replace(PLAIN, refit="none"), PACE) == pytest.approx(9.6)
    assert estimate_seconds(PLAIN, PACE) == pytest.approx(9.6 + 5 * 2.0)


def test_gradients_count_for_the_sequences_that_they_see() -> None:
    graded = replace(PLAIN, method="taylor-fine")
    plain = estimate_seconds(PLAIN, PACE)
    assert estimate_seconds(graded, PACE) == pytest.approx(plain + 3e-3 * 32 * 100)
    assert estimate_seconds(replace(graded, gradient_sequences=500), PACE) == pytest.approx(plain + 3e-3 * 64 * 100)


def test_a_reconstruction_takes_time_for_every_token() -> None:
    extra = [
        estimate_seconds(replace(preset, refit="reconstruct"), PACE) - estimate_seconds(preset, PACE)
        for preset in (PLAIN, replace(PLAIN, calibration_sequences=128))
    ]
    assert extra[0] == pytest.approx((PATHS + PRODUCTS * PASSES) * 6.4 + LOGITS * 0.64)
    assert extra[1] == pytest.approx(2 * extra[0])
    twice = estimate_seconds(replace(PLAIN, refit=f"reconstruct:{2 * PASSES}"), PACE)
    assert twice - estimate_seconds(PLAIN, PACE) == pytest.approx((PATHS + PRODUCTS * 2 * PASSES) * 6.4 + LOGITS * 0.64)


def test_a_search_takes_its_rounds_or_its_minutes() -> None:
    plain = estimate_seconds(PLAIN, PACE)
    rounds = [estimate_seconds(replace(PLAIN, allocation=f"search:{n}"), PACE) - plain for n in (1, 4)]
    rules = estimate_seconds(replace(PLAIN, allocation="judged"), PACE) - plain
    assert rules == pytest.approx(RULES * (8 * 100 * (1e-3 + 2 * 1e-4) + 2.0))
    compared = estimate_seconds(replace(PLAIN, allocation="judged:obs,magnitude"), PACE) - plain
    assert compared == pytest.approx(3 * rules + 2 * SCORE_SOLVES * 2.0)
    assert rounds[1] - rules == pytest.approx(4 * (rounds[0] - rules))
    assert rounds[0] - rules == pytest.approx(10 * 8 * 100 * 1e-3 + 3 * 2.0)
    assert estimate_seconds(replace(PLAIN, allocation="search"), PACE) > plain + rounds[0]
    assert estimate_seconds(replace(PLAIN, allocation="search:2min"), PACE) == pytest.approx(plain + 120)
