"""The main job from the command line, on a tiny model: what is written, said and decided."""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commandline import Outcome, invoke
from transformers import AutoModelForCausalLM

from edgeprune.checkpoint import load_pruned
from edgeprune.cli.opening import open_dense
from edgeprune.cli.verdict import in_words
from edgeprune.groups import layer_widths
from edgeprune.plan import PrunePlan
from edgeprune.presets import PRESETS
from edgeprune.pruning import model_groups
from edgeprune_runtime.bench import PEAK_MEMORY, BenchResult, Ratio, bench
from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.session import OutOfMemoryError
from edgeprune_runtime.validate import validate

OUTPUT = {"checkpoint", "bundle", "report.json", "report.md", "report.html"}
SMALL = (
    *("--preset", "fast", "--align", 1, "--min-channels", 4, "--dtype", "float32", "--threads", 1),
    *("--calibration-sequences", 8, "--calibration-tokens", 32, "--gradient-sequences", 4),
    *("--rounds", 1, "--prompt-tokens", 8, "--generate-tokens", 4),
)


def compress(model: Path, text: Path | str, output: Path, *arguments: object) -> Outcome:
    return invoke("compress", model, "-c", text, "-o", output, *SMALL, *arguments)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def report_of(output: Path) -> Any:
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def done(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """One run with `--ratio 0.2`. Read only."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    outcome = compress(model_folder, text_file, output, "--ratio", 0.2)
    assert outcome.code == 0, outcome.err
    return output, outcome


@pytest.mark.parametrize("command", ["compress", "export", "run", "validate", "eval", "bench"])
def test_every_command_has_a_help_page(command: str) -> None:
    outcome = invoke(command, "--help")
    assert outcome.code == 0
    assert f"Usage: edgeprune {command}" in outcome.out
    if command == "compress":
        assert "[/CONFIG]" in outcome.out  # brackets are markup to typer, unless they are escaped


def test_output_holds_checkpoint_bundle_and_reports(done: tuple[Path, Outcome]) -> None:
    output, _ = done
    assert names(output) == OUTPUT
    assert names(output.parent) == {output.name}
    plan = PrunePlan.load(output / "checkpoint")
    model = load_pruned(output / "checkpoint")
    widths = layer_widths(model_groups(model), {})
    for group in model_groups(model):
        assert group.units == len(plan.keep.get(group.name, range(plan.units[group.name])))
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters_after
    bundle = open_bundle(output / "bundle", verify=True)
    assert bundle.manifest.parameters.all == plan.parameters_after
    assert [layer.channels for layer in bundle.manifest.layers] == [width.channels for width in widths]
    validate(bundle, threads=1).ensure_passed()
    report = report_of(output)
    assert report["data"]["plan"]["parameters_after"] == plan.parameters_after
    assert [side["bundle"] for side in report["data"]["bench"]["sides"]] == ["dense", "bundle"]
    assert ".part" not in (output / "report.json").read_text()
    assert "<html" in (output / "report.html").read_text()
    assert (output / "report.md").read_text().startswith("# edgeprune")


def test_ratio_is_reached_within_half_a_percent(done: tuple[Path, Outcome]) -> None:
    plan = PrunePlan.load(done[0] / "checkpoint")
    assert abs(plan.ratio_reached - 0.2) <= 0.005
    assert plan.ratio_reached == pytest.approx(1 - plan.parameters_after / plan.parameters_before)
    assert not any("asked to remove" in note for note in plan.notes)


def test_run_says_which_text_it_used_and_the_plan_keeps_its_hash(done: tuple[Path, Outcome], text_file: Path) -> None:
    output, outcome = done
    calibration = PrunePlan.load(output / "checkpoint").calibration
    assert calibration is not None
    assert (calibration.sequences, calibration.length_tokens, len(calibration.sha256)) == (8, 32, 64)
    assert calibration.sha256[:12] in outcome.out
    assert f"8 x 32 tokens of the file {text_file.name}" in outcome.err


def test_verdict_speaks_of_pruned_and_dense(done: tuple[Path, Outcome]) -> None:
    output, outcome = done
    said = " ".join(outcome.out.split())
    assert "20.0 % of all parameters are gone" in said
    assert "times that of dense" in said
    assert "[A" not in said
    assert "_bytes" not in said
    assert f"edgeprune run {output}/bundle" in outcome.err
    assert "Loading weights" not in outcome.err


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Ratio("decode", 1.22, 1.18, 1.26), "decode: 1.22 times as fast as dense (95 % interval 1.18 to 1.26)"),
        (Ratio("load", 0.9, 0.85, 0.95), "load: 0.90 times as fast as dense (95 % interval 0.85 to 0.95)"),
        (
            Ratio("prefill", 1.02, 0.9, 1.1),
            "prefill: no difference shown, 1.02 times as fast as dense (95 % interval 0.90 to 1.10)",
        ),
        (
            Ratio(PEAK_MEMORY, 1.25, 1.2, 1.3),
            "peak memory: 0.800 of the dense model's (95 % interval 0.769 to 0.833)",
        ),
        (
            Ratio("decode", 2.0, None, None),
            "decode: undecided, 2.00 times as fast as dense (at least 3 rounds would make",
        ),
    ],
)
def test_comparison_in_words(ratio: Ratio, words: str) -> None:
    assert in_words(ratio).startswith(words)


def test_plan_is_shown_before_the_cut(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()

    def stop(*_: object, **__: object) -> None:
        assert isinstance(sys.stdout, io.StringIO)
        shown.write(sys.stdout.getvalue())
        raise RuntimeError("the cut begins")

    monkeypatch.setattr("edgeprune.pruning.apply_plan", stop)
    with pytest.raises(RuntimeError, match="the cut begins"):
        compress(model_folder, text_file, tmp_path / "out")
    assert "What stays in each layer" in shown.getvalue()
    assert names(tmp_path) == {".out.work"}  # where the same command continues


def test_dry_run_shows_the_plan_and_writes_nothing(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = compress(model_folder, text_file, tmp_path / "out", "--dry-run")
    assert outcome.code == 0
    for words in ("channels", "query heads", "parameters", "weights in float32, MB", "KV cache per 1,000 tokens, MB"):
        assert words in outcome.out
    assert not names(tmp_path)
    (tmp_path / "out").mkdir()
    assert compress(model_folder, text_file, tmp_path / "out", "--dry-run").code == 0


def test_dry_run_does_not_convert_a_model_for_an_export(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noted(*arguments: Any, exports: bool) -> Any:
        asked.append(exports)
        return open_dense(*arguments, exports=exports)

    monkeypatch.setattr("edgeprune.cli.compress.open_dense", noted)
    assert compress(model_folder, text_file, tmp_path / "out", "--dry-run").code == 0
    assert asked == [False]


def test_json_is_one_document_and_nothing_else(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = compress(model_folder, text_file, tmp_path / "out", "--dry-run", "--json")
    assert json.loads(outcome.out)["data"]["plan"]["ratio_asked"] == 0.2
    assert outcome.out.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    outcome = invoke("compress", model_folder, "-c", text_file, *SMALL, "--json", "-q")
    assert json.loads(outcome.out) == report_of(tmp_path / "toy-pruned")
    assert outcome.out.count("\n") == 1
    assert names(tmp_path) == {"toy-pruned"}


def test_offline_the_model_writes_its_own_calibration_text(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.calibration._hub_answers", lambda: False)
    outcome = invoke("compress", model_folder, "-o", tmp_path / "out", *SMALL, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    source = json.loads(outcome.out)["data"]["plan"]["calibration"]["source"]
    assert "wrote itself" in source
    assert "could not be reached" in source
    assert source in outcome.err


def test_uniform_without_refit_gives_a_stock_checkpoint(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("--allocation", "uniform", "--refit", "none", "--keep-dense")
    arguments += ("--eval-text", str(text_file), "--eval-window", "64", "--eval-windows", "2")
    held_gates = ("--max-perplexity-ratio", 1000, "--min-decode-speedup", 0.001, "--rounds", 3)
    outcome = compress(model_folder, text_file, output, *arguments, *held_gates)
    assert outcome.code == 0, outcome.err
    assert [verdict["passed"] for verdict in report_of(output)["verdicts"]].count(True) == 2
    assert names(output) == OUTPUT | {"dense"}
    validate(open_bundle(output / "dense", verify=True), threads=1).ensure_passed()
    assert "per_layer_config" not in json.loads((output / "checkpoint/config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    plan = PrunePlan.load(output / "checkpoint")
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters_after
    assert plan.refit == "none"
    data = report_of(output)["data"]
    assert data["refit"] == {}
    assert data["perplexity"]["text"] == text_file.name
    assert (data["perplexity"]["pruned"]["windows"], data["perplexity"]["pruned"]["window_tokens"]) == (2, 64)
    assert plan.calibration is not None
    assert plan.calibration.sequences == 8


def test_missed_ratio_is_said(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("--allocation", "uniform", "--heads", "keep", "--align", 40, "--ratio", 0.13, "--dry-run", "--json")
    outcome = compress(model_folder, text_file, tmp_path / "out", *arguments)
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)["data"]["plan"]
    assert abs(plan["ratio_reached"] - 0.13) > 0.005
    assert any("asked to remove 13.0" in note and "40 channels" in note for note in plan["notes"])
    assert "asked to remove 13.0" in outcome.err


def test_missed_gates_fail_by_exit_code_and_keep_the_output(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    gates = ("--max-perplexity-ratio", 0.01, "--min-decode-speedup", 1000, "--rounds", 3)
    outcome = compress(model_folder, text_file, tmp_path / "out", "-q", *gates)
    assert outcome.code == 1
    assert outcome.err.startswith("edgeprune: the result is in")
    assert outcome.err.count("\n") == 1
    assert names(tmp_path / "out") == OUTPUT
    failed = [verdict["text"] for verdict in report_of(tmp_path / "out")["verdicts"] if verdict["passed"] is False]
    assert [text.partition(":")[0] for text in failed] == ["perplexity", "decode"]


@pytest.mark.parametrize(("too_small_for", "code"), [("dense", 0), ("bundle", 1)])
def test_memory_that_does_not_hold_a_model_is_a_finding(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    too_small_for: str,
    code: int,
) -> None:
    def limited(bundles: Sequence[Path], **settings: Any) -> BenchResult:
        if settings.pop("memory_bytes") is not None and too_small_for in [bundle.name for bundle in bundles]:
            raise OutOfMemoryError("too little")
        return bench(bundles, **settings)

    monkeypatch.setattr("edgeprune_runtime.bench.bench", limited)
    gate = ("--min-decode-speedup", 0.001, "--rounds", 3)
    outcome = compress(model_folder, text_file, tmp_path / "out", "--memory", "64MiB", *gate, "-q")
    assert outcome.code == code
    said = [verdict["text"] for verdict in report_of(tmp_path / "out")["verdicts"]]
    if code:
        assert any("the pruned model does not run within --memory 64MiB" in text for text in said)
    else:
        assert any("the dense model does not run within --memory 64MiB; the pruned one does" in text for text in said)
        assert any("cannot be judged" in text for text in said)
    assert names(tmp_path / "out") == OUTPUT


def test_same_seed_gives_the_same_plan_and_force_replaces_an_earlier_output(
    done: tuple[Path, Outcome], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(done[0], output)
    (output / "report.md").write_text("earlier")
    assert compress(model_folder, text_file, output, "--force").code == 0
    assert names(tmp_path) == {"out"}
    assert (output / "report.md").read_text() != "earlier"
    first, same = (PrunePlan.load(folder / "checkpoint") for folder in (done[0], output))
    assert (first.keep, first.calibration) == (same.keep, same.calibration)
    other = compress(model_folder, text_file, tmp_path / "other", "--seed", 1, "--dry-run", "--json")
    assert first.calibration is not None
    assert json.loads(other.out)["data"]["plan"]["calibration"]["sha256"] != first.calibration.sha256


def test_pruned_checkpoint_is_compressed_again(done: tuple[Path, Outcome], text_file: Path, tmp_path: Path) -> None:
    outcome = compress(done[0] / "checkpoint", text_file, tmp_path / "out", "--ratio", 0.1)
    assert outcome.code == 0, outcome.err
    first, second = PrunePlan.load(done[0] / "checkpoint"), PrunePlan.load(tmp_path / "out/checkpoint")
    assert second.parameters_before == first.parameters_after
    assert abs(second.ratio_reached - 0.1) <= 0.005
    assert "Reading global" not in outcome.err
    validate(open_bundle(tmp_path / "out/bundle"), threads=1).ensure_passed()


def test_interrupt_leaves_nothing_half_written(
    done: tuple[Path, Outcome],
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeprune_runtime.bench.bench", interrupt)
    shutil.copytree(done[0], tmp_path / "out")
    before = (tmp_path / "out/report.json").read_bytes()
    outcome = compress(model_folder, text_file, tmp_path / "out", "-q", "--force")
    assert outcome.code == 130
    assert "the same command continues" in caplog.text
    assert names(tmp_path) == {"out", ".out.work"}
    assert (tmp_path / "out/report.json").read_bytes() == before


def test_options_win_over_the_preset(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ("--preset", "fast", "--method", "magnitude", "--dry-run", "--json")
    outcome = compress(model_folder, text_file, tmp_path / "out", *arguments)
    plan = json.loads(outcome.out)["data"]["plan"]
    assert (plan["method"], plan["allocation"], plan["refit"]) == (
        "magnitude",
        PRESETS["fast"].allocation,
        "least-squares",
    )
    assert (plan["calibration"]["sequences"], plan["calibration"]["length_tokens"]) == (8, 32)


def test_help_shows_what_the_presets_set() -> None:
    said = " ".join(invoke("compress", "--help").out.replace("│", " ").split())
    for name, preset in PRESETS.items():
        assert f"{name} {preset.method}" in said
        assert f"{name} {preset.allocation}" in said
        assert f"{name} {preset.gradient_sequences}" in said


@pytest.mark.parametrize("method", ["magnitude", "taylor-fine"])
def test_dry_run_estimates_the_time_of_every_preset(
    model_folder: Path, text_file: Path, tmp_path: Path, method: str
) -> None:
    outcome = compress(model_folder, text_file, tmp_path / "out", "--dry-run", "--json", "--method", method)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["data"]["preset"] == "fast"
    seconds = report["data"]["estimated_seconds"]
    assert set(seconds) == set(PRESETS)
    assert 0 < seconds["fast"] < seconds["best"]
    (table,) = (table for table in report["tables"] if table["title"] == "Presets")
    assert [row["preset"] for row in table["rows"]] == ["fast (chosen)", "balanced", "best"]
    assert table["rows"][0]["values"].startswith(method)
    assert "estimated" in outcome.err


def test_report_says_what_the_refit_did(done: tuple[Path, Outcome]) -> None:
    report = report_of(done[0])
    (table,) = (table for table in report["tables"] if table["title"] == "What the refit did")
    *kinds, worst = table["rows"]
    assert {row["Linears and MLPs"].partition(",")[0] for row in kinds} <= {"o_proj", "down_proj"}
    assert worst["Linears and MLPs"].startswith("worst: model.layers.")
    outcomes = report["data"]["refit"]
    assert worst["all tokens"] == max(outcome["error"] for outcome in outcomes.values())
    for outcome in outcomes.values():
        assert outcome["is_accepted"] == (outcome["held_out_error"] < outcome["held_out_error_before"])


def test_intercepts_count_in_the_plan_and_reload(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = compress(model_folder, text_file, tmp_path / "out", "--refit", "intercept", "--checkpoint-only", "--json")
    assert outcome.code == 0, outcome.err
    model, plan = load_pruned(tmp_path / "out"), PrunePlan.load(tmp_path / "out")
    assert plan.refit == "intercept"
    assert model.config.mlp_bias
    assert any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("down_proj.bias"))
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters_after
    assert plan.ratio_reached == pytest.approx(1 - plan.parameters_after / plan.parameters_before)
    assert (
        abs(plan.ratio_reached - 0.2) <= 0.01
    )  # the toy is so small that one channel, or one bias, is a third of this
    assert json.loads(outcome.out)["data"]["refit"]


def test_part_of_a_killed_run_is_cleared_away(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.0123abcd.part").mkdir()
    (tmp_path / ".out.0123abcd.part" / "half").write_text("half")
    (tmp_path / ".other.0123abcd.part").mkdir()
    outcome = compress(model_folder, text_file, tmp_path / "out", "--checkpoint-only")
    assert outcome.code == 0, outcome.err
    assert names(tmp_path) == {"out", ".other.0123abcd.part"}
    assert "belongs to a run" not in outcome.err
