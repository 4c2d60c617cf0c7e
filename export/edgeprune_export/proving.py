"""A variant's graph against its torch model: what it must compute, and what a device will hold it against."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
from tokenizers import Tokenizer

from edgeprune.checkpoint import load_pruned
from edgeprune.memory import default_budget
from edgeprune_export.block_gate import Checked, check_by_blocks
from edgeprune_export.fidelity import check_fidelity
from edgeprune_export.golden import golden_cases
from edgeprune_export.parity import ParityResult, check_parity
from edgeprune_export.quantize import RoundedWeights, round_weights
from edgeprune_export.sample_text import tokenize
from edgeprune_runtime.bundle import TOKENIZER_FILE, GraphSource, Variant, data_file, golden_file, graph_file
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.golden import save_golden

Progress = Callable[[str, float], None]
"""Hears the name of a stage and the share of it that is done."""

BY_BLOCKS = (
    "checked against torch block by block, as the whole model did not fit into memory: greedy continuations were not "
    "compared"
)

SPARE = 2.0
"""Kernels of another processor round inputs a little otherwise."""

TWIN_FILE = "exact-products.onnx"
FLOAT_BYTES = 4
COPIES = 2.5
"""Of a float32 model, that checking it whole takes: in torch, in ONNX Runtime, and what both need to run."""


def needs_blocks(parameters: int, source: GraphSource, max_memory_bytes: int | None) -> bool:
    """Whether a model must be checked block by block to stay within a limit; None: within half of this machine.

    Raises:
        EdgepruneError: if it must, and its graph cannot be taken apart.
    """
    budget = default_budget() if max_memory_bytes is None else max_memory_bytes
    whole_bytes = int(COPIES * FLOAT_BYTES * parameters)
    if whole_bytes <= budget:
        return False
    if source != "decoder":
        raise EdgepruneError(
            f"checking a {source} graph takes the whole model, about {whole_bytes / 1e9:.1f} GB, and the limit is "
            f"{budget / 1e9:.1f} GB; raise --max-memory"
        )
    return True


def prove(
    folder: Path,
    checkpoint: Path,
    source: GraphSource,
    rounded: RoundedWeights,
    texts: Sequence[str],
    report: Progress,
    *,
    by_blocks: bool = False,
) -> Variant:
    """Hold a variant's graph against its torch model, and write what a device will hold it against.

    Args:
        folder: the bundle that is being written.
        checkpoint: where the weights come from.
        source: who made the graph.
        rounded: the weights that it has.
        texts: real text to compare on.
        report: hears how far this is.
        by_blocks: with one block in memory at a time.

    Raises:
        GateError: if it computes something else, or its rounded weights are not good enough.
    """
    name = rounded.precision.name
    tokenizer = Tokenizer.from_file(str(checkpoint / TOKENIZER_FILE))
    tokenizer.no_truncation()
    sequences = tokenize(tokenizer, texts)
    graph = folder / graph_file(name)
    report("parity", 0.0)
    check = check_by_blocks if by_blocks else _check_whole
    if rounded.precision.rounds_inputs:
        # What rounding inputs does to logits would hide a mistake; without it the graph must be as exact as any.
        with _exact_twin(graph) as twin:
            exact = replace(rounded, precision=replace(rounded.precision, accuracy_level=0))
            check(checkpoint, twin, exact, sequences, partial(report, "exactness"), parity_only=True)
    checked = check(checkpoint, graph, rounded, sequences, partial(report, "parity"))
    save_golden(folder / golden_file(name), checked.golden)
    return Variant(
        graph=graph_file(name),
        data=(data_file(name),),
        graph_source=source,
        tolerance=_tolerance(rounded, checked.parity),
        parity=cast("Mapping[str, Any]", checked.parity.to_dict()),
        fidelity=cast("Mapping[str, Any]", checked.fidelity.to_dict() if checked.fidelity else {}),
        golden=golden_file(name),
        accuracy_level=rounded.precision.accuracy_level if rounded.precision.is_quantised else None,
    )


def _tolerance(rounded: RoundedWeights, parity: ParityResult) -> float:
    """What a device may differ by: where inputs are rounded, not much more than was found here."""
    return min(parity.tolerance, SPARE * parity.max_abs_error) if rounded.precision.rounds_inputs else parity.tolerance


@contextmanager
def _exact_twin(graph: Path) -> Iterator[Path]:
    """The same graph with products in float32, beside it, for as long as the code inside runs."""
    model = ir.load(graph)
    for node in list(model.graph):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        elif node.op_type == "MatMulIntegerToFloat":
            _multiply_exactly(model.graph, node)
    file = graph.with_name(TWIN_FILE)
    ir.save(model, file)
    try:
        yield file
    finally:
        file.unlink()


def _multiply_exactly(graph: ir.Graph, node: ir.Node) -> None:
    """Put float32 in the place of a product of whole numbers: what was rounded for it, times the weight, scaled."""
    halves, weight, _, weight_scale, _, zero_point = node.inputs
    unrounded = _producer(_producer(halves).inputs[0]).inputs[0]  # of a rounding, of coarse and fine in one
    to_float = {"to": ir.DataType.FLOAT.value}
    nothing = ir.node("Sub", [unrounded, unrounded])  # the finer half, of which there is none
    inputs = ir.node("Concat", [unrounded, *nothing.outputs], {"axis": 0})
    numbers, middle = ir.node("Cast", [weight], to_float), ir.node("Cast", [zero_point], to_float)
    signed = ir.node("Sub", [*numbers.outputs, *middle.outputs])
    product = ir.node("MatMul", [*inputs.outputs, *signed.outputs])
    scaled = ir.node("Mul", [*product.outputs, weight_scale])
    made = [nothing, inputs, numbers, middle, signed, product, scaled]
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, scaled.outputs)


def _producer(value: ir.Value | None) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None, "inputs are rounded as the graph runs"
    return node


def _check_whole(
    checkpoint: Path,
    graph: Path,
    rounded: RoundedWeights,
    sequences: Sequence[Sequence[int]],
    on_check: Callable[[float], None],
    *,
    parity_only: bool = False,
) -> Checked:
    """The gates with the whole model in memory; `parity_only` asks what the graph computes, and nothing else."""
    precision = rounded.precision
    model = load_pruned(checkpoint)
    fidelity = None
    if precision.is_rounded and not parity_only:
        fidelity = check_fidelity(model, graph, sequences, precision)
    round_weights(model, rounded)
    tolerance, max_kl = precision.tolerances
    parity = check_parity(model, graph, sequences, tolerance=tolerance, max_kl=max_kl, on_check=on_check)
    return Checked(parity, fidelity, [] if parity_only else golden_cases(model, sequences))
