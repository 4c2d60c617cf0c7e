"""The benchmark scripts start, and on a tiny trained model give Markdown and end with one JSON document."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("main_job", "accuracy", "speed", "export")
TINY_CALIBRATION = ("--calibration-sequences", "8", "--calibration-tokens", "64", "--gradient-sequences", "4")


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def report(name: str, *arguments: str) -> dict[str, Any]:
    done = script(name, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# ")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_is_measured_and_how_to_run_it(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{name}.py" in done.stdout


def test_missing_texts_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = script("export", "--data", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "benchmarks/README.md" in done.stderr


@pytest.mark.slow
def test_accuracy_measures_equal_recipes_once_and_several_seeds(data_folder: Path, stories260k: Path) -> None:
    found = report(
        *("accuracy", "--model", str(stories260k), "--data", str(data_folder), *TINY_CALIBRATION),
        *("--windows", "2", "--window", "64", "--lambada", "4", "--seeds", "0", "1"),
        *("--recipe", "a=magnitude", "--recipe", "b=magnitude||refit", "--recipe", "c=magnitude||no-refit"),
    )
    dense, a, b, c = found["tables"][0]["rows"]
    assert dense["times dense"] == 1.0
    assert a["perplexity"] == b["perplexity"] != c["perplexity"]
    assert a["spread"] > 0.0
    assert list(found["data"]["recipes"]["a"]["seeds"]) == ["0", "1"]


@pytest.mark.slow
def test_accuracy_refuses_a_recipe_it_does_not_understand(data_folder: Path) -> None:
    done = script("accuracy", "--data", str(data_folder), "--recipe", "a=magnitude||maybe")
    assert done.returncode == 2
    assert "no-refit" in done.stderr


@pytest.mark.slow
def test_job_then_speed(data_folder: Path, stories260k: Path, tmp_path: Path) -> None:
    text = str(data_folder / "text" / "calib_c4.jsonl")
    latency = ("--prompt-tokens", "8", "--generate-tokens", "4")
    job = report(
        *("main_job", "--model", str(stories260k), "-o", str(tmp_path / "job"), "--"),
        *("--calibration", text, *TINY_CALIBRATION, *latency, "--rounds", "1", "--keep-dense"),
    )
    figures, seconds = job["data"]["figures"], job["data"]["seconds"]
    assert sum(seconds.values()) == pytest.approx(figures["wall_s"])
    assert figures["process_tree_peak_rss_bytes"] > 0.8 * figures["largest_process_peak_rss_bytes"] > 50e6
    bundles = ("--dense", str(tmp_path / "job" / "dense"), "--pruned", str(tmp_path / "job" / "bundle"))
    speed = report("speed", *bundles, "--rounds", "3", *latency)
    assert {"prefill", "decode"} <= {ratio["name"] for ratio in speed["data"]["bench"]["ratios"]}


@pytest.mark.slow
def test_export_compares_both_graphs_with_torch(data_folder: Path, stories260k: Path) -> None:
    found = report(
        *("export", "--checkpoint", str(stories260k), "--data", str(data_folder)),
        *("--rounds", "1", "--windows", "1", "--window", "32"),
    )
    differences = found["data"]["differences"]
    assert set(differences) == {"torch - decoder", "torch - traced", "decoder - traced"}
    assert all(0.0 < difference < 1e-3 for difference in differences.values())
