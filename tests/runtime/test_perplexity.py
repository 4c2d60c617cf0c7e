"""Perplexity equals the formula written out, with and without overlapping windows."""

import math
from pathlib import Path

import numpy as np
import pytest

from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.perplexity import measure_perplexity, token_nll
from edgeprune_runtime.session import Decoder

IDS = np.random.default_rng(3).integers(0, 259, 150)


@pytest.fixture(scope="module")
def decoder(both_folder: Path) -> Decoder:
    return Decoder(open_bundle(both_folder), threads=1)


def _slow_nll(decoder: Decoder, start: int, first: int, window: int) -> list[float]:
    logits, _ = decoder.forward(IDS[None, start : start + window])
    rows = logits[0].astype(np.float64)
    chances = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    return [-math.log(chances[place - 1, IDS[start + place]]) for place in range(first, window)]


def test_windows_without_overlap_predict_all_but_their_first_token(decoder: Decoder) -> None:
    steps: list[tuple[int, int]] = []
    result = measure_perplexity(
        decoder, IDS, window=40, text_hash="h", joining="j", progress=lambda *s: steps.append(s)
    )
    losses = [loss for start in (0, 40, 80) for loss in _slow_nll(decoder, start, 1, 40)]
    assert (result.windows, result.scored_tokens, result.stride_tokens) == (3, 117, 40)
    assert result.nll == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert (result.text_hash, result.joining) == ("h", "j")


def test_smaller_stride_scores_each_token_once(decoder: Decoder) -> None:
    result = measure_perplexity(decoder, IDS, window=40, stride=10)
    losses = _slow_nll(decoder, 0, 1, 40)
    for start in range(10, 111, 10):
        losses += _slow_nll(decoder, start, 30, 40)
    assert result.scored_tokens == len(losses) == 149
    assert result.nll == pytest.approx(np.mean(losses), rel=1e-6)


def test_max_windows_takes_the_first(decoder: Decoder) -> None:
    two = measure_perplexity(decoder, IDS, window=40, max_windows=2)
    assert two.window_nll == measure_perplexity(decoder, IDS, window=40).window_nll[:2]


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[1e30, 0.0], [1000.0, -1000.0]], np.float32)
    np.testing.assert_allclose(token_nll(logits, np.array([0, 1])), [0.0, 2000.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "window is 1"),
        ({"window": 97}, "the model's context"),
        ({"window": 40, "stride": 0}, "stride is 0"),
        ({"window": 40, "stride": 41}, "stride is 41"),
        ({"window": 40, "max_windows": 0}, "max-windows is 0"),
    ],
)
def test_settings_outside_their_range_are_refused(decoder: Decoder, settings: dict[str, int], message: str) -> None:
    with pytest.raises(EdgepruneError, match=message):
        measure_perplexity(decoder, IDS, **settings)  # type: ignore[arg-type]


def test_text_shorter_than_a_window_is_refused(decoder: Decoder) -> None:
    with pytest.raises(EdgepruneError, match="less than one window"):
        measure_perplexity(decoder, IDS[:10], window=40)
