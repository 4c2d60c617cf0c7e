"""Baichuan's own form, read without its code: equal to its maths, dense, cut, streamed, and through the command."""

import json
from pathlib import Path
from typing import Any

import baichuan
import pytest
import torch
from commandline import SENTENCES, invoke
from cuts import groups_of, prefill, random_keep, silenced
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgeprune.checkpoint import load_pruned, open_decoder
from edgeprune.groups import kept
from edgeprune.shrink import shrink
from edgeprune.sources import count_parameters, load, load_tokenizer, open_source, stored_folder
from edgeprune_runtime.errors import EdgepruneError

GENERATIONS = {"baichuan": baichuan.sizes(), "baichuan2": baichuan.sizes(**baichuan.BAICHUAN2)}
IDS = torch.randint(0, 320, (2, 11), generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=GENERATIONS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return GENERATIONS[request.param]


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_dense_logits_are_those_of_baichuan(tmp_path: Path, config: dict[str, Any], form: str) -> None:
    weights = baichuan.tensors(config)
    source = open_source(str(baichuan.save(tmp_path / "model", config, weights, form)))
    assert source.model_type == "llama"
    model = load(source)
    torch.testing.assert_close(prefill(model, IDS), baichuan.logits(config, weights, IDS), atol=2e-5, rtol=1e-5)
    assert count_parameters(model) == sum(each.numel() for name, each in weights.items() if "inv_freq" not in name)


def test_the_two_heads_differ(tmp_path: Path) -> None:
    """Else the equality above would not show that the norm head is folded."""
    weights = baichuan.tensors(GENERATIONS["baichuan"])
    plain, normed = (baichuan.logits(config, weights, IDS) for config in GENERATIONS.values())
    assert (plain - normed).abs().max() > 0.1


def test_cut_equals_silenced(tmp_path: Path, config: dict[str, Any]) -> None:
    """Silenced in Baichuan's own tensors: columns of o_proj and down_proj that are zero."""
    weights = baichuan.tensors(config)
    model = load(open_source(str(baichuan.save(tmp_path / "model", config, weights))))
    groups = groups_of(model)
    keep = random_keep(groups, 5)
    with silenced(model, groups, keep):
        expected = prefill(model, IDS)
    for group in groups:
        if group.kind != "kv_heads":
            gone = sorted({*range(group.units)} - {*kept(keep, group)})
            columns = [unit * group.inner.size + i for unit in gone for i in range(group.inner.size)]
            weights[f"{group.inner.module}.weight"][:, columns] = 0.0
    shrink(model, groups, keep)
    torch.testing.assert_close(prefill(model, IDS), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(prefill(model, IDS), baichuan.logits(config, weights, IDS), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["safetensors", "shards"])
def test_blocks_are_read_one_at_a_time(tmp_path: Path, config: dict[str, Any], form: str) -> None:
    weights = baichuan.tensors(config)
    source = open_source(str(baichuan.save(tmp_path / "model", config, weights, form)))
    folder = stored_folder(source)
    assert folder is not None
    decoder = open_decoder(folder)
    packed = weights["model.layers.1.self_attn.W_pack.weight"]
    with decoder.block(1) as block:
        for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
            found = block.get_submodule(f"self_attn.{name}").weight
            assert torch.equal(found, packed[48 * number : 48 * (number + 1)])
            # no more of the packed tensor stays in memory than the part
            assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
    assert decoder.is_streamed
    assert all(parameter.is_meta for parameter in decoder.blocks.parameters())


def test_half_precision_stays_as_it_is_stored(tmp_path: Path) -> None:
    config = GENERATIONS["baichuan2"] | {"torch_dtype": "bfloat16"}
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in baichuan.tensors(config).items()}
    folder = baichuan.save(tmp_path / "model", config, weights)
    decoder = open_decoder(folder)
    head = decoder.tensors()["lm_head.weight"]
    assert head.dtype == torch.bfloat16
    expected = torch.nn.functional.normalize(weights["lm_head.weight"].float()).to(torch.bfloat16)
    assert torch.equal(head, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 5120, "num_hidden_layers": 40, "max_position_embeddings": None, "model_max_length": 4096},
        {"hidden_size": 5120, "num_hidden_layers": 40},
        {"max_position_embeddings": None},
    ],
)
def test_alibi_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(baichuan.sizes(**changes)))
    with pytest.raises(EdgepruneError, match="is a Baichuan with ALiBi"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("name", "tensor", "what"),
    [
        ("model.layers.1.self_attn.W_pack.weight", None, "lacks the tensor model.layers.1.self_attn.k_proj.weight"),
        ("model.layers.1.self_attn.W_pack.weight", torch.zeros(96, 48), "do not belong together"),
        ("model.layers.1.self_attn.W_pack.weight", torch.zeros(()), "can be made"),
        ("model.layers.1.self_attn.W_pack.weight", torch.zeros(145, 48), "can be made"),
        ("model.layers.1.mlp.more.weight", torch.zeros(3), "does not expect: model.layers.1.mlp.more.weight"),
        ("model.norm.weight", torch.full((48,), torch.nan), "NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, form: str, name: str, tensor: torch.Tensor | None, what: str) -> None:
    config = GENERATIONS["baichuan"]
    weights = baichuan.tensors(config)
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    folder = baichuan.save(tmp_path / "model", config, weights, form)
    with pytest.raises(EdgepruneError, match=what):
        load(open_source(str(folder)))


def test_a_config_whose_classes_are_no_list_is_read(tmp_path: Path) -> None:
    config = GENERATIONS["baichuan"]
    folder = baichuan.save(tmp_path / "model", config | {"architectures": 5}, baichuan.tensors(config))
    assert load(open_source(str(folder))).config.model_type == "llama"


def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    folder = baichuan.save(
        tmp_path / "model", GENERATIONS["baichuan"], baichuan.tensors(GENERATIONS["baichuan"]), "bin"
    )
    torch.save({"state": [1, 2], "padding": torch.zeros(10**5)}, folder / "pytorch_model.bin")
    with pytest.raises(EdgepruneError, match="holds more than named tensors"):
        load(open_source(str(folder)))


def test_tokenizer_is_read_without_its_code(tmp_path: Path) -> None:
    config = GENERATIONS["baichuan"]
    source = open_source(str(baichuan.save(tmp_path / "model", config, baichuan.tensors(config))))
    tokenizer = load_tokenizer(source)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    ids = tokenizer("in the  中国 Ü").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "in", "▁the", "▁▁", "中国", "▁", "<0xC3>", "<0x9C>",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "in the  中国 Ü"


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_compress_makes_a_pruned_llama_of_it(tmp_path: Path, config: dict[str, Any], form: str) -> None:
    weights = baichuan.tensors(config)
    folder = baichuan.save(tmp_path / "model", config, weights, form)
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 48)
    outcome = invoke(
        "compress", folder, "-c", text, "-o", tmp_path / "out", "--ratio", 0.2, "--preset", "fast", "--checkpoint-only",
        "--align", 1, "--min-channels", 4, "--dtype", "float32", "--calibration-sequences", 8, "--calibration-tokens",
        32, "--allocation", "uniform", "--refit", "none", "-q",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] in ("llama", "mistral")
    assert "auto_map" not in written
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["ratio_reached"] == pytest.approx(0.2, abs=0.02)
    assert not list((tmp_path / "out").glob("*.py"))
    assert (tmp_path / "out/tokenizer.json").is_file()
    stored = load_file(tmp_path / "out/model.safetensors")
    rows = [i for head in plan["keep"]["layers.0.heads"] for i in range(8 * head, 8 * head + 8)]
    assert torch.equal(
        stored["model.layers.0.self_attn.q_proj.weight"], weights["model.layers.0.self_attn.W_pack.weight"][rows]
    )
    model = load_pruned(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(prefill(stock, IDS), prefill(model, IDS))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_export_converts_it_first(tmp_path: Path, form: str) -> None:
    config = GENERATIONS["baichuan2"]
    folder = baichuan.save(tmp_path / "model", config, baichuan.tensors(config), form)
    (folder / "LICENSE").write_text("Do what you like.")
    outcome = invoke("export", folder, "-o", tmp_path / "bundle", "-q")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "bundle" / "LICENSE").read_text() == "Do what you like."
    assert {path.name for path in tmp_path.iterdir()} == {"model", "bundle"}
    manifest = json.loads((tmp_path / "bundle/edgeprune.json").read_text())
    assert (manifest["model"]["name"], manifest["model"]["model_type"]) == ("model", "llama")
    said = invoke("run", tmp_path / "bundle", "--prompt", "in the 中国", "--max-new-tokens", 4, "-q", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out.splitlines()[-1])["prompt_tokens"] == 4


@pytest.mark.parametrize("generation", GENERATIONS)
def test_whole_job(tmp_path: Path, generation: str) -> None:
    """Dense and pruned through ONNX; the dense one is converted on the way, and nothing of that is left."""
    config = GENERATIONS[generation]
    folder = baichuan.save(tmp_path / "model", config, baichuan.tensors(config))
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES * 48)
    outcome = invoke(
        "compress", folder, "-c", text, "-o", tmp_path / "out", "--preset", "fast", "--align", 1, "--min-channels", 4,
        "--dtype", "float32", "--calibration-sequences", 8, "--calibration-tokens", 32, "--rounds", 1,
        "--prompt-tokens", 8, "--generate-tokens", 4, "--threads", 1, "-q",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt", "out"}
    assert (tmp_path / "out/bundle/onnx/model.onnx").is_file()
    assert invoke("validate", tmp_path / "out/bundle").code == 0
