"""The gate closes on the mistakes that exporters make; each control breaks one thing in a graph that was right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exported import SAMPLE, decoder_graph, pruned
from onnx_ir.tape import Tape

from edgeprune_export import interface, parity
from edgeprune_export.graph_check import attention_nodes
from edgeprune_export.parity import check_parity
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.session import PREFILL_CHUNK_TOKENS

HEAD_DIM = 16
Array = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def model_and_graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("parity")
    model = pruned(folder / "model", "llama", head_dim=HEAD_DIM, num_attention_heads=12, num_key_value_heads=6)
    return model, decoder_graph(folder / "model", folder)


@pytest.fixture
def graph(model_and_graph: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    source = model_and_graph[1]
    for file in (source, source.with_name("model.onnx_data")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / source.name


def edit_weight(graph: Path, name: str, change: Callable[[Array], Array]) -> None:
    tensor = ir.load(graph).graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    stored = np.memmap(
        graph.with_name("model.onnx_data"), np.float32, "r+", tensor.offset or 0, tuple(tensor.shape.numpy())
    )
    changed = change(np.array(stored))
    assert not np.array_equal(changed, stored)
    stored[:] = changed
    stored.flush()


def refused(model: Any, graph: Path, why: str = "parity of model.onnx failed") -> None:
    with pytest.raises(GateError, match=why):
        check_parity(model, graph, SAMPLE, threads=1)


def test_right_graph_passes_with_figures(model_and_graph: tuple[Any, Path]) -> None:
    model, graph = model_and_graph
    result = check_parity(model, graph, SAMPLE, threads=1)
    assert result.max_abs_error < 1e-4
    assert 0 <= result.mean_kl <= result.p99_kl < 1e-6
    assert result.greedy_agreement == result.greedy_tokens > 0
    assert result.positions > 300


def test_swapped_query_heads_are_refused(model_and_graph: tuple[Any, Path], graph: Path) -> None:
    def swap(weight: Array) -> Array:
        heads = weight.reshape(weight.shape[0], -1, HEAD_DIM)
        heads[:, [0, 1]] = heads[:, [1, 0]]
        return weight

    model = model_and_graph[0]
    # Two heads of one KV group may change places if o_proj follows; here it does not.
    edit_weight(graph, "model.layers.1.self_attn.qkv_proj.weight", swap)
    refused(model, graph)


def test_other_logits_than_the_last_ones_where_these_are_asked_for_are_refused(
    model_and_graph: tuple[Any, Path], graph: Path
) -> None:
    broken = ir.load(graph)
    begin = broken.graph.node("lm_head/begin")
    begin.op_type = "Identity"  # as right as ever where all are asked for
    ir.save(broken, graph)
    refused(model_and_graph[0], graph, "worst in 'last logits'")


# Shifting cosines and sines by a position would shift all positions alike, which rotary embeddings do not see.
def test_cosines_shifted_by_one_are_refused(model_and_graph: tuple[Any, Path], graph: Path) -> None:
    broken = ir.load(graph)
    angles = broken.graph.node("rotary/angles").outputs[0]
    frequencies = broken.graph.initializers["rotary.frequencies"]
    tape = Tape()
    cosines = broken.graph.node("rotary/Cos")
    cosines.replace_input_with(0, tape.op("Sub", [angles, frequencies]))
    broken.graph.insert_before(cosines, tape.nodes)
    ir.save(broken, graph)
    refused(model_and_graph[0], graph)


def test_frequencies_in_another_order_are_refused(model_and_graph: tuple[Any, Path], graph: Path) -> None:
    broken = ir.load(graph)
    frequencies = broken.graph.initializers["rotary.frequencies"]
    assert frequencies.const_value is not None
    frequencies.const_value = ir.tensor(frequencies.const_value.numpy()[:, ::-1].copy(), name=frequencies.name)
    ir.save(broken, graph)
    refused(model_and_graph[0], graph)


@pytest.mark.parametrize("part", interface.PARTS)
def test_stale_kv_dimension_is_refused(model_and_graph: tuple[Any, Path], graph: Path, part: str) -> None:
    broken = ir.load(graph)
    value = next(value for value in broken.graph.inputs if value.name == interface.past_name(1, part))
    assert value.shape is not None
    heads = value.shape[1]
    assert isinstance(heads, int)
    value.shape = ir.Shape([value.shape[0], heads + 1, *list(value.shape)[2:]])
    ir.save(broken, graph)
    refused(model_and_graph[0], graph, "shapes")


def test_last_slot_off_by_one_is_refused(model_and_graph: tuple[Any, Path], graph: Path) -> None:
    broken = ir.load(graph)
    broken.graph.initializers["one_i32"].const_value = ir.tensor(np.array([2], np.int32), name="one_i32")
    ir.save(broken, graph)
    refused(model_and_graph[0], graph)


@pytest.mark.parametrize("reader", ["mask/present", "positions/seen"])
def test_attention_mask_off_by_one_is_refused(model_and_graph: tuple[Any, Path], graph: Path, reader: str) -> None:
    broken = ir.load(graph)
    mask = next(value for value in broken.graph.inputs if value.name == "attention_mask")
    node = next(node for node in broken.graph if node.name == reader)
    tape = Tape()
    bounds = {
        name: tape.initializer(ir.tensor(np.array([number], np.int64), name=name))
        for name, number in {"from0": 0, "from1": 1, "until": 2**62}.items()
    }
    rest = tape.op("Slice", [mask, bounds["from1"], bounds["until"], bounds["from1"]])
    first = tape.op("Slice", [mask, bounds["from0"], bounds["from1"], bounds["from1"]])
    rolled = tape.op("Concat", [rest, first], {"axis": 1})
    for value in tape.initializers:
        broken.graph.register_initializer(value)
    broken.graph.insert_before(node, tape.nodes)
    node.replace_input_with(0, rolled)
    ir.save(broken, graph)
    refused(model_and_graph[0], graph)


@pytest.mark.parametrize("error_tokens", [-1, 1])
def test_window_off_by_one_is_refused(tmp_path: Path, error_tokens: int) -> None:
    model = pruned(tmp_path / "model", "mistral-window", head_dim=HEAD_DIM)
    graph = decoder_graph(tmp_path / "model", tmp_path)
    check_parity(model, graph, SAMPLE, threads=1)
    broken = ir.load(graph)
    window = np.array(model.config.sliding_window + error_tokens, np.int64)
    broken.graph.initializers["window"].const_value = ir.tensor(window, name="window")
    ir.save(broken, graph)
    refused(model, graph)


def test_score_softcap_that_is_left_out_is_refused(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", "gemma2", head_dim=HEAD_DIM)
    graph = decoder_graph(tmp_path / "model", tmp_path)
    broken = ir.load(graph)
    attention_nodes(broken.graph)[1].attributes["softcap"] = ir.AttrFloat32("softcap", 0.0)
    ir.save(broken, graph)
    refused(model, graph)


def test_missing_input_is_refused(model_and_graph: tuple[Any, Path], graph: Path) -> None:
    broken = ir.load(graph)
    value = next(value for value in broken.graph.inputs if value.name == "attention_mask")
    value.name = "mask"
    ir.save(broken, graph)
    refused(model_and_graph[0], graph, "contract")


def test_values_that_are_not_numbers_are_refused(model_and_graph: tuple[Any, Path], graph: Path) -> None:
    edit_weight(graph, "model.norm.weight", lambda weight: np.full_like(weight, np.nan))
    refused(model_and_graph[0], graph)


def test_too_little_text_is_refused(model_and_graph: tuple[Any, Path]) -> None:
    model, graph = model_and_graph
    with pytest.raises(EdgepruneError, match="sample text has 3 tokens"):
        check_parity(model, graph, [[1, 2, 3]])


def test_tolerance_decides(model_and_graph: tuple[Any, Path]) -> None:
    model, graph = model_and_graph
    with pytest.raises(GateError, match=r"tolerance 1e-08"):
        check_parity(model, graph, SAMPLE, tolerance=1e-8, threads=1)


@pytest.mark.parametrize("spoilt_row", [0, 1])
def test_one_value_that_is_not_a_number_is_not_forgotten(spoilt_row: int) -> None:
    comparison = parity.Comparison(1.0)
    for row in range(3):
        expected = np.array([[1.0, 2.0]], np.float32)
        found = expected.copy()
        if row == spoilt_row:
            found[0, 0] = np.nan
        comparison.add("rows", expected, found)
    assert np.isnan(comparison.result(1, 1).max_abs_error)
    with pytest.raises(GateError, match="differ from the torch model by up to nan"):
        parity.judge(Path("model.onnx"), comparison.result(1, 1))


def test_prompt_longer_than_a_piece_of_the_runtime_is_compared(tmp_path: Path) -> None:
    model = pruned(tmp_path / "model", "llama", head_dim=HEAD_DIM, max_position_embeddings=1024)
    result = check_parity(model, decoder_graph(tmp_path / "model", tmp_path), SAMPLE, threads=1)
    longest = max(int(name.split()[1]) for name in result.checks if name.startswith("prefill"))
    assert longest > PREFILL_CHUNK_TOKENS
    assert {f"decode after {longest}", f"decode after {PREFILL_CHUNK_TOKENS}"} <= set(result.checks)
