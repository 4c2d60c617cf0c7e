"""The zeros of a checkpoint are counted in its graph, in float and as ONNX Runtime's own quantisers leave them."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from cuts import groups_of, random_keep
from exported import Record, letter_tokenizer, record_of
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from safetensors.torch import load_file, save_file
from toys import per_layer_lists, toy

from edgeprune import checkpoint
from edgeprune.calibration import Calibration
from edgeprune.checkpoint import SavedCheckpoint, load_pruned
from edgeprune.groups import layer_widths
from edgeprune.patterns import Found, Pattern
from edgeprune.plan import PrunePlan, SparsityRecord
from edgeprune.pruning import keep_all
from edgeprune.shrink import linear_of, shrink, weight_of
from edgeprune.sparsify import Sparsity, sparsify
from edgeprune_export import exporting, sparsity_check, traced
from edgeprune_export.exporting import export
from edgeprune_export.external_data import ExternalData
from edgeprune_export.sparsity_check import check_zeros, found_zeros
from edgeprune_runtime.bundle import MANIFEST_FILE, open_bundle
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.validate import validate

GRAPH = "onnx/model.onnx"
ALL = Sparsity("2:4", "wanda", "all", "hardware", "none")
PAPER = Sparsity("2:4", "dass", "mlp", "paper", "none")


def calibration() -> Calibration:
    return Calibration(torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(1)), "test", 0, "")


def sparse_checkpoint(
    folder: Path, name: str, sparsity: Sparsity, layers: int = 2, **changes: Any
) -> tuple[Any, SavedCheckpoint]:
    """A toy with zeros, saved; and the model."""
    model = toy(name, num_hidden_layers=layers, **per_layer_lists(name, layers) | changes)
    sparsify(model, sparsity, calibration())
    plan = replace(keep_all(model, "toy", calibration()), sparsity=sparsity.record(groups_of(model)))
    return model, checkpoint.save(model, letter_tokenizer(), plan, layer_widths(groups_of(model), {}), folder)


def reads(graph: ir.Graph, record: Record, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Where `check_zeros` takes the weights `(out, in)` of each Linear to differ from zero."""
    found: dict[str, torch.Tensor] = {}

    def note(record: SparsityRecord, read: Any, where: str) -> Found:
        found.update({name: read(name) for name in record.sides})
        return Found(0, 0, 0, 0)

    with monkeypatch.context() as patch:
        patch.setattr(sparsity_check, "check_pattern", note)
        check_zeros(graph, *record)
    return found


def holds_the_zeros_of(model: Any, saved: SavedCheckpoint, bundle: Path, sparsity: Sparsity, source: str) -> None:
    manifest = export(saved.folder, bundle, graph_source=source)
    opened = open_bundle(bundle, verify=True)
    assert opened.variant.graph_source == source
    assert manifest.results["zeros"] == asdict(saved.zeros)
    assert opened.is_sparse
    assert found_zeros(opened.manifest) == saved.zeros
    assert check_zeros(ir.load(opened.graph_path).graph, *record_of(model, sparsity)) == saved.zeros


# --- float graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [("llama", ALL), ("llama-bias", ALL), ("gemma3_text", ALL), ("phi3", ALL), ("qwen3", ALL), ("llama", PAPER),
     ("phi3", PAPER), ("llama-mha", replace(ALL, pattern="5:16")), ("llama", replace(ALL, pattern="0.5"))],
)  # fmt: skip
def test_declarative_graph_has_the_zeros_of_the_checkpoint(
    name: str, sparsity: Sparsity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saved = sparse_checkpoint(tmp_path / "model", name, sparsity, layers=1)
    holds_the_zeros_of(model, saved, tmp_path / "bundle", sparsity, "decoder")
    graph = ir.load(tmp_path / "bundle" / GRAPH).graph
    for linear, nonzero in reads(graph, record_of(model, sparsity), monkeypatch).items():
        assert torch.equal(nonzero, weight_of(linear_of(model, linear)) != 0)


def test_traced_graph_of_transposed_weights_and_biases_has_the_zeros_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saved = sparse_checkpoint(tmp_path / "model", "gpt2", ALL, layers=1)
    with ExternalData(tmp_path / "model.onnx_data") as data:
        traced_model = traced.build(load_pruned(saved.folder), layer_widths(groups_of(model), {}), data)
    assert "Gemm" in {node.op_type for node in traced_model.graph}
    record = record_of(model, ALL)
    assert check_zeros(traced_model.graph, *record) == saved.zeros
    for linear, nonzero in reads(traced_model.graph, record, monkeypatch).items():
        assert torch.equal(nonzero, weight_of(linear_of(model, linear)) != 0)
    ir.save(traced_model, tmp_path / "model.onnx")
    quantised = dynamic(tmp_path / "model.onnx", tmp_path, per_channel=True)
    assert "MatMulInteger" in {node.op_type for node in quantised.graph.node}
    assert check_zeros(ir.from_proto(quantised).graph, *record).broken == 0


# That its zeros are found in the graph of every type is asked of all traced graphs, in test_traced.py.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "sparsity"), [("gpt2", ALL), ("phi3", PAPER)])
def test_traced_graph_has_the_zeros_of_the_checkpoint(name: str, sparsity: Sparsity, tmp_path: Path) -> None:
    model, saved = sparse_checkpoint(tmp_path / "model", name, sparsity, layers=1)
    holds_the_zeros_of(model, saved, tmp_path / "bundle", sparsity, "traced")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SavedCheckpoint, Path]:
    """A sparse model with biases, its checkpoint and its bundle. Read only."""
    folder = tmp_path_factory.mktemp("sparse")
    model, saved = sparse_checkpoint(folder / "model", "llama-bias", ALL)
    export(saved.folder, folder / "bundle")
    return model, saved, folder / "bundle"


@pytest.fixture
def graph(sparse: tuple[Any, SavedCheckpoint, Path]) -> ir.Graph:
    """Its graph, to be damaged."""
    return ir.load(sparse[2] / GRAPH).graph


@pytest.fixture(scope="module")
def record(sparse: tuple[Any, SavedCheckpoint, Path]) -> Record:
    return record_of(sparse[0], ALL)


def test_sparse_bundle_runs_as_any_other(sparse: tuple[Any, SavedCheckpoint, Path]) -> None:
    validate(open_bundle(sparse[2], verify=True), threads=1).ensure_passed()


def test_dense_bundle_has_no_zeros_to_tell_of(tmp_path: Path) -> None:
    model = toy("llama", num_hidden_layers=1)
    checkpoint.save(model, letter_tokenizer(), None, layer_widths(groups_of(model), {}), tmp_path / "model")
    manifest = export(tmp_path / "model", tmp_path / "bundle")
    assert "zeros" not in manifest.results
    assert not open_bundle(tmp_path / "bundle").is_sparse
    assert found_zeros(open_bundle(tmp_path / "bundle").manifest) is None


@pytest.mark.parametrize("damage", [7, {"weights": 1}, {"weights": -1, "nonzeros": 0, "allowed": 0, "broken": 0}])
def test_counts_that_a_stranger_wrote_are_checked(sparse: tuple[Any, SavedCheckpoint, Path], damage: Any) -> None:
    bundle = open_bundle(sparse[2])
    damaged = replace(bundle, manifest=replace(bundle.manifest, results={"zeros": damage}))
    with pytest.raises(EdgepruneError, match="zeros"):
        found_zeros(damaged.manifest)


def changed(graph: ir.Graph, weight: str, row: int, column: int) -> None:
    """Set one stored weight, which lies as `(in, out)`, to something other than zero."""
    value = graph.initializers[weight]
    array = value.const_value.numpy().copy()
    assert array[column, row] == 0
    array[column, row] = -1e-30
    value.const_value = ir.tensor(array, name=weight)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_weight_that_is_not_zero_is_found_in_a_product_of_several_linears(
    sparse: tuple[Any, SavedCheckpoint, Path], graph: ir.Graph, record: Record, part: str
) -> None:
    outputs = record[1]
    attention = "model.layers.1.self_attn"
    begin = sum(outputs[f"{attention}.{each}_proj"] for each in "qkv"[: "qkv".index(part[0])])
    for row in (0, outputs[f"{attention}.{part}"] - 1):
        weight = weight_of(linear_of(sparse[0], f"{attention}.{part}"))
        column = int((weight[row] == 0).nonzero()[-1])
        changed(graph, f"{attention}.qkv_proj.weight", begin + row, column)
        with pytest.raises(GateError, match=rf"the graph: {attention}.{part} breaks the pattern 2:4 in 1 places"):
            check_zeros(graph, *record)
        changed_back(graph, f"{attention}.qkv_proj.weight", begin + row, column)
    assert check_zeros(graph, *record).broken == 0


def changed_back(graph: ir.Graph, weight: str, row: int, column: int) -> None:
    value = graph.initializers[weight]
    array = value.const_value.numpy().copy()
    array[column, row] = 0
    value.const_value = ir.tensor(array, name=weight)


@pytest.mark.parametrize("linear", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj"])
def test_weight_that_is_not_zero_is_found(
    sparse: tuple[Any, SavedCheckpoint, Path], graph: ir.Graph, record: Record, linear: str
) -> None:
    row, column = (weight_of(linear_of(sparse[0], linear)) == 0).nonzero()[100].tolist()
    changed(graph, f"{linear}.weight", row, column)
    with pytest.raises(GateError, match=rf"the graph: {linear} breaks the pattern 2:4 in 1 places"):
        check_zeros(graph, *record)


@pytest.mark.parametrize("linear", ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_linear_that_the_graph_does_not_multiply_by_is_missed(graph: ir.Graph, record: Record, linear: str) -> None:
    stored = linear.replace("k_proj", "qkv_proj")
    (node,) = [node for node in graph if node.name == f"model.layers.1.{stored}/MatMul"]
    node.op_type = "Add"
    with pytest.raises(GateError, match=rf"no product with the weight of model.layers.1.{linear}; its zeros cannot"):
        check_zeros(graph, *record)


def broken_checkpoint(sparse: tuple[Any, SavedCheckpoint, Path], folder: Path) -> Path:
    """A copy of the checkpoint whose plan promises zeros that its weights no longer have."""
    folder.mkdir()
    for file in sparse[1].folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    weight[tuple((weight == 0).nonzero()[3].tolist())] = 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_checkpoint_that_breaks_its_plan_is_not_exported(
    sparse: tuple[Any, SavedCheckpoint, Path], tmp_path: Path
) -> None:
    broken = broken_checkpoint(sparse, tmp_path / "model")
    with pytest.raises(GateError, match=r"model\.layers\.1\.mlp\.down_proj breaks the pattern 2:4 in 1 places"):
        export(broken, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export(sparse[1].folder, tmp_path / "bundle")
    before = (tmp_path / "bundle" / MANIFEST_FILE).read_bytes()
    with pytest.raises(GateError):
        export(broken, tmp_path / "bundle", force=True)
    assert (tmp_path / "bundle" / MANIFEST_FILE).read_bytes() == before


def test_graph_that_loses_zeros_on_the_way_is_not_written(
    sparse: tuple[Any, SavedCheckpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = exporting.decoder.build

    def careless(*arguments: Any, **named: Any) -> ir.Model:
        model = build(*arguments, **named)
        array = model.graph.initializers["model.layers.0.mlp.up_proj.weight"].const_value.numpy() + np.float32(1e-9)
        model.graph.initializers["model.layers.0.mlp.up_proj.weight"].const_value = ir.tensor(array)
        return model

    monkeypatch.setattr(exporting.decoder, "build", careless)
    with pytest.raises(GateError, match=r"the graph: model\.layers\.0\.mlp\.up_proj breaks the pattern"):
        export(sparse[1].folder, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_cut_model_gets_its_zeros_into_the_graph_as_well(tmp_path: Path) -> None:
    """Other widths in every layer; the counts are those of the widths that are left."""
    model = toy("llama-bias", head_dim=16)
    groups = groups_of(model)
    keep = random_keep(groups, 3)
    plan = keep_all(model, "toy", calibration())
    record = ALL.record(groups)
    shrink(model, groups, keep)
    sparsify(model, ALL, calibration())
    plan = PrunePlan(**{**vars(plan), "keep": {name: tuple(units) for name, units in keep.items()}, "sparsity": record})
    saved = checkpoint.save(model, letter_tokenizer(), plan, layer_widths(groups, keep), tmp_path / "model")
    assert saved.form == "per-layer"
    assert saved.zeros.weights == sum(weight_of(linear_of(model, name)).numel() for name in record.sides)
    holds_the_zeros_of(model, saved, tmp_path / "bundle", ALL, "decoder")


# --- graphs that were quantised ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet_quantisers() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def nbits(path: Path, _: Path, **settings: Any) -> onnx.ModelProto:
    quantiser = MatMulNBitsQuantizer(onnx.load(path), block_size=32, **settings)
    quantiser.process()
    return quantiser.model.model


def dynamic(path: Path, folder: Path, **settings: Any) -> onnx.ModelProto:
    # operators of other domains have no shapes to infer types from
    quantize_dynamic(path, folder / "dynamic.onnx", extra_options={"DefaultTensorType": TensorProto.FLOAT}, **settings)
    return onnx.load(folder / "dynamic.onnx")


QUANTISERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "2 bits": (nbits, "MatMulNBits", {"bits": 2, "is_symmetric": True}),
    "2 bits, zero points": (nbits, "MatMulNBits", {"bits": 2, "is_symmetric": False}),
    "4 bits": (nbits, "MatMulNBits", {"bits": 4, "is_symmetric": True}),
    "4 bits, zero points": (nbits, "MatMulNBits", {"bits": 4, "is_symmetric": False}),
    "8 bits": (nbits, "MatMulNBits", {"bits": 8, "is_symmetric": True}),
    "8 bits, zero points": (nbits, "MatMulNBits", {"bits": 8, "is_symmetric": False}),
    "QDQ": (nbits, "DequantizeLinear", {"bits": 4, "is_symmetric": True, "quant_format": QuantFormat.QDQ}),
    "QDQ, zero points": (
        nbits, "DequantizeLinear", {"bits": 4, "is_symmetric": False, "quant_format": QuantFormat.QDQ}
    ),
    "QDQ of channels": (
        nbits,
        "Transpose",
        {"bits": 4, "is_symmetric": True, "quant_format": QuantFormat.QDQ, "channel_wised_quantize": True},
    ),
    "QDQ of channels, zero points": (
        nbits,
        "DequantizeLinear",
        {"bits": 4, "is_symmetric": False, "quant_format": QuantFormat.QDQ, "channel_wised_quantize": True},
    ),
    "dynamic int8": (dynamic, "MatMulInteger", {"weight_type": QuantType.QInt8}),
    "dynamic uint8": (dynamic, "MatMulInteger", {"weight_type": QuantType.QUInt8}),
    "dynamic int8 of channels": (dynamic, "MatMulInteger", {"weight_type": QuantType.QInt8, "per_channel": True}),
    "dynamic uint8 of channels": (dynamic, "MatMulInteger", {"weight_type": QuantType.QUInt8, "per_channel": True}),
}  # fmt: skip


class Product:
    """A product of a quantised graph with the weight of a Linear, read by other means than those under test."""

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        self._model = model
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        makers = {output: node for node in model.graph.node for output in node.output}
        (self.node,) = (node for node in model.graph.node if self._multiplies_by(node, f"{name}.weight", makers))
        self.chain = []
        value = self.node.input[1]
        while value in makers:
            self.chain.insert(0, makers[value])
            value = makers[value].input[0]
        self.stored = self._constants[value]

    @staticmethod
    def _multiplies_by(node: onnx.NodeProto, weight: str, makers: dict[str, onnx.NodeProto]) -> bool:
        if not node.op_type.startswith("MatMul"):
            return False
        value = node.input[1]
        while value in makers and makers[value].op_type in ("DequantizeLinear", "Transpose"):
            value = makers[value].input[0]
        return value.startswith(weight)

    def _constant(self, node: onnx.NodeProto, place: int) -> np.ndarray | None:
        if place >= len(node.input) or not node.input[place]:
            return None
        return numpy_helper.to_array(self._constants[node.input[place]])

    def by_numpy(self) -> np.ndarray:
        """The weight `(out, in)`, unpacked as the operators' specifications say."""
        if self.node.op_type == "MatMulNBits":
            return self._of_bits()
        if self.node.op_type == "MatMulInteger":
            zero_point = self._constant(self.node, 3)
            return (numpy_helper.to_array(self.stored).astype(float) - (0 if zero_point is None else zero_point)).T
        weight = numpy_helper.to_array(self.stored).astype(float)
        for node in self.chain:
            if node.op_type == "Transpose":
                weight = weight.T
                continue
            settings = {attribute.name: attribute.i for attribute in node.attribute}
            scale, zero_point = (self._constant(node, place) for place in (1, 2))
            for place in np.ndindex(*weight.shape):
                of_block = list(place)
                of_block[settings["axis"]] //= settings["block_size"]
                middle = 0.0 if zero_point is None else float(zero_point[tuple(of_block)])
                weight[place] = (weight[place] - middle) * float(scale[tuple(of_block)])
        return weight.T

    def _of_bits(self) -> np.ndarray:
        inputs, outputs, bits, block = (
            helper.get_node_attr_value(self.node, name) for name in ("K", "N", "bits", "block_size")
        )
        stored, scale = numpy_helper.to_array(self.stored), self._constant(self.node, 2).reshape(outputs, -1)
        zero_point = self._constant(self.node, 3)
        if zero_point is not None:
            zero_point = zero_point.reshape(outputs, -1)
        each, weight = 8 // bits, np.zeros((outputs, inputs))
        for row, column in np.ndindex(outputs, inputs):
            number, inside = divmod(column, block)
            value = stored[row, number, inside // each] >> (inside % each * bits) & ((1 << bits) - 1)
            middle = 1 << (bits - 1)
            if zero_point is not None:
                middle = zero_point[row, number // each] >> (number % each * bits) & ((1 << bits) - 1)
            weight[row, column] = (int(value) - int(middle)) * scale[row, number]
        return weight

    def by_the_runtime(self) -> np.ndarray:
        """The weight `(out, in)`, as what ONNX Runtime makes of the unit matrix."""
        inputs = len(self.by_numpy().T)
        is_integer = self.node.op_type == "MatMulInteger"
        product = onnx.NodeProto()
        product.CopyFrom(self.node)
        product.input[0], product.output[0] = "x", "y"
        if is_integer:
            product.input[2] = ""
        kind, result = (TensorProto.UINT8, TensorProto.INT32) if is_integer else (TensorProto.FLOAT, TensorProto.FLOAT)
        names = {name for node in (*self.chain, product) for name in node.input}
        graph = helper.make_graph(
            [*self.chain, product],
            "product",
            [helper.make_tensor_value_info("x", kind, [None, inputs])],
            [helper.make_tensor_value_info("y", result, None)],
            [tensor for name, tensor in self._constants.items() if name in names],
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        unit = np.eye(inputs, dtype=np.uint8 if is_integer else np.float32)
        (found,) = session.run(None, {"x": unit})
        return found.T


@pytest.mark.parametrize("kind", QUANTISERS)
def test_zeros_stay_zeros_behind_a_quantiser(
    sparse: tuple[Any, SavedCheckpoint, Path], record: Record, kind: str, tmp_path: Path, monkeypatch: Any
) -> None:
    model, saved, bundle = sparse
    quantise, expected, settings = QUANTISERS[kind]
    quantised = quantise(bundle / GRAPH, tmp_path, **settings)
    graph = ir.from_proto(quantised).graph
    found = check_zeros(graph, *record)
    assert (found.weights, found.allowed, found.broken) == (saved.zeros.weights, saved.zeros.allowed, 0)
    assert 0.8 * found.allowed < found.nonzeros <= found.allowed
    where, total = reads(graph, record, monkeypatch), 0
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        product = Product(quantised, f"model.layers.1.{name}")
        assert expected in [node.op_type for node in (*product.chain, product.node)]
        weight = product.by_numpy()
        np.testing.assert_allclose(product.by_the_runtime(), weight, rtol=1e-5, atol=1e-6)
        parts = [name.replace("qkv", part) for part in ("qkv" if "qkv" in name else "-")]
        nonzero = torch.cat([where[f"model.layers.1.{part}"] for part in parts])
        assert np.array_equal(nonzero.numpy(), weight != 0)
        dense = torch.cat([weight_of(linear_of(model, f"model.layers.1.{part}")) for part in parts])
        assert not (nonzero & (dense == 0)).any()
        total += int(nonzero.sum())
    assert total == sum(
        int(nonzero.sum()) for name, nonzero in where.items() if ".1." in name and "up_proj" not in name
    )


@pytest.mark.parametrize("kind", QUANTISERS)
@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "mlp.down_proj"])
def test_one_quantised_value_that_is_not_its_zero_point_is_found(
    sparse: tuple[Any, SavedCheckpoint, Path], record: Record, kind: str, name: str, tmp_path: Path
) -> None:
    quantise, _, settings = QUANTISERS[kind]
    quantised = quantise(sparse[2] / GRAPH, tmp_path, **settings)
    stored = Product(quantised, f"model.layers.0.{name}").stored
    before = stored.raw_data
    pattern = Pattern.parse("2:4")
    for place in range(len(before)):
        damaged = bytearray(before)
        damaged[place] ^= 1
        stored.raw_data = bytes(damaged)
        weight = torch.from_numpy(Product(quantised, f"model.layers.0.{name}").by_numpy())
        if pattern.find(weight).broken:
            break
    assert pattern.find(weight).broken == 1
    with pytest.raises(GateError, match=r"breaks the pattern 2:4 in 1 places"):
        check_zeros(ir.from_proto(quantised).graph, *record)
    stored.raw_data = before
    assert check_zeros(ir.from_proto(quantised).graph, *record).broken == 0


# --- other forms of a product -----------------------------------------------------------------------------------------

TINY = SparsityRecord("2:4", "wanda", "mlp", "hardware", "none", {"m.down": "in"})
KEPT = np.array([[0, 2, 0, -3, 5, 0, 7, 0], [1, 0, 0, 2, 0, 0, 0, 4], [9, 8, 0, 0, 0, 0, 1, 1]], np.float32)
ZERO_POINTS = np.array([3, -7, 11], np.int8)


def tiny(kind: str, weight: np.ndarray, between: list[onnx.NodeProto], *others: onnx.TensorProto, **has: int) -> Any:
    """A graph of one product with the stored weight `m.down.weight`."""
    read = between[-1].output[0] if between else "m.down.weight"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])]
    nodes = [*between, helper.make_node(kind, ["x", read], ["y"], **has)]
    stored = ir.serde.serialize_tensor(ir.tensor(weight, name="m.down.weight"))
    made = helper.make_graph(nodes, "tiny", inputs, outputs, [stored, *others])
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)])).graph


def of(operator: str, *inputs: str, **has: Any) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), [f"{inputs[0]}/{operator}"], **has)


def quantised_forms() -> dict[str, Any]:
    scales = numpy_helper.from_array(np.full(3, 0.25, np.float32), "s")
    points = numpy_helper.from_array(ZERO_POINTS, "z")
    one_scale, one_point = (
        numpy_helper.from_array(np.array(a), n) for a, n in ((np.float32(0.5), "s"), (np.int8(4), "z"))
    )
    shifted = (KEPT + ZERO_POINTS[:, None]).astype(np.int8)
    read = "m.down.weight"
    return {
        "float16": tiny("MatMul", KEPT.T.astype(np.float16), []),
        "bfloat16": tiny("MatMul", KEPT.T.astype(ir.DataType.BFLOAT16.numpy()), []),
        "rows and transB": tiny("Gemm", KEPT, [], transB=1),
        "columns": tiny("Gemm", KEPT.T, []),
        "behind an Identity": tiny("MatMul", KEPT.T, [of("Identity", read)]),
        "behind a Transpose": tiny("MatMul", KEPT, [of("Transpose", read, perm=[1, 0])]),
        "one zero point": tiny("MatMul", (KEPT.T + 4).astype(np.int8), [of("DequantizeLinear", read, "s", "z")],
                               one_scale, one_point),
        "no zero point": tiny("MatMul", KEPT.T.astype(np.int8), [of("DequantizeLinear", read, "s")], one_scale),
        "a zero point for each output": tiny(
            "MatMul", np.ascontiguousarray(shifted.T), [of("DequantizeLinear", read, "s", "z", axis=1)], scales, points
        ),
        "the same behind a Transpose": tiny(
            "MatMul", shifted,
            [of("DequantizeLinear", read, "s", "z", axis=0), of("Transpose", f"{read}/DequantizeLinear", perm=[1, 0])],
            scales, points,
        ),
        "the same of rows": tiny("Gemm", shifted, [of("DequantizeLinear", read, "s", "z", axis=-2)], scales, points,
                                 transB=1),
    }  # fmt: skip


@pytest.mark.parametrize("form", quantised_forms())
def test_product_of_another_form_is_read_as_well(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = TINY, {"m.down": 3}
    graph = quantised_forms()[form]
    assert check_zeros(graph, *record) == Found(24, 11, 12, 0)
    assert np.array_equal(reads(graph, record, monkeypatch)["m.down"].numpy(), KEPT != 0)
    value = graph.initializers["m.down.weight"]
    array = value.const_value.numpy().copy()
    dense = array + array.dtype.type(1)
    value.const_value = ir.tensor(dense, name="m.down.weight")
    with pytest.raises(GateError, match=r"m\.down breaks the pattern"):
        check_zeros(graph, *record)
