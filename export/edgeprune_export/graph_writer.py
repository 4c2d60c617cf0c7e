"""A graph that grows node by node, its weights streamed from a checkpoint into the external data file.

Where the precision is one of few bits, each weight is rounded as it comes by: products become `MatMulNBits`, and
looking up the embedding `GatherBlockQuantized`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from edgeprune_export import interface
from edgeprune_export.external_data import ExternalData
from edgeprune_export.quantize import FLOAT32, Precision, Quantised, quantize
from edgeprune_export.weights import Array, Weights

OPSET = 21
MICROSOFT = "com.microsoft"
SCALES, ZERO_POINTS, BLOCKS = "_scales", "_zero_points", "_blocks"
"""What the names of a rounded weight's other initializers end with."""

Attributes = Mapping[str, int | float | str | Sequence[int]]


@dataclass(frozen=True)
class Table:
    """A weight `(rows, columns)` that is looked up in, as the initializers that hold it."""

    values: tuple[ir.Value, ...]
    rows: int
    columns: int


class GraphWriter:
    """Operators, constants and the Linears of a checkpoint, as values of one graph, named by whoever makes them."""

    def __init__(self, weights: Weights, data: ExternalData, precision: Precision = FLOAT32) -> None:
        self.weights = weights
        self.precision = precision
        self.graph = ir.Graph((), (), nodes=(), opset_imports={"": OPSET, MICROSOFT: 1}, name="decoder")
        self._data = data
        self._tape = Tape(self.graph)

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Attributes | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """The output of a new node."""
        value = self._tape.op(kind, inputs, attributes, domain=domain, name=name)
        value.name = f"{name}/output"
        return value

    def multi_op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Attributes | None = None,
        *,
        outputs: int,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """All outputs of a new node, which the caller names."""
        return self._tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs, domain=domain, name=name)

    def input(self, name: str, dtype: ir.DataType, shape: interface.Shape) -> ir.Value:
        """A new input of the graph."""
        value = interface.describe(ir.Value(), name, dtype, shape)
        self.graph.inputs.append(value)
        return value

    def constant(self, name: str, array: np.ndarray[Any, np.dtype[Any]]) -> ir.Value:
        """A small constant that stays inside the graph; one per name."""
        found = self.graph.initializers.get(name)
        return found if found is not None else self._tape.initializer(ir.tensor(array, name=name))

    def initializer(self, name: str, array: np.ndarray[Any, np.dtype[Any]]) -> ir.Value:
        """A large constant, appended to the external data."""
        return self._tape.initializer(self._data.add(name, array))

    def linear(self, x: ir.Value, *names: str, packed_name: str | None = None) -> ir.Value:
        """`x` through one Linear, or through several at once, their outputs joined."""
        product = self.matmul(x, *names, packed_name=packed_name)
        if f"{names[0]}.bias" not in self.weights:
            return product
        name = packed_name or names[0]
        bias = self.weights.read_rows([f"{part}.bias" for part in names])
        return self.op("Add", [product, self.initializer(f"{name}.bias", bias)], f"{name}/Add")

    def matmul(self, x: ir.Value, *names: str, packed_name: str | None = None) -> ir.Value:
        """`x` times the transposed weights of one or more Linears, without their biases."""
        name = packed_name or names[0]
        weight = self.weights.read_rows([f"{part}.weight" for part in names])
        if not self.precision.is_quantised:
            return self.op("MatMul", [x, self.initializer(f"{name}.weight", weight.T)], f"{name}/MatMul")
        return self._product(x, self._rounded(f"{name}.weight", weight), name, *weight.shape)

    def lookup(self, ids: ir.Value, name: str) -> tuple[ir.Value, "Table"]:
        """Rows of a table, and the table, which `times_table` may multiply by."""
        weight = self.weights.read(f"{name}.weight")
        if not self.precision.is_quantised:
            whole = self.initializer(f"{name}.weight", weight)
            return self.op("Gather", [whole, ids], name), Table((whole,), *weight.shape)
        found = quantize(torch.from_numpy(weight), self.precision)
        rows = self.initializer(f"{name}.weight", found.data.flatten(1).numpy())
        scales = self._scales(f"{name}.weight", found)
        attributes: Attributes = {
            "bits": self.precision.bits,
            "block_size": self.precision.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        values = self.op("GatherBlockQuantized", [rows, ids, *scales], name, attributes, domain=MICROSOFT)
        return values, Table((rows, *scales), *weight.shape)

    def times_table(self, x: ir.Value, table: "Table", name: str) -> ir.Value:
        """`x` times the transposed rows of a table that was looked up in: the head of a model that ties both."""
        if self.precision.is_quantised:
            rows, *scales = table.values
            assert isinstance(rows.const_value, ir.ExternalTensor), "large weights are external"
            # the bytes that are looked up in, once more, as the blocks that this operator wants
            blocks = -(-table.columns // self.precision.block_size)
            shape = (table.rows, blocks, self.precision.block_size * self.precision.bits // 8)
            same = self._tape.initializer(self._data.again(rows.const_value, f"{rows.name}{BLOCKS}", shape))
            return self._product(x, (same, *scales), name, table.rows, table.columns)
        (weight,) = table.values
        # Listed among the graph's inputs, an initializer counts as one that a caller may override (sessions do not
        # show it as an input). So ONNX Runtime uses the table where it lies, mapped from the file, for both readers. As
        # a constant it would be packed into a second copy for the product: that is a tenth faster for one token, and a
        # whole table more of memory, which is what a small device has least of.
        self.graph.inputs.append(weight)
        return self.op("FusedMatMul", [x, weight], name, {"transB": 1}, domain=MICROSOFT)

    def _rounded(self, name: str, weight: Array) -> tuple[ir.Value, ...]:
        """The initializers of a rounded weight: numbers, scales and, where blocks have their own, zero points."""
        found = quantize(torch.from_numpy(weight), self.precision)
        return self.initializer(name, found.data.numpy()), *self._scales(name, found)

    def _scales(self, name: str, found: Quantised) -> tuple[ir.Value, ...]:
        parts = {f"{name}{SCALES}": found.scales, f"{name}{ZERO_POINTS}": found.zero_points}
        return tuple(self.initializer(part, tensor.numpy()) for part, tensor in parts.items() if tensor is not None)

    def _product(self, x: ir.Value, weight: Sequence[ir.Value], name: str, outputs: int, inputs: int) -> ir.Value:
        attributes: Attributes = {
            "K": inputs,
            "N": outputs,
            "bits": self.precision.bits,
            "block_size": self.precision.block_size,
            "accuracy_level": self.precision.accuracy_level,
        }
        return self.op("MatMulNBits", [x, *weight], f"{name}/MatMul", attributes, domain=MICROSOFT)

    def split(self, x: ir.Value, sizes: Sequence[int], name: str) -> Sequence[ir.Value]:
        """`x` cut into stretches of its last dimension."""
        lengths = self.constant(f"{name}/sizes", np.array(sizes, np.int64))
        return self.multi_op("Split", [x, lengths], f"{name}/split", {"axis": -1}, outputs=len(sizes))
