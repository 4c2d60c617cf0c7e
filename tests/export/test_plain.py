"""The plain form of the traced graph: attention as products and a softmax, in operators that every runtime knows."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import toys
from exported import SAMPLE, pruned

from edgeprune.checkpoint import load_pruned
from edgeprune_export import traced
from edgeprune_export.external_data import ExternalData
from edgeprune_export.graph_check import attention_nodes, check_graph
from edgeprune_export.parity import check_parity
from edgeprune_export.routing import attend_plainly
from edgeprune_export.weights import Weights
from edgeprune_runtime.errors import GateError

TOLERANCE = 1e-4


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_each_head_attends_over_the_keys_of_its_own_kv_head(kv_heads: int, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 3, 8, generator=generator)
    key, value = torch.randn(2, 2, kv_heads, 7, 8, generator=generator)
    bias = torch.where(torch.rand(2, 1, 3, 7, generator=generator) < 0.7, 0.0, -1e9)
    found = attend_plainly(query, key, value, bias, scale=0.3, softcap=softcap)
    assert found.shape == (2, 3, 6, 8)
    for row in range(2):
        for head in range(6):
            kv_head = head // (6 // kv_heads)
            scores = 0.3 * query[row, head] @ key[row, kv_head].T
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            expected = torch.softmax(scores + bias[row, 0], dim=-1) @ value[row, kv_head]
            torch.testing.assert_close(found[row, :, head], expected)


def plain_equals_torch(folder: Path, name: str) -> None:
    pruned(folder / "model", name, **toys.least_blocks(name))
    model, weights = load_pruned(folder / "model"), Weights(folder / "model")
    with ExternalData(folder / "model.onnx_data") as data:
        graph = traced.build(model, weights.layer_widths(), data, is_plain=True)
    check_graph(graph, weights, is_plain=True)
    with pytest.raises(GateError, match="0 attention operators"):
        check_graph(graph, weights)
    assert graph.opset_imports == {"": traced.PLAIN_OPSET}
    assert not attention_nodes(graph.graph)
    ir.save(graph, folder / "model.onnx")
    check_parity(model, folder / "model.onnx", SAMPLE, tolerance=TOLERANCE, threads=1)


def test_plain_graph_with_soft_caps_and_local_layers_equals_torch(tmp_path: Path) -> None:
    plain_equals_torch(tmp_path, "gemma2")


# What the toys of one type differ in, but for windows, reaches the plain form as it reaches the other.
@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in toys.TYPES if name != "gemma2"), "mistral-window"])
def test_plain_graph_of_every_type_equals_torch(name: str, tmp_path: Path) -> None:
    plain_equals_torch(tmp_path, name)
