import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from cuts import decode, groups_of, prefill, random_keep, some_ids, uniform_keep
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import edgeprune
from edgeprune import checkpoint
from edgeprune.checkpoint import SavedCheckpoint, load_pruned, save
from edgeprune.groups import layer_widths
from edgeprune.plan import PrunePlan
from edgeprune.refit import Mode, carry_intercepts
from edgeprune.shrink import is_stock, shrink
from edgeprune_runtime.errors import EdgepruneError, GateError

TILED = ("bloom", "gpt2", "gpt_neo", "gpt_neox", "opt")
"""Types whose stock code makes the heads tile the hidden states."""

REMOTE_CODE_SCRIPT = Path(__file__).with_name("remote_code_script.py")


def cut_and_save(model: Any, keep: dict[str, list[int]], out: Path, **options: Any) -> SavedCheckpoint:
    groups = groups_of(model)
    widths = layer_widths(groups, keep)
    shrink(model, groups, keep)
    return save(model, None, None, widths, out, **options)


def per_layer(name: str, out: Path) -> Any:
    model = toys.toy(name)
    saved = cut_and_save(model, random_keep(groups_of(model), seed=1), out)
    assert saved.form == "per-layer"
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same_model(model: Any, copy: Any) -> None:
    expected, found = model.state_dict(), copy.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    ids = some_ids(model)
    torch.testing.assert_close(prefill(copy, ids), prefill(model, ids), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(decode(copy, ids, 3), decode(model, ids, 3), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", toys.NAMES)
def test_per_layer_reload_equals_the_cut(name: str, tmp_path: Path) -> None:
    model = per_layer(name, tmp_path / "out")
    copy = edgeprune.load_pruned(tmp_path / "out")
    assert_same_model(model, copy)
    assert layer_widths(groups_of(copy), {}) == layer_widths(groups_of(model), {})
    ids = some_ids(model, batch=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(copy.generate(ids, **options), model.generate(ids, **options))


def widest_stock_keep(model: Any) -> dict[str, list[int]]:
    """The same widths in every layer, narrowed wherever stock code takes narrower ones."""
    groups = groups_of(model)
    heads, kv_heads = (next(group.units for group in groups if group.kind == kind) for kind in ("heads", "kv_heads"))
    share = heads // kv_heads
    keep = uniform_keep(groups, kv_heads=min(2, kv_heads), share=1, channels=32)
    if is_stock(model.config, layer_widths(groups, keep)):
        return keep
    return uniform_keep(groups, kv_heads=kv_heads, share=share, channels=32)


@pytest.mark.parametrize("name", [name for name in toys.NAMES if not name.startswith("bloom")])
def test_uniform_reload_by_stock_transformers_equals_the_cut(name: str, tmp_path: Path) -> None:
    model = toys.toy(name)
    dense = layer_widths(groups_of(model), {})[0]
    saved = cut_and_save(model, widest_stock_keep(model), tmp_path / "out")
    assert (saved.form, saved.notes) == ("uniform", ())
    widths = layer_widths(groups_of(model), {})[0]
    assert widths.channels == 32
    assert (widths.heads < dense.heads) == (name.split("-")[0] not in TILED and name != "phi3-longrope")
    assert not list((tmp_path / "out").glob("*.py"))
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert_same_model(model, load_pruned(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["head_dim"] == dense.head_dim


def test_bloom_has_no_stock_config_for_narrower_blocks(tmp_path: Path) -> None:
    for index, cut in enumerate(
        ({"kv_heads": 4, "share": 1, "channels": 192}, {"kv_heads": 6, "share": 1, "channels": 32})
    ):
        model = toys.toy("bloom")
        saved = cut_and_save(model, uniform_keep(groups_of(model), **cut), tmp_path / str(index))
        assert saved.form == "per-layer"
        assert f"refuses {cut['kv_heads']} heads and {cut['channels']} channels" in saved.notes[0]
        assert_same_model(model, load_pruned(tmp_path / str(index)))


@pytest.mark.parametrize("name", ["gpt2", "phi3-longrope"])
def test_equal_heads_that_stock_code_cannot_have_are_saved_per_layer(name: str, tmp_path: Path) -> None:
    model = toys.toy(name)
    saved = cut_and_save(model, uniform_keep(groups_of(model), kv_heads=2, share=1, channels=32), tmp_path / "out")
    assert saved.form == "per-layer"
    assert "refuses 2 heads" in saved.notes[0]
    assert_same_model(model, load_pruned(tmp_path / "out"))


@pytest.mark.parametrize("name", toys.NAMES)
def test_uncut_blocks_leave_a_stock_config(name: str, tmp_path: Path) -> None:
    model = toys.toy(name)
    assert cut_and_save(model, {}, tmp_path / "out").form == "uniform"
    assert_same_model(model, load_pruned(tmp_path / "out"))


@pytest.mark.parametrize("name", toys.KINDS)
def test_stock_transformers_refuses_a_per_layer_folder(name: str, tmp_path: Path) -> None:
    per_layer(name, tmp_path / "out")
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # A config that may be read is what AutoTokenizer needs to work in such a folder.
    assert AutoConfig.from_pretrained(tmp_path / "out").is_heterogeneous


def test_per_layer_folders_load_without_edgeprune(tmp_path: Path) -> None:
    """One process that cannot import edgeprune loads every type by trust_remote_code and computes the same."""
    for name in toys.KINDS:
        model = per_layer(name, tmp_path / name)
        ids = some_ids(model)
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
        expected = {"ids": ids, "logits": prefill(model, ids), "steps": decode(model, ids, 3), "tokens": tokens}
        save_file(expected, tmp_path / f"{name}.expected")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(REMOTE_CODE_SCRIPT), str(tmp_path), *toys.KINDS],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == toys.KINDS


def test_llama_that_stock_llama_refuses_is_saved_as_mistral(tmp_path: Path) -> None:
    model = toys.toy("llama", num_attention_heads=6, num_key_value_heads=6, head_dim=16)
    saved = cut_and_save(model, uniform_keep(groups_of(model), kv_heads=5, share=1, channels=32), tmp_path / "out")
    assert (saved.form, saved.model_type) == ("uniform", "mistral")
    assert "mistral" in saved.notes[0]
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert copy.config.sliding_window is None
    assert_same_model(model, copy)


def test_llama_with_biases_has_no_stand_in(tmp_path: Path) -> None:
    model = toys.toy("llama-bias", num_attention_heads=6, num_key_value_heads=6)
    saved = cut_and_save(model, uniform_keep(groups_of(model), kv_heads=5, share=1, channels=32), tmp_path / "out")
    assert (saved.form, saved.model_type) == ("per-layer", "llama")
    assert "refuses 5 heads" in saved.notes[0]
    assert_same_model(model, load_pruned(tmp_path / "out"))


def test_notes_reach_the_plan(tmp_path: Path, plan: PrunePlan) -> None:
    model = toys.toy("llama", num_attention_heads=6, num_key_value_heads=6)
    groups = groups_of(model)
    keep = uniform_keep(groups, kv_heads=5, share=1, channels=32)
    shrink(model, groups, keep)
    plan = dataclasses.replace(plan, notes=("first",))
    saved = save(model, None, plan, layer_widths(groups, keep), tmp_path / "out")
    assert PrunePlan.load(tmp_path / "out") == dataclasses.replace(plan, notes=("first", *saved.notes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = toys.toy("llama").to(dtype)
    cut_and_save(model, random_keep(groups_of(model), seed=2), tmp_path / "out")
    copy = load_pruned(tmp_path / "out", dtype)
    assert copy.dtype == dtype
    assert all(torch.equal(copy.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    per_layer("qwen2", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    copy = load_pruned(tmp_path / "out")
    assert copy.lm_head.weight is copy.model.embed_tokens.weight


def test_folder_and_files_are_readable_by_others(tmp_path: Path) -> None:
    per_layer("llama", tmp_path / "out")
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {usual}


def test_the_folder_code_is_never_run_by_load_pruned(tmp_path: Path) -> None:
    model = per_layer("llama", tmp_path / "out")
    (tmp_path / "out/modeling_edgeprune.py").write_text("raise SystemExit('foreign code ran')")
    assert_same_model(model, load_pruned(tmp_path / "out"))


def test_saved_by_transformers_a_loaded_model_loads_again(tmp_path: Path) -> None:
    per_layer("llama", tmp_path / "out")
    model = load_pruned(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert_same_model(model, load_pruned(tmp_path / "again"))


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    per_layer("llama", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(EdgepruneError, match="--force"):
        per_layer("qwen2", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    model = toys.toy("qwen2")
    cut_and_save(model, random_keep(groups_of(model), 1), tmp_path / "out", force=True)
    assert_same_model(model, load_pruned(tmp_path / "out"))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_force_does_not_replace_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("precious")
    model = toys.toy("llama")
    with pytest.raises(EdgepruneError, match="not a checkpoint folder"):
        cut_and_save(model, {}, tmp_path / "home", force=True)
    assert contents(tmp_path / "home") == {"thesis.txt": b"precious"}


def fill_disk_early(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def fill_disk_in_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.SafetensorsWriter, "write", full)


def fill_disk_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_config", full)


@pytest.mark.parametrize("fill", [fill_disk_early, fill_disk_in_weights, fill_disk_in_python])
def test_a_full_disk_leaves_the_earlier_folder(fill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    per_layer("llama", tmp_path / "out")
    before = contents(tmp_path / "out")
    fill(monkeypatch)
    model = toys.toy("llama")
    with pytest.raises(EdgepruneError, match="no disk space left"):
        cut_and_save(model, {}, tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_difference", interrupt)
    with pytest.raises(KeyboardInterrupt):
        per_layer("llama", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoilt", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_copy_that_differs_is_not_believed(spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(writer: checkpoint.SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        write(writer, name, tensor + 1e-6 if name == spoilt else tensor)

    write = checkpoint.SafetensorsWriter.write
    monkeypatch.setattr(checkpoint.SafetensorsWriter, "write", spoil)
    with pytest.raises(GateError, match=re.escape(spoilt)):
        per_layer("llama", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_not_finite_weights_are_not_saved(tmp_path: Path) -> None:
    model = toys.toy("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(EdgepruneError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        cut_and_save(model, {}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_large_finite_weights_are_finite() -> None:
    checkpoint.check_finite("model", "weight", torch.full((9, 9), 6e4, dtype=torch.float16))  # their sum overflows


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"0": {"intermediate_size": 0}}, "not a positive whole number"),
        ({"0": {"intermediate_size": 1e9}}, "not a positive whole number"),
        ({"0": {"intermediate_size": 10**15}}, "do not belong together"),
        ({"0": {"num_attention_heads": 5}}, "no multiple"),
        ({"0": {"hidden_act": "relu"}}, "not understood"),
        ({"7": {"intermediate_size": 8}}, "describes no llama model"),
        ({"x": {"intermediate_size": 8}}, "not understood"),
        ([1, 2], "no JSON object"),
    ],
)  # fmt: skip
def test_hostile_per_layer_config(layers: Any, message: str, tmp_path: Path) -> None:
    per_layer("llama", tmp_path / "out")
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"per_layer_config": layers}))
    with pytest.raises(EdgepruneError, match=message):
        load_pruned(tmp_path / "out")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def loading_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: Any, **__: Any) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", begun)


def test_missing_tensors_are_refused_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys.toy("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    change_config(tmp_path, vocab_size=8_000_000)
    loading_is_not_begun(monkeypatch)
    with pytest.raises(EdgepruneError, match=r"lacks the tensor lm_head\.weight \(2 in all\)"):
        load_pruned(tmp_path)


def test_torch_files_smaller_than_their_config_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.toy("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_model(model, load_pruned(tmp_path))
    change_config(tmp_path, vocab_size=8_000_000)
    loading_is_not_begun(monkeypatch)
    with pytest.raises(EdgepruneError, match="parameters, the weight files have"):
        load_pruned(tmp_path)


def test_either_of_two_tied_tensors_is_enough(tmp_path: Path) -> None:
    model = toys.toy("llama-mha")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_model(model, load_pruned(tmp_path))


def test_a_real_model_with_its_tokenizer(stories260k: Path, tmp_path: Path) -> None:
    model = load_pruned(stories260k)
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    groups = groups_of(model)
    keep = random_keep(groups, seed=1)
    shrink(model, groups, keep)
    save(model, tokenizer, None, layer_widths(groups, keep), tmp_path / "out")
    copy = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert copy("Once upon a time").input_ids == tokenizer("Once upon a time").input_ids
    assert "local_files_only" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())


@pytest.mark.parametrize("mode", ["intercept", "bias"])
def test_intercepts_stay_where_the_stand_in_has_no_room_for_them(mode: Mode, tmp_path: Path) -> None:
    """Five heads at this width are no stock Llama, and Mistral, its stand-in, knows no biases."""
    model = toys.toy("llama", num_attention_heads=6, num_key_value_heads=6)
    groups = groups_of(model)
    keep = {group.name: tuple(range(5)) for group in groups if group.kind in ("heads", "kv_heads")}
    carry_intercepts(model, groups, mode, {"heads", "channels"})
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    shrink(model, groups, keep)
    saved = save(model, None, None, layer_widths(groups, keep), tmp_path / "out")
    assert (saved.form, saved.model_type) == ("per-layer", "llama")
    assert_same_model(model, load_pruned(tmp_path / "out"))


@pytest.fixture
def plan() -> PrunePlan:
    return PrunePlan(
        model="toy", model_type="llama", method="magnitude", allocation="uniform", refit="none", ratio_asked=0.2,
        ratio_reached=0.2, parameters_before=10, parameters_after=8, block_parameters_before=5,
        block_parameters_after=3,
        align=1, seed=0, dtype="float32", calibration=None, edgeprune_version="0", keep={"layers.0.heads": (0, 2)},
        units={"layers.0.heads": 4},
    )  # fmt: skip
