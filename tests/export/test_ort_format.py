"""ONNX Runtime's own format: the file computes what the graph computes, and the findings are those of its tool."""

import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from exported import decoder_graph, pruned

from edgeprune_export import ort_format
from edgeprune_export.exporting import export
from edgeprune_export.ort_format import convert_to_ort, mobile_findings
from edgeprune_export.quantize import PRECISIONS
from edgeprune_runtime.bundle import graph_file
from edgeprune_runtime.errors import EdgepruneError, GateError

LENIENT = {"block_size": 16, "max_perplexity_ratio": 9.0, "min_argmax_agreement": 0.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Variants of a toy with other widths in every layer. Read only."""
    folder = tmp_path_factory.mktemp("bundle")
    pruned(folder / "checkpoint", "llama")
    precisions = [PRECISIONS["fp32"], replace(PRECISIONS["int4"], **LENIENT)]
    export(folder / "checkpoint", folder / "bundle", precisions=precisions)
    return folder / "bundle"


@pytest.fixture(scope="module")
def graph(bundle: Path) -> Path:
    return bundle / graph_file("fp32")


def session(graph: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])


def feeds_of(model: onnxruntime.InferenceSession, batch: int, width: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(1).integers(3, 97, (batch, width))
    mask = np.ones_like(ids)
    mask[0, :2] = 0
    past = {
        node.name: np.zeros((batch, node.shape[1], 0, node.shape[3]), np.float32)
        for node in model.get_inputs()
        if node.name.startswith("past")
    }
    return {"input_ids": ids, "attention_mask": mask, **past}


@pytest.mark.parametrize("variant", ["fp32", "int4"])
def test_file_runs_alone_and_computes_the_same(bundle: Path, variant: str, tmp_path: Path) -> None:
    graph = bundle / graph_file(variant)
    files = convert_to_ort(graph, tmp_path / "mobile")
    assert files.model == tmp_path / "mobile" / f"{graph.stem}.ort"
    assert sorted(path.name for path in files.model.parent.iterdir()) == sorted(
        [files.model.name, files.operators.name]
    )
    assert files.size_bytes == files.model.stat().st_size
    ours, theirs = session(graph), session(files.model)
    assert [(node.name, node.shape) for node in ours.get_inputs()] == [
        (node.name, node.shape) for node in theirs.get_inputs()
    ]
    feeds = feeds_of(ours, batch=2, width=7)
    for expected, found in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_table_that_embedding_and_output_share_is_in_the_file_once(variant: str, tmp_path: Path) -> None:
    pruned(tmp_path / "checkpoint", "llama", tie_word_embeddings=True)
    export(tmp_path / "checkpoint", tmp_path / "bundle", precisions=[replace(PRECISIONS[variant], **LENIENT)])
    graph = tmp_path / "bundle" / graph_file(variant)
    parsed = onnx.load(graph)
    readers = {name: node.op_type for node in parsed.graph.node for name in node.input}
    tables = [onnx.numpy_helper.to_array(tensor) for tensor in parsed.graph.initializer if tensor.dims[:1] == [97]]
    [table] = {table.tobytes() for table in tables if table.dtype == np.uint8}
    assert {"GatherBlockQuantized", "MatMulNBits"} <= set(readers.values())
    files = convert_to_ort(graph, tmp_path)
    assert files.model.read_bytes().count(table) == 1
    assert files.max_abs_error == 0.0
    # which a session over the file would compute at every call
    assert not {"Cos", "Sin", "Range"} & set(re.findall(r"\w+", files.operators.read_text("utf-8")))


@pytest.mark.slow
def test_traced_graph_is_converted_too(tmp_path: Path) -> None:
    pruned(tmp_path / "checkpoint", "gpt_neox", num_hidden_layers=1)
    export(tmp_path / "checkpoint", tmp_path / "bundle")
    assert convert_to_ort(tmp_path / "bundle" / graph_file("fp32"), tmp_path).max_abs_error < 1e-4
    assert mobile_findings(tmp_path / "bundle" / graph_file("fp32")).nodes > 10


def test_operators_are_those_of_the_file_and_name_no_folder(graph: Path, tmp_path: Path) -> None:
    text = convert_to_ort(graph, tmp_path).operators.read_text("utf-8")
    assert str(tmp_path) not in text
    lines = text.splitlines()
    assert lines[0].startswith("#")
    assert all(re.fullmatch(r"[a-z.]+;\d+;[A-Za-z,]+", line) for line in lines[1:])
    named = {(line.split(";")[0], operator) for line in lines[1:] for operator in line.split(";")[2].split(",")}
    optimised = tmp_path / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )
    nodes = onnx.load(optimised, load_external_data=False).graph.node
    assert named == {(node.domain or "ai.onnx", node.op_type) for node in nodes}


def test_findings_agree_with_what_the_tool_logs(graph: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from onnxruntime.tools.mobile_helpers import usability_checker

    found = mobile_findings(graph)
    with caplog.at_level(logging.INFO):
        worth_it = usability_checker.analyze_model(graph, logger=logging.getLogger("tool"))
    said = caplog.text
    assert worth_it is any({each.as_it_is.advice, each.fixed_shapes.advice} != {"no"} for each in found.accelerators)
    for each in found.accelerators:
        assert f"Model should perform well with {each.name} as is: {each.as_it_is.advice.upper()}" in said
        for part in (each.as_it_is, each.fixed_shapes):
            assert (
                f"{part.pieces} partitions with a total of {part.supported_nodes}/{found.nodes} nodes can be handled "
                f"by the {each.name} EP" in said
            )
    assert "input_ids" in found.dynamic_inputs
    assert found.recommended == ()
    assert "com.microsoft:GroupQueryAttention" in found.accelerators[0].unsupported_operators
    assert json.loads(json.dumps(found.to_dict()))["accelerators"][0]["name"] == "NNAPI"
    assert found.sentences()[0].startswith("ONNX Runtime's mobile usability check advises the CPU provider")
    assert len(found.sentences()) == 1 + len(found.accelerators)


def test_process_is_left_as_it_was(graph: Path, tmp_path: Path) -> None:
    """ONNX Runtime's tools configure the root logger and extend the path when they are imported."""
    for name in [name for name in sys.modules if name.startswith("onnxruntime.tools")]:
        del sys.modules[name]
    handlers, path = list(logging.root.handlers), list(sys.path)
    logging.root.handlers[:] = []
    try:
        convert_to_ort(graph, tmp_path)
        mobile_findings(graph)
        assert logging.root.handlers == []
        assert sys.path == path
    finally:
        logging.root.handlers[:] = handlers


def test_more_weights_than_the_format_holds_are_refused_before_work(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_format, "MAX_BYTES", ort_format.SPARE_BYTES)
    with pytest.raises(EdgepruneError, match=r"the ORT format holds .* GB; convert a variant of fewer bits"):
        convert_to_ort(graph, tmp_path / "mobile")
    assert not (tmp_path / "mobile").exists()


def test_file_that_computes_something_else_is_not_left(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned(tmp_path / "other", "llama", seed=3, rms_norm_eps=0.5)
    other = decoder_graph(tmp_path / "other", tmp_path / "graph")
    convert, of_other = ort_format._convert, ort_format._read(other)
    monkeypatch.setattr(ort_format, "_convert", lambda _, __, model, **how: convert(of_other, other, model, **how))
    with pytest.raises(GateError, match=r"model\.ort differs from .* in a logit"):
        convert_to_ort(graph, tmp_path / "mobile")
    assert list((tmp_path / "mobile").iterdir()) == []


@pytest.mark.parametrize("broken", ["missing", "no graph", "no weights"])
def test_what_cannot_be_read_is_one_line(broken: str, graph: Path, tmp_path: Path) -> None:
    copy = tmp_path / "onnx" / "model.onnx"
    copy.parent.mkdir()
    if broken == "no graph":
        copy.write_bytes(b"not a graph")
    elif broken == "no weights":
        copy.write_bytes(graph.read_bytes())
    for call in (lambda: convert_to_ort(copy, tmp_path / "mobile"), lambda: mobile_findings(copy)):
        with pytest.raises(EdgepruneError) as error:
            call()
        assert "\n" not in str(error.value)
        assert "model.onnx" in str(error.value)
    assert not list(tmp_path.glob("mobile/*"))
