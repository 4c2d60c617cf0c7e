"""A graph that grows node by node, its weights streamed from a checkpoint into the external data file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune_export import interface
from edgeprune_export.external_data import ExternalData
from edgeprune_export.weights import Array, Weights

OPSET = 21
MICROSOFT = "com.microsoft"

Attributes = Mapping[str, int | float | str | Sequence[int]]


class GraphWriter:
    """Operators, constants and the Linears of a checkpoint, as values of one graph, named by whoever makes them."""

    def __init__(self, weights: Weights, data: ExternalData) -> None:
        self.weights = weights
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

    def initializer(self, name: str, array: Array) -> ir.Value:
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
        return self.op("MatMul", [x, self.initializer(f"{name}.weight", weight.T)], f"{name}/MatMul")

    def split(self, x: ir.Value, sizes: Sequence[int], name: str) -> Sequence[ir.Value]:
        """`x` cut into stretches of its last dimension."""
        lengths = self.constant(f"{name}/sizes", np.array(sizes, np.int64))
        return self.multi_op("Split", [x, lengths], f"{name}/split", {"axis": -1}, outputs=len(sizes))
