"""Tiny random models of every supported type, built from config: for equality and shape, never for claims."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

# matrices this small gain nothing from threads, and threads of several test processes get in each other's way
torch.set_num_threads(1)

SHAPES: dict[str, dict[str, Any]] = {
    # name -> (model_type and) sizes; several KV-head ratios, odd counts
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "llama-mha": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-bias": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "smollm3": {"num_attention_heads": 6, "num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]},
}
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
NAMES = list(SHAPES)


def toy(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random float32 model in eval mode; its weights are large enough that every head and channel matters."""
    config = CONFIG_MAPPING[name.split("-")[0]](**COMMON | SHAPES[name] | changes)
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
