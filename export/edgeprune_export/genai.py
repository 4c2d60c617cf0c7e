"""`genai_config.json`: what onnxruntime-genai (0.15 or later) must know to run a bundle.

The file has one KV head count and one head_dim for the whole model. Where layers differ, onnxruntime-genai reads each
layer's own from the graph's input shapes; the file states the largest.
"""

from collections.abc import Sequence
from typing import Any

from edgeprune_runtime.bundle import Manifest, graph_file

# A session allocates its KV cache for this many tokens at once; a context of 128k would take gigabytes.
MAX_LENGTH_TOKENS = 4096

# Target -> what onnxruntime-genai calls its provider; all else runs on the CPU there.
PROVIDERS = {"cuda": "cuda", "directml": "dml"}


def genai_config(manifest: Manifest, *, variant: str) -> dict[str, Any]:
    """The configuration for one variant of a bundle."""
    layers = manifest.layers
    # Only GroupQueryAttention can write new keys into the buffer that holds the old ones.
    options: list[dict[str, Any]] = [{PROVIDERS[manifest.target]: {}}] if manifest.target in PROVIDERS else []
    share_buffer = manifest.variants[variant].graph_source == "decoder"
    return {
        "model": {
            "type": "decoder",
            "context_length": manifest.context_tokens,
            "vocab_size": manifest.vocab_size,
            "bos_token_id": _or(manifest.bos_token_id, manifest.eos_token_ids),
            "eos_token_id": list(manifest.eos_token_ids),
            "pad_token_id": _or(manifest.pad_token_id, manifest.eos_token_ids),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": options},
                "filename": graph_file(variant),
                "hidden_size": manifest.hidden_size,
                "head_size": max(layer.head_dim for layer in layers),
                "num_attention_heads": max(layer.heads for layer in layers),
                "num_key_value_heads": max(layer.kv_heads for layer in layers),
                "num_hidden_layers": len(layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(MAX_LENGTH_TOKENS, manifest.context_tokens),
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": share_buffer,
        },
    }


def _or(token_id: int | None, others: Sequence[int]) -> int:
    """A token id where the format wants one even if the model has none."""
    return token_id if token_id is not None else (others[0] if others else 0)
