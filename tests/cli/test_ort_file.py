"""A bundle's file in ONNX Runtime's own format runs, validates and is measured in the place of the folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from commandline import Outcome, invoke, save_toy

from edgeprune_runtime.session import PROVIDERS

OPTIONS = ("--max-new-tokens", 12, "--threads", 1, "--json", "--quiet")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For phones, in two precisions. Read only."""
    folder = tmp_path_factory.mktemp("bundles")
    checkpoint = save_toy(folder / "toy", hidden_size=96, num_hidden_layers=2)
    done = invoke("export", checkpoint, "-o", folder / "mobile", "--target", "mobile", "--precision", "int8,fp32")
    assert done.code == 0, done.err
    return folder / "mobile"


def last_json(done: Outcome) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out.splitlines()[-1])


@pytest.mark.parametrize(("name", "variant"), [("model_quantized", "int8"), ("model", "fp32")])
def test_file_writes_what_its_variant_writes(name: str, variant: str, bundle: Path) -> None:
    found = last_json(invoke("run", bundle / "ort" / f"{name}.ort", "--prompt", "the cook", *OPTIONS))
    expected = last_json(invoke("run", bundle, "--variant", variant, "--prompt", "the cook", *OPTIONS))
    assert (found["tokens"], found["variant"]) == (expected["tokens"], variant)
    assert len(found["tokens"]) == 12


def test_file_is_named_relative_to_where_one_stands(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle / "ort")
    assert last_json(invoke("run", "model.ort", "--prompt", "the cook", *OPTIONS))["variant"] == "fp32"


def test_file_is_what_is_validated_and_measured(bundle: Path) -> None:
    file = bundle / "ort" / "model.ort"
    done = invoke("validate", file, "--threads", 1)
    assert done.code == 0, done.err
    assert file.name in "".join(done.out.split())
    rounds = ("--rounds", 1, "--prompt-tokens", 8, "--generate-tokens", 4, "--threads", 1)
    [side] = last_json(invoke("bench", file, *rounds, "--json", "--quiet"))["data"]["bench"]["sides"]
    assert side["bundle"] == str(file)
    assert side["size_bytes"] == file.stat().st_size


@pytest.mark.parametrize(("name", "variant"), [("model_quantized", "int8"), ("model", "fp32")])
def test_file_has_the_perplexity_of_its_variant(name: str, variant: str, bundle: Path, text_file: Path) -> None:
    options = ("--text", text_file, "--window", 64, "--max-windows", 8, "--threads", 1, "--json", "--quiet")
    file = bundle / "ort" / f"{name}.ort"
    found = last_json(invoke("eval", file, *options))["data"]["eval"]
    expected = last_json(invoke("eval", bundle, "--variant", variant, *options))["data"]["eval"]
    assert (found["bundle"], found["scored_tokens"]) == (str(file), expected["scored_tokens"])
    assert found["variant"] == expected["variant"] == variant
    assert found["window_nll"] == pytest.approx(expected["window_nll"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


@pytest.mark.parametrize(("name", "variant"), [("model_quantized", "int8"), ("model", "fp32")])
def test_doctor_looks_at_the_file_alone(name: str, variant: str, bundle: Path) -> None:
    file = bundle / "ort" / f"{name}.ort"
    document = last_json(invoke("doctor", file, "--verify", "--json"))
    assert (document["bundle"], document["problems"]) == (str(file), 0)
    subjects = [finding["subject"] for finding in document["findings"]]
    assert {"fp32", "int8", "onnxruntime-genai"} & set(subjects) == {variant}
    room = document["findings"][subjects.index(variant) + 1]
    assert room["figures"]["weights_bytes"] == file.stat().st_size


def test_doctor_finds_the_file_damaged_where_its_variant_is_not(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    file = copy / "ort" / "model.ort"
    file.write_bytes(file.read_bytes()[:-1])
    done = invoke("doctor", file)
    assert done.code == 1
    assert "problem  fp32: its files are damaged" in done.out
    assert "ok       fp32: " in invoke("doctor", copy, "--variant", "fp32").out


def test_another_provider_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of such a file ONNX Runtime does not say whether the provider takes any node of it."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS["cuda"], PROVIDERS["cpu"]])
    done = invoke("run", bundle / "ort" / "model.ort", "--prompt", "the cook", "--provider", "cuda")
    assert done.code == 2
    assert "does not say which of its nodes that would take; give the bundle's folder, or" in done.err


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("ort/model.ort", ("--variant", "int8"), "model.ort is not the variant 'int8'; give the file alone"),
        ("ort/model.ort", ("--provider", "azure"), "unknown provider 'azure'"),
        ("ort/other.ort", (), "does not list ort/other.ort; in the ORT format it has ort/model.ort, ort/model_qu"),
        ("onnx/model_quantized.ort", (), "does not list onnx/model_quantized.ort"),
        ("model.ort", (), "model.ort does not lie in the folder ort/ of a bundle"),
    ],
)
def test_mistakes_are_said_in_a_line(file: str, options: tuple[str, ...], message: str, bundle: Path) -> None:
    done = invoke("run", bundle / file, "--prompt", "the cook", *options)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert message in done.err


def test_doctor_says_what_is_no_file_of_a_bundle(bundle: Path) -> None:
    done = invoke("doctor", bundle / "model.ort")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "model.ort does not lie in the folder ort/ of a bundle" in done.err
