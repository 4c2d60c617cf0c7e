"""Phi-3: Llama blocks with fused projections, all rows of q, then of k, then of v; all gates, then all ups."""

from typing import Any

from edgeprune.groups import KEYS, Group, Slot, block_groups, read_widths

BASE = "Phi3ForCausalLM"
SOURCE = "decoder"
WIDTHS = KEYS
STOCK = ("heads", "kv_heads", "channels")
ATTRIBUTES = {"self_attn": {"num_key_value_groups": "heads_each", "num_key_value_heads": "kv_heads"}}
CONFIG_READERS = ("self_attn",)  # splits q from k and v at config.num_attention_heads * head_dim


def groups(config: Any) -> list[Group]:
    """Groups of every layer."""
    return [group for layer in range(config.num_hidden_layers) for group in _layer_groups(config, layer)]


def _layer_groups(config: Any, layer: int) -> list[Group]:
    widths = read_widths(config, layer, WIDTHS)
    size = widths.head_dim
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    qkv, queries, keys = f"{attention}.qkv_proj", widths.heads * size, widths.kv_heads * size
    return block_groups(
        layer,
        widths,
        q=Slot(qkv, "out", size),
        k=Slot(qkv, "out", size, start=queries),
        v=Slot(qkv, "out", size, start=queries + keys),
        o=Slot(f"{attention}.o_proj", "in", size),
        channels=(
            Slot(f"{mlp}.gate_up_proj", "out", 1),
            Slot(f"{mlp}.gate_up_proj", "out", 1, start=widths.channels),
            Slot(f"{mlp}.down_proj", "in", 1),
        ),
    )
