"""Phi-3: Llama blocks with fused projections, all rows of q, then of k, then of v; all gates, then all ups."""

from typing import Any

from edgeprune.groups import KEYS, Group, Slot, block_groups, read_widths, stacked_qkv

BASE = "Phi3ForCausalLM"
SOURCE = "decoder"
WIDTHS = KEYS
STOCK = ("heads", "kv_heads", "channels")
ATTRIBUTES = {"self_attn": {"num_key_value_groups": "heads_each", "num_key_value_heads": "kv_heads"}}
CONFIG_READERS = ("self_attn",)  # splits q from k and v at config.num_attention_heads * head_dim


def layer_groups(config: Any, layer: int) -> list[Group]:
    """Groups of one layer."""
    widths = read_widths(config, layer, WIDTHS)
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    return block_groups(
        layer,
        widths,
        **stacked_qkv(f"{attention}.qkv_proj", widths),
        o=Slot(f"{attention}.o_proj", "in", widths.head_dim),
        channels=(
            Slot(f"{mlp}.gate_up_proj", "out", 1),
            Slot(f"{mlp}.gate_up_proj", "out", 1, start=widths.channels),
            Slot(f"{mlp}.down_proj", "in", 1),
        ),
    )
