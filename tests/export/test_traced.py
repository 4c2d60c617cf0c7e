"""The traced graph computes what torch computes, with one attention operator for each layer, padding included."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import toys
from exported import SAMPLE, pruned, record_of

from edgeprune.checkpoint import load_pruned
from edgeprune.patterns import check_pattern
from edgeprune.shrink import linear_of, weight_of
from edgeprune.sparsify import Sparsity
from edgeprune_export import traced
from edgeprune_export.external_data import ExternalData
from edgeprune_export.graph_check import check_graph
from edgeprune_export.parity import check_parity
from edgeprune_export.sparsity_check import check_zeros
from edgeprune_export.weights import Weights

TOLERANCE = 1e-4
# Zeros change nothing of how a graph is traced, and show whether each Linear's weight is found in it again.
ZEROS = Sparsity("2:4", "magnitude", "all", "hardware", "none")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, toys.two_blocks(name)) for name in toys.TYPES if name != "gpt_neo"),  # which is by itself below
    # Blocks of unequal widths are cases of each type above; what its other toys differ in is within one block.
    *((name, toys.least_blocks(name)) for name in toys.NAMES if name not in toys.TYPES),
    ("qwen2", {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("phi3", {"num_hidden_layers": 1, "head_dim": 16, "partial_rotary_factor": 0.75, "sliding_window": 7}),
]


def traced_equals_torch(folder: Path, name: str, changes: dict[str, Any]) -> None:
    pruned(folder / "model", name, sparsity=ZEROS, **changes)
    model, weights = load_pruned(folder / "model"), Weights(folder / "model")
    before = model.config._attn_implementation
    with ExternalData(folder / "model.onnx_data") as data:
        graph = traced.build(model, weights.layer_widths(), data)
    check_graph(graph, weights)
    record, outputs = record_of(model, ZEROS)
    zeros = check_pattern(record, lambda name: weight_of(linear_of(model, name)), "the model")
    assert check_zeros(graph.graph, record, outputs) == zeros
    ir.save(graph, folder / "model.onnx")
    assert len(set(weights.layer_widths())) == model.config.num_hidden_layers
    # The same model, which tracing has left as it was.
    assert model.config._attn_implementation == before
    check_parity(model, folder / "model.onnx", SAMPLE, tolerance=TOLERANCE, threads=1)


def test_traced_graph_with_local_layers_of_its_own_equals_torch(tmp_path: Path) -> None:
    traced_equals_torch(tmp_path, "gpt_neo", toys.two_blocks("gpt_neo"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_traced_graph_of_every_type_equals_torch(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    traced_equals_torch(tmp_path, name, changes)
