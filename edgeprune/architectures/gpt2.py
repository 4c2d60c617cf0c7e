"""GPT-2: all rows of q, then k, then v in one `Conv1D` (a Linear whose weight is stored as (in, out)), plain MLP."""

from typing import Any

from edgeprune.groups import Group, Slot, WidthKeys, block_groups, read_widths

BASE = "GPT2LMHeadModel"
SOURCE = "traced"
WIDTHS: WidthKeys = {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "channels": "n_inner"}
STOCK = ("channels",)  # its heads tile the hidden states
ATTRIBUTES = {"attn": {"num_heads": "heads", "split_size": "inner"}}
INTERCEPT = {"heads": None, "channels": None}


def groups(config: Any) -> list[Group]:
    """Groups of every layer."""
    return [group for layer in range(config.num_hidden_layers) for group in _layer_groups(config, layer)]


def _layer_groups(config: Any, layer: int) -> list[Group]:
    widths = read_widths(config, layer, WIDTHS, channels=4 * config.hidden_size)
    size, inner = widths.head_dim, widths.heads * widths.head_dim
    attention, mlp = f"transformer.h.{layer}.attn", f"transformer.h.{layer}.mlp"
    return block_groups(
        layer,
        widths,
        q=Slot(f"{attention}.c_attn", "out", size),
        k=Slot(f"{attention}.c_attn", "out", size, start=inner),
        v=Slot(f"{attention}.c_attn", "out", size, start=2 * inner),
        o=Slot(f"{attention}.c_proj", "in", size),
        channels=(Slot(f"{mlp}.c_fc", "out", 1), Slot(f"{mlp}.c_proj", "in", 1)),
    )
