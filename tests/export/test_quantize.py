"""Rounded weights: the numbers, the graph that multiplies by them, and the gates that it passes."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exported import pruned
from onnx import TensorProto, helper, numpy_helper

from edgeprune.checkpoint import load_pruned
from edgeprune_export.exporting import export
from edgeprune_export.fidelity import Fidelity, judge
from edgeprune_export.proving import TWIN_FILE
from edgeprune_export.quantize import PRECISIONS, Precision, Quantised, parse_precisions, quantize, with_gates
from edgeprune_runtime.bundle import Manifest, open_bundle
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.session import Decoder
from edgeprune_runtime.validate import validate

INT8 = replace(PRECISIONS["int8"], block_size=16, accuracy_level=0)
# on a toy with random weights 4 bits change nearly every likeliest token; the gates have tests of their own
INT4 = replace(PRECISIONS["int4"], block_size=16, accuracy_level=0, max_perplexity_ratio=9.0, min_argmax_agreement=0.0)


def weight(rows: int = 10, inputs: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("inputs", [64, 70])
def test_onnx_runtime_multiplies_by_what_was_rounded(bits: int, is_symmetric: bool, inputs: int) -> None:
    precision = Precision("any", bits, 16, is_symmetric)
    dense = weight(inputs=inputs)
    found = quantize(dense, precision)
    constants = [numpy_helper.from_array(found.data.numpy(), "B"), numpy_helper.from_array(found.scales.numpy(), "S")]
    if found.zero_points is not None:
        constants.append(numpy_helper.from_array(found.zero_points.numpy(), "Z"))
    node = helper.make_node(
        "MatMulNBits", ["x", *(constant.name for constant in constants)], ["y"], domain="com.microsoft",
        K=inputs, N=10, bits=bits, block_size=16,
    )  # fmt: skip
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    model = helper.make_model(
        helper.make_graph([node], "one product", [x], [y], constants),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.eye(inputs, dtype=np.float32)})
    expected = found.dequantized(inputs)
    torch.testing.assert_close(torch.from_numpy(np.asarray(product)).T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", [INT8, INT4, replace(INT4, is_symmetric=True)])
def test_rounding_moves_no_weight_by_more_than_its_block_allows(precision: Precision) -> None:
    dense = weight()
    blocks = dense.reshape(10, -1, 16)
    low, high = blocks.amin(2).clamp_max(0), blocks.amax(2).clamp_min(0)
    spread = 2 * blocks.abs().amax(2) if precision.is_symmetric else high - low
    step = spread / ((1 << precision.bits) - (2 if precision.is_symmetric else 1))
    moved = (quantize(dense, precision).dequantized(64) - dense).reshape(10, -1, 16).abs().amax(2)
    # at the end that has one number less, and where a smaller scale cuts weights off, they may move by more than half
    allowed = step * (1.01 if precision.bits == 8 else 2.5)
    assert (moved <= allowed + 1e-6).all()


@pytest.mark.parametrize("precision", [INT8, INT4, replace(INT4, is_symmetric=True)])
def test_zeros_stay_zeros(precision: Precision) -> None:
    dense = weight() * (weight(seed=1) > 0)
    dense[0] = 0
    assert (quantize(dense, precision).dequantized(64)[dense == 0] == 0).all()


def test_a_smaller_scale_is_taken_where_it_misses_less() -> None:
    dense = weight(rows=200)
    best = (quantize(dense, INT4).dequantized(64) - dense).square().mean()
    plain = _plain_rounding_error(dense, INT4)
    assert best < 0.97 * plain


def _plain_rounding_error(dense: torch.Tensor, precision: Precision) -> torch.Tensor:
    blocks = dense.reshape(len(dense), -1, precision.block_size)
    low, high = blocks.amin(2, keepdim=True).clamp_max(0), blocks.amax(2, keepdim=True).clamp_min(0)
    scale = (high - low) / 15
    zero_point = (-low / scale).round()
    rounded = (((blocks / scale + zero_point).round().clamp(0, 15)) - zero_point) * scale
    return (rounded - blocks).square().mean()


# --- variants of a bundle ---------------------------------------------------------------------------------------------


def stored_bytes(file: Path) -> int:
    """Bytes of a graph's weights, without the gaps between them, which are most of a toy's file."""
    values = (value.const_value for value in ir.load(file).graph.initializers.values())
    places = {tensor.offset: tensor.nbytes for tensor in values if isinstance(tensor, ir.ExternalTensor)}
    return sum(places.values())


@pytest.mark.parametrize("name", ["llama", "llama-mha", "phi3", "gemma3_text", "qwen3"])
def test_variants_of_one_folder_are_valid_and_smaller(name: str, tmp_path: Path) -> None:
    pruned(tmp_path / "model", name, head_dim=16)
    manifest = export(tmp_path / "model", tmp_path / "bundle", precisions=(PRECISIONS["fp32"], INT8, INT4))
    assert list(manifest.variants) == ["fp32", "int8", "int4"]
    assert manifest.default_variant == "fp32"
    sizes = {name: stored_bytes(tmp_path / "bundle" / variant.graph) for name, variant in manifest.variants.items()}
    # the embedding keeps eight bits in int4, and is much of a toy
    assert sizes["int4"] < 0.85 * sizes["int8"] < 0.4 * sizes["fp32"]
    for variant in manifest.variants:
        opened = open_bundle(tmp_path / "bundle", variant, verify=True)
        assert validate(opened, threads=1).passed, variant
        assert bool(opened.variant.fidelity) == (variant != "fp32")
    levels = {variant: each.accuracy_level for variant, each in Manifest.load(tmp_path / "bundle").variants.items()}
    assert levels == {"fp32": None, "int8": 0, "int4": 0}
    fidelity = {variant: manifest.variants[variant].fidelity for variant in ("int8", "int4")}
    assert fidelity["int8"]["mean_kl"] < fidelity["int4"]["mean_kl"]


@pytest.mark.parametrize("name", ["llama", "llama-mha"])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_tables_of_four_bits_take_half_of_the_room(name: str, is_symmetric: bool, tmp_path: Path) -> None:
    """Of a model that ties both tables, and of one that does not."""
    pruned(tmp_path / "model", name, head_dim=16)
    sizes = {}
    for bits in (8, 4):
        precision = replace(INT4, table_bits=bits, is_symmetric=is_symmetric)
        export(tmp_path / "model", tmp_path / f"{bits}", precisions=(precision,))
        bundle = open_bundle(tmp_path / f"{bits}", verify=True)
        assert validate(bundle, threads=1).passed
        nodes = {node.op_type: node for node in ir.load(bundle.graph_path).graph}
        assert nodes["GatherBlockQuantized"].attributes["bits"].as_int() == bits
        assert nodes["MatMulNBits"].attributes["bits"].as_int() == bits, "the head is the last product"
        sizes[bits] = stored_bytes(bundle.graph_path)
    config = load_pruned(tmp_path / "model").config
    rows, blocks = config.vocab_size * (1 if config.tie_word_embeddings else 2), config.hidden_size // 16
    points = 0 if is_symmetric else math.ceil(blocks / 2)  # two in a byte, and none in that of another row
    assert sizes[8] - sizes[4] == rows * (config.hidden_size // 2 - points)


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama-mha", head_dim=16)
    export(tmp_path / "model", tmp_path / "bundle", precisions=(INT4,))
    graph = ir.load(tmp_path / "bundle/onnx/model_q4.onnx").graph
    places = {
        (value.const_value.offset, value.const_value.length)
        for name, value in graph.initializers.items()
        if name.startswith("model.embed_tokens.weight") and not name.endswith(("_scales", "_zero_points"))
        and isinstance(value.const_value, ir.ExternalTensor)
    }  # fmt: skip
    assert len(places) == 1
    assert {"GatherBlockQuantized", "MatMulNBits"} <= {node.op_type for node in graph}


def test_the_first_precision_is_what_every_runtime_takes(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    export(tmp_path / "model", tmp_path / "bundle", precisions=(INT8,))
    opened = open_bundle(tmp_path / "bundle", verify=True)
    assert opened.variant_name == "int8"
    assert not (tmp_path / "bundle/onnx/model.onnx").exists()
    assert '"onnx/model_quantized.onnx"' in (tmp_path / "bundle/genai_config.json").read_text()
    assert Decoder(opened, threads=1).forward(np.array([[1, 5, 6]]))[0].shape[1] == 3


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "gemma3_text", "qwen2", "qwen3", "smollm3"])
def test_half_floats_compute_what_torch_computes(name: str, tmp_path: Path) -> None:
    pruned(tmp_path / "model", name)
    manifest = export(tmp_path / "model", tmp_path / "bundle", precisions=(PRECISIONS["fp16"], PRECISIONS["fp32"]))
    sizes = {name: stored_bytes(tmp_path / "bundle" / variant.graph) for name, variant in manifest.variants.items()}
    assert sizes["fp16"] == sizes["fp32"] / 2
    opened = open_bundle(tmp_path / "bundle", "fp16", verify=True)
    assert validate(opened, threads=1).passed
    graph = ir.load(opened.graph_path).graph
    # Angles of late positions are beyond float16; the table of them that a session computes is float16 again.
    weights = [value for name, value in graph.initializers.items() if not name.startswith("rotary")]
    floats = {value.dtype for value in (*graph.inputs, *weights)} - {
        ir.DataType.INT64,
        ir.DataType.INT32,
    }
    assert floats == {ir.DataType.FLOAT16}
    assert graph.outputs[0].dtype == ir.DataType.FLOAT, "logits are float32 in every variant"


def test_rounded_inputs_are_within_their_own_tolerance(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    manifest = export(tmp_path / "model", tmp_path / "bundle", precisions=(replace(INT8, accuracy_level=4),))
    variant = manifest.variants["int8"]
    assert variant.accuracy_level == 4
    assert 1e-3 < variant.parity["max_abs_error"] < variant.tolerance
    assert validate(open_bundle(tmp_path / "bundle"), threads=1).passed
    assert not list((tmp_path / "bundle").rglob(TWIN_FILE))


@pytest.mark.parametrize("max_memory_bytes", [None, 1], ids=["whole", "by blocks"])
def test_a_small_mistake_does_not_hide_behind_rounded_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_memory_bytes: int | None
) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    exact = Quantised._exact
    monkeypatch.setattr(Quantised, "_exact", lambda rounded, rows: exact(rounded, rows) * 1.002)
    with pytest.raises(GateError, match=f"parity of {TWIN_FILE} failed"):
        export(
            tmp_path / "model",
            tmp_path / "bundle",
            precisions=(replace(INT8, accuracy_level=4),),
            max_memory_bytes=max_memory_bytes,
        )


def test_one_scale_that_is_wrong_fails_the_device_check(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    export(tmp_path / "model", tmp_path / "bundle", precisions=(INT8,))
    bundle = open_bundle(tmp_path / "bundle")
    graph = ir.load(bundle.graph_path).graph
    scales = graph.initializers["model.layers.1.mlp.down_proj.weight_scales"].const_value
    assert isinstance(scales, ir.ExternalTensor)
    assert scales.offset is not None
    with (bundle.folder / bundle.variant.data[0]).open("r+b") as file:
        file.seek(scales.offset)
        file.write(np.full(8, 3.0, np.float32).tobytes())
    assert not validate(bundle, threads=1).passed


@pytest.mark.parametrize(
    "limit", [{"max_perplexity_ratio": 0.5}, {"min_argmax_agreement": 1.01}, {"max_greedy_flips": -0.01}]
)
def test_a_variant_that_loses_too_much_is_not_written(limit: dict[str, float], tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    bad = replace(INT8, **limit)
    with pytest.raises(GateError, match="int8 loses too much"):
        export(tmp_path / "model", tmp_path / "bundle", precisions=(bad,))
    assert not (tmp_path / "bundle").exists()
    manifest = export(tmp_path / "model", tmp_path / "bundle", precisions=(bad, PRECISIONS["fp32"]))
    assert list(manifest.variants) == ["fp32"]
    assert manifest.default_variant == "fp32"
    assert manifest.notes[-1].startswith("not written: int8 loses too much")
    assert not list((tmp_path / "bundle").rglob("*int8*"))
    assert validate(open_bundle(tmp_path / "bundle", verify=True), threads=1).passed


@pytest.mark.parametrize(
    ("flips", "limit", "passes"),
    [(0.5, 0.5, True), (0.75, 0.5, False), (math.nan, 0.5, False), (1.0, None, True), (None, None, True)],
)
def test_greedy_flips_have_a_limit_where_the_user_sets_one(
    flips: float | None, limit: float | None, passes: bool
) -> None:
    (precision,) = with_gates([PRECISIONS["int4"]], None, None, limit)
    found = Fidelity(
        perplexity=20.0,
        perplexity_ratio=1.1,
        argmax_agreement=0.9,
        mean_kl=0.01,
        greedy_flips=flips,
        greedy_tokens=16,
        positions=100,
    )
    if passes:
        assert judge(found, precision) == found
    else:
        with pytest.raises(GateError, match=r"another greedy continuation of .*% of the texts \(at most 50% allowed\)"):
            judge(found, precision)


def test_a_graph_that_rounds_otherwise_than_its_torch_model_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    exact = Quantised._exact
    monkeypatch.setattr(Quantised, "_exact", lambda rounded, rows: exact(rounded, rows) * 1.01)
    with pytest.raises(GateError, match="parity"):
        export(tmp_path / "model", tmp_path / "bundle", precisions=(INT8,))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "details", "message"),
    [
        ("int3", {}, f"unknown precision 'int3'; expected {', '.join(PRECISIONS)}, joined"),
        ("fp32,fp32", {}, "named twice"),
        ("", {}, "unknown precision ''"),
        ("int4", {"block_size": 24}, "--block-size is 24; expected one of 16"),
        ("int4", {"accuracy_level": 3}, "--accuracy-level is 3; expected one of 0"),
        (
            "fp32",
            {"block_size": 64},
            "--block-size 64 would change nothing of fp32, .*name int8 or int4 in --precision",
        ),
        ("fp32,fp16", {"is_symmetric": True}, "--symmetric would change nothing of fp32, fp16"),
        ("int8-dynamic", {"accuracy_level": 0}, "--accuracy-level 0 would change nothing of int8-dynamic"),
        ("int4", {"table_bits": 6}, "--table-bits is 6; expected 4 or 8"),
        ("fp32,int8", {"table_bits": 4}, "--table-bits 4 would change nothing of fp32, int8, whose .* name int4 in"),
        ("int8", {"table_bits": 4, "block_size": 64}, "--table-bits 4 would change nothing of int8, .* name int4 in"),
        ("fp32", {"table_bits": 4, "block_size": 64}, "--block-size 64, --table-bits 4 would .* name int4 in"),
        ("fp16", {"block_size": 64, "is_symmetric": False}, "--block-size 64, --asymmetric would change nothing"),
    ],
)
def test_what_onnx_runtime_does_not_take_is_refused(text: str, details: dict[str, int], message: str) -> None:
    with pytest.raises(EdgepruneError, match=message):
        parse_precisions(text, **details)


def test_the_user_may_set_the_gates_of_what_is_rounded() -> None:
    plain, int4 = with_gates([PRECISIONS["fp32"], PRECISIONS["int4"]], 3.0, 0.25, 0.75)
    assert plain == PRECISIONS["fp32"]
    assert (int4.max_perplexity_ratio, int4.min_argmax_agreement, int4.max_greedy_flips) == (3.0, 0.25, 0.75)
    assert with_gates([PRECISIONS["int4"]], None, None, None) == (PRECISIONS["int4"],)
    with pytest.raises(EdgepruneError, match=r"--max-perplexity-ratio and --min-agreement would change nothing"):
        with_gates([PRECISIONS["fp32"]], 3.0, 0.25, None)
    for ratio, agreement, flips, message in (
        (0.0, None, None, "--max-perplexity-ratio is 0"),
        (None, 1.5, None, "--min-agreement is 1.5"),
        (None, None, -0.5, "--max-greedy-flips is -0.5; expected a share from 0 to 1"),
        (None, None, math.nan, "--max-greedy-flips is nan"),
    ):
        with pytest.raises(EdgepruneError, match=message):
            with_gates([PRECISIONS["int4"]], ratio, agreement, flips)


def test_details_reach_the_rounded_precisions_alone() -> None:
    plain, int4 = parse_precisions("fp32, int4", block_size=64, is_symmetric=True, accuracy_level=4)
    assert plain == PRECISIONS["fp32"]
    assert (int4.block_size, int4.is_symmetric, int4.accuracy_level) == (64, True, 4)
    int8, int4 = parse_precisions("int8,int4", block_size=64, table_bits=4)
    assert (int8.table_bits, int4.table_bits) == (None, 4)


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("gpt2", INT8, "gpt2 has the traced one; expected --precision fp32"),
        ("llama", replace(INT8, block_size=32), "does not divide the hidden_size 48.*expected one of 16"),
    ],
)
def test_what_the_graph_cannot_hold_is_refused_early(
    name: str, precision: Precision, message: str, tmp_path: Path
) -> None:
    pruned(tmp_path / "model", name)
    with pytest.raises(EdgepruneError, match=message):
        export(tmp_path / "model", tmp_path / "bundle", precisions=(precision,))
    assert not (tmp_path / "bundle").exists()
