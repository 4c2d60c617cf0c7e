"""The gates that need one block in memory find what the gates of a whole model find."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import toys
from exported import SAMPLE, pruned

from edgeprune.calibration import Calibration
from edgeprune_export import exporting
from edgeprune_export.block_gate import STAGE_FILE, check_by_blocks
from edgeprune_export.exporting import export
from edgeprune_export.gptq import RoundingData
from edgeprune_export.proving import BY_BLOCKS, needs_blocks
from edgeprune_export.quantize import FLOAT32, PRECISIONS, Precision, RoundedWeights
from edgeprune_export.weights import Weights
from edgeprune_runtime.bundle import Manifest, open_bundle
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.validate import validate

INT8 = replace(PRECISIONS["int8"], block_size=16, accuracy_level=0)
INT4 = replace(PRECISIONS["int4"], block_size=16, accuracy_level=0, max_perplexity_ratio=9.0, min_argmax_agreement=0.0)
DYNAMIC = replace(PRECISIONS["int8-dynamic"], max_perplexity_ratio=9.0, min_argmax_agreement=0.0)
DECODER_TOYS = ("llama", "llama-mha", "mistral-window", "phi3", "gemma2", "gemma3_text", "qwen2", "qwen3", "smollm3")
LITTLE = 1


def variant(folder: Path, name: str) -> tuple[Manifest, dict[str, float]]:
    manifest = Manifest.load(folder)
    return manifest, dict(manifest.variants[name].parity["checks"])  # type: ignore[arg-type]  # as it was written


@pytest.mark.parametrize("name", DECODER_TOYS)
@pytest.mark.parametrize("precision", [FLOAT32, INT4, DYNAMIC], ids=["fp32", "int4", "int8-dynamic"])
def test_finds_what_the_whole_model_finds(name: str, precision: Precision, tmp_path: Path) -> None:
    changes = {} if name == "mistral-window" else {"head_dim": 16}
    pruned(tmp_path / "model", name, **changes)
    for folder, limit in (("whole", None), ("blocks", LITTLE)):
        export(tmp_path / "model", tmp_path / folder, precisions=(precision,), max_memory_bytes=limit)
        assert validate(open_bundle(tmp_path / folder, verify=True), threads=1).passed
        assert not list((tmp_path / folder).rglob(STAGE_FILE))
    whole, blocks = (variant(tmp_path / folder, precision.name) for folder in ("whole", "blocks"))
    assert whole[1].keys() == blocks[1].keys()
    assert blocks[0].variants[precision.name].parity["max_abs_error"] < (1.0 if precision.rounds_inputs else 1e-4)
    assert (
        blocks[0].variants[precision.name].parity["positions"] == whole[0].variants[precision.name].parity["positions"]
    )
    assert BY_BLOCKS in blocks[0].notes
    assert BY_BLOCKS not in whole[0].notes
    if precision.is_rounded:
        of_whole, of_blocks = (manifest.variants[precision.name].fidelity for manifest, _ in (whole, blocks))
        for figure in ("perplexity", "perplexity_ratio", "mean_kl", "argmax_agreement"):
            assert of_blocks[figure] == pytest.approx(of_whole[figure], rel=1e-3)
        assert of_blocks["greedy_flips"] is None
    graphs = [
        (tmp_path / folder / whole[0].variants[precision.name].data[0]).read_bytes() for folder in ("whole", "blocks")
    ]
    assert graphs[0] == graphs[1]


def test_half_floats_are_checked_by_blocks_too(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    manifest = export(
        tmp_path / "model", tmp_path / "bundle", precisions=(PRECISIONS["fp16"],), max_memory_bytes=LITTLE
    )
    assert manifest.variants["fp16"].fidelity["argmax_agreement"] > 0.9


def test_weights_that_data_has_rounded_are_checked_by_blocks_too(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    ids = torch.randint(3, toys.COMMON["vocab_size"], (12, 24), generator=torch.Generator().manual_seed(0))
    rounding = RoundingData(Calibration(ids, "random", 0, ""))
    manifest = export(
        tmp_path / "model", tmp_path / "bundle", precisions=(INT4,), rounding=rounding, max_memory_bytes=LITTLE
    )
    assert manifest.variants["int4"].parity["max_abs_error"] < 1e-4


def test_a_weight_of_one_block_that_differs_is_refused(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    export(tmp_path / "model", tmp_path / "bundle")
    graph = tmp_path / "bundle/onnx/model.onnx"
    tensor = ir.load(graph).graph.initializers["model.layers.1.mlp.down_proj.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    stored = np.memmap(
        graph.with_name("model.onnx_data"), np.float32, "r+", tensor.offset or 0, tuple(tensor.shape.numpy())
    )
    stored[0] += 0.1
    stored.flush()
    rounded = RoundedWeights(Weights(tmp_path / "model"), FLOAT32)
    with pytest.raises(GateError, match=r"parity of model\.onnx failed: logits differ"):
        check_by_blocks(tmp_path / "model", graph, rounded, SAMPLE)


def test_weights_that_lose_too_much_are_refused(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    strict = replace(INT4, max_perplexity_ratio=0.5)
    with pytest.raises(GateError, match="int4 loses too much"):
        export(tmp_path / "model", tmp_path / "bundle", precisions=(strict,), max_memory_bytes=LITTLE)
    assert not (tmp_path / "bundle").exists()


def test_a_limit_of_greedy_flips_is_refused_where_none_would_be_counted(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "llama", head_dim=16)
    limited = replace(INT8, max_greedy_flips=0.5)
    with pytest.raises(EdgepruneError, match=r"--max-greedy-flips needs the whole model in memory.*raise --max-memory"):
        export(tmp_path / "model", tmp_path / "bundle", precisions=(limited,), max_memory_bytes=LITTLE)
    assert not (tmp_path / "bundle").exists()


def test_a_traced_graph_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "gpt2")
    with pytest.raises(EdgepruneError, match=r"checking a traced graph takes the whole model.*raise --max-memory"):
        export(tmp_path / "model", tmp_path / "bundle", max_memory_bytes=LITTLE)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_fits_is_checked_whole() -> None:
    assert not needs_blocks(100_000_000, "decoder", 1_000_000_000)
    assert needs_blocks(100_000_001, "decoder", 1_000_000_000)
    assert not needs_blocks(1000, "traced", None)
    assert exporting.needs_blocks is needs_blocks
