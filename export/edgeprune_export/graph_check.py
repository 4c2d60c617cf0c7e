"""Proof by shapes: a graph holds the checkpoint's parameters, each once, and no size of the model before the cut."""

import re
from collections import defaultdict
from math import prod

import onnx_ir as ir

from edgeprune.groups import LayerWidths
from edgeprune_export import interface
from edgeprune_export.graph_writer import BLOCKS, SCALES
from edgeprune_export.positions import context_tokens
from edgeprune_export.weights import Weights
from edgeprune_runtime.errors import GateError

ATTENTION_OPERATORS = ("Attention", "GroupQueryAttention")
_PARAMETER_ENDINGS = (".weight", ".bias")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def check_graph(model: ir.Model, weights: Weights, *, is_plain: bool = False) -> None:
    """Hold a graph's initializers, attention operators and KV inputs against the checkpoint.

    A plain graph has no operator for a whole attention: its heads are in no attribute, only in the shapes of weights.

    Raises:
        GateError: naming the first size that the checkpoint does not have.
    """
    widths = weights.layer_widths()
    _check_parameters(model.graph, weights)
    _check_sizes(model.graph, weights, widths)
    if not is_plain:
        _check_attention(model.graph, widths)
    _check_cache(model.graph, widths)


def attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that are a whole attention, in order; a graph has one for each layer."""
    return [node for node in graph if node.op_type in ATTENTION_OPERATORS]


def _check_parameters(graph: ir.Graph, weights: Weights) -> None:
    found = sum(
        prod(_dims(value))
        for name, value in graph.initializers.items()
        if name.endswith(_PARAMETER_ENDINGS) and value.dtype in _FLOATS
    )
    found += sum(rounded_weights(graph).values())
    expected, _ = weights.count_parameters()
    if found != expected:
        raise GateError(f"the graph holds {found:,} parameters, the checkpoint {expected:,}; it must not be used")


def rounded_weights(graph: ir.Graph) -> dict[str, int]:
    """Name of each initializer that holds rounded weights -> how many weights that are; padding is none."""
    found: dict[str, int] = {}
    for node in graph:
        if node.op_type == "MatMulNBits":
            value, count = node.inputs[1], node.attributes["K"].as_int() * node.attributes["N"].as_int()
        elif node.op_type == "GatherBlockQuantized":
            value = node.inputs[0]
            assert value is not None, "it looks up in something"
            rows, stored_bytes = _dims(value)
            count = rows * stored_bytes * 8 // node.attributes["bits"].as_int()
        elif (value := _of_rows(node)) is not None:
            count = prod(_dims(value))
        else:
            continue
        assert value is not None, "a product has two factors"
        name = (value.name or "").removesuffix(BLOCKS)
        found[name] = max(found.get(name, 0), count)
    return found


def _of_rows(node: ir.Node) -> ir.Value | None:
    """The weight in whole numbers, with a scale for each row, that a node multiplies by or looks up in."""
    index = {"MatMulIntegerToFloat": 1, "Gather": 0}.get(node.op_type)
    value = None if index is None else node.inputs[index]
    return value if value is not None and value.is_initializer() and value.dtype == ir.DataType.UINT8 else None


def _check_sizes(graph: ir.Graph, weights: Weights, widths: list[LayerWidths]) -> None:
    layer_name = re.compile(rf"\b{re.escape(weights.blocks_name)}\.([0-9]{{1,9}})\.")

    def layer_of(name: str) -> int | None:
        found = layer_name.search(name)
        return int(found[1]) if found else None

    own: defaultdict[int, set[int]] = defaultdict(set)
    for layer, width in enumerate(widths):
        own[layer] |= {(width.heads + 2 * width.kv_heads) * width.head_dim, width.head_dim, 1}
    shared = {1, context_tokens(weights.config)}
    # Rotary frequencies are buffers that no file stores.
    buffers = {name: tuple(buffer.shape) for name, buffer in weights.model.named_buffers()}
    for name, shape in (weights.shapes | buffers).items():
        place = layer_of(name)
        (shared if place is None else own[place]).update(shape)
    # A tracer may give a constant that it folded out of a layer a name of its own.
    shared = shared.union(*own.values())
    of_rows = {value.name for node in graph if (value := _of_rows(node)) is not None}
    for name, value in graph.initializers.items():
        place = layer_of(name)
        # Small integers in the graph are sizes, axes and the like; their values are checked by running it.
        # scales have a size that says how many blocks there are, which no tensor of the checkpoint has
        if name.endswith(SCALES):
            continue
        if (value.dtype in _FLOATS or name in of_rows) and not set(_dims(value)) <= (
            shared if place is None else own[place]
        ):
            where = "the checkpoint" if place is None else f"layer {place} of the checkpoint"
            raise GateError(f"the graph's {name} has the shape {_dims(value)}, which no tensor of {where} has")


def _check_attention(graph: ir.Graph, widths: list[LayerWidths]) -> None:
    nodes = attention_nodes(graph)
    if len(nodes) != len(widths):
        raise GateError(f"the graph has {len(nodes)} attention operators for {len(widths)} layers; expected one each")
    for layer, (node, width) in enumerate(zip(nodes, widths, strict=True)):
        if node.op_type != "GroupQueryAttention":
            continue  # the other takes its heads from its inputs' shapes, which come from the weights
        heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        if (heads, kv_heads) != (width.heads, width.kv_heads):
            raise GateError(
                f"the attention of layer {layer} of the graph has {heads} heads on {kv_heads} KV heads, the checkpoint "
                f"{width.heads} on {width.kv_heads}"
            )


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
