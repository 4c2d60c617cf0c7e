"""ONNX Runtime's own format for phones: one `.ort` file, what a small build must contain, what speeds it up.

    convert_to_ort    onnx/model_q4.onnx -> model_q4.ort, model_q4.required_operators.config
    mobile_findings   what ONNX Runtime's mobile usability check says of NNAPI and CoreML

The file holds the graph as it is after optimisation, and its weights: external data goes into it, and as FlatBuffers
count their bytes in 31 bits, so does the format. It has no word for two tensors over the same bytes, as a rounded table
is that embedding and output share in two shapes: one of them is written as a `Reshape` of the other, which copies
nothing. What hangs on constants alone, such as the rotary tables, is computed here, as a session over such a file would
not do so when it opens, but at every call. The list of operators is what `--include_ops_by_config` of ONNX Runtime's
build takes, so that a build for one app carries no other kernels; the full packages read the file as well.
"""

import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types
from numpy.typing import DTypeLike, NDArray
from onnx.external_data_helper import uses_external_data
from onnx.helper import tensor_dtype_to_np_dtype

from edgeprune_runtime.bundle import ORT_SUFFIX
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.limits import usable_cpus
from edgeprune_runtime.output import check_space
from edgeprune_runtime.session import ORT_ERRORS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

OPERATORS_SUFFIX = ".required_operators.config"

MAX_BYTES = (1 << 31) - 1
# Nodes, names and alignment beside the weights; a graph of 80 layers takes less than 2 MB.
SPARE_BYTES = 16 << 20

# Both files are run at the same level by the same kernels: what a conversion may not change is every sum.
TOLERANCE = 1e-4
CHECK_TOKENS = 8

_FAILURES: tuple[type[Exception], ...] = (*ORT_ERRORS, MemoryError)
_DTYPES: dict[str, DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

# The products pack such a weight when a session starts, which they do with initialisers alone.
PACKING_OPERATOR = "MatMulNBits"

Advice = Literal["yes", "maybe", "no"]


@dataclass(frozen=True)
class OrtFiles:
    """A converted graph.

    Attributes:
        model: the `.ort` file, weights included.
        operators: the list of operators that a reduced build of ONNX Runtime must contain.
        size_bytes: of the model.
        max_abs_error: largest difference of a logit to the ONNX graph.
    """

    model: Path
    operators: Path
    size_bytes: int
    max_abs_error: float


@dataclass(frozen=True)
class Partition:
    """How an accelerator would share a graph with the CPU: how many nodes it takes, in how many separate pieces."""

    advice: Advice
    supported_nodes: int
    pieces: int


@dataclass(frozen=True)
class Accelerator:
    """What the check says of one accelerator, for the graph as it is and with every shape fixed."""

    name: str
    as_it_is: Partition
    fixed_shapes: Partition
    unsupported_operators: tuple[str, ...]


@dataclass(frozen=True)
class MobileFindings:
    """What ONNX Runtime's mobile usability check finds in a graph.

    The check goes by lists of operators; it runs nothing on a phone.
    """

    nodes: int
    dynamic_inputs: tuple[str, ...]
    accelerators: tuple[Accelerator, ...]

    @property
    def recommended(self) -> tuple[str, ...]:
        """Accelerators that are worth a try with the graph as it is; where there is none, the CPU is the advice."""
        return tuple(each.name for each in self.accelerators if each.as_it_is.advice != "no")

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain JSON values."""
        return {**asdict(self), "recommended": list(self.recommended)}

    def sentences(self) -> tuple[str, ...]:
        """The findings for a reader, one line each."""
        advice = " or ".join(self.recommended) or "the CPU provider"
        return (
            f"ONNX Runtime's mobile usability check advises {advice} "
            f"({self.nodes} nodes, {len(self.dynamic_inputs)} inputs of no fixed shape)",
            *(
                f"{each.name} would take {each.as_it_is.supported_nodes} nodes (partitions: {each.as_it_is.pieces}), "
                f"with fixed shapes {each.fixed_shapes.supported_nodes} (partitions: {each.fixed_shapes.pieces}); "
                f"not {', '.join(name.partition(':')[2] for name in each.unsupported_operators)}"
                for each in self.accelerators
            ),
        )


def convert_to_ort(graph: Path, folder: Path) -> OrtFiles:
    """Convert a variant's graph to ONNX Runtime's format, and run both to see that they compute the same.

    Args:
        graph: The ONNX file, its external data beside it.
        folder: Takes the two files; made where it does not exist.

    Raises:
        EdgepruneError: if the graph cannot be read, has more weights than the format holds, or the disk is full.
        GateError: if the converted graph computes something else. Neither file is left behind then.
    """
    source = _read(graph)
    _fold_constants(source, graph)
    has_views = _store_once(source)
    size_bytes = _size_bytes(source) + SPARE_BYTES
    if size_bytes > MAX_BYTES:
        raise EdgepruneError(
            f"{graph} takes {size_bytes / 1e9:.1f} GB with its weights, and the ORT format holds "
            f"{MAX_BYTES / 1e9:.1f} GB; convert a variant of fewer bits, such as --precision int4"
        )
    check_space(folder, size_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    model, operators = folder / (graph.stem + ORT_SUFFIX), folder / (graph.stem + OPERATORS_SUFFIX)
    try:
        _convert(source, graph, model, has_views=has_views)
        operators.write_text(_required_operators(model), encoding="utf-8")
        error = _largest_difference(graph, model)
    except BaseException:
        # ONNX Runtime leaves an empty file where it fails.
        model.unlink(missing_ok=True)
        operators.unlink(missing_ok=True)
        raise
    return OrtFiles(model, operators, model.stat().st_size, error)


def mobile_findings(graph: Path) -> MobileFindings:
    """What ONNX Runtime's mobile usability check says of a graph; temporarily takes the disk space of its weights.

    Raises:
        EdgepruneError: if the graph cannot be read.
    """
    with _root_logger_untouched():
        from onnxruntime.tools.mobile_helpers import usability_checker
        from onnxruntime.tools.onnx_model_utils import optimize_model

    with tempfile.TemporaryDirectory() as place:
        # The conversion optimises too, so the check looks at a graph that is optimised as far as devices share.
        optimised = Path(place) / graph.name
        check_space(optimised.parent, _size_bytes(_read(graph)) + SPARE_BYTES)
        try:
            optimize_model(graph, optimised, use_external_initializers=True)
        except ORT_ERRORS as error:
            raise _unreadable(graph, error) from error
        model = onnx.load(optimised, load_external_data=False)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def coreml(file: str) -> Any:
        return lambda fixed_only: usability_checker.check_coreml_partitions(model, fixed_only, file)

    checks: dict[str, Any] = {
        "NNAPI": lambda fixed_only: usability_checker.check_nnapi_partitions(model, fixed_only),
        "CoreML NeuralNetwork": coreml("coreml_supported_neuralnetwork_ops.md"),
        "CoreML MLProgram": coreml("coreml_supported_mlprogram_ops.md"),
    }
    accelerators = []
    for name, check in checks.items():
        as_it_is, fixed = check(True), check(False)
        unsupported = tuple(sorted(as_it_is.unsupported_ops | fixed.unsupported_ops))
        accelerators.append(Accelerator(name, _partition(as_it_is), _partition(fixed), unsupported))
    dynamic, _ = usability_checker.check_shapes(model.graph)
    return MobileFindings(len(model.graph.node), tuple(value.name for value in dynamic), tuple(accelerators))


def _partition(found: Any) -> Partition:
    advice = cast("Advice", found.suitability().name.lower())
    return Partition(advice, found.num_supported_nodes, found.num_partitions)


def _convert(source: onnx.ModelProto, graph: Path, model: Path, *, has_views: bool) -> None:
    """Write a parsed graph, whose external data lie beside the file it was read from, in the ORT format."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(model)
    options.log_severity_level = 4
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    # Its layouts suit the processor at hand alone.
    disabled = ["NchwcTransformer"]
    if has_views:
        # It would make copies of what is stored once.
        disabled.append("ConstantFolding")
    try:
        onnxruntime.InferenceSession(
            source.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except _FAILURES as error:
        raise _unreadable(graph, error) from error


def _fold_constants(model: onnx.ModelProto, file: Path) -> None:
    """Put what ONNX Runtime computes of small constants in the place of the nodes that compute it.

    Its own folding cannot be told to leave the views of `_store_once` alone.
    """
    graph = model.graph
    known = {tensor.name for tensor in graph.initializer if not uses_external_data(tensor)} | {""}
    known -= {value.name for value in graph.input}  # a caller may override these
    folded: list[onnx.NodeProto] = []
    left: list[onnx.NodeProto] = []
    for node in graph.node:  # which stand in the order of their computation
        if known.issuperset(node.input):
            folded.append(node)
            known.update(node.output)
        else:
            left.append(node)
    if not folded:
        return
    read = {name for node in left for name in node.input} | {output.name for output in graph.output}
    wanted = [name for node in folded for name in node.output if name in read]
    used = {name for node in folded for name in node.input}
    part = onnx.helper.make_model(
        onnx.helper.make_graph(
            folded,
            "constants",
            [],
            [onnx.helper.make_empty_tensor_value_info(name) for name in wanted],
            [tensor for tensor in graph.initializer if tensor.name in used],
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = session.run(wanted, {})
    except _FAILURES as error:
        raise _unreadable(file, error) from error
    kept = [tensor for tensor in graph.initializer if tensor.name not in used or tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(left)
    graph.initializer.extend(kept)
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in zip(wanted, values, strict=True)
    )


def _store_once(model: onnx.ModelProto) -> bool:
    """Keep one of tensors over the same bytes of external data, the others as views of it; say if there were any."""
    graph = model.graph
    packed = {name for node in graph.node if node.op_type == PACKING_OPERATOR for name in node.input}
    sharing: dict[tuple[object, ...], list[onnx.TensorProto]] = {}
    for tensor in graph.initializer:
        if uses_external_data(tensor):
            place = sorted((entry.key, entry.value) for entry in tensor.external_data)
            sharing.setdefault((tensor.data_type, *place), []).append(tensor)
    views = []
    for tensors in sharing.values():
        whole, *others = sorted(tensors, key=lambda tensor: tensor.name not in packed)
        for other in others:
            shape = f"{other.name}/shape"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(other.dims, np.int64), shape))
            views.append(onnx.helper.make_node("Reshape", [whole.name, shape], [other.name], f"{other.name}/view"))
            graph.initializer.remove(other)
    nodes = [*views, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return bool(views)


def _required_operators(model: Path) -> str:
    """The configuration of ONNX Runtime's reduced build, a line `domain;opset;operators` for each domain and opset."""
    with _root_logger_untouched():
        from onnxruntime.tools.ort_format_model import OrtFormatModelProcessor

    required: dict[str, dict[int, set[str]]] = {}
    # Its None, for operators of every type, is not in its types.
    OrtFormatModelProcessor(str(model), required, cast("Any", None)).process()
    lines = [
        f"{domain};{opset};{','.join(sorted(operators))}"
        for domain, opsets in sorted(required.items())
        for opset, operators in sorted(opsets.items())
        if operators
    ]
    return "\n".join([f"# Operators of {model.name}", *lines, ""])


def _largest_difference(graph: Path, model: Path) -> float:
    """Largest difference of a logit between the two, in a prompt and a cached step behind it.

    Raises:
        GateError: if it is larger than `TOLERANCE` allows.
    """
    expected, found = _some_logits(graph), _some_logits(model)
    error = float(np.abs(expected - found).max())
    if not error <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise GateError(
            f"{model.name} differs from {graph} by up to {error:.3g} in a logit; the ORT format must not be used for it"
        )
    return error


def _some_logits(graph: Path) -> NDArray[np.float32]:
    """Logits (CHECK_TOKENS + 1, V) of a prompt of CHECK_TOKENS and one step behind it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = usable_cpus()
    options.log_severity_level = 4
    # Not `make_session`: it asks which nodes a provider takes, and a file in the ORT format does not say.
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    logits = next(node for node in session.get_outputs() if node.name == "logits")
    ids = np.random.default_rng(0).integers(0, cast("int", logits.shape[-1]), (1, CHECK_TOKENS + 1))
    past = {
        node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), _DTYPES[node.type])
        for node in session.get_inputs()
        if node.name.startswith("past_key_values.")
    }
    prompt, past = _run(session, ids[:, :CHECK_TOKENS], past)
    step, _ = _run(session, ids[:, CHECK_TOKENS:], past)
    return np.concatenate([prompt[0], step[0]])


def _run(
    session: "InferenceSession", ids: NDArray[np.int64], past: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    before = next(iter(past.values())).shape[2]
    mask = np.ones((1, before + ids.shape[1]), np.int64)
    presents = [name.replace("past_key_values", "present") for name in past]
    outputs = session.run(["logits", *presents], {"input_ids": ids, "attention_mask": mask, **past})
    # Only dense tensors come out of these graphs; ONNX Runtime's own type allows for every kind of value.
    logits, *cache = cast("list[NDArray[Any]]", outputs)
    return logits, dict(zip(past, cache, strict=True))


def _read(graph: Path) -> onnx.ModelProto:
    """A graph without its weights."""
    try:
        return onnx.load(graph, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise _unreadable(graph, error) from error


def _size_bytes(model: onnx.ModelProto) -> int:
    """Bytes of a graph and its weights, where each weight has its own."""
    weights = sum(
        math.prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
        if uses_external_data(tensor)
    )
    size_bytes: int = model.ByteSize() + weights
    return size_bytes


def _unreadable(graph: Path, error: BaseException) -> EdgepruneError:
    reason = " ".join(str(error).split())[:300]
    return EdgepruneError(f"ONNX Runtime cannot convert {graph} ({reason}); give the graph of a bundle that validates")


@contextmanager
def _root_logger_untouched() -> Iterator[None]:
    """Undo what importing ONNX Runtime's tools does to a process: it configures logging and extends `sys.path`."""
    handlers, path = list(logging.root.handlers), list(sys.path)
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        sys.path[:] = path
