"""`edgeprune pack`: what it writes and says, what other commands then say, and what it refuses in one line."""

import importlib.util
import json
from pathlib import Path

import pytest
from commandline import invoke
from tiny_bundle import write_bundle

from edgeprune_export import packing
from edgeprune_runtime.errors import GateError

SMALL = ("--threads", 1)


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_pack_shows_what_it_saves_and_every_command_says_that_it_is_run(bundle: Path, tmp_path: Path) -> None:
    done = invoke("pack", bundle, "--rounds", 1, "--json", *SMALL)
    assert done.code == 0, done.err
    assert f"wrote {bundle / 'packed/fp32'}" in done.err
    found = json.loads(done.out.splitlines()[-1])["data"]["pack"]
    assert found["packed_copy"]["size_bytes"] > found["own_graph"]["size_bytes"]
    for form in ("own_graph", "packed_copy"):
        assert found[form]["load_ms"] > 0
        assert {"before_rss_bytes", "peak_rss_bytes", "own_rss_bytes", "peak_times_size"} < found[form].keys()
    assert all(figure in done.out for figure in ("load_ms", "peak_rss_bytes", "own_rss_bytes"))

    line = f"fp32 runs from its packed copy, {bundle / 'packed/fp32'}\n"
    text = tmp_path / "text.txt"
    text.write_text("Some words to predict, and a few more of them. " * 4)
    jobs = {
        "run": ("--prompt", "hi", "--max-new-tokens", 2),
        "validate": (),
        "eval": ("--text", text, "--window", 32),
        "bench": ("--rounds", 1, "--prompt-tokens", 4, "--generate-tokens", 2),
    }
    for command, options in jobs.items():
        said = invoke(command, bundle, *options, *SMALL, "--json")
        assert said.code == 0, said.err
        assert said.err.count(line) == 1, command
    assert json.loads(invoke("run", bundle, *jobs["run"], *SMALL, "--json").out.splitlines()[-1])["is_packed"]
    assert invoke("run", bundle, *jobs["run"], *SMALL, "--quiet").err == ""
    assert "ok       fp32: runs from its packed copy" in invoke("doctor", bundle).out


def test_what_is_not_run_is_said_with_what_to_do(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("pack", bundle, "--rounds", 1, "--quiet", *SMALL).err == ""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "elsewhere"))
    done = invoke("validate", bundle, *SMALL)
    assert done.code == 0
    assert "runs without its packed copy: it was not made here by this user; edgeprune pack BUNDLE" in done.err
    assert "note     fp32: runs without its packed copy: it was not made here" in invoke("doctor", bundle).out


def test_copy_that_computes_something_else_is_exit_code_1(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise GateError("the packed weights give other logits")

    monkeypatch.setattr(packing, "_check_logits", refuse)
    done = invoke("pack", bundle)
    assert done.code == 1
    assert done.err.splitlines()[-1] == "edgeprune: the packed weights give other logits"
    assert not (bundle / "packed").exists()


def test_unknown_variant_and_missing_folder_are_one_line(bundle: Path, tmp_path: Path) -> None:
    done = invoke("pack", bundle, "--variant", "int4", "-q")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "has no variant 'int4'; it has fp32" in done.err
    assert invoke("pack", tmp_path / "none").code == 2
    assert invoke("pack", "x" * 300).code == 2


def test_base_install_is_told_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name))
    done = invoke("pack", bundle)
    assert done.code == 2
    assert "needs onnx, " in done.err
    assert "pip install 'edgeprune[pack]'" in done.err
