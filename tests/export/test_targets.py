"""What each target makes of a toy: variants, operators, files and sentences, and that the bundle is valid."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from exported import genai_continuation, pruned

from edgeprune_export import quantize
from edgeprune_export.exporting import export
from edgeprune_export.quantize import DETAILS, FLOAT32, PRECISIONS
from edgeprune_export.targets import Target, choose, known_targets
from edgeprune_runtime.bundle import Bundle, Manifest, open_bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.generate import Generation
from edgeprune_runtime.session import PREFILL_CHUNK_TOKENS, PROVIDERS, Decoder
from edgeprune_runtime.validate import validate

NAMES = known_targets()
FUSED = {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"}
NEW = {"Attention", "RMSNormalization", "RotaryEmbedding"}
EXPECTED = {
    # target -> variants, graph, operators that it has, operators that it has not
    "coreml": (["fp32"], "decoder", {"MatMul", *FUSED}, {"MatMulNBits"}),
    "cpu": (["int8"], "decoder", {"MatMulNBits", *FUSED}, {"MatMul"}),
    "cuda": (["fp16"], "decoder", {"MatMul", *FUSED}, {"MatMulNBits"}),
    "directml": (["fp32"], "plain", {"MatMul", "Softmax"}, FUSED | NEW),
    "genai": (["int8"], "decoder", {"MatMulNBits", *FUSED}, {"MatMul"}),
    "mobile": (["int8"], "decoder", {"MatMulNBits", *FUSED}, {"MatMul"}),
    "tensorrt": (["fp32"], "plain", {"MatMul", "Softmax"}, FUSED | NEW),
    "wasm": (["int8-dynamic"], "decoder", {"MatMulIntegerToFloat", *FUSED}, {"MatMul", "MatMulNBits"}),
    "webgpu": (["int4"], "decoder", {"MatMulNBits", *FUSED}, {"MatMul"}),
}
PLAIN_OPSET = 18

Made = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other widths in every layer, and a hidden size that holds whole blocks."""
    folder = tmp_path_factory.mktemp("targets") / "toy"
    pruned(folder, "llama-mha", hidden_size=96, head_dim=16, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def made(checkpoint: Path) -> Made:
    """The bundle of a target with nothing else said, made once."""
    found: dict[str, Bundle] = {}

    def of(name: str) -> Bundle:
        if name not in found:
            out = checkpoint.with_name(name)
            with pytest.MonkeyPatch.context() as patch:
                # rounding changes likeliest tokens of a toy with random weights; the gates have tests of their own
                for each in PRECISIONS.values():
                    lenient = replace(each, max_perplexity_ratio=9.0, min_argmax_agreement=0.0)
                    patch.setitem(quantize.PRECISIONS, each.name, lenient)
                choice = choose(name, "llama")
            export(
                checkpoint, out, graph_source=choice.graph_source, precisions=choice.precisions, target=choice.target
            )
            found[name] = open_bundle(out, verify=True)
        return found[name]

    return of


def operators(bundle: Bundle) -> set[str]:
    return {node.op_type for node in ir.load(bundle.graph_path).graph}


def test_every_target_is_expected_here() -> None:
    assert sorted(EXPECTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_the_others_need(name: str) -> None:
    target = Target.find(name)
    assert 10 < len(target.title) < 90
    assert target.provider in PROVIDERS
    assert set(target.precisions) <= set(PRECISIONS)
    assert all(set(details) <= set(DETAILS) for details in target.details.values())
    for precision in choose(name, "llama").precisions:
        precision.check()
    assert any(word in target.verified for word in ("run", "checked against torch with the CPU provider"))
    assert all(sentence == sentence.strip() and not sentence.endswith(".") for sentence in target.sentences)


@pytest.mark.parametrize("name", NAMES)
def test_a_target_alone_gives_a_valid_bundle_of_its_own_form(name: str, made: Made) -> None:
    bundle = made(name)
    variants, graph, has, has_not = EXPECTED[name]
    manifest = bundle.manifest
    assert list(manifest.variants) == variants
    assert {variant.graph_source for variant in manifest.variants.values()} == {graph}
    assert manifest.target == name
    assert set(Target.find(name).sentences) <= set(manifest.notes)
    found = operators(bundle)
    assert has <= found
    assert not has_not & found
    validate(bundle, threads=1).ensure_passed()


@pytest.mark.parametrize("name", [name for name in NAMES if EXPECTED[name][1] == "plain"])
def test_a_plain_graph_has_nothing_but_standard_operators_of_an_old_opset(name: str, made: Made) -> None:
    model = ir.load(made(name).graph_path)
    assert model.opset_imports == {"": PLAIN_OPSET}
    assert {node.domain for node in model.graph} == {""}


@pytest.mark.parametrize("name", ["cpu", "genai", "mobile"])
def test_products_of_8_bits_on_processors_round_their_inputs(name: str, made: Made) -> None:
    products = [node for node in ir.load(made(name).graph_path).graph if node.op_type == "MatMulNBits"]
    assert {node.attributes["accuracy_level"].as_int() for node in products} == {4}


def test_coreml_reads_the_cache_in_nothing_that_it_takes_itself(made: Made) -> None:
    """It refuses tensors without elements, as the cache is before the first token."""
    graph = ir.load(made("coreml").graph_path).graph
    readers = {use.node.op_type for value in graph.inputs if str(value.name).startswith("past") for use in value.uses()}
    assert readers == {"GroupQueryAttention"}


def test_cuda_keeps_its_cache_in_half_precision(made: Made) -> None:
    graph = ir.load(made("cuda").graph_path).graph
    assert {value.dtype for value in graph.inputs if str(value.name).startswith("past")} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize(("name", "dtype", "file"), [("wasm", "int8", "model_int8"), ("webgpu", "q4", "model_q4")])
def test_browsers_find_the_names_of_transformers_js(name: str, dtype: str, file: str, made: Made) -> None:
    folder = made(name).folder
    config = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert config == {"dtype": dtype, "use_external_data_format": {f"{file}.onnx": 1}}
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == [f"{file}.onnx", f"{file}.onnx_data"]
    assert any(f'dtype: "{dtype}"' in note for note in made(name).manifest.notes)


def test_genai_writes_the_tokens_that_our_runtime_writes(made: Made) -> None:
    bundle = made("genai")
    search = json.loads((bundle.folder / "genai_config.json").read_text())["search"]
    assert search["past_present_share_buffer"] is True
    assert search["max_length"] == bundle.manifest.context_tokens
    prompt = list(range(20, 44))
    expected = list(Generation(Decoder(bundle, threads=1), prompt, max_new_tokens=8))
    assert expected
    assert genai_continuation(bundle.folder, prompt, len(expected)) == expected


def test_mobile_holds_a_file_for_phones_that_runs(made: Made) -> None:
    bundle = made("mobile")
    names = {"ort/model_quantized.ort", "ort/model_quantized.required_operators.config"}
    assert names <= set(bundle.manifest.files)
    session = onnxruntime.InferenceSession(bundle.folder / "ort/model_quantized.ort")
    assert {node.name for node in session.get_inputs()} >= {"input_ids", "attention_mask", "past_key_values.0.key"}
    results = bundle.manifest.results["mobile"]
    assert isinstance(results, dict)
    assert set(results["ort"]) == {"int8"}
    assert any(note.startswith("ONNX Runtime's mobile usability check advises") for note in bundle.manifest.notes)


Range = dict[str, dict[str, tuple[int, ...]]]
"""Of the smallest, the usual and the largest shapes, those of every input."""


def tensorrt_range(folder: Path) -> Range:
    options = json.loads((folder / "tensorrt_options.json").read_text())
    assert set(options) == {f"trt_profile_{which}_shapes" for which in ("min", "opt", "max")}
    found = {}
    for key, shapes in options.items():
        pairs = (each.split(":") for each in shapes.split(","))
        found[key.split("_")[2]] = {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}
    return found


def shapes_of(manifest: Manifest, tokens: int, past: int) -> dict[str, tuple[int, ...]]:
    """Those of one row with so many new tokens behind a cache."""
    cache = {
        f"past_key_values.{index}.{part}": (1, layer.kv_heads, past, layer.head_dim)
        for index, layer in enumerate(manifest.layers)
        for part in ("key", "value")
    }
    return {"input_ids": (1, tokens), "attention_mask": (1, past + tokens), **cache}


@pytest.mark.parametrize("context", [1, 2, 16, 64, 511, 512, 513, 1024, 4096, 8192, 131072])
def test_tensorrt_range_holds_every_step_of_a_text(context: int, made: Made, tmp_path: Path) -> None:
    package = Target.find("tensorrt").package
    assert package is not None
    manifest = package(tmp_path, replace(made("tensorrt").manifest, context_tokens=context))
    found = tensorrt_range(tmp_path)
    most = min(context, 4096)
    piece = min(PREFILL_CHUNK_TOKENS, most)
    assert manifest.notes[-1].endswith(f"one row, {piece} new tokens at once and {most} in all")
    pieces = [(min(piece, most - past), past) for past in range(0, most, piece)]
    for tokens, past in (*pieces, (1, 0), (1, most - 1)):
        for name, shape in shapes_of(manifest, tokens, past).items():
            low, usual, high = (found[which][name] for which in ("min", "opt", "max"))
            assert all(a <= b <= c for a, b, c in zip(low, usual, high, strict=True)), name
            assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)), name


def test_tensorrt_range_has_shapes_that_the_graph_computes(made: Made) -> None:
    """TensorRT refuses a range whose smallest, usual or largest shapes contradict each other in some operator."""
    bundle = made("tensorrt")
    session = onnxruntime.InferenceSession(bundle.graph_path)
    for shapes in tensorrt_range(bundle.folder).values():
        feeds: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        feeds["input_ids"] = feeds["input_ids"].astype(np.int64)
        feeds["attention_mask"] = np.zeros(shapes["attention_mask"], np.int64)
        feeds["attention_mask"][:, -shapes["input_ids"][1] :] = 1
        logits, *presents = session.run(None, feeds)
        assert logits.shape[:2] == shapes["input_ids"]
        assert {present.shape[2] for present in presents} == {shapes["attention_mask"][1]}


# --- what the user says himself ---------------------------------------------------------------------------------------


def test_without_a_target_nothing_changes() -> None:
    choice = choose(None, "llama")
    assert (choice.target, choice.graph_source, choice.precisions, choice.notes) == (None, "decoder", (FLOAT32,), ())


def test_what_the_user_gives_wins_over_the_target() -> None:
    int4, fp32 = choose("cpu", "llama", precision="int4,fp32", block_size=64).precisions
    assert (int4.name, int4.block_size, int4.accuracy_level, fp32) == ("int4", 64, 4, FLOAT32)
    (int8,) = choose("cpu", "llama", accuracy_level=0).precisions
    assert (int8.name, int8.accuracy_level) == ("int8", 0)
    assert choose("cuda", "llama", graph_source="traced", precision="fp32").graph_source == "traced"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "coreml"])
def test_a_model_without_the_decoder_graph_gets_what_there_is_and_a_note(name: str) -> None:
    choice = choose(name, "gpt2")
    assert choice.precisions == (FLOAT32,)
    is_less = EXPECTED[name][0] != ["fp32"]
    assert bool(choice.notes) == is_less
    assert all("the variant is fp32" in note for note in choice.notes)


@pytest.mark.parametrize(
    ("target", "model_type", "given", "message"),
    [
        ("tensorrt", "llama", {"precision": "int4"}, "tensorrt needs the plain graph, which is written in fp32 alone"),
        ("directml", "llama", {"precision": "fp32,fp16"}, "--precision names fp16; leave it out"),
        (
            "tensorrt",
            "llama",
            {"graph_source": "decoder"},
            "needs the plain graph, and --graph-source asks for decoder",
        ),
        ("coreml", "llama", {"graph_source": "traced"}, "needs the decoder graph, and --graph-source asks for traced"),
        ("coreml", "gpt2", {}, "needs the decoder graph, which does not know 'gpt2'"),
        ("cpu", "gpt2", {"precision": "int8"}, "gpt2 gets the traced graph, which is written in fp32 alone"),
        ("cpu", "llama", {"graph_source": "traced", "precision": "int8"}, "gets the traced graph"),
        (
            "cpu",
            "gpt2",
            {"block_size": 64, "is_symmetric": False},
            "gpt2 gets the traced graph, which is written in fp32 alone, and --block-size 64, --asymmetric would",
        ),
        (
            "cpu",
            "llama",
            {"graph_source": "plain", "accuracy_level": 0},
            "gets the plain graph, .*--accuracy-level 0 would change nothing of that; leave it out",
        ),
        ("webgpu", "gpt2", {"precision": "int4", "block_size": 16}, "--precision names int4; leave it out"),
        ("wasm", "gpt2", {"block_size": 64}, "--block-size 64 would change nothing of int8-dynamic"),
        ("tensorrt", "llama", {"graph_source": "magic"}, "unknown graph source 'magic'"),
        ("cpu", "llama", {"precision": "int5"}, "unknown precision 'int5'"),
        ("cpu", "llama", {"block_size": 24}, "--block-size is 24"),
        (
            "gpu",
            "llama",
            {},
            r"unknown --target 'gpu'; expected one of: coreml \(products on Apple.*cuda \(sixteen bits",
        ),
    ],
)
def test_contradictions_are_refused_in_one_line(
    target: str, model_type: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(EdgepruneError, match=message):
        choose(target, model_type, **given)


@pytest.mark.parametrize("name", ["wasm", "webgpu", "mobile"])
def test_weights_that_no_browser_or_phone_file_holds_are_refused(name: str) -> None:
    target = Target.find(name)
    assert target.max_data_bytes is not None
    parameters = target.max_data_bytes  # a byte each, and scales
    with pytest.raises(EdgepruneError, match=f"--target {name} holds .* GB; use --precision int4"):
        target.check_size(parameters, (PRECISIONS["int8"],))
    target.check_size(parameters, (PRECISIONS["int4"],))
    with pytest.raises(EdgepruneError, match="a smaller model"):
        target.check_size(10 * parameters, (PRECISIONS["int4"],))


def test_a_size_that_is_refused_writes_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose("wasm", "llama")
    assert choice.target is not None
    small = replace(choice.target, max_data_bytes=1000)
    with pytest.raises(EdgepruneError, match="the int8-dynamic weights would take"):
        export(checkpoint, tmp_path / "out", precisions=choice.precisions, target=small)
    assert not list(tmp_path.iterdir())


def test_packaging_that_fails_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def fails(folder: Path, manifest: Manifest) -> Manifest:
        (folder / "half").write_text("")
        raise EdgepruneError("no room")

    target = replace(Target.find("cpu"), package=fails)
    with pytest.raises(EdgepruneError, match="no room"):
        export(checkpoint, tmp_path / "out", target=target)
    assert not list(tmp_path.iterdir())
