"""GPT-Neo: separate q/k/v/out projections, one query head per KV head, plain MLP; local and global layers."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from edgeprune.groups import Group, Slot, WidthKeys, block_groups, read_widths, separate_qkv

BASE = "GPTNeoForCausalLM"
SOURCE = "traced"
WIDTHS: WidthKeys = {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "channels": "intermediate_size"}
STOCK = ("channels",)  # its heads tile the hidden states
ATTRIBUTES = {"attn.attention": {"num_heads": "heads"}}
RETURNS_TUPLE = True
INTERCEPT = {"heads": None, "channels": None}


def layer_groups(config: Any, layer: int) -> list[Group]:
    """Groups of one layer."""
    widths = read_widths(config, layer, WIDTHS, channels=4 * config.hidden_size)
    attention, mlp = f"transformer.h.{layer}.attn.attention", f"transformer.h.{layer}.mlp"
    return block_groups(
        layer,
        widths,
        **separate_qkv(attention, widths.head_dim),
        o=Slot(f"{attention}.out_proj", "in", widths.head_dim),
        channels=(Slot(f"{mlp}.c_fc", "out", 1), Slot(f"{mlp}.c_proj", "in", 1)),
    )


def attention_routes(model: Any, attend: Any, call: Any) -> Iterator[tuple[Any, str, Any]]:
    """Replacements, as (owner, attribute, value), under which attention goes through `attend` while it is traced."""
    for block in model.transformer.h:
        attention = block.attn.attention
        window = model.config.window_size if attention.attention_type == "local" else None
        yield attention, "_attn", partial(_attention, attend, call, window)


def _attention(
    attend: Any, call: Any, window: int | None, query: Any, key: Any, value: Any, _: Any
) -> tuple[Any, None]:
    # The mask that comes along knows no window, and stock code's own window counts padding.
    output = attend(query, key, value, call.bias(window), scale=1.0)
    return output.transpose(1, 2), None
