"""Greedy and sampled generation, and why it stops."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import CONTEXT

from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.generate import Generation, Sampling
from edgeprune_runtime.golden import load_golden
from edgeprune_runtime.session import Decoder, KvCache, Logits

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


@pytest.fixture(scope="module")
def decoder(both_folder: Path) -> Decoder:
    return Decoder(open_bundle(both_folder), threads=1)


def test_greedy_gives_the_golden_tokens(decoder: Decoder) -> None:
    for case in load_golden(decoder.bundle):
        generation = Generation(decoder, case.ids.tolist(), max_new_tokens=len(case.greedy))
        assert list(generation) == case.greedy.tolist()
        assert generation.stop_reason == "length"


def test_cache_is_written_in_place(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    places: set[tuple[int, ...]] = set()
    step = Decoder.step

    def recorded(self: Decoder, ids: Sequence[int], cache: KvCache) -> tuple[Logits, KvCache]:
        logits, after = step(self, ids, cache)
        places.update(tuple(value.data_ptr() for value in each.values) for each in (cache, after))
        return logits, after

    monkeypatch.setattr(Decoder, "step", recorded)
    assert len(list(Generation(decoder, [5, 6], max_new_tokens=9))) == 9
    assert len(places) == 1


def test_stops_before_an_end_token(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_golden(decoder.bundle)[1]
    third = int(case.greedy[2])
    monkeypatch.setattr(decoder, "manifest", dataclasses.replace(decoder.manifest, eos_token_ids=(third,)))
    generation = Generation(decoder, case.ids.tolist(), max_new_tokens=20)
    tokens = list(generation)
    assert tokens == case.greedy[: case.greedy.tolist().index(third)].tolist()
    assert generation.stop_reason == "eos"


def test_stops_at_the_end_of_the_context(decoder: Decoder) -> None:
    generation = Generation(decoder, [1] * (CONTEXT - 2), max_new_tokens=50)
    assert len(list(generation)) == 3  # the last one needs no slot of its own
    assert generation.stop_reason == "context"


def test_same_seed_same_text(decoder: Decoder) -> None:
    def text(seed: int) -> list[int]:
        return list(Generation(decoder, [5], max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


def _shares(sampling: Sampling) -> list[float]:
    generator = np.random.default_rng(0)
    drawn = [sampling.choose(LOGITS, generator) for _ in range(2000)]
    return [drawn.count(token) / len(drawn) for token in range(4)]


def test_sampling_follows_the_chances() -> None:
    np.testing.assert_allclose(_shares(Sampling(temperature=1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(_shares(Sampling(temperature=0.5)), squared / squared.sum(), atol=0.04)
    np.testing.assert_allclose(_shares(Sampling(temperature=1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(_shares(Sampling(temperature=1.0, top_p=0.6)), [0.625, 0.375, 0, 0], atol=0.04)
    assert _shares(Sampling(temperature=1.0, top_p=0.4)) == [1, 0, 0, 0]
    assert _shares(Sampling()) == [1, 0, 0, 0]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_settings_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(EdgepruneError, match="was expected"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_no_new_token_is_refused(decoder: Decoder) -> None:
    with pytest.raises(EdgepruneError, match="at least 1"):
        Generation(decoder, [1], max_new_tokens=0)
