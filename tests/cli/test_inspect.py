"""What a model is, said from its config alone, and held against what compress then does."""

import json
import math
from pathlib import Path
from typing import Any

import baichuan
import pytest
import toys
from commandline import Outcome, invoke
from cuts import groups_of, random_keep

from edgeprune import checkpoint, sources
from edgeprune.configs import architecture
from edgeprune.groups import layer_widths
from edgeprune.shrink import shrink

SMALL = ("--align", 1, "--min-channels", 4)


def config_only(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def inspected(model: Path | str, *arguments: object) -> dict[str, Any]:
    outcome = invoke("inspect", model, "--json", *arguments)
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def refusal(command: str, model: Path, tmp_path: Path) -> Outcome:
    output = () if command == "inspect" else ("-o", tmp_path / "out")
    return invoke(command, model, *output)


@pytest.mark.parametrize("name", toys.NAMES)
def test_figures_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """Built on meta from config.json: the same sizes and parameters as the weights have, part by part."""
    model = toys.toy(name)
    model.config.save_pretrained(tmp_path)
    found = inspected(tmp_path, *SMALL)
    family = architecture(model.config.model_type)
    assert (found["model_type"], found["graph_source"]) == (model.config.model_type, family.SOURCE)
    assert [layer["heads"] for layer in found["layers"]] == [w.heads for w in layer_widths(groups_of(model), {})]
    assert found["parameters"]["all"] == sources.count_parameters(model)
    assert sum(found["parameters"].values()) == 2 * found["parameters"]["all"]
    # the narrow OPT has projections between embedding and blocks, which are none of the named parts
    between = sum(each.numel() for part, each in model.named_parameters() if ".project_" in part)
    assert found["parameters"]["other"] == between
    assert found["parameters"]["MLP"] > 0
    assert found["parameters"]["embedding"] >= model.get_input_embeddings().weight.numel()
    assert bool(found["head_counts"]) == ("channels" in family.STOCK)


def test_a_hub_id_is_inspected_from_its_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is played by a local folder; which files are asked for is what counts."""
    asked = []

    def download(hub_id: str, file: str, **_: Any) -> str:
        asked.append((hub_id, file))
        return str(tmp_path / file)

    def no_download(*_: Any, **__: Any) -> None:
        raise AssertionError("more than the config was fetched")

    toys.toy("qwen2").config.save_pretrained(tmp_path)
    monkeypatch.setattr(sources, "_hub_answers", lambda: True)
    monkeypatch.setattr(sources, "hf_hub_download", download)
    monkeypatch.setattr(sources, "snapshot_download", no_download)
    by_id, by_folder = inspected("somebody/a-model", *SMALL), inspected(tmp_path, *SMALL)
    assert asked == [("somebody/a-model", "config.json")]
    assert by_id["place"].startswith("config.json of somebody/a-model on the Hugging Face hub")
    assert {**by_id, "model": "", "place": ""} == {**by_folder, "model": "", "place": ""}


def test_the_reachable_ratio_is_reached_and_no_more(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    largest = inspected(model_folder, *SMALL)["largest_ratio"]
    arguments = (
        *("compress", model_folder, "-c", text_file, "-o", tmp_path / "out", *SMALL, "--allocation", "uniform"),
        *("--preset", "fast", "--calibration-sequences", 8, "--calibration-tokens", 16, "--dry-run", "--json", "-q"),
        *("--dtype", "float32", "--prompt-tokens", 8, "--generate-tokens", 4),
    )
    down = math.floor(1000 * largest) / 1000
    done = invoke(*arguments, "--ratio", down)
    assert done.code == 0, done.err
    assert json.loads(done.out)["data"]["plan"]["ratio_reached"] == pytest.approx(down, abs=0.005)
    more = invoke(*arguments, "--ratio", largest + 0.01)
    assert more.code == 2
    assert f"at most {largest:.3f} of all parameters" in more.err


def test_a_pruned_model_shows_the_widths_of_each_layer(tmp_path: Path) -> None:
    model = toys.toy("llama")
    groups = groups_of(model)
    keep = random_keep(groups, 1)
    shrink(model, groups, keep)
    widths = layer_widths(groups, keep)
    checkpoint.save(model, None, None, widths, tmp_path / "pruned")
    found = inspected(tmp_path / "pruned", *SMALL)
    assert [layer["channels"] for layer in found["layers"]] == [layer.channels for layer in widths]
    assert not found["is_stock"]
    assert "--widths uniform: its layers differ already" in found["refused"]
    shown = invoke("inspect", tmp_path / "pruned")
    assert shown.code == 0
    for layer in widths:
        assert f"{layer.heads}/{layer.kv_heads}" in shown.out
    assert "█" in shown.out


def test_baichuan_is_read_as_llama(tmp_path: Path) -> None:
    config = baichuan.sizes()
    found = inspected(config_only(tmp_path / "model", config), *SMALL)
    assert (found["stored_type"], found["model_type"], found["own_code"]) == ("baichuan", "llama", None)
    count = sum(each.numel() for name, each in baichuan.tensors(config).items() if "inv_freq" not in name)
    assert found["parameters"]["all"] == count


def test_own_code_is_named(tmp_path: Path) -> None:
    config = toys.toy("llama").config.to_dict() | {"auto_map": {"AutoModelForCausalLM": "foreign.Foreign"}}
    found = inspected(config_only(tmp_path / "model", config), *SMALL)
    assert found["own_code"] == "foreign.Foreign"
    assert any("--trust-remote-code" in line for line in found["refused"])


REFUSED = {
    "mixture of experts": ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts"),
    "state space": ({"model_type": "mamba"}, "'mamba' (a state-space"),
    "hybrid": ({"model_type": "jamba"}, "'jamba' (a state-space"),
    "encoder-decoder": ({"model_type": "t5"}, "an encoder-decoder"),
    "encoder": ({"model_type": "bert"}, "not a decoder-only language model"),
    "quantised": ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "is quantised (gptq)"),
    "ALiBi Baichuan": (baichuan.sizes(hidden_size=5120, num_hidden_layers=40), "is a Baichuan with ALiBi"),
    "unknown": ({"model_type": "no-such-thing"}, "'no-such-thing', which cannot be pruned"),
    "nameless": ({}, "names no model_type"),
}


@pytest.mark.parametrize("command", ["compress", "inspect", "export"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_pruned_is_refused_by_name(kind: str, command: str, tmp_path: Path) -> None:
    config, what = REFUSED[kind]
    outcome = refusal(command, config_only(tmp_path / "model", config), tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert what in outcome.err


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_attention_heads": 0}, "describes no"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"vocab_size": 10**14}, "parameters; expected those of a real model"),
        ({"intermediate_size": "many"}, "describes no"),
        ({"hidden_size": 0}, "hidden states have 0 numbers"),
        ({"pad_token_id": 10**12}, "describes no"),
        ({"dtype": []}, "describes no"),
    ],
)
def test_a_config_that_describes_no_model(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    config = toys.toy("llama").config.to_dict() | changes
    outcome = refusal("inspect", config_only(tmp_path / "model", config), tmp_path)
    assert outcome.code == 2
    assert what in outcome.err


def test_a_value_that_the_stand_in_refuses_is_no_error(tmp_path: Path) -> None:
    config = toys.toy("llama").config.to_dict() | {"attention_dropout": None}
    assert inspected(config_only(tmp_path / "model", config), *SMALL)["model_type"] == "llama"


@pytest.mark.parametrize("guard", ["--align", "--min-channels"])
def test_guards_are_positive(guard: str, tmp_path: Path) -> None:
    toys.toy("llama").config.save_pretrained(tmp_path)
    outcome = invoke("inspect", tmp_path, guard, 0)
    assert outcome.code == 2
    assert "must all be at least 1" in outcome.err


def test_a_folder_without_config(tmp_path: Path) -> None:
    outcome = invoke("inspect", tmp_path)
    assert outcome.code == 2
    assert "has no config.json" in outcome.err
