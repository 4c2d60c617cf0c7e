"""A bundle appears whole and proven, or not at all."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import genai_continuation, letter_tokenizer, pruned
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from edgeprune.checkpoint import load_pruned
from edgeprune.cli import app
from edgeprune_export import exporting, quantize
from edgeprune_export.exporting import export
from edgeprune_export.reference import continue_greedily
from edgeprune_runtime.bundle import GENAI_CONFIG_FILE, MANIFEST_FILE, open_bundle
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.session import Decoder
from edgeprune_runtime.validate import validate

PROMPT = list(range(20, 44))
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = 'A chat.' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token + system }}{% for turn in turns %}"
    "{% if turn['role'] == 'user' %}{{ ' USER: ' + turn['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + turn['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "toy"
    pruned(folder, "llama", head_dim=16)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name("bundle")
    export(checkpoint, out, name="a toy")
    return out


@pytest.mark.parametrize("room_tokens", [0, 8])
def test_prompt_costs_the_logits_of_its_last_token_alone(
    bundle: Path, room_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(open_bundle(bundle), threads=1)
    whole, _ = decoder.forward(np.array([PROMPT]))
    shapes: list[tuple[int, ...]] = []
    run = Decoder._run

    def recorded(self: Decoder, *arguments: Any, last: bool) -> Any:
        logits, values = run(self, *arguments, last=last)
        shapes.append(logits.shape[:2])
        return logits, values

    monkeypatch.setattr(Decoder, "_run", recorded)
    logits, cache = decoder.prefill([PROMPT], room_tokens=room_tokens)
    np.testing.assert_allclose(logits, whole[:, -1], atol=1e-4)
    following, _ = decoder.forward(np.array([PROMPT[:5]]), cache=cache)  # the switch is back
    expected, _ = decoder.forward(np.array([PROMPT + PROMPT[:5]]))
    np.testing.assert_allclose(following, expected[:, len(PROMPT) :], atol=1e-4)
    decoder.prefill([PROMPT, PROMPT[:3]], side="left")
    decoder.prefill([PROMPT, PROMPT[:3]], side="right")  # the last column is padding in a row
    assert shapes == [(1, 1), (1, 5), (1, len(PROMPT) + 5), (2, 1), (2, len(PROMPT))]


def names_beside(folder: Path) -> set[str]:
    return {path.name for path in folder.parent.iterdir()}


def test_bundle_opens_and_validates_without_torch_code(bundle: Path) -> None:
    opened = open_bundle(bundle, verify=True)
    assert opened.manifest.model.name == "a toy"
    assert opened.manifest.padding == "both"
    assert len({layer.kv_heads for layer in opened.manifest.layers}) > 1
    assert opened.variant.parity["max_abs_error"] <= opened.variant.tolerance
    validate(opened, threads=1).ensure_passed()


def test_bundle_works_after_it_was_moved(bundle: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(bundle, moved)
    validate(open_bundle(moved, verify=True), threads=1).ensure_passed()


def test_configs_name_the_external_data_and_no_code(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 1}
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    assert config["head_dim"] == 16
    assert not list(bundle.rglob("*.py"))


def test_manifest_counts_what_the_checkpoint_holds(bundle: Path, checkpoint: Path) -> None:
    model = load_pruned(checkpoint)
    manifest = open_bundle(bundle).manifest
    assert manifest.parameters.all == sum(parameter.numel() for parameter in model.parameters())
    assert set(manifest.files) == {
        path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()
    } - {MANIFEST_FILE}


def test_existing_output_is_refused_and_replaced_only_by_force(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(bundle, out)
    with pytest.raises(EdgepruneError, match="--force"):
        export(checkpoint, out)
    export(checkpoint, out, force=True, name="second")
    assert open_bundle(out, verify=True).manifest.model.name == "second"
    assert names_beside(out) == {"bundle"}


def test_force_replaces_nothing_but_a_bundle(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(EdgepruneError, match="not a bundle"):
        export(checkpoint, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_failed_gate_writes_nothing_and_keeps_the_old_bundle(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "FLOAT_TOLERANCES", (1e-9, 1.0))
    out = tmp_path / "bundle"
    shutil.copytree(bundle, out)
    before = (out / MANIFEST_FILE).read_bytes()
    with pytest.raises(GateError):
        export(checkpoint, out, force=True)
    assert (out / MANIFEST_FILE).read_bytes() == before
    assert names_beside(out) == {"bundle"}


def test_full_disk_is_said_before_writing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(EdgepruneError, match="no disk space left"):
        export(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.ir, "save", full)
    with pytest.raises(EdgepruneError, match="no disk space left"):
        export(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_checkpoint_without_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "toy")
    (tmp_path / "toy" / "tokenizer.json").unlink()
    with pytest.raises(EdgepruneError, match=r"no tokenizer\.json"):
        export(tmp_path / "toy", tmp_path / "out")


def test_chat_template_that_is_no_text_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "toy")
    (tmp_path / "toy" / "chat_template.jinja").write_bytes(b"{{ bos_token }}\xff")
    with pytest.raises(EdgepruneError, match=r"chat_template\.jinja of the checkpoint is not UTF-8 text"):
        export(tmp_path / "toy", tmp_path / "out")
    assert names_beside(tmp_path / "out") == {"toy"}


def test_link_out_of_the_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    shutil.copytree(checkpoint, tmp_path / "toy")
    (tmp_path / "toy" / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(EdgepruneError, match=r"vocab\.json links to .*secret, outside its folder"):
        export(tmp_path / "toy", tmp_path / "out")
    assert names_beside(tmp_path / "out") == {"secret", "toy"}


def test_licence_of_any_size_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "toy")
    with (tmp_path / "toy" / "LICENSE").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(EdgepruneError, match=r"LICENSE has 1073741824 bytes, at most .* expected of a licence"):
        export(tmp_path / "toy", tmp_path / "out")
    assert names_beside(tmp_path / "out") == {"toy"}


def test_links_of_the_hub_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--toy"
    snapshot = repository / "snapshots" / "0123abcd"
    shutil.copytree(checkpoint, repository / "blobs")
    (repository / "blobs" / "LICENSE").write_text("Do what you like.")
    snapshot.mkdir(parents=True)
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    export(snapshot, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do what you like."


def test_command_writes_a_bundle_and_says_what_to_do_next(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = CliRunner().invoke(app, ["export", str(checkpoint), "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["bundle"] == str(out)
    assert f"edgeprune run {out}" in result.stderr
    open_bundle(out, verify=True)


def test_command_refuses_an_unknown_graph_source(checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["export", str(checkpoint), "-o", str(tmp_path / "out"), "--graph-source", "magic"]
    )
    assert isinstance(result.exception, EdgepruneError)
    assert "auto, decoder, traced" in str(result.exception)


def test_plain_names_of_graph_sources_are_held_against_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [exporting.graph_source_of("llama", name) for name in exporting.GRAPH_SOURCES] == [
        "decoder",
        "decoder",
        "traced",
        "plain",
    ]
    monkeypatch.setattr("edgeprune.architectures.llama.SOURCE", "traced")
    with pytest.raises(EdgepruneError, match="use --graph-source traced"):
        exporting.graph_source_of("llama", "decoder")


def test_command_reads_a_text_to_compare_on(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "out"), "-q", "--text"]
    refused = CliRunner().invoke(app, [*arguments, str(tmp_path / "binary.txt")])
    assert isinstance(refused.exception, EdgepruneError)
    assert "is not UTF-8" in str(refused.exception)
    (tmp_path / "text.txt").write_text("A cat sat on the mat and looked at the sea.\n" * 9)
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "text.txt")])
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize("begins", [True, False])
def test_bundle_says_to_transformers_js_whether_texts_begin_with_a_token(begins: bool, tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(bos_token="^", eos_token="~")
    if begins:
        bos = ("^", tokenizer.convert_tokens_to_ids("^"))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="^ $A", special_tokens=[bos])
    pruned(tmp_path / "toy", "llama", tokenizer=tokenizer, head_dim=16)
    export(tmp_path / "toy", tmp_path / "bundle")
    stated = json.loads((tmp_path / "bundle" / "tokenizer_config.json").read_text())
    assert stated.get("add_bos_token", False) == begins


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_of_the_tokenizer_is_what_run_speaks(place: str, tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(bos_token="^", eos_token="~", chat_template=VICUNA_TEMPLATE)
    checkpoint = tmp_path / "toy"
    model = pruned(checkpoint, "llama", tokenizer=tokenizer, head_dim=16)
    if place == "tokenizer_config.json":  # where older checkpoints have it
        (checkpoint / "chat_template.jinja").unlink()
        config = json.loads((checkpoint / place).read_text())
        (checkpoint / place).write_text(json.dumps(config | {"chat_template": VICUNA_TEMPLATE}))
    export(checkpoint, tmp_path / "bundle")
    # transformers.js reads it here, and only here
    stated = json.loads((tmp_path / "bundle" / "tokenizer_config.json").read_text())
    assert stated["chat_template"] == VICUNA_TEMPLATE
    assert stated["bos_token"] == "^"
    arguments = [
        "run",
        str(tmp_path / "bundle"),
        "-p",
        "Hi?",
        "--system",
        "Be kind.",
        "--max-new-tokens",
        "8",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    prompt = tokenizer.encode("^Be kind. USER: Hi? ASSISTANT:", add_special_tokens=False)
    expected = continue_greedily(model, prompt, 8)
    if 2 in expected:
        expected = expected[: expected.index(2)]
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["prompt_tokens"], found["tokens"]) == (len(prompt), expected)


def test_context_that_ends_before_the_models_is_explained(tmp_path: Path) -> None:
    pruned(tmp_path / "toy", "phi3-longrope")
    manifest = export(tmp_path / "toy", tmp_path / "bundle")
    assert manifest.context_tokens == 64
    assert manifest.notes == open_bundle(tmp_path / "bundle").manifest.notes
    assert "ends at 64 of the model's 128 tokens: longrope" in manifest.notes[0]
    validate(open_bundle(tmp_path / "bundle"), threads=1).ensure_passed()


def test_really_trained_model_exports_and_validates(stories260k: Path, tmp_path: Path) -> None:
    manifest = export(stories260k, tmp_path / "bundle")
    assert manifest.plan is None
    validate(open_bundle(tmp_path / "bundle"), threads=1).ensure_passed()


@pytest.mark.parametrize("share_buffer", [True, False])
def test_onnxruntime_genai_finds_the_same_tokens(
    checkpoint: Path, bundle: Path, tmp_path: Path, share_buffer: bool
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    config = json.loads((folder / GENAI_CONFIG_FILE).read_text())
    config["search"]["past_present_share_buffer"] = share_buffer
    (folder / GENAI_CONFIG_FILE).write_text(json.dumps(config))
    expected = continue_greedily(load_pruned(checkpoint), PROMPT, 16)
    if 2 in expected:  # genai stops at the end-of-text token
        expected = expected[: expected.index(2) + 1]
    assert genai_continuation(folder, PROMPT, len(expected)) == expected
