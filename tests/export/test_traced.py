"""The traced graph computes what torch and the declarative graph compute, padding included."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import toys
from exported import SAMPLE, pruned

from edgeprune.checkpoint import load_pruned
from edgeprune.configs import load_config
from edgeprune_export import traced
from edgeprune_export.external_data import ExternalData
from edgeprune_export.graph_check import check_graph
from edgeprune_export.parity import check_parity
from edgeprune_export.weights import Weights, layer_widths

TOLERANCE = 1e-4
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in toys.NAMES),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
]


def traced_equals_torch(folder: Path, name: str, changes: dict[str, Any]) -> None:
    pruned(folder / "model", name, **changes)
    model, config = load_pruned(folder / "model"), load_config(folder / "model")
    with Weights(folder / "model") as weights, ExternalData(folder / "model.onnx_data") as data:
        widths = layer_widths(config, weights)
        graph = traced.build(model, widths, data)
        check_graph(graph, config, weights, widths)
    ir.save(graph, folder / "model.onnx")
    assert len(set(widths)) > 1
    check_parity(model, folder / "model.onnx", SAMPLE, tolerance=TOLERANCE, threads=1)


def test_traced_graph_equals_torch(tmp_path: Path) -> None:
    traced_equals_torch(tmp_path, "llama-mha", {"num_hidden_layers": 2})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_traced_graph_of_every_type_equals_torch(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    traced_equals_torch(tmp_path, name, changes)
