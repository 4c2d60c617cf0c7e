"""Measuring runs in fresh processes, compares by interval, and holds memory limits in one clear line."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgeprune_runtime.bench import Side, bench, compare, report_bench
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.session import OutOfMemoryError
from edgeprune_runtime.worker import Request, Round

ROUND = Round(100.0, 1000, 20.0, (5.0, 6.0, 5.0), 80.0, 2000, None)
SMALL = {"prompt_tokens": 8, "generate_tokens": 4, "threads": 1}


def _side(label: str, rounds: list[Round]) -> Side:
    return Side(label, label, "model", "fp32", 10, 40, 128, tuple(rounds))


def _slower(round_: Round, factor: float) -> Round:
    return dataclasses.replace(
        round_,
        ttft_ms=round_.ttft_ms * factor,
        step_ms=tuple(step * factor for step in round_.step_ms),
        load_ms=round_.load_ms * factor,
    )


def test_two_bundles_take_turns_in_fresh_processes(both_folder: Path, right_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = bench([both_folder, right_folder], rounds=1, progress=lambda *step: seen.append(step), **SMALL)
    assert seen == [(1, 2), (2, 2)]
    assert [side.label for side in result.sides] == ["A", "B"]
    figures = result.sides[0].figures()
    assert all(value is None or value > 0 for value in figures.values())
    assert len(result.sides[0].rounds[0].step_ms) == 3
    peak, load_peak = figures["peak_rss_bytes"], figures["load_peak_rss_bytes"]
    assert peak is None or load_peak is None or peak >= load_peak > 0
    report = report_bench(result).to_markdown()
    assert "time to first token (ttft), ms" in report
    assert "from the prompt's token ids" in report
    assert set(result.sides[0].rounds[0].nodes_by_provider) == {"CPUExecutionProvider"}
    assert all("undecided" in ratio.verdict for ratio in result.ratios)


def test_clear_difference_is_found_and_drift_cancels() -> None:
    drift = [1.0, 1.5, 2.5, 1.2, 0.8]
    a = _side("A", [_slower(ROUND, 1.3 * factor) for factor in drift])
    b = _side("B", [_slower(ROUND, factor) for factor in drift])
    ratios = {ratio.name: ratio for ratio in compare(a, b)}
    assert ratios["decode"].ratio == pytest.approx(1.3)
    assert ratios["decode"].low == pytest.approx(1.3)
    assert "decode: B is faster, 1.300 times A's speed" in ratios["decode"].verdict
    assert "no difference" in ratios["peak memory"].verdict
    assert "B is slower" in {ratio.name: ratio for ratio in compare(b, a)}["prefill"].verdict


def test_noise_is_no_difference() -> None:
    a = _side("A", [_slower(ROUND, factor) for factor in (1.0, 1.3, 0.8, 1.1, 0.9)])
    b = _side("B", [_slower(ROUND, factor) for factor in (1.1, 0.9, 1.0, 0.8, 1.3)])
    assert all("no difference" in ratio.verdict for ratio in compare(a, b))


def test_one_token_has_no_decode_figures(both_folder: Path) -> None:
    result = bench([both_folder], rounds=1, prompt_tokens=8, generate_tokens=1, threads=1)
    assert result.sides[0].figures()["tpot_ms"] is None


@pytest.mark.parametrize("memory_bytes", [16 << 20, 48 << 20])
def test_exceeded_memory_is_one_line(both_folder: Path, memory_bytes: int) -> None:
    with pytest.raises(OutOfMemoryError, match=f"does not run within --memory {memory_bytes >> 20}MiB") as error:
        bench([both_folder], rounds=1, memory_bytes=memory_bytes, **SMALL)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


def test_mapped_pages_count_towards_the_limit(both_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune_runtime.bench.memory_group", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(
        "edgeprune_runtime.bench._run_worker", lambda _: dataclasses.replace(ROUND, peak_rss_bytes=1 << 30)
    )
    with pytest.raises(OutOfMemoryError, match="its peak RSS was 1,073,741,824 bytes"):
        bench([both_folder], rounds=1, memory_bytes=1 << 29, **SMALL)


def test_enough_memory_names_its_enforcement(both_folder: Path) -> None:
    result = bench([both_folder], rounds=1, memory_bytes=1 << 30, **SMALL)
    assert result.enforcement in ("cgroup v2 memory.max", "RLIMIT_DATA, and peak RSS compared afterwards")
    assert result.enforcement in report_bench(result).to_markdown()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"prompt_tokens": 0}, "prompt-tokens is 0"),
        ({"prompt_tokens": 95}, "the context of"),
        ({"provider": "tpu"}, "unknown provider"),
        ({"variant": "int4"}, "no variant 'int4'"),
    ],
)
def test_wrong_settings_are_refused_before_measuring(
    both_folder: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(EdgepruneError, match=message):
        bench([both_folder], **({"rounds": 1, **SMALL} | settings))  # type: ignore[arg-type]


def test_three_bundles_are_refused(both_folder: Path) -> None:
    with pytest.raises(EdgepruneError, match="3 bundles"):
        bench([both_folder] * 3)


def test_worker_that_refuses_is_one_error(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").write_bytes(bytes((folder / "onnx" / "model.onnx").stat().st_size))
    with pytest.raises(EdgepruneError, match="cannot load"):
        bench([folder], rounds=1, **SMALL)


@pytest.mark.parametrize("rounds", [5, 40])
def test_interval_holds_the_truth_as_often_as_it_says(rounds: int) -> None:
    generator = np.random.default_rng(0)
    held, trials = 0, 1000
    for _ in range(trials):
        noise = np.exp(generator.normal(0.0, 0.1, (2, rounds)))
        a, b = (
            _side(label, [_slower(ROUND, factor) for factor in row]) for label, row in zip("AB", noise, strict=True)
        )
        ratio = next(ratio for ratio in compare(a, b) if ratio.name == "prefill")
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= 1.0 <= ratio.high
    assert 0.93 <= held / trials <= 0.97


def test_each_side_is_the_first_in_every_other_round(
    both_folder: Path, right_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def worker(request: Request) -> Round:
        order.append("A" if request.bundle == str(both_folder) else "B")
        return dataclasses.replace(ROUND, ttft_ms=float(len(order)))

    monkeypatch.setattr("edgeprune_runtime.bench.run_worker", worker)
    result = bench([both_folder, right_folder], rounds=3, **SMALL)
    assert "".join(order) == "ABBAAB"
    assert [[round_.ttft_ms for round_ in side.rounds] for side in result.sides] == [[1.0, 4.0, 5.0], [2.0, 3.0, 6.0]]
