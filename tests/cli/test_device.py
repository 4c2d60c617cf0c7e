"""The device's commands: what they print, their exit codes, and one line for each thing a user can cause."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import edit_weight, write_bundle

from edgeprune.cli import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeprune", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def _last_json(out: str) -> Any:
    return json.loads(out)


def test_run_streams_and_ends_with_json(call: Call, bundle: Path) -> None:
    code, out, err = call("run", bundle, "--prompt", "hi", "--max-new-tokens", 5, "--threads", 1, "--json")
    document = _last_json(out)
    assert code == 0
    assert (len(document["tokens"]), document["stop_reason"], document["threads"]) == (5, "length", 1)
    assert document["prompt_tokens"] == 6  # user, h, i, end, newline, assistant
    assert err.startswith(document["text"])
    assert "5 generated" in err
    assert call("run", bundle, "--prompt", "hi", "--max-new-tokens", 5)[1] == document["text"] + "\n"


def test_run_reads_standard_input_and_quiet_is_quiet(call: Call, bundle: Path) -> None:
    code, out, err = call("run", bundle, "-p", "-", "--raw", "--json", "-q", "--max-new-tokens", 2, stdin="abc")
    assert (code, err, _last_json(out)["prompt_tokens"]) == (0, "", 3)


def test_standard_input_that_is_no_text_is_one_line(call: Call, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "StringIO", lambda _: io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    code, out, err = call("run", bundle, "-p", "-")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "standard input is not text" in err


def test_run_with_a_seed_repeats(call: Call, bundle: Path) -> None:
    arguments = (
        "run",
        bundle,
        "-p",
        "x",
        "--temperature",
        1,
        "--top-k",
        50,
        "--top-p",
        0.9,
        "-q",
        "--max-new-tokens",
        8,
    )
    assert call(*arguments, "--seed", 1) == call(*arguments, "--seed", 1)


def test_validate_passes_and_fails_by_exit_code(call: Call, bundle: Path, tmp_path: Path) -> None:
    code, out, _ = call("validate", bundle, "--json", "-q")
    assert (code, _last_json(out)["data"]["validate"]["passed"]) == (0, True)
    wrong = write_bundle(tmp_path / "wrong")
    edit_weight(wrong, "cos", lambda cache: np.roll(cache, 1, axis=0))
    code, out, err = call("validate", wrong, "--json", "-q")
    assert (code, _last_json(out)["data"]["validate"]["passed"]) == (1, False)
    assert err.startswith("edgeprune: ")
    assert err.count("\n") == 1


def test_eval_names_window_stride_and_joining(call: Call, bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A line.\n\nAnother line.\n" * 20)
    arguments = ("eval", bundle, "--text", text, "--window", 32, "--json", "-q")
    code, out, err = call(*arguments, "--max-windows", 3)
    result = _last_json(out)["data"]["eval"]
    assert (code, err) == (0, "")
    assert (result["windows"], result["window_tokens"], result["stride_tokens"]) == (3, 32, 32)
    assert result["joining"] == "whole file"
    joined = _last_json(call(*arguments, "--rows-joined", "--stride", 16)[1])["data"]["eval"]
    assert joined["joining"] == 'rows joined by "\\n\\n"'
    assert joined["text_hash"] != result["text_hash"]


def test_bench_writes_its_report_once(call: Call, bundle: Path, tmp_path: Path) -> None:
    arguments = ("bench", bundle, bundle, "--rounds", 1, "--prompt-tokens", 8, "--generate-tokens", 3, "--threads", 1)
    code, out, _ = call(*arguments, "-o", tmp_path / "report", "--json", "-q", "--memory", "1GiB")
    assert code == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "report.html"}
    assert _last_json(out)["data"]["bench"]["memory_bytes"] == 1 << 30
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    code, _, err = call(*arguments, "-o", tmp_path / "report")
    assert (code, "exists already" in err) == (2, True)
    assert call(*arguments, "-o", tmp_path / "report", "--force", "-q")[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    code, _, err = call(*arguments, "-o", tmp_path / "mine", "--force")
    assert (code, "is not an earlier report" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "{bundle}", "-p", "x" * 200), "shorten the prompt"),
        (("run", "{bundle}", "-p", ""), None),
        (("run", "{bundle}", "-p", "", "--raw"), "a prompt has no tokens"),
        (("run", "{bundle}", "-p", "x", "--provider", "tpu"), "unknown provider 'tpu'"),
        (("run", "{bundle}", "-p", "x", "--variant", "int4"), "no variant 'int4'"),
        (("run", "{bundle}", "-p", "x", "--temperature", "-1"), "temperature is -1.0"),
        (("run", "{bundle}", "-p", "x", "--raw", "--system", "s"), "--raw takes none"),
        (("run", "{bundle}", "-p", "x\udcff"), r"the prompt holds '\udcff', which is no character"),
        (("run", "{bundle}", "-p", "x", "--system", "\udcff"), r"the system message holds '\udcff'"),
        (("run", "{bundle}", "-p", "x", "--threads", "1099511627776"), "Invalid value for '--threads'"),
        (("run", "a prompt in the wrong place " * 11, "-p", "x"), "is no usable path"),
        (("run", "{absent}", "-p", "x"), "is not a folder"),
        (("validate", "{absent}"), "is not a folder"),
        (("eval", "{bundle}", "--text", "{absent}"), "cannot read the text"),
        (("validate", "{bundle}", "--threads", "2147483648"), "Invalid value for '--threads'"),
        (("bench", "{bundle}", "--memory", "lots"), "is not a size"),
        (("bench", "{bundle}", "--memory", "9" * 400), "is not a size"),
        (("bench", "{bundle}", "--memory", "24MiB", "--rounds", "1", "--prompt-tokens", "8"), "does not run within"),
        (("bench", "{bundle}"), "lower --prompt-tokens"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    call: Call, bundle: Path, tmp_path: Path, arguments: tuple[str, ...], message: str | None
) -> None:
    filled = [argument.format(bundle=bundle, absent=tmp_path / "absent") for argument in arguments]
    code, _, err = call(*filled)
    if message is None:
        assert code == 0
        return
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0
    assert err.startswith("edgeprune: ")
