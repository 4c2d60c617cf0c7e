"""A bundle whose graph is traced, from a model with ALiBi: what a device must get right without rotary positions."""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exported import SAMPLE, genai_continuation, pruned
from packing import packed_offsets

from edgeprune.checkpoint import load_pruned
from edgeprune_export.exporting import export
from edgeprune_export.graph_check import attention_nodes
from edgeprune_export.packing import pack
from edgeprune_export.parity import check_parity
from edgeprune_export.positions import DEFAULT_CONTEXT_TOKENS
from edgeprune_export.reference import continue_greedily
from edgeprune_export.weights import Weights
from edgeprune_runtime.bundle import graph_file, open_bundle
from edgeprune_runtime.errors import GateError
from edgeprune_runtime.generate import Generation
from edgeprune_runtime.session import Decoder
from edgeprune_runtime.validate import validate

LAYERS = 2
PROMPT = list(range(20, 44))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced") / "toy"
    pruned(folder, "bloom", num_hidden_layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name("bundle")
    export(checkpoint, out)
    return out


def test_bundle_validates_and_has_one_attention_operator_per_layer(bundle: Path) -> None:
    opened = open_bundle(bundle, verify=True)
    assert opened.variant.graph_source == "traced"
    assert opened.manifest.context_tokens == DEFAULT_CONTEXT_TOKENS
    assert len(set(opened.manifest.layers)) == LAYERS
    assert len(attention_nodes(ir.load(opened.graph_path).graph)) == LAYERS
    validate(opened, threads=1).ensure_passed()


def test_packed_copy_computes_what_the_bundle_does(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "key"))
    opened = open_bundle(shutil.copytree(bundle, tmp_path / "bundle"))
    assert packed_offsets(pack(opened).graph)
    result = validate(opened, threads=1)
    assert (result.passed, result.is_packed) == (True, True)


def test_runtime_and_onnxruntime_genai_continue_as_torch_does(checkpoint: Path, bundle: Path) -> None:
    expected = continue_greedily(load_pruned(checkpoint), PROMPT, 16)
    if 2 in expected:  # both stop at the end-of-text token
        expected = expected[: expected.index(2)]
    decoder = Decoder(open_bundle(bundle), threads=1)
    assert list(Generation(decoder, PROMPT, max_new_tokens=16)) == expected
    assert genai_continuation(bundle, PROMPT, len(expected)) == expected


def test_slopes_of_the_wrong_heads_are_refused(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    # The known mistake of another pruner: slopes that follow from a head's number among those that are left.
    widths = Weights(checkpoint).layer_widths()
    (tmp_path / "onnx").mkdir()
    for file in (graph_file("fp32"), f"{graph_file('fp32')}_data"):
        (tmp_path / file).write_bytes((bundle / file).read_bytes())
    graph = tmp_path / graph_file("fp32")
    model = load_pruned(checkpoint)
    check_parity(model, graph, SAMPLE, threads=1)
    broken = ir.load(graph)
    for width in widths:
        assert width.alibi_heads != tuple(range(width.heads))
        (picked,) = (
            value
            for value in broken.graph.initializers.values()
            if value.const_value is not None and value.const_value.numpy().tolist() == list(width.alibi_heads)
        )
        picked.const_value = ir.tensor(np.arange(width.heads), name=picked.name)
    ir.save(broken, graph)
    with pytest.raises(GateError, match="differ from the torch model"):
        check_parity(model, graph, SAMPLE, threads=1)
