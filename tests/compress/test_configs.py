"""Configs as untrusted input: which models are known, what the others are, and what a hostile file may say."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import toys
from cuts import prefill, some_ids
from exported import pruned
from transformers import BloomConfig, GPT2LMHeadModel

from edgeprune.checkpoint import load_pruned
from edgeprune.configs import architecture, check_architecture, config_groups, known_types, load_config
from edgeprune_runtime.errors import EdgepruneError

EXPERTS = "a mixture of experts"
RECURRENT = "a state-space, recurrent or hybrid model"
TRANSLATES = "an encoder-decoder"
SEES = "multimodal"
OTHER = "not a decoder-only language model"

REFUSED = {
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "deepseek_v2": EXPERTS, "deepseek_v3": EXPERTS,
    "gpt_oss": EXPERTS, "granitemoe": EXPERTS, "olmoe": EXPERTS, "phimoe": EXPERTS, "glm4_moe": EXPERTS,
    "llama4_text": EXPERTS, "hunyuan_v1_moe": EXPERTS,
    "mamba": RECURRENT, "mamba2": RECURRENT, "falcon_mamba": RECURRENT, "falcon_h1": RECURRENT, "jamba": RECURRENT,
    "bamba": RECURRENT, "zamba": RECURRENT, "zamba2": RECURRENT, "nemotron_h": RECURRENT, "rwkv": RECURRENT,
    "recurrent_gemma": RECURRENT, "granitemoehybrid": RECURRENT, "lfm2": RECURRENT, "lfm2_moe": RECURRENT,
    "qwen3_next": RECURRENT, "qwen3_5_text": RECURRENT, "kimi_linear": RECURRENT, "xlstm": RECURRENT,
    "t5": TRANSLATES, "umt5": TRANSLATES, "bart": TRANSLATES, "pegasus": TRANSLATES, "marian": TRANSLATES,
    "whisper": TRANSLATES,
    "gemma3": SEES, "gemma3n": SEES, "llava": SEES, "qwen2_vl": SEES, "mllama": SEES, "llama4": SEES,
    "bert": OTHER, "roberta": OTHER, "electra": OTHER, "vit": OTHER,
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "kind"), REFUSED.items())
def test_other_sorts_of_models_are_refused_by_name(model_type: str, kind: str) -> None:
    with pytest.raises(
        EdgepruneError, match=f"'{model_type}' \\({kind}\\), which cannot be pruned; known: "
    ) as refusal:
        check_architecture({"model_type": model_type}, "x")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("model_type", ["gptj", "cohere", "no_such_type"])
def test_decoders_without_an_architecture_file_are_refused_without_a_guess(model_type: str) -> None:
    with pytest.raises(EdgepruneError, match=f"architecture '{model_type}', which cannot be pruned"):
        check_architecture({"model_type": model_type}, "x")


def test_every_toy_is_of_a_known_type_and_every_stock_type_has_a_toy() -> None:
    types = {name.split("-")[0] for name in toys.NAMES}
    assert types <= set(known_types())
    assert {known for known in known_types() if not hasattr(architecture(known), "BECOMES")} == types


def change(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"alibi_heads": [0, 6]}, "describes no bloom model"),
        ({"alibi_heads": [0]}, "does not name one of the 6 heads for each"),
        ({"alibi_heads": [1, 0]}, "not sorted"),
        ({"alibi_heads": [0, 0]}, "names a head twice"),
        ({"alibi_heads": [-1, 0]}, "no list of head numbers"),
        ({"alibi_heads": [0, 1.5]}, "no list of head numbers"),
        ({"alibi_heads": "01"}, "no list of head numbers"),
        ({"n_head": 2}, "not understood"),
    ],
)
def test_hostile_slopes(sizes: dict[str, Any], message: str, tmp_path: Path) -> None:
    pruned(tmp_path / "out", "bloom", 1)
    layer = {"alibi_heads": [0, 1], "num_attention_heads": 2, "intermediate_size": 8}
    change(tmp_path / "out", per_layer_config={str(i): layer | sizes for i in range(3)})
    with pytest.raises(EdgepruneError, match=message):
        load_config(tmp_path / "out")


@pytest.mark.parametrize("heads", [0, -3, 10**12])
def test_head_counts_that_nothing_has_are_refused(heads: int, tmp_path: Path) -> None:
    toys.toy("bloom").save_pretrained(tmp_path)
    change(tmp_path, n_head=heads)
    with pytest.raises(EdgepruneError, match="attention heads; expected 1 to"):
        load_config(tmp_path)


def test_many_layers_share_the_slopes_of_many_heads() -> None:
    config = BloomConfig(n_layer=3, n_head=1000, hidden_size=1000)
    slopes = [group.alibi_heads for group in config_groups(config) if group.kind == "heads"]
    assert slopes[0] == tuple(range(1000))
    # a tuple for each layer would let two numbers of a config take all memory
    assert all(of_layer is slopes[0] for of_layer in slopes)


@pytest.mark.parametrize(
    ("name", "key"), [("gpt2", "n_layer"), ("gpt_neo", "num_layers"), ("llama", "num_hidden_layers")]
)
def test_layer_counts_are_bounded_under_every_name(name: str, key: str, tmp_path: Path) -> None:
    toys.toy(name).save_pretrained(tmp_path)
    change(tmp_path, **{key: 10**9})
    with pytest.raises(EdgepruneError, match="says 1000000000 layers"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "sizes"), [("bloom", {"intermediate_size": 80}), ("gpt2", {"head_dim": 16}), ("opt", {"head_dim": 4})]
)
def test_sizes_that_stock_code_does_not_read_are_not_believed(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    toys.toy(name).save_pretrained(tmp_path)
    change(tmp_path, **sizes)
    with pytest.raises(EdgepruneError, match="its sizes do not belong together"):
        load_pruned(tmp_path)


def test_a_layout_that_a_folder_brings_along_is_not_believed(tmp_path: Path) -> None:
    model = pruned(tmp_path / "out", "bloom", 1)
    lies = {"blocks": "lm_head", "head_dim": 10**9, "widths": {}, "linears": {"": {}}, "alibi": "forward"}
    change(tmp_path / "out", edgeprune=lies)
    copy, ids = load_pruned(tmp_path / "out"), some_ids(model)
    assert (prefill(copy, ids) == prefill(model, ids)).all()


def test_causal_masks_of_old_files_are_passed_over(tmp_path: Path) -> None:
    """Files of GPT-2 hold a mask for every layer, and the names of the bare decoder."""
    from safetensors.torch import load_file, save_file

    model = toys.toy("gpt2")
    assert isinstance(model, GPT2LMHeadModel)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors["h.0.attn.bias"] = tensors["ln_f.bias"].new_ones(1, 1, 4, 4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = some_ids(model)
    assert (prefill(load_pruned(tmp_path), ids) == prefill(model, ids)).all()


def test_reading_a_pruned_config_warns_of_nothing(tmp_path: Path) -> None:
    pruned(tmp_path / "out", "llama")
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]  # the shortest way to look
    logger: Any = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    type(logger).warning_once.cache_clear()  # or it may have been said already
    logger.addHandler(handler)
    try:
        load_config(tmp_path / "out")
    finally:
        logger.removeHandler(handler)
    assert not said
