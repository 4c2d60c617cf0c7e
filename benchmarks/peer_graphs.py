"""Other people's graphs of the same model, and what a graph file says of itself: its precision, what a token reads.

Each maker writes into a folder of its own once; a folder that is there is used again.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune_runtime.errors import EdgepruneError

if TYPE_CHECKING:
    import onnx

    from edgeprune_export.quantize import Precision
    from edgeprune_runtime.bundle import Bundle

BUILDER = "onnxruntime_genai.models.builder"
LOOKUPS = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"}
"""Operators that take a few rows of a weight: an embedding, or the angles of positions."""
LAST_LINES = 300


@dataclass(frozen=True)
class Graph:
    """An ONNX file and the files of its weights.

    Attributes:
        file: the graph.
        data: files that hold its weights.
        token_bytes: of weights that decoding one token reads from end to end.
        accuracy_level: of the products with blocks of integers; None without such.
        block: bits, block size and symmetry of the first of these products; None without such.
        table_bits: of the last of them, which is the head; None without such.
        writes_in_place: new keys and values can be written behind the old ones.
    """

    file: Path
    data: tuple[Path, ...]
    token_bytes: int
    accuracy_level: int | None
    block: tuple[int, int, bool] | None
    table_bits: int | None
    writes_in_place: bool

    @property
    def files(self) -> tuple[Path, ...]:
        """The graph and its weights."""
        return (self.file, *self.data)

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(file.stat().st_size for file in self.files)

    def stored_as(self, precision: "Precision") -> "Precision":
        """A precision with the blocks that the graph really has."""
        if self.block is None:
            return precision
        bits, block_size, is_symmetric = self.block
        return replace(
            precision, bits=bits, block_size=block_size, is_symmetric=is_symmetric, table_bits=self.table_bits
        )


def read_graph(file: Path) -> Graph:
    """What a graph file says; its weights are not read."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    readers: dict[str, set[str]] = defaultdict(set)
    for node in model.graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    weights = model.graph.initializer
    read = [weight for weight in weights if readers[weight.name] - LOOKUPS]
    places = {entry.value for weight in weights for entry in weight.external_data if entry.key == "location"}
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    ends = [{each.name: each.i for each in node.attribute} for node in products[:1] + products[-1:]]
    first, last = ends or ({}, {})
    return Graph(
        file,
        tuple(file.parent / place for place in sorted(places)),
        sum(map(_stored_bytes, read)),
        first.get("accuracy_level", 0) if products else None,
        (first["bits"], first["block_size"], _has_no_zero_points(products[0])) if products else None,
        last.get("bits"),
        any(node.op_type == "GroupQueryAttention" for node in model.graph.node),
    )


def at_level(graph: Graph, level: int, folder: Path) -> Graph:
    """The same graph with another `accuracy_level` in its products, in a folder of its own, made if it is not there."""
    import onnx

    twin = folder / graph.file.name
    if not twin.is_file() or twin.stat().st_mtime_ns < graph.file.stat().st_mtime_ns:
        folder.mkdir(parents=True, exist_ok=True)
        for file in graph.data:
            shutil.copyfile(file, folder / file.name)
        model = onnx.load(graph.file, load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                kept = [each for each in node.attribute if each.name != "accuracy_level"]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
        onnx.save(model, twin)
    return read_graph(twin)


def packed(bundle: "Bundle", folder: Path) -> Graph:
    """A bundle's graph with its weights packed for this machine, in a folder of its own, made if it is not there."""
    from edgeprune_export.packing import write_packed

    graph = read_graph(bundle.graph_path)
    twin = folder / graph.file.name
    if not twin.is_file() or twin.stat().st_mtime_ns < graph.file.stat().st_mtime_ns:
        part = folder.with_name(f"{folder.name}.part")
        for left in (part, folder):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        write_packed(bundle, part)
        part.rename(folder)
    # A token reads as many bytes, whichever of the two forms they are in.
    return replace(read_graph(twin), token_bytes=graph.token_bytes)


def gguf_bytes(file: Path) -> int:
    """Bytes of a GGUF file's weights; where the embedding is the head too, a token reads all of them."""
    from gguf import GGUFReader

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    lookup = tensors.get("token_embd.weight", 0) if "output.weight" in tensors else 0
    return sum(tensors.values()) - lookup


def check_genai() -> None:
    """Check that onnxruntime-genai's model builder can run here.

    Raises:
        EdgepruneError: if the package is missing.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise EdgepruneError("--builder needs onnxruntime-genai in this environment; pip install 'edgeprune[genai]'")


def check_python(option: str, python: Path, module: str, install: str) -> None:
    """Check that another environment's interpreter has a package.

    Raises:
        EdgepruneError: if it does not start or lacks the package.
    """
    try:
        done = subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise EdgepruneError(f"{option} {python} cannot be started ({error.strerror}); give a Python") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EdgepruneError(f"{option} {python} cannot import {module} ({reason}); there, run: {install}")


def build_genai(checkpoint: Path, precision: str, folder: Path) -> Graph:
    """The graph of onnxruntime-genai's model builder, with its own defaults for the CPU."""
    cache = folder.with_name(f"{folder.name}.cache")
    options = ("-p", precision, "-e", "cpu", "-c", str(cache))
    return _build(folder, [sys.executable, "-m", BUILDER, "-i", str(checkpoint), "-o", "{out}", *options])


def build_mobius(python: Path, source: Path, folder: Path) -> Graph:
    """The graph of mobius-onnx: float32 of a checkpoint folder, or the blocks of a GGUF file as they are."""
    job = (
        ("build", "--config", str(source), "--dtype", "f32", "--ep", "cpu", "{out}")
        if source.is_dir()
        else ("build-gguf", str(source), "--keep-quantized", "--ep", "cpu", "--output", "{out}")
    )
    return _build(folder, [str(python), "-m", "mobius", *job])


def _build(folder: Path, command: Sequence[str]) -> Graph:
    """Run a maker of graphs unless its folder is there; it appears when it is complete."""
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [word.replace("{out}", str(part)) for word in command]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            reason = " ".join((done.stderr or done.stdout).split())[-LAST_LINES:]
            raise EdgepruneError(f"{' '.join(words[1:3])} failed for {folder.name}: {reason}")
        part.rename(folder)
    return read_graph(folder / "model.onnx")


def _has_no_zero_points(product: "onnx.NodeProto") -> bool:
    return len(product.input) < 4 or not product.input[3]


def _stored_bytes(weight: "onnx.TensorProto") -> int:
    import onnx

    for entry in weight.external_data:
        if entry.key == "length":
            return int(entry.value)
    return int(onnx.numpy_helper.to_array(weight).nbytes)
