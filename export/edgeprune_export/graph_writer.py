"""A graph that grows node by node, its weights streamed from a checkpoint into the external data file.

Where the precision is one of few bits, each weight is rounded as it comes by: products become `MatMulNBits`, and
looking up the embedding `GatherBlockQuantized`. Where a block is a whole row, inputs are rounded too, as the graph
runs, and products are of whole numbers:

    x ─ by each token's largest ─ to 8 bits ─ what that missed, to 8 bits ─ MatMulIntegerToFloat on both ─ their sum

`MatMulIntegerToFloat` is ONNX Runtime's one for MatMulInteger, Cast and Mul by both scales. It takes one scale for all
tokens; without the division a single one of large values, as the first of a text is to down_proj, leaves a few of the
256 numbers to the others: SmolLM2 has 1.66 times its perplexity then, 1.09 times with it, and with the second half,
which goes along as more rows of the same product, what rounded weights alone cost. Weights lie as `(inputs, outputs)`,
also those of the embedding: a tied head multiplies by them as they are, and looking up gathers columns. They have no
sign, as kernels for signed ones add in 16 bits on many processors, which do not hold the sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeprune_export import interface
from edgeprune_export.external_data import ExternalData
from edgeprune_export.quantize import HALF_BITS, Precision, Quantised, RoundedWeights
from edgeprune_export.weights import Weights

OPSET = 21
MICROSOFT = "com.microsoft"
SCALES, ZERO_POINTS, BLOCKS = "_scales", "_zero_points", "_blocks"
"""What the names of a rounded weight's other initializers end with."""

TOKENS = interface.LOGITS_SHAPE
"""Names of the first sizes of whatever there is of each token. Where ONNX Runtime cannot see that two sizes are equal,
no value takes the memory of another, and planning takes seconds."""

MIDDLE = 128
STEPS = 127
"""Of an input in 8 bits, to either side of the middle; what is missed is at most half a step."""

SMALLEST = 1e-30
"""A token of zeros is divided by something too."""

Attributes = Mapping[str, int | float | str | Sequence[int]]


@dataclass(frozen=True)
class Table:
    """A weight `(rows, columns)` that is looked up in, as the initializers that hold it in a precision."""

    values: tuple[ir.Value, ...]
    precision: Precision
    rows: int
    columns: int


@dataclass(frozen=True)
class _RoundedInput:
    """What a product of whole numbers reads: `numbers` `(2B, T, K)`, the coarse ones and then the fine ones.

    `sizes` `(B, T, 1)` are the steps between the coarse ones, which tokens were divided by before.
    """

    numbers: ir.Value
    sizes: ir.Value


class GraphWriter:
    """Operators, constants and the Linears of a checkpoint, as values of one graph, named by whoever makes them."""

    def __init__(self, rounded: RoundedWeights, data: ExternalData) -> None:
        self.weights: Weights = rounded.weights
        self.rounded = rounded
        self.precision = rounded.precision
        is_half = self.precision.bits == HALF_BITS
        self.dtype = ir.DataType.FLOAT16 if is_half else ir.DataType.FLOAT
        """Type of everything that is neither a whole number nor the logits."""
        self.graph = ir.Graph((), (), nodes=(), opset_imports={"": OPSET, MICROSOFT: 1}, name="decoder")
        self._data = data
        self._tape = Tape(self.graph)
        self._rounded_inputs: dict[ir.Value, _RoundedInput] = {}

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

    def scalar(self, name: str, value: float) -> ir.Value:
        """A number of the graph's float type."""
        return self.constant(name, np.array(value, self.dtype.numpy()))

    def initializer(self, name: str, array: np.ndarray[Any, np.dtype[Any]]) -> ir.Value:
        """A large constant, appended to the external data; floats in the graph's type."""
        if np.issubdtype(array.dtype, np.floating):
            array = array.astype(self.dtype.numpy(), copy=False)
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
        weights = [f"{part}.weight" for part in names]
        if not self.precision.is_quantised:
            weight = self.weights.read_rows(weights)
            return self.op("MatMul", [x, self.initializer(f"{name}.weight", weight.T)], f"{name}/MatMul")
        found = self.rounded.read(*weights)
        if found.precision.is_by_row:
            return self._integer_product(x, self._rows(f"{name}.weight", found), name)
        parts = (self.initializer(f"{name}.weight", found.data.numpy()), *self._scales(f"{name}.weight", found))
        return self._product(x, parts, found.precision, name, len(found.data), self.weights.shapes[weights[0]][1])

    def lookup(self, ids: ir.Value, name: str) -> tuple[ir.Value, "Table"]:
        """Rows of a table, and the table, which `times_table` may multiply by."""
        rows, columns = self.weights.shapes[f"{name}.weight"]
        if not self.precision.is_quantised:
            whole = self.initializer(f"{name}.weight", self.weights.read(f"{name}.weight"))
            return self.op("Gather", [whole, ids], name), Table((whole,), self.precision, rows, columns)
        found = self.rounded.read(f"{name}.weight")
        if found.precision.is_by_row:
            parts = self._rows(f"{name}.weight", found)
            return self._gathered(ids, parts, name), Table(parts, found.precision, rows, columns)
        data = self.initializer(f"{name}.weight", found.data.flatten(1).numpy())
        scales = self._scales(f"{name}.weight", found)
        attributes: Attributes = {
            "bits": found.precision.bits,
            "block_size": found.precision.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        values = self.op("GatherBlockQuantized", [data, ids, *scales], name, attributes, domain=MICROSOFT)
        return values, Table((data, *scales), found.precision, rows, columns)

    def times_table(self, x: ir.Value, table: "Table", name: str) -> ir.Value:
        """`x` times the transposed rows of a table that was looked up in: the head of a model that ties both."""
        precision = table.precision
        if precision.is_by_row:
            return self._integer_product(x, table.values, name)
        if precision.is_quantised:
            rows, *scales = table.values
            assert isinstance(rows.const_value, ir.ExternalTensor), "large weights are external"
            # the bytes that are looked up in, once more, as the blocks that this operator wants
            blocks = -(-table.columns // precision.block_size)
            shape = (table.rows, blocks, precision.block_size * precision.bits // 8)
            same = self._tape.initializer(self._data.again(rows.const_value, f"{rows.name}{BLOCKS}", shape))
            return self._product(x, (same, *scales), precision, name, table.rows, table.columns)
        (weight,) = table.values
        # Listed among the graph's inputs, an initializer counts as one that a caller may override (sessions do not
        # show it as an input). So ONNX Runtime uses the table where it lies, mapped from the file, for both readers. As
        # a constant it would be packed into a second copy for the product: that is a tenth faster for one token, and a
        # whole table more of memory, which is what a small device has least of.
        self.graph.inputs.append(weight)
        return self.op("FusedMatMul", [x, weight], name, {"transB": 1}, domain=MICROSOFT)

    def _scales(self, name: str, found: Quantised) -> tuple[ir.Value, ...]:
        parts = {f"{name}{SCALES}": found.scales, f"{name}{ZERO_POINTS}": found.zero_points}
        return tuple(self.initializer(part, tensor.numpy()) for part, tensor in parts.items() if tensor is not None)

    def _product(
        self, x: ir.Value, weight: Sequence[ir.Value], precision: Precision, name: str, outputs: int, inputs: int
    ) -> ir.Value:
        attributes: Attributes = {
            "K": inputs,
            "N": outputs,
            "bits": precision.bits,
            "block_size": precision.block_size,
            "accuracy_level": precision.accuracy_level,
        }
        return self.op("MatMulNBits", [x, *weight], f"{name}/MatMul", attributes, domain=MICROSOFT)

    def _rows(self, name: str, found: Quantised) -> tuple[ir.Value, ...]:
        """A weight with a scale for each row: its numbers `(inputs, rows)` uint8, and the scales `(rows,)`."""
        numbers = self.initializer(name, found.data.flatten(1).numpy().T)
        return numbers, self.initializer(f"{name}{SCALES}", found.scales[:, 0].numpy())

    def _gathered(self, ids: ir.Value, parts: Sequence[ir.Value], name: str) -> ir.Value:
        """Columns of a weight with a scale for each, as rows of floats."""
        numbers, scales = parts
        columns = self.op("Gather", [numbers, ids], name, {"axis": 1})
        rows = self.op("Transpose", [columns], f"{name}/rows", {"perm": [1, 2, 0]})
        values = self.op("Cast", [rows], f"{name}/float", {"to": self.dtype.value})
        signed = self.op("Sub", [values, self.scalar("middle_float", MIDDLE)], f"{name}/signed")
        of_rows = self.op("Gather", [scales, ids], f"{name}/scales")
        return self.op("Mul", [signed, self.op("Unsqueeze", [of_rows, self._last()], f"{name}/scale")], f"{name}/exact")

    def _integer_product(self, x: ir.Value, parts: Sequence[ir.Value], name: str) -> ir.Value:
        weight, weight_scale = parts
        assert weight.shape is not None, "initializers have shapes"
        width, outputs = weight.shape.numpy()
        found = self._rounded(x, width)
        middle = self._middle()
        inputs = [found.numbers, weight, self.scalar("one_float", 1), weight_scale, middle, middle]
        products = self.op("MatMulIntegerToFloat", inputs, f"{name}/MatMul", domain=MICROSOFT)
        attributes: Attributes = {"axis": 0, "num_outputs": 2}
        coarse, fine = self.multi_op("Split", [products], f"{name}/halves", attributes, outputs=2)
        for value, part in ((coarse, "coarse"), (fine, "fine")):
            interface.describe(value, f"{name}/{part}", self.dtype, (*_tokens(x), outputs))
        smaller = self.op("Mul", [fine, self.scalar("coarser", 1 / (2 * STEPS))], f"{name}/smaller")
        return self.op("Mul", [self.op("Add", [coarse, smaller], f"{name}/sum"), found.sizes], f"{name}/sized")

    def _rounded(self, x: ir.Value, width: int) -> _RoundedInput:
        """A value `(B, T, width)` in twice 8 bits; rounded once, however many products read it."""
        if x in self._rounded_inputs:
            return self._rounded_inputs[x]
        name = f"{x.name}/rounded"
        largest = self.op("ReduceMax", [self.op("Abs", [x], f"{name}/abs"), self._last()], f"{name}/largest")
        some = self.op("Max", [largest, self.scalar("smallest", SMALLEST)], f"{name}/some")
        sizes = self.op("Mul", [some, self.scalar("step", 1 / STEPS)], f"{name}/sizes")
        even = self.op("Div", [x, sizes], f"{name}/even")
        missed = self.op("Sub", [even, self.op("Round", [even], f"{name}/coarse")], f"{name}/missed")
        fine = self.op("Mul", [missed, self.scalar("finer", 2 * STEPS)], f"{name}/fine")
        halves = self.op("Concat", [even, fine], f"{name}/halves", {"axis": 0})
        batch, length = _tokens(x)
        interface.describe(halves, f"{name}/halves", self.dtype, (f"twice_{batch}", length, width))
        numbers = self.op("QuantizeLinear", [halves, self.scalar("one_float", 1), self._middle()], name)
        self._rounded_inputs[x] = _RoundedInput(numbers, sizes)
        return self._rounded_inputs[x]

    def _middle(self) -> ir.Value:
        """The number that stands for zero."""
        return self.constant("middle", np.array(MIDDLE, np.uint8))

    def _last(self) -> ir.Value:
        return self.constant("last", np.array([-1], np.int64))

    def split(self, x: ir.Value, sizes: Sequence[int], name: str) -> Sequence[ir.Value]:
        """`x` cut into stretches of its last dimension."""
        lengths = self.constant(f"{name}/sizes", np.array(sizes, np.int64))
        return self.multi_op("Split", [x, lengths], f"{name}/split", {"axis": -1}, outputs=len(sizes))


def _tokens(x: ir.Value) -> tuple[str, ...]:
    """Names of the first sizes of a value, where it has some of its own."""
    return TOKENS if x.shape is None else tuple(str(size) for size in x.shape[: len(TOKENS)])
