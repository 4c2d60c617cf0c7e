"""Plain operators and shape profiles, for TensorRT on NVIDIA GPUs.

TensorRT takes no contrib operator (a graph with GroupQueryAttention would fall back to CUDA piece by piece), and its
parser learned the operators of opset 23 one release at a time.

No engine cache is asked for: ONNX Runtime tells engines apart by the structure of their graph, not by its weights, so
that one pruned model would run with the weights of another (onnxruntime#6455), from whatever folder it is started in.
"""

import json
from dataclasses import replace
from pathlib import Path

from edgeprune_runtime.bundle import Manifest
from edgeprune_runtime.session import PREFILL_CHUNK_TOKENS
from edgeprune_runtime.tensorrt import for_engine, shape_profile

PROVIDER = "tensorrt"
GRAPH_SOURCE = "plain"
PRECISIONS = ("fp32",)
OPTIONS_FILE = "tensorrt_options.json"
NOTES = (
    f"edgeprune gives TensorRT its shape profiles itself; {OPTIONS_FILE} holds them for programs of your own: "
    'InferenceSession(graph, providers=[("TensorrtExecutionProvider", options)])',
    'there "trt_fp16_enable": "1" computes in float16, and "trt_engine_cache_enable": "1" keeps the engine, which '
    'takes minutes to build; each bundle needs a "trt_engine_cache_path" of its own, since weights are not compared',
)
VERIFIED = "checked against torch with the CPU provider; neither TensorRT nor the shape profiles were run"


def package(folder: Path, manifest: Manifest) -> Manifest:
    """Write the range of shapes that one engine is built for: one row, prompts in pieces as our runtime feeds them."""
    bounded = for_engine(manifest, tokens=PREFILL_CHUNK_TOKENS)
    options = shape_profile(bounded, rows=1, tokens=PREFILL_CHUNK_TOKENS)
    (folder / OPTIONS_FILE).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    prompt = min(PREFILL_CHUNK_TOKENS, bounded.context_tokens)
    note = f"the shape profiles are for one row, {prompt} new tokens at once and {bounded.context_tokens} in all"
    return replace(manifest, notes=(*manifest.notes, note))
