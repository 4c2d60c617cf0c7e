"""Proof by shapes: a graph holds the checkpoint's parameters, each once, and no size of the model before the cut."""

import re
from collections import defaultdict
from math import prod

import onnx_ir as ir
from transformers import PreTrainedConfig

from edgeprune.groups import LayerWidths
from edgeprune_export import interface
from edgeprune_export.weights import Weights, count_parameters
from edgeprune_runtime.errors import GateError

_PARAMETER_ENDINGS = (".weight", ".bias")
_LAYER = re.compile(r"\bmodel\.layers\.([0-9]{1,9})\.")


def check_graph(model: ir.Model, config: PreTrainedConfig, weights: Weights, widths: list[LayerWidths]) -> None:
    """Hold a graph's initializers, attention operators and KV inputs against the checkpoint.

    Raises:
        GateError: naming the first size that the checkpoint does not have.
    """
    _check_parameters(model.graph, config, weights)
    _check_sizes(model.graph, config, weights, widths)
    _check_attention(model.graph, widths)
    _check_cache(model.graph, widths)


def _check_parameters(graph: ir.Graph, config: PreTrainedConfig, weights: Weights) -> None:
    found = sum(prod(_dims(value)) for name, value in graph.initializers.items() if name.endswith(_PARAMETER_ENDINGS))
    expected, _ = count_parameters(config, weights)
    if found != expected:
        raise GateError(f"the graph holds {found:,} parameters, the checkpoint {expected:,}; it must not be used")


def _check_sizes(graph: ir.Graph, config: PreTrainedConfig, weights: Weights, widths: list[LayerWidths]) -> None:
    own: defaultdict[int, set[int]] = defaultdict(set)
    for layer, width in enumerate(widths):
        own[layer] |= {(width.heads + 2 * width.kv_heads) * width.head_dim, width.head_dim, 1}
    shared = {1, config.max_position_embeddings}
    for name in weights.names:
        place = _layer(name)
        (shared if place is None else own[place]).update(weights.shape(name))
    # A tracer may give a constant that it folded out of a layer a name of its own.
    shared = shared.union(*own.values(), (width.head_dim // 2 for width in widths))
    for name, value in graph.initializers.items():
        place = _layer(name)
        # Small integers in the graph are sizes, axes and the like; their values are checked by running it.
        if value.dtype == ir.DataType.FLOAT and not set(_dims(value)) <= (shared if place is None else own[place]):
            where = "the checkpoint" if place is None else f"layer {place} of the checkpoint"
            raise GateError(f"the graph's {name} has the shape {_dims(value)}, which no tensor of {where} has")


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _check_attention(graph: ir.Graph, widths: list[LayerWidths]) -> None:
    attributes = [
        (node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int())
        for node in graph
        if node.op_type == "GroupQueryAttention"
    ]
    expected = [(width.heads, width.kv_heads) for width in widths]
    if attributes and attributes != expected:
        raise GateError(f"the graph's attention has the heads {attributes}, the checkpoint {expected}")


def _check_cache(graph: ir.Graph, widths: list[LayerWidths]) -> None:
    shapes = {value.name: value.shape for value in graph.inputs}
    for layer, width in enumerate(widths):
        for part in interface.PARTS:
            name = interface.past_name(layer, part)
            if shapes.get(name) != ir.Shape(interface.past_shape(width)):
                raise GateError(f"the graph's {name} is {shapes.get(name)}, the checkpoint needs {width}")


def _dims(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None, f"{value.name} is an initializer"
    return tuple(value.const_value.shape.numpy())
