"""The device's commands run where torch, transformers, onnx and the export side cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import write_bundle

pytestmark = pytest.mark.slow

BLOCKER = """
import sys

BLOCKED = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "safetensors", "accelerate", "gguf",
           "datasets", "scipy", "edgeprune_export"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not on the device", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, a text, and the import system's blocker."""
    folder = tmp_path_factory.mktemp("device")
    write_bundle(folder / "bundle")
    (folder / "text.txt").write_text("Some text to read.\n" * 40)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(BLOCKER)
    return folder


def _call(device: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(device / "site")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=device,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_blocker_blocks(device: Path) -> None:
    for name in ("torch", "onnx", "edgeprune_export"):
        assert f"{name} is not on the device" in _call(device, "-c", f"import {name}").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "bundle", "--prompt", "hi", "--max-new-tokens", "4"),
        ("validate", "bundle"),
        ("eval", "bundle", "--text", "text.txt", "--window", "32"),
        ("bench", "bundle", "bundle", "--rounds", "1", "--prompt-tokens", "8", "--generate-tokens", "3"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_command_runs_with_the_base_install(device: Path, arguments: tuple[str, ...]) -> None:
    done = _call(device, "-m", "edgeprune", *arguments, "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)


def test_a_trained_model_exported_with_torch_runs_without_it(device: Path, stories260k: Path) -> None:
    from edgeprune_export.exporting import export

    export(stories260k, device / "stories")
    validated = _call(device, "-m", "edgeprune", "validate", "stories", "--json", "-q")
    assert validated.returncode == 0, validated.stdout
    prompt = ("--prompt", "Once upon a time", "--max-new-tokens", "40")
    story = json.loads(_call(device, "-m", "edgeprune", "run", "stories", *prompt, "--json").stdout.splitlines()[-1])
    assert story["text"].startswith(", there was a little")
    text = stories260k.parent / "text" / "tinystories_train_sample.jsonl"
    if not text.is_file():
        pytest.skip(f"no {text}")
    options = ("--text", str(text), "--window", "512", "--max-windows", "40", "--json", "-q")
    done = _call(device, "-m", "edgeprune", "eval", "stories", *options)
    # The model's own perplexity on these stories, each by itself, is 4.5; joined windows begin in mid-story.
    assert 4.0 < json.loads(done.stdout.splitlines()[-1])["data"]["eval"]["perplexity"] < 5.5
