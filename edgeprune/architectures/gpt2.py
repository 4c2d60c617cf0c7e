"""GPT-2: all rows of q, then k, then v in one `Conv1D` (a Linear whose weight is stored as (in, out)), plain MLP."""

from typing import Any

from edgeprune.groups import Group, Slot, WidthKeys, block_groups, read_widths, stacked_qkv

BASE = "GPT2LMHeadModel"
SOURCE = "traced"
WIDTHS: WidthKeys = {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "channels": "n_inner"}
STOCK = ("channels",)  # its heads tile the hidden states
ATTRIBUTES = {"attn": {"num_heads": "heads", "split_size": "inner"}}
INTERCEPT = {"heads": None, "channels": None}


def layer_groups(config: Any, layer: int) -> list[Group]:
    """Groups of one layer."""
    widths = read_widths(config, layer, WIDTHS, channels=4 * config.hidden_size)
    attention, mlp = f"transformer.h.{layer}.attn", f"transformer.h.{layer}.mlp"
    return block_groups(
        layer,
        widths,
        **stacked_qkv(f"{attention}.c_attn", widths),
        o=Slot(f"{attention}.c_proj", "in", widths.head_dim),
        channels=(Slot(f"{mlp}.c_fc", "out", 1), Slot(f"{mlp}.c_proj", "in", 1)),
    )
