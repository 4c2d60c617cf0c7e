"""Rounded variants from the command line: what is written, measured and said, and what is refused in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import baichuan
import onnx_ir as ir
import pytest
import typer
from commandline import Outcome, invoke, save_toy
from gguf_toy import save_gguf

from edgeprune import sources
from edgeprune.cli import app
from edgeprune.journal import work_folder
from edgeprune_export import quantize
from edgeprune_export.quantize import PRECISIONS
from edgeprune_runtime.bundle import open_bundle

SMALL = (
    *("--preset", "fast", "--align", 4, "--min-channels", 4, "--dtype", "float32", "--threads", 1),
    *("--calibration-sequences", 8, "--calibration-tokens", 32, "--eval-windows", 2),
    *("--rounds", 1, "--prompt-tokens", 8, "--generate-tokens", 4),
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose hidden size holds whole blocks. Read only."""
    return save_toy(tmp_path_factory.mktemp("models") / "wide", hidden_size=96)


def refused(outcome: Outcome, message: str) -> None:
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


def test_export_writes_a_variant_for_each_precision(wide: Path, tmp_path: Path) -> None:
    done = invoke("export", wide, "-o", tmp_path / "bundle", "--precision", "int8,fp32", "--json")
    assert done.code == 0, done.err
    manifest = json.loads(done.out.splitlines()[-1])
    assert manifest["default_variant"] == "int8"
    assert "int8, " in done.err
    assert "times the perplexity, the same likeliest token at" in done.err
    flips = manifest["variants"]["int8"]["fidelity"]["greedy_flips"]
    assert f", another greedy continuation of {flips:.0%} of the texts" in done.err
    for variant in ("int8", "fp32"):
        checked = invoke("validate", tmp_path / "bundle", "--variant", variant, "--threads", 1)
        assert checked.code == 0, checked.err


def test_compress_measures_the_first_precision_against_dense(wide: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("compress", wide, "-c", text_file, "-o", out, *SMALL, "--precision", "int8")
    assert done.code == 0, done.err
    report = json.loads((out / "report.json").read_text())
    assert [side["variant"] for side in report["data"]["bench"]["sides"]] == ["fp32", "int8"]
    assert "pruned is the variant int8, dense is fp32" in (out / "report.md").read_text()
    assert list(open_bundle(out / "bundle").manifest.variants) == ["int8"]


def test_compress_rounds_the_pruned_model_as_the_user_says(wide: Path, text_file: Path, tmp_path: Path) -> None:
    details = ("--precision", "int8", "--block-size", 16, "--asymmetric", "--accuracy-level", 0)
    done = invoke("compress", wide, "-c", text_file, "-o", tmp_path / "out", *SMALL, *details)
    assert done.code == 0, done.err
    bundle = open_bundle(tmp_path / "out/bundle")
    assert bundle.variant.accuracy_level == 0
    products = [node for node in ir.load(bundle.graph_path).graph if node.op_type == "MatMulNBits"]
    assert products
    for node in products:
        assert node.attributes["block_size"].as_int() == 16
        assert node.inputs[3] is not None, "blocks that are not symmetric have zero points"


def test_tables_have_as_many_bits_as_the_user_says(wide: Path, tmp_path: Path) -> None:
    gates = ("--max-perplexity-ratio", 9, "--min-agreement", 0)
    lost = {}
    for bits in (8, 4):
        out = tmp_path / f"bundle-{bits}"
        done = invoke("export", wide, "-o", out, "--precision", "int4", "--table-bits", bits, *gates)
        assert done.code == 0, done.err
        (table,) = [
            node for node in ir.load(open_bundle(out).graph_path).graph if node.op_type == "GatherBlockQuantized"
        ]
        assert table.attributes["bits"].as_int() == bits
        lost[bits] = open_bundle(out).manifest.variants["int4"].fidelity["mean_kl"]
    assert lost[4] > lost[8]


def test_rounding_options_are_the_same_in_export_and_compress() -> None:
    def said(command: str, option: str) -> Any:
        params = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
        (found,) = [param for param in params if param.name == option]
        return found.opts, found.secondary_opts, found.default, found.help

    for option in ("block_size", "symmetric", "accuracy_level", "table_bits"):
        assert said("compress", option) == said("export", option)


def test_variant_that_loses_too_much_is_left_out_and_said(
    wide: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopeless = replace(quantize.PRECISIONS["int8"], min_argmax_agreement=1.01)
    monkeypatch.setitem(quantize.PRECISIONS, "int8", hopeless)
    done = invoke("export", wide, "-o", tmp_path / "bundle", "--precision", "fp32,int8")
    assert done.code == 1
    assert "was written without int8" in done.err
    assert list(open_bundle(tmp_path / "bundle", verify=True).manifest.variants) == ["fp32"]
    done = invoke("compress", wide, "-c", text_file, "-o", tmp_path / "out", *SMALL, "--precision", "fp32,int8")
    assert done.code == 1
    assert "int8 is not in the bundle: its rounded weights lose too much" in " ".join(done.err.split())
    assert (tmp_path / "out/report.json").is_file()
    assert not work_folder(tmp_path / "out").exists()


def test_pruning_is_not_lost_where_no_precision_is_good_enough(
    wide: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compress", wide, "-c", text_file, "-o", tmp_path / "out", *SMALL)
    with monkeypatch.context() as patch:
        patch.setitem(quantize.PRECISIONS, "int8", replace(quantize.PRECISIONS["int8"], min_argmax_agreement=1.01))
        done = invoke(*command, "--precision", "int8")
    assert done.code == 1
    assert "int8 loses too much" in done.err
    assert work_folder(tmp_path / "out").is_dir()
    done = invoke(*command, "--precision", "fp32")
    assert done.code == 0, done.err
    assert "  continues " in done.err
    assert not work_folder(tmp_path / "out").exists()


def test_other_blocks_continue_where_a_gate_said_no(
    wide: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compress", wide, "-c", text_file, *SMALL, "--precision", "int4")
    lenient = replace(quantize.PRECISIONS["int4"], max_perplexity_ratio=9.0, min_argmax_agreement=0.0)
    monkeypatch.setitem(quantize.PRECISIONS, "int4", replace(lenient, min_argmax_agreement=1.01))
    done = invoke(*command, "-o", tmp_path / "out", "--block-size", 32)
    assert done.code == 1
    assert "int4 loses too much" in done.err
    monkeypatch.setitem(quantize.PRECISIONS, "int4", lenient)
    for output in ("out", "afresh"):
        done = invoke(*command, "-o", tmp_path / output, "--block-size", 16)
        assert done.code == 0, done.err
        assert ("  continues " in done.err) == (output == "out")
    continued, afresh = (open_bundle(tmp_path / output / "bundle") for output in ("out", "afresh"))
    (data,) = continued.variant.data
    assert (continued.folder / data).read_bytes() == (afresh.folder / data).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "int5"), f"unknown precision 'int5'; expected {', '.join(PRECISIONS)}, joined"),
        (("--precision", "int8", "--checkpoint-only"), "--checkpoint-only writes none"),
        (("--precision", "int8", "--graph-source", "traced"), "is made by the decoder graph"),
    ],
)
def test_what_cannot_be_written_is_refused_early(
    arguments: tuple[str, ...], message: str, wide: Path, text_file: Path, tmp_path: Path
) -> None:
    refused(invoke("compress", wide, "-c", text_file, "-o", tmp_path / "out", *SMALL, "--quiet", *arguments), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "int4", "--block-size", 24), "--block-size is 24; expected one of 16, 32"),
        (("--precision", "int8", "--accuracy-level", 3), "--accuracy-level is 3; expected one of 0, 1, 4"),
        (("--block-size", 64), "--block-size 64 would change nothing of fp32, which has no blocks"),
        (("--target", "wasm", "--symmetric"), "--symmetric would change nothing of int8-dynamic"),
        (("--precision", "int4", "--table-bits", 2), "--table-bits is 2; expected 4 or 8"),
        (
            ("--target", "cpu", "--table-bits", 4),
            "--table-bits 4 would change nothing of int8, whose embedding and head",
        ),
        (("--precision", ""), "unknown precision ''"),
    ],
)
def test_compress_refuses_how_to_round_before_it_looks_for_a_model(
    arguments: tuple[str | int, ...], message: str, tmp_path: Path
) -> None:
    refused(invoke("compress", tmp_path / "missing", *SMALL, "--quiet", *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibration", "text.txt"), "--calibration would change nothing of fp32: int4 alone is fitted to text"),
        (
            ("--precision", "int4", "--calibration-sequences", 8, "--calibration-tokens", 64),
            "--calibration-sequences 8, --calibration-tokens 64 would change nothing without --calibration",
        ),
        (("--precision", "int4", "--calibration-tokens", 512), "--calibration-tokens 512 would change nothing without"),
        (("--min-agreement", 0.5), "--min-agreement would change nothing of fp32, which rounds no weight"),
        (("--max-greedy-flips", 0.5), "--max-greedy-flips would change nothing of fp32, which rounds no weight"),
        (
            ("--precision", "int8", "--max-greedy-flips", 0.5, "--max-memory", "1KiB"),
            "--max-greedy-flips needs the whole model in memory",
        ),
    ],
)
def test_export_refuses_what_would_change_nothing(
    arguments: tuple[str | float, ...], message: str, wide: Path, tmp_path: Path
) -> None:
    refused(invoke("export", wide, "-o", tmp_path / "bundle", "--quiet", *arguments), message)
    assert not (tmp_path / "bundle").exists()


def test_export_takes_what_compress_takes(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is played by a local folder."""
    monkeypatch.setattr(sources, "_hub_answers", lambda: True)
    monkeypatch.setattr(sources, "hf_hub_download", lambda _, file, **__: str(model_folder / file))
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: str(model_folder))
    done = invoke("export", "somebody/a-model", "-o", tmp_path / "bundle", "--quiet")
    assert done.code == 0, done.err
    model = open_bundle(tmp_path / "bundle").manifest.model
    assert model.name == "a-model"
    assert model.source.startswith("somebody/a-model from the Hugging Face hub (llama, revision ")
    assert 'base_model: "somebody/a-model"' in (tmp_path / "bundle" / "README.md").read_text()


def test_export_converts_a_gguf_file_first_and_leaves_no_copy(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    done = invoke("export", save_gguf(tmp_path / "a-model.gguf"), "-o", tmp_path / "there" / "bundle", "--quiet")
    assert done.code == 0, done.err
    model = open_bundle(tmp_path / "there" / "bundle").manifest.model
    assert (model.name, model.source) == ("a-model", "a-model, F32 from GGUF")
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["bundle"]


def test_export_names_a_folder_that_is_converted_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a-model"
    baichuan.save(folder, config := baichuan.sizes(), baichuan.tensors(config))
    monkeypatch.chdir(folder)
    done = invoke("export", ".", "-o", tmp_path / "bundle", "--quiet")
    assert done.code == 0, done.err
    assert open_bundle(tmp_path / "bundle").manifest.model.name == "a-model"


TWICE_THE_LOGITS = """
from transformers import LlamaForCausalLM

class OwnModel(LlamaForCausalLM):
    def forward(self, *inputs, **options):
        output = super().forward(*inputs, **options)
        output.logits = 2 * output.logits
        return output
"""


def test_own_code_that_computes_something_else_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_toy(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "modeling_own.py").write_text(TWICE_THE_LOGITS)
    done = invoke("export", folder, "-o", tmp_path / "bundle", "--quiet", "--trust-remote-code")
    assert done.code == 1
    assert "read back in stock llama code, the checkpoint is not the model: logits differ by" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "bundle").exists()


def test_export_names_what_is_no_model_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("")
    for name, message in (("nothing-like-it", "unknown model"), (tmp_path / "weights.pt", "no .gguf file")):
        refused(invoke("export", name, "-o", tmp_path / "bundle", "--quiet"), message)


def test_block_that_does_not_divide_the_hidden_size_is_refused_with_those_that_do(
    model_folder: Path, tmp_path: Path
) -> None:
    refused(
        invoke("export", model_folder, "-o", tmp_path / "bundle", "--precision", "int8", "--quiet"),
        "--block-size 32 does not divide the hidden_size 48, which the embedding is stored in; expected one of 16",
    )
