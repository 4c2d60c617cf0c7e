"""The declarative graph computes what torch computes, in every way it is used, whatever the widths."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import toys
from exported import SAMPLE, decoder_graph, pruned
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edgeprune.checkpoint import load_pruned
from edgeprune.configs import architecture
from edgeprune_export import interface
from edgeprune_export.external_data import (
    CACHE_LINE_BYTES,
    GRANULARITY_BYTES,
    LARGE_TENSOR_BYTES,
    MAPPED_TENSOR_BYTES,
    PAGE_BYTES,
    ExternalData,
)
from edgeprune_export.graph_check import attention_nodes, check_graph
from edgeprune_export.parity import check_parity
from edgeprune_export.weights import Weights
from edgeprune_runtime.errors import EdgepruneError, GateError

TOLERANCE = 1e-4
LONG_CONTEXT_TOKENS = 70_000
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    # These two change their frequencies with the length of a text, but only beyond what the graph takes.
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "long_factor": [2.0 + index for index in range(8)],
        "original_max_position_embeddings": 64,
    },
}
NAMES = [name for name in toys.NAMES if architecture(name.split("-")[0]).SOURCE == "decoder"]
# The operator rotates stretches whose size is a multiple of 16; others are rotated before it.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {} if name == "phi3-longrope" else {"head_dim": 16}) for name in NAMES),
    ("llama", {"head_dim": 8}),
    ("qwen3", {"head_dim": 8}),
    ("gemma3_text", {"head_dim": 256}),
    ("phi3", {"head_dim": 32, "partial_rotary_factor": 0.5}),
    ("phi3", {"head_dim": 16, "partial_rotary_factor": 0.75, "sliding_window": 7}),
    ("gemma2", {"head_dim": 16, "attention_bias": True}),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_graph_equals_torch(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", name, **changes)
    graph = decoder_graph(tmp_path / "model", tmp_path)
    check_graph(ir.load(graph), Weights(tmp_path / "model"))
    result = check_parity(model, graph, SAMPLE, tolerance=TOLERANCE, threads=1)
    assert result.argmax_agreement == 1.0
    assert {"batch padded left", "batch padded right", "batch padded mixed", "decode padded mixed"} <= set(
        result.checks
    )


@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_scaling_equals_torch_as_far_as_the_context_goes(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    model = pruned(tmp_path / "model", "llama", head_dim=16, rope_parameters=rope)
    check_parity(model, decoder_graph(tmp_path / "model", tmp_path), SAMPLE, tolerance=TOLERANCE, threads=1)


def rotary_tables(graph: Path, tmp_path: Path) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """The tables that ONNX Runtime computes from a graph when it opens a session, by the name of the value."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    optimised = ir.load(options.optimized_model_filepath).graph
    computed = {"Range", "Cos", "Sin"} & {node.op_type for node in optimised}
    assert not computed, f"{computed} would be computed at every step"
    tables = {name: value.const_value for name, value in optimised.initializers.items() if name.startswith("rotary")}
    return {name: table.numpy() for name, table in tables.items() if table is not None and table.shape.rank() == 2}


@pytest.mark.parametrize("kind", ["default", *ROPES])
def test_rotary_tables_are_computed_when_a_session_opens_and_stored_nowhere(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES.get(kind, {})}
    model = toys.toy("llama", head_dim=16, rope_parameters=rope, max_position_embeddings=LONG_CONTEXT_TOKENS)
    model.save_pretrained(tmp_path / "model")
    graph = decoder_graph(tmp_path / "model", tmp_path)
    assert graph.stat().st_size + graph.with_name("model.onnx_data").stat().st_size < 4 * LONG_CONTEXT_TOKENS * 8
    tokens = 64 if kind == "longrope" else LONG_CONTEXT_TOKENS
    expected = model.base_model.rotary_emb(torch.zeros(1), torch.arange(tokens)[None])
    tables = rotary_tables(graph, tmp_path)
    assert len(tables) == 2
    for (name, table), of_torch in zip(sorted(tables.items()), expected, strict=True):
        assert table.shape == (tokens, 8)
        np.testing.assert_allclose(table, of_torch[0, :, :8].numpy(), rtol=0, atol=5e-7, err_msg=name)


def test_every_kind_of_layer_has_rotary_tables_of_its_own(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", "gemma3_text", head_dim=16)
    tables = rotary_tables(decoder_graph(tmp_path / "model", tmp_path), tmp_path)
    assert len(tables) == 4
    positions = torch.arange(len(next(iter(tables.values()))))[None]
    for kind in set(model.config.layer_types):
        expected = model.base_model.rotary_emb(torch.zeros(1), positions, kind)
        for function, of_torch in zip(("Cos", "Sin"), expected, strict=True):
            (found,) = (table for name, table in tables.items() if f".{kind}/" in name and function in name)
            np.testing.assert_allclose(found, of_torch[0, :, :8].numpy(), rtol=0, atol=5e-7)


def test_rotary_module_of_another_formula_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys.toy("llama", head_dim=16).save_pretrained(tmp_path / "model")
    forward = LlamaRotaryEmbedding.forward
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", lambda self, x, ids: forward(self, x, 2 * ids))
    with pytest.raises(EdgepruneError, match=r"LlamaRotaryEmbedding makes other cosines .*--graph-source traced"):
        decoder_graph(tmp_path / "model", tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ],
)
def test_sliding_windows_count_tokens_not_padding(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", name, head_dim=16, **changes)
    check_parity(model, decoder_graph(tmp_path / "model", tmp_path), SAMPLE, tolerance=TOLERANCE, threads=1)


def test_dense_checkpoint_equals_torch(tmp_path: Path) -> None:
    model = toys.toy("qwen3", head_dim=16)
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    check_parity(model, decoder_graph(tmp_path / "model", tmp_path), SAMPLE, tolerance=TOLERANCE, threads=1)


def test_half_precision_weights_are_widened_exactly(tmp_path: Path) -> None:
    toys.toy("llama", head_dim=16).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    graph = decoder_graph(tmp_path / "model", tmp_path)
    check_parity(load_pruned(tmp_path / "model"), graph, SAMPLE, tolerance=TOLERANCE, threads=1)


def test_unknown_activation_is_refused(tmp_path: Path) -> None:
    toys.toy("llama", hidden_act="relu").save_pretrained(tmp_path / "model")
    with pytest.raises(EdgepruneError, match=r"'relu'.*traced"):
        decoder_graph(tmp_path / "model", tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    toys.toy("llama").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 4] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EdgepruneError, match=name):
        decoder_graph(tmp_path / "model", tmp_path)


def test_no_size_of_the_dense_model_is_left(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama-bias", head_dim=16)
    graph = ir.load(decoder_graph(tmp_path / "model", tmp_path)).graph
    widths = Weights(tmp_path / "model").layer_widths()
    assert len(set(widths)) == 3
    dims = {size for value in graph.initializers.values() for size in value.shape.numpy()}
    assert toys.COMMON["intermediate_size"] not in dims | {width.channels for width in widths}
    attention = attention_nodes(graph)
    assert [node.attributes["num_heads"].as_int() for node in attention] == [width.heads for width in widths]
    assert [node.attributes["kv_num_heads"].as_int() for node in attention] == [width.kv_heads for width in widths]
    shapes = {value.name: value.shape for value in graph.inputs}
    for layer, width in enumerate(widths):
        assert shapes[interface.past_name(layer, "value")] == ir.Shape(
            ("batch_size", width.kv_heads, "past_sequence_length", width.head_dim)
        )


def test_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama-mha")
    weights = Weights(tmp_path / "model")
    assert weights.config.tie_word_embeddings
    graph = ir.load(decoder_graph(tmp_path / "model", tmp_path)).graph
    parameters, _ = weights.count_parameters()
    stored = [value.const_value for value in graph.initializers.values()]
    tensors = [tensor for tensor in stored if isinstance(tensor, ir.ExternalTensor)]
    assert sum(tensor.nbytes for tensor in tensors) == 4 * parameters


def test_weights_lie_in_one_file_beside_the_graph_on_page_boundaries(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "qwen2")
    graph = ir.load(decoder_graph(tmp_path / "model", tmp_path)).graph
    stored = [value.const_value for value in graph.initializers.values()]
    tensors = [tensor for tensor in stored if isinstance(tensor, ir.ExternalTensor)]
    assert {str(tensor.location) for tensor in tensors} == {"model.onnx_data"}
    alignments = {
        tensor.name: PAGE_BYTES if tensor.nbytes >= MAPPED_TENSOR_BYTES else CACHE_LINE_BYTES for tensor in tensors
    }
    assert all(tensor.offset % alignments[tensor.name] == 0 for tensor in tensors if tensor.offset is not None)
    assert sum(tensor.nbytes for tensor in stored if tensor is not None and tensor not in tensors) < 4096


def test_large_tensors_are_aligned_for_mapping(tmp_path: Path) -> None:
    large = np.arange(LARGE_TENSOR_BYTES // 4, dtype=np.float32)
    with ExternalData(tmp_path / "data") as data:
        data.add("small", np.ones(3, np.float32))
        tensor = data.add("large", large)
    assert tensor.offset == GRANULARITY_BYTES
    assert np.array_equal(tensor.numpy(), large)
    assert data.size_bytes == (tmp_path / "data").stat().st_size


def test_graph_that_lost_a_parameter_is_refused(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama-bias")
    model = ir.load(decoder_graph(tmp_path / "model", tmp_path))
    weights = Weights(tmp_path / "model")
    check_graph(model, weights)
    del model.graph.initializers["model.layers.1.mlp.up_proj.bias"]
    with pytest.raises(GateError, match="parameters"):
        check_graph(model, weights)


def test_layer_with_the_size_of_another_layer_is_refused(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama")
    model = ir.load(decoder_graph(tmp_path / "model", tmp_path))
    # The sum of parameters is as it was, and every size is one that the checkpoint knows.
    first, second = (model.graph.initializers[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert first.shape != second.shape
    first.const_value, second.const_value = second.const_value, first.const_value
    with pytest.raises(GateError, match=r"no tensor of layer \d of the checkpoint"):
        check_graph(model, Weights(tmp_path / "model"))


def test_layer_without_one_attention_operator_is_refused(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama")
    model = ir.load(decoder_graph(tmp_path / "model", tmp_path))
    attention_nodes(model.graph)[1].op_type = "SomethingElse"
    with pytest.raises(GateError, match="2 attention operators for 3 layers"):
        check_graph(model, Weights(tmp_path / "model"))
