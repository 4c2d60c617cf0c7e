"""Tiny random models of every supported type, built from config: for equality and shape, never for claims."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

# matrices this small gain nothing from threads, and threads of several test processes get in each other's way
torch.set_num_threads(1)

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]

SHAPES: dict[str, dict[str, Any]] = {
    # name -> (model_type and) sizes; several KV-head ratios, odd counts
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "llama-mha": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-bias": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "llama-rope": {"num_attention_heads": 6, "num_key_value_heads": 1, "rope_parameters": LLAMA3},
    "mistral": {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": None},
    "mistral-window": {"num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 4},
    "qwen2": {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "smollm3": {"num_attention_heads": 6, "num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]},
    "gemma2": {
        "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 4, "layer_types": LOCAL_AND_GLOBAL,
        "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 4, "layer_types": LOCAL_AND_GLOBAL,
        "query_pre_attn_scalar": 8,
    },
    "phi3": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "phi3-longrope": {
        "num_attention_heads": 6, "num_key_value_heads": 6, "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 64,
    },
    "gpt2": {"num_attention_heads": 6, "n_inner": 80},
    "gpt_neo": {"num_attention_heads": 3, "attention_types": [[["global", "local"], 1], [["global"], 1]],
                "window_size": 4},
    "gpt_neox": {"num_attention_heads": 6, "tie_word_embeddings": False},
    "gpt_neox-serial": {"num_attention_heads": 3, "use_parallel_residual": False, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    "opt": {"num_attention_heads": 6, "ffn_dim": 80},
    "opt-narrow": {"num_attention_heads": 3, "ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "bloom": {"num_attention_heads": 6},
    "bloom-odd": {"num_attention_heads": 3, "apply_residual_connection_post_layernorm": True},
}  # fmt: skip
COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
UNKNOWN: dict[str, tuple[str, ...]] = {
    # what configs of a type do not state: their heads tile the hidden states, and some name the MLP's width otherwise
    "bloom": ("head_dim", "intermediate_size", "max_position_embeddings"),
    "gpt2": ("head_dim", "intermediate_size"),
    "gpt_neo": ("head_dim",),
    "gpt_neox": ("head_dim",),
    "opt": ("head_dim", "intermediate_size"),
}
NAMES = list(SHAPES)
TYPES = [name for name in NAMES if "-" not in name]
KINDS = ["llama", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom"]
"""One of each sort of block, for what takes long."""


def per_layer_lists(name: str, layers: int) -> dict[str, Any]:
    """What the config of a toy says layer by layer, for another number of layers."""
    model_type = name.split("-")[0]
    if model_type == "gpt_neo":
        return {"attention_types": [[["global", "local"], layers // 2], [["global"], layers % 2]]}
    if model_type == "smollm3":
        return {"no_rope_layers": ([1, 0] * layers)[:layers]}
    return {"layer_types": (LOCAL_AND_GLOBAL * layers)[:layers]} if model_type.startswith("gemma") else {}


def two_blocks(name: str) -> dict[str, Any]:
    """Changes that leave a toy two blocks, one of each sort that it has, for what takes as long as there are blocks."""
    return {"num_hidden_layers": 2, **per_layer_lists(name, 2)}


def least_blocks(name: str) -> dict[str, Any]:
    """As `two_blocks`, but one block where all are of one sort."""
    return two_blocks(name) if per_layer_lists(name, 2) else {"num_hidden_layers": 1}


def toy(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random float32 model in eval mode; its weights are large enough that every head and channel matters."""
    model_type = name.split("-")[0]
    sizes = COMMON | SHAPES[name] | changes
    known = {key: value for key, value in sizes.items() if key not in UNKNOWN.get(model_type, ())}
    config = CONFIG_MAPPING[model_type](**known)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model
