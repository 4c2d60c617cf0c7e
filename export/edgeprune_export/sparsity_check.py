"""Proof by counting: the zeros of a sparse checkpoint are in the graph, in the graph's own precision.

A Linear's weight is found by the operator that multiplies by it, which also says along which dimension the inputs lie.
Quantised weights count as zero where they equal their zero point, as a runtime makes exactly zero of them:

    MatMul, FusedMatMul, Gemm     float weights, also behind a Transpose or a DequantizeLinear
    MatMulNBits                   2, 4 or 8 bits in blocks of inputs, with a zero point each, or the middle of the range
    MatMulInteger[ToFloat]        8 bits, with one zero point, or one for each output
"""

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from edgeprune.patterns import Found, check_pattern
from edgeprune.plan import SparsityRecord
from edgeprune_runtime.bundle import ZEROS, Manifest
from edgeprune_runtime.errors import GateError
from edgeprune_runtime.untrusted import Fields

JOINED = ("q_proj", "k_proj", "v_proj")
JOINED_NAME = "qkv_proj"
"""Linears whose outputs a graph may have from one product, in this order, and what that is called."""

ZERO_POINT_INPUTS = {"MatMulInteger": 3, "MatMulIntegerToFloat": 5}
"""Products of whole numbers -> which input holds the weight's zero point."""

WRAPPER = "model."
"""What the traced graph puts before the names of the checkpoint: there the model is a part of what was traced."""


def check_zeros(graph: ir.Graph, record: SparsityRecord, outputs: Mapping[str, int]) -> Found:
    """Count the zeros of all Linears of a record in a graph whose weights are at hand.

    Args:
        graph: the exported graph.
        record: which Linears, and in what pattern.
        outputs: output features of each, by name.

    Raises:
        GateError: if a Linear is not found, or breaks the pattern.
    """
    products = {}
    for node in graph:
        if (name := _linear_of(node)) is not None:
            products[name] = node

    def read(module: str) -> torch.Tensor:
        parent, _, own = module.rpartition(".")
        node, rows = products.get(module) or products.get(WRAPPER + module), slice(0, outputs[module])
        if node is None and own in JOINED:
            node = products.get(f"{parent}.{JOINED_NAME}")
            begin = sum(outputs[f"{parent}.{part}"] for part in JOINED[: JOINED.index(own)])
            rows = slice(begin, begin + outputs[module])
        if node is None:
            raise GateError(f"the graph has no product with the weight of {module}; its zeros cannot be counted")
        return _nonzero(node)[rows]

    return check_pattern(record, read, "the graph")


def found_zeros(manifest: Manifest) -> Found | None:
    """What `check_zeros` counted when a bundle was written; None if its model is not sparse."""
    counted = manifest.results.get(ZEROS)
    if counted is None:
        return None
    fields = Fields.nested(ZEROS, counted)
    return Found(*(fields.count(name) for name in ("weights", "nonzeros", "allowed", "broken")))


def _linear_of(node: ir.Node) -> str | None:
    """Name of the Linear that a node multiplies by, as the checkpoint has it; None if it does not."""
    if node.op_type not in ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits", *ZERO_POINT_INPUTS):
        return None
    value = node.inputs[1]
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type not in ("Transpose", "DequantizeLinear", "Identity"):
            return None
        value = producer.inputs[0]
    found = re.match(r"(.+)\.weight", value.name or "") if value is not None else None
    return found[1] if found else None


def _nonzero(node: ir.Node) -> torch.Tensor:
    """`(out, in)` bool: where a node's weight differs from zero."""
    if node.op_type == "MatMulNBits":
        return _nonzero_of_bits(node)
    weight = node.inputs[1]
    assert weight is not None, "a product has two factors"
    if node.op_type in ZERO_POINT_INPUTS:
        return (_constant(weight) != _given(node, ZERO_POINT_INPUTS[node.op_type], 0)).T
    found = _nonzero_of(weight)
    return found if node.attributes.get_int("transB", 0) else found.T


def _nonzero_of(value: ir.Value) -> torch.Tensor:
    """Where a constant, or what simple operators make of one, differs from zero."""
    producer = value.producer()
    if producer is None:
        return _constant(value) != 0
    inner = producer.inputs[0]
    assert inner is not None, "these operators have an input"
    if producer.op_type == "Identity":
        return _nonzero_of(inner)
    if producer.op_type == "Transpose":
        return _nonzero_of(inner).T
    stored, zero_point = _constant(inner), _given(producer, 2, 0)
    axis = producer.attributes.get_int("axis", 1) % stored.ndim
    if zero_point.ndim == stored.ndim:  # one for each block
        block = producer.attributes.get_int("block_size", stored.shape[axis])
        zero_point = zero_point.repeat_interleave(block, axis).narrow(axis, 0, stored.shape[axis])
    elif zero_point.numel() > 1:
        zero_point = zero_point.reshape([-1 if dimension == axis else 1 for dimension in range(stored.ndim)])
    return stored != zero_point


def _nonzero_of_bits(node: ir.Node) -> torch.Tensor:
    """The same of a MatMulNBits: its weight is `(out, blocks, bytes)`, its zero points `(out, bytes)`."""
    inputs, outputs, bits, block = (node.attributes[name].as_int() for name in ("K", "N", "bits", "block_size"))
    stored = node.inputs[1]
    assert stored is not None, "a product has two factors"
    blocks = -(-inputs // block)
    values = _unpacked(_constant(stored).reshape(outputs, -1), bits).reshape(outputs, blocks, block)
    middle = _given(node, 3, 1 << (bits - 1))
    if middle.is_floating_point():  # one number for each block
        return (values != middle.reshape(outputs, blocks, 1)).reshape(outputs, -1)[:, :inputs]
    zero_points = _unpacked(middle.reshape(outputs, -1), bits)[:, :blocks, None] if middle.numel() > 1 else middle
    return (values != zero_points).reshape(outputs, -1)[:, :inputs]


def _unpacked(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes `(rows, bytes)` as numbers of so many bits, the lowest first."""
    shifts = torch.arange(0, 8, bits)
    return ((stored.long()[:, :, None] >> shifts) & ((1 << bits) - 1)).reshape(len(stored), -1)


def _given(node: ir.Node, index: int, default: int) -> torch.Tensor:
    """A constant among a node's inputs, or what stands for one that is left out."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return torch.tensor(default) if value is None else _constant(value)


def _constant(value: ir.Value) -> torch.Tensor:
    assert value.const_value is not None, f"{value.name} is an initializer"
    array = value.const_value.numpy()
    # numpy has no small floats and integers of its own; as float32 they keep their values
    return torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "V" else np.array(array))
