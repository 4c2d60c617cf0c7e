"""What TensorRT must be told of the shapes that will come: a profile, the range that it builds an engine for.

Without one it builds another engine whenever a text outgrows what it has seen, which is at every token. ONNX Runtime
takes several profiles and runs the first alone (onnxruntime#31624), so one holds prompts and decoding.
"""

from collections.abc import Sequence
from dataclasses import replace

from edgeprune_runtime.bundle import Layer, Manifest

MAX_TOKENS = 4096
"""An engine takes memory for its largest shapes, whether they come or not; a long context would take all there is."""


def for_engine(manifest: Manifest, *, tokens: int) -> Manifest:
    """The manifest with the context that an engine is built for, which holds `tokens` new ones at once."""
    return replace(manifest, context_tokens=min(manifest.context_tokens, max(MAX_TOKENS, tokens)))


def shape_profile(manifest: Manifest, *, rows: int, tokens: int) -> dict[str, str]:
    """Provider options for up to `rows` rows of up to `tokens` new tokens, behind any cache that the context holds.

    No text reaches the largest shapes all at once. But TensorRT refuses a profile whose largest shapes contradict
    each other, so the mask is as wide as the longest cache and the most new tokens together.
    """
    last = manifest.context_tokens - 1
    sizes = {"min": (1, 1, 0), "opt": (1, 1, last // 2), "max": (rows, min(tokens, manifest.context_tokens), last)}
    return {f"trt_profile_{name}_shapes": _shapes(manifest.layers, *size) for name, size in sizes.items()}


def _shapes(layers: Sequence[Layer], rows: int, tokens: int, past_tokens: int) -> str:
    """Shapes of all inputs in TensorRT's notation, such as "input_ids:1x1,attention_mask:1x1"."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_ids": (rows, tokens),
        "attention_mask": (rows, past_tokens + tokens),
    }
    for index, layer in enumerate(layers):
        for part in ("key", "value"):
            shapes[f"past_key_values.{index}.{part}"] = (rows, layer.kv_heads, past_tokens, layer.head_dim)
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
