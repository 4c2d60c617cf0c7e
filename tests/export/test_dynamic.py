"""Products of whole numbers, whose inputs are rounded as the graph runs: weights, operators, and what is shared."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exported import pruned
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgeprune.plan import SparsityRecord
from edgeprune_export import decoder
from edgeprune_export.exporting import export
from edgeprune_export.external_data import ExternalData
from edgeprune_export.graph_check import check_graph, rounded_weights
from edgeprune_export.graph_writer import GraphWriter
from edgeprune_export.proving import TWIN_FILE
from edgeprune_export.quantize import (
    FLOAT_TOLERANCES,
    PRECISIONS,
    Quantised,
    RoundedWeights,
    parse_precisions,
    quantize,
)
from edgeprune_export.sparsity_check import check_zeros
from edgeprune_export.targets import choose
from edgeprune_export.weights import Weights
from edgeprune_runtime.bundle import Bundle, graph_file, open_bundle, transformers_js_dtype
from edgeprune_runtime.errors import GateError
from edgeprune_runtime.session import Decoder
from edgeprune_runtime.validate import validate

NAME = "int8-dynamic"
# on a toy with random weights rounding changes likeliest tokens; the gates have tests of their own
DYNAMIC = replace(PRECISIONS[NAME], max_perplexity_ratio=9.0, min_argmax_agreement=0.0)
TOYS = ("llama", "llama-mha", "llama-bias", "phi3", "gemma2", "gemma3_text", "qwen2", "qwen3", "smollm3")


def weight(rows: int = 10, inputs: int = 70, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def graph_of(checkpoint: Path, folder: Path) -> ir.Model:
    """The graph of a checkpoint, weights at hand, as it is before anything is proven."""
    folder.mkdir()
    with ExternalData(folder / "data") as data:
        return decoder.build(RoundedWeights(Weights(checkpoint), DYNAMIC), data)


def numbers(graph: ir.Graph, name: str) -> np.ndarray:
    constant = graph.initializers[name].const_value
    assert constant is not None
    return constant.numpy()


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_a_row_has_one_scale_and_misses_by_half_a_step_at_most() -> None:
    dense = weight()
    dense[3] = 0
    found = quantize(dense, DYNAMIC)
    assert found.scales.shape == (10, 1)
    assert found.zero_points is None
    moved = (found.dequantized(70) - dense).abs().amax(1)
    step = dense.abs().amax(1) / 128
    assert (moved <= 1.001 * step).all()  # at the end that has one number less; half a step everywhere else
    assert moved.median() <= 0.51 * step.median()


def one_product(inputs: list[str], constants: list[TensorProto]) -> ModelProto:
    """A graph of one product with numbers `x`."""
    node = helper.make_node("MatMulIntegerToFloat", inputs, ["y"], domain="com.microsoft")
    given = helper.make_tensor_value_info("x", TensorProto.UINT8, None)
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(
        helper.make_graph([node], "one product", [given], [made], constants),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


@pytest.mark.parametrize("inputs", [64, 70])
def test_onnx_runtime_multiplies_by_what_was_rounded(inputs: int) -> None:
    found = quantize(weight(inputs=inputs), DYNAMIC)
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(found.data.flatten(1).numpy().T), "W"),
        numpy_helper.from_array(found.scales[:, 0].numpy(), "S"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(np.array(0, np.uint8), "zero"),
        numpy_helper.from_array(np.array(128, np.uint8), "middle"),
    ]
    model = one_product(["x", "W", "one", "S", "zero", "middle"], constants)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.eye(inputs, dtype=np.uint8)})
    torch.testing.assert_close(torch.from_numpy(np.asarray(product)).T, found.dequantized(inputs), rtol=1e-6, atol=0)


def test_details_of_blocks_do_not_reach_it() -> None:
    dynamic, int4 = parse_precisions(f"{NAME},int4", block_size=64, is_symmetric=False, accuracy_level=0)
    assert dynamic == PRECISIONS[NAME]
    assert int4.block_size == 64


# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_every_product_is_of_whole_numbers_and_no_input_is_rounded_twice(name: str, tmp_path: Path) -> None:
    pruned(tmp_path / "model", name)
    model = graph_of(tmp_path / "model", tmp_path / "graph")
    kinds = [node.op_type for node in model.graph]
    assert not {"MatMul", "FusedMatMul", "MatMulNBits", "GatherBlockQuantized"} & set(kinds)
    # q, k and v are one product; gate and up read the same input, and so does what Phi-3 stores as one
    products = 4 if name == "phi3" else 5
    assert kinds.count("MatMulIntegerToFloat") == products * 3 + 1
    assert kinds.count("QuantizeLinear") == 4 * 3 + 1
    floats = {key for key, value in model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    weights = Weights(tmp_path / "model")
    assert not {key for key in floats if len(weights.shapes.get(key, ())) == 2}, "nothing large is float32"


def test_sizes_that_onnx_runtime_cannot_infer_are_stated(tmp_path: Path) -> None:
    """Else no value takes the memory of another, and a session takes seconds to plan."""
    pruned(tmp_path / "model", "llama")
    graph = graph_of(tmp_path / "model", tmp_path / "graph").graph
    made = [value for node in graph if node.op_type in ("Split", "Concat") for value in node.outputs]
    of_halves = [value for value in made if (value.name or "").endswith(("/coarse", "/fine", "/halves"))]
    assert len(of_halves) == 2 * 16 + 13
    lengths = Counter(str(value.shape[1]) for value in of_halves if value.shape)
    assert lengths == {"sequence_length": len(of_halves) - 3, "logits_length": 3}  # the head's are as many as are kept
    assert all(value.shape is not None and isinstance(value.shape[2], int) for value in of_halves)


def test_a_tied_table_is_one_initializer(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama-mha")
    graph = graph_of(tmp_path / "model", tmp_path / "graph").graph
    (head,) = (node for node in graph if node.name == "lm_head/MatMul")
    (lookup,) = (node for node in graph if node.name == "model.embed_tokens")
    assert head.inputs[1] is lookup.inputs[0] is graph.initializers["model.embed_tokens.weight"]


def run(folder: Path, x: np.ndarray, make: Callable[[GraphWriter, ir.Value], ir.Value], weights: Any = None) -> Any:
    """What a piece of graph gives for an input."""
    rounded = RoundedWeights(weights, DYNAMIC)
    with ExternalData(folder / "piece_data") as data:
        writer = GraphWriter(rounded, data)
        made = make(writer, writer.input("x", ir.DataType.from_numpy(x.dtype), x.shape))
        made.dtype = ir.DataType.FLOAT
        writer.graph.outputs.append(made)
    ir.save(ir.Model(writer.graph, ir_version=10), folder / "piece.onnx")
    session = onnxruntime.InferenceSession(str(folder / "piece.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_looked_up_rows_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", "llama-mha")
    ids = np.array([[5, 0, 96], [7, 7, 2]])
    weights = Weights(tmp_path / "model")
    found = run(tmp_path, ids, lambda writer, x: writer.lookup(x, "model.embed_tokens")[0], weights)
    expected = quantize(model.get_input_embeddings().weight.detach(), DYNAMIC).dequantized(48)[ids]
    assert torch.equal(torch.from_numpy(found), expected)


def test_a_token_of_large_values_leaves_the_others_their_numbers(tmp_path: Path) -> None:
    """Without its own size for each token, the second would be rounded to zeros."""
    rows = quantize(weight(6, 16), DYNAMIC)
    x = np.stack([np.full(16, 1e6), np.linspace(-1e-3, 1e-3, 16), np.zeros(16)])[None].astype(np.float32)

    def product(writer: GraphWriter, x: ir.Value) -> ir.Value:
        return writer._integer_product(x, writer._rows("m", rows), "m")

    found, exact = run(tmp_path, x, product)[0], x[0] @ rows.dequantized(16).numpy().T
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-4, atol=100)
    np.testing.assert_allclose(found[1], exact[1], rtol=1e-4, atol=1e-7)
    assert (found[2] == 0).all()


def test_parameters_and_sizes_are_counted(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama-mha")
    model, weights = graph_of(tmp_path / "model", tmp_path / "graph"), Weights(tmp_path / "model")
    check_graph(model, weights)
    assert rounded_weights(model.graph)["model.embed_tokens.weight"] == 97 * 48
    value = model.graph.initializers["model.layers.1.mlp.down_proj.weight"]
    stored = numbers(model.graph, value.name or "")
    value.const_value = ir.tensor(np.concatenate([stored, stored[:1]]))
    with pytest.raises(GateError, match=r"parameters, the checkpoint"):
        check_graph(model, weights)
    value.const_value = ir.tensor(stored.reshape(2, -1))
    with pytest.raises(GateError, match=r"down_proj\.weight has the shape .* no tensor of layer 1"):
        check_graph(model, weights)


RECORD = SparsityRecord("0.5", "magnitude", "mlp", "hardware", "none", {"m.down": "in"})


@pytest.mark.parametrize("is_whole", [True, False])
def test_zeros_are_counted_in_it(is_whole: bool) -> None:
    dense = weight(4, 8)
    dense[:, ::2] = 0
    if not is_whole:
        dense[1, :2] = 1
    found = quantize(dense, DYNAMIC)
    stored = np.ascontiguousarray(found.data.flatten(1).numpy().T)
    constants = [
        numpy_helper.from_array(stored, "m.down.weight"),
        numpy_helper.from_array(np.array(128, np.uint8), "middle"),
        numpy_helper.from_array(found.scales[:, 0].numpy(), "scales"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
    ]
    graph = one_product(["x", "m.down.weight", "one", "scales", "middle", "middle"], constants)
    assert check_zeros(ir.from_proto(graph).graph, RECORD, {"m.down": 4}).nonzeros == 16 + (not is_whole)


# --- bundles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("dynamic")
    pruned(folder / "model", "llama-mha")
    export(folder / "model", folder / "bundle", precisions=(DYNAMIC,))
    return open_bundle(folder / "bundle", verify=True)


def test_a_bundle_is_named_as_transformers_js_looks_for_it(bundle: Bundle) -> None:
    assert (bundle.variant.graph, bundle.variant_name) == ("onnx/model_int8.onnx", NAME)
    assert graph_file(NAME) == bundle.variant.graph
    assert transformers_js_dtype(NAME) == "int8"
    assert bundle.variant.data == ("onnx/model_int8.onnx_data",)
    assert not list(bundle.folder.rglob(TWIN_FILE))


def test_a_bundle_is_nearly_exact_and_a_device_can_check_it(bundle: Bundle) -> None:
    """Two halves of 8 bits leave less than single precision's own gate allows on so small a model."""
    error = bundle.variant.parity["max_abs_error"]
    assert isinstance(error, float)
    assert error < FLOAT_TOLERANCES[0]
    assert validate(bundle, threads=1).passed


def test_a_token_does_not_feel_what_else_is_in_the_batch(bundle: Bundle) -> None:
    decoder = Decoder(bundle, threads=1)
    row = np.array([[5, 9, 60, 11, 2, 33]])
    alone, _ = decoder.forward(row)
    together, _ = decoder.forward(np.concatenate([row[:, ::-1], row, row + 20]))
    np.testing.assert_allclose(together[1], alone[0], atol=1e-3)
    cached = decoder.forward(row[:, 3:], cache=decoder.forward(row[:, :3])[1])[0]
    np.testing.assert_allclose(cached[0], alone[0, 3:], atol=1e-3)


@pytest.mark.parametrize("max_memory_bytes", [None, 1], ids=["whole", "by blocks"])
def test_weights_that_differ_a_little_from_those_of_torch_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_memory_bytes: int | None
) -> None:
    pruned(tmp_path / "model", "llama")
    write_to = Quantised.write_to

    def damaged(rounded: Quantised, dense: torch.Tensor) -> None:
        write_to(rounded, dense)
        dense *= 1.002

    monkeypatch.setattr(Quantised, "write_to", damaged)
    with pytest.raises(GateError, match=f"parity of {TWIN_FILE} failed"):
        export(tmp_path / "model", tmp_path / "bundle", precisions=(DYNAMIC,), max_memory_bytes=max_memory_bytes)


def test_inputs_that_are_rounded_wrongly_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin does not round them, so that it is the graph itself that must be found wrong."""
    pruned(tmp_path / "model", "llama")
    op = GraphWriter.op

    def without_fine_half(self: GraphWriter, kind: str, inputs: Any, name: str, *rest: Any, **others: Any) -> ir.Value:
        if name.endswith("rounded/fine"):
            inputs = [inputs[0], self.scalar("nothing", 0.0)]
        return op(self, kind, inputs, name, *rest, **others)

    monkeypatch.setattr(GraphWriter, "op", without_fine_half)
    with pytest.raises(GateError, match=r"parity of model_int8\.onnx failed"):
        export(tmp_path / "model", tmp_path / "bundle", precisions=(DYNAMIC,))


def test_a_hidden_size_that_no_block_divides_is_no_obstacle(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", hidden_size=42, head_dim=8)
    manifest = export(tmp_path / "model", tmp_path / "bundle", precisions=(DYNAMIC,))
    assert list(manifest.variants) == [NAME]


def test_browsers_without_a_gpu_get_it() -> None:
    (precision,) = choose("wasm", "llama").precisions
    assert precision == PRECISIONS[NAME]
