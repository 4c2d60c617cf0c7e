"""Every supported type by the same commands: compress, export, validate, run, once with the widths of each layer."""

import json
from pathlib import Path

import pytest
import torch
import toys
from commandline import SENTENCES, invoke
from cuts import prefill, some_ids
from exported import letter_tokenizer
from transformers import AutoModelForCausalLM

from edgeprune import checkpoint
from edgeprune.configs import architecture
from edgeprune.groups import layer_widths
from edgeprune.pruning import model_groups

LAYERS = 2


def dense(folder: Path, name: str) -> Path:
    # room in the vocabulary for tokens that a tokenizer class of transformers adds of itself
    changes = {"num_hidden_layers": LAYERS, "vocab_size": 128}
    model = toys.toy(name, **changes | {key: values[:LAYERS] for key, values in lists_of(name).items()})
    checkpoint.save(model, letter_tokenizer(), None, layer_widths(model_groups(model), {}), folder)
    return folder


def lists_of(name: str) -> dict[str, list[object]]:
    """The settings of a toy that have one entry for each layer."""
    keys = ("layer_types", "no_rope_layers")
    found = {key: toys.SHAPES[name][key] for key in keys if key in toys.SHAPES[name]}
    return found | ({"attention_types": [[["global", "local"], 1]]} if name == "gpt_neo" else {})


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers copies the modelling files to that it runs."""
    return tmp_path_factory.mktemp("modules")


@pytest.mark.slow
@pytest.mark.parametrize("name", toys.TYPES)
def test_from_weights_to_text(name: str, tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 24)
    pruned, bundle = tmp_path / "pruned", tmp_path / "bundle"
    done = invoke(
        "compress", dense(tmp_path / "dense", name), "-c", text, "-o", pruned, "--ratio", 0.2, "--checkpoint-only",
        "--align", 1, "--min-channels", 4, "--allocation", "global", "--dtype", "float32", "--gradient-sequences", 4,
        "--calibration-sequences", 8, "--calibration-tokens", 16, "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = json.loads((pruned / "plan.json").read_text())
    assert plan["ratio_reached"] == pytest.approx(0.2, abs=0.005)
    assert json.loads((pruned / "config.json").read_text())["auto_map"], "the layers were to differ"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    by_remote_code = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True, dtype=torch.float32).eval()
    ids = some_ids(by_remote_code)
    torch.testing.assert_close(prefill(by_remote_code, ids), prefill(checkpoint.load_pruned(pruned), ids))
    exported = invoke("export", pruned, "-o", bundle, "-q")
    assert exported.code == 0, exported.err
    manifest = json.loads((bundle / "edgeprune.json").read_text())
    assert len(manifest["layers"]) == LAYERS
    assert manifest["variants"]["fp32"]["graph_source"] == architecture(name).SOURCE
    assert manifest["parameters"]["all"] == plan["parameters_after"]
    assert invoke("validate", bundle, "--threads", 1).code == 0
    said = invoke("run", bundle, "--prompt", "The cook", "--raw", "--max-new-tokens", 4, "--threads", 1, "-q", "--json")
    assert said.code == 0, said.err
    assert len(json.loads(said.out.splitlines()[-1])["tokens"]) > 0
