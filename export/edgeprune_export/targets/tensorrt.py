"""Plain operators and shape profiles, for TensorRT on NVIDIA GPUs.

TensorRT takes no contrib operator (a graph with GroupQueryAttention would fall back to CUDA piece by piece), and its
parser learned the operators of opset 23 one release at a time. It builds an engine for a range of shapes; without a
stated range it builds another one whenever a text outgrows what it has seen, which is at every token.
"""

import json
from dataclasses import replace
from pathlib import Path

from edgeprune_export.genai import MAX_LENGTH_TOKENS
from edgeprune_runtime.bundle import Manifest
from edgeprune_runtime.session import PREFILL_CHUNK_TOKENS

PROVIDER = "tensorrt"
GRAPH_SOURCE = "plain"
PRECISIONS = ("fp32",)
OPTIONS_FILE = "tensorrt_options.json"
NOTES = (
    f'{OPTIONS_FILE} holds provider options for ONNX Runtime: InferenceSession(graph, providers=[("'
    'TensorrtExecutionProvider", options)]); "trt_fp16_enable": "1" computes in float16',
)
VERIFIED = "checked against torch with the CPU provider; neither TensorRT nor the shape profiles were run"


def package(folder: Path, manifest: Manifest) -> Manifest:
    """Write the range of shapes that one engine is built for: one row, prompts in pieces as our runtime feeds them."""
    most = min(manifest.context_tokens, MAX_LENGTH_TOKENS)
    prompt = min(PREFILL_CHUNK_TOKENS, most)
    # (new tokens, tokens in the cache): a first token, one somewhere in a text, the last piece of a long prompt
    ranges = {"min": (1, 0), "opt": (1, most // 2), "max": (prompt, most - prompt)}
    options = {f"trt_profile_{name}_shapes": _shapes(manifest, *sizes) for name, sizes in ranges.items()}
    options["trt_engine_cache_enable"] = "1"  # building an engine takes minutes
    (folder / OPTIONS_FILE).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    note = f"the shape profiles are for one row, {prompt} new tokens at once and {most} in all"
    return replace(manifest, notes=(*manifest.notes, note))


def _shapes(manifest: Manifest, tokens: int, past_tokens: int) -> str:
    """Shapes of all inputs in TensorRT's notation, such as "input_ids:1x1,attention_mask:1x1"."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_ids": (1, tokens),
        "attention_mask": (1, past_tokens + tokens),
    }
    for index, layer in enumerate(manifest.layers):
        for part in ("key", "value"):
            shapes[f"past_key_values.{index}.{part}"] = (1, layer.kv_heads, past_tokens, layer.head_dim)
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
