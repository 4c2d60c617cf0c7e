"""A run that is killed at any point continues, and ends with the same bytes as one that was left alone."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import Outcome, invoke, killed_after

from edgeprune.journal import work_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and kills")
SMALL = (
    *(
        "--align",
        1,
        "--min-channels",
        4,
        "--dtype",
        "float32",
        "--method",
        "fusion",
        "--ratio",
        0.2,
        "--allocation",
        "uniform",
    ),
    *("--calibration-sequences", 16, "--calibration-tokens", 32, "--gradient-sequences", 8),
)
Killed = Callable[[tuple[object, ...], Path, str], None]


def compress(model: Path, text: Path | str, output: Path, *arguments: object) -> Outcome:
    return invoke("compress", model, "-c", text, "-o", output, *SMALL, *arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(output: Path, appears: str, run: Callable[[], object]) -> None:
    """Run in a process of its own, and kill it as soon as a file appears in the work folder."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    while not (work_folder(output) / appears).exists() and process.is_alive():
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"the run ended before {appears} was seen"


@pytest.fixture(scope="module")
def undisturbed(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The checkpoint of a run that was left alone."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    outcome = compress(model_folder, text_file, output, "--checkpoint-only")
    assert outcome.code == 0, outcome.err
    assert "continues" not in outcome.err
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    return contents(output)


@pytest.mark.parametrize("step", ["calibration", "statistics-1", "loss", "gradients-2", "plan", "cut-1"])
def test_killed_run_continues_to_the_same_bytes(
    undisturbed: dict[str, bytes], model_folder: Path, text_file: Path, tmp_path: Path, step: str
) -> None:
    output = tmp_path / "out"
    killed(output, f"{step}.safetensors", lambda: compress(model_folder, text_file, output, "--checkpoint-only"))
    assert not output.exists()
    outcome = compress(model_folder, text_file, output, "--checkpoint-only")
    assert outcome.code == 0, outcome.err
    assert contents(output) == undisturbed
    assert not work_folder(output).exists()
    assert step == "calibration" or "continues" in outcome.err


@pytest.mark.parametrize(
    ("allocation", "step", "continues"),
    [
        ("judged", "search-dense-0-2-1", "continues after the last block (statistics)"),
        ("judged", "search-1-0", "continues from block 2 of 4 (widths, candidate 1)"),
        ("judged", "search-2-1", "continues from block 3 of 4 (widths, candidate 2)"),
        ("judged", "search-2", "continues after 2 judged candidates (widths)"),
        ("judged:obs", "scores-obs-1", "continues after the last block (statistics)"),
        ("judged:obs", "search-8", "continues after 8 judged candidates (widths)"),
    ],
)
def test_judging_that_was_killed_continues_to_the_same_bytes(
    model_folder: Path, text_file: Path, tmp_path: Path, allocation: str, step: str, continues: str
) -> None:
    judging = ("--checkpoint-only", "--allocation", allocation, "--method", "wanda-sp")
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    assert compress(model_folder, text_file, undisturbed, *judging).code == 0
    killed_after(step, lambda: compress(model_folder, text_file, output, *judging))
    outcome = compress(model_folder, text_file, output, *judging)
    assert outcome.code == 0, outcome.err
    assert contents(output) == contents(undisturbed)
    assert continues in outcome.err


@pytest.mark.parametrize("step", ["search-1", "search-4", "search-5"])
def test_search_that_was_killed_continues_to_the_same_bytes(
    model_folder: Path, text_file: Path, tmp_path: Path, step: str
) -> None:
    searching = ("--checkpoint-only", "--allocation", "search:2", "--method", "wanda-sp")
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    assert compress(model_folder, text_file, undisturbed, *searching).code == 0
    killed(output, f"{step}.safetensors", lambda: compress(model_folder, text_file, output, *searching))
    outcome = compress(model_folder, text_file, output, *searching)
    assert outcome.code == 0, outcome.err
    assert contents(output) == contents(undisturbed)
    assert "(widths" in outcome.err


def test_run_killed_again_and_again_gets_there(
    undisturbed: dict[str, bytes], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for appears in ("statistics-0.safetensors", "gradients-3.safetensors", "cut-0.safetensors", "cut-2.safetensors"):
        killed(output, appears, lambda: compress(model_folder, text_file, output, "--checkpoint-only"))
    assert compress(model_folder, text_file, output, "--checkpoint-only").code == 0
    assert contents(output) == undisturbed


def test_finished_steps_are_not_repeated(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeprune.checkpoint.save", stop)
        assert compress(model_folder, text_file, output, "--checkpoint-only").code == 130
    for name in ("edgeprune.pruning.refit_linear", "edgeprune.calibration.gather"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("done twice"))
    monkeypatch.setattr("edgeprune.streaming.Pass.run", lambda *_, **__: pytest.fail("run twice"))
    outcome = compress(model_folder, text_file, output, "--checkpoint-only")
    assert outcome.code == 0, outcome.err
    assert "continues after the last block (refit and cut)" in outcome.err


def test_other_settings_begin_anew_and_say_so(
    undisturbed: dict[str, bytes],
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    killed(
        output,
        "statistics-1.safetensors",
        lambda: compress(model_folder, text_file, output, "--checkpoint-only", "--seed", 5),
    )
    outcome = compress(model_folder, text_file, output, "--checkpoint-only")
    assert outcome.code == 0, outcome.err
    assert "with another calibration text; it is discarded" in caplog.text
    assert "continues" not in outcome.err
    assert contents(output) == undisturbed


def test_second_run_at_the_same_time_is_refused(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcomes: list[Outcome] = []

    def second(*_: object, **__: object) -> None:
        outcomes.append(compress(model_folder, text_file, output, "--checkpoint-only"))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeprune.pruning.make_plan", second)
        compress(model_folder, text_file, output, "--checkpoint-only")
    (outcome,) = outcomes
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "another run is writing" in outcome.err


def test_text_that_the_model_wrote_itself_is_not_written_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    killed(output, "statistics-1.safetensors", lambda: compress(model_folder, "self", output, "--checkpoint-only"))
    monkeypatch.setattr("edgeprune.calibration.sample", lambda *_, **__: pytest.fail("written again"))
    outcome = compress(model_folder, "self", output, "--checkpoint-only")
    assert outcome.code == 0, outcome.err
