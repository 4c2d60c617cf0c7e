"""GPT-NeoX (Pythia): one fused projection that holds [q k v] of head after head, plain MLP beside the attention."""

from typing import Any

from edgeprune.groups import Group, Slot, WidthKeys, block_groups, interleaved_qkv, read_widths

BASE = "GPTNeoXForCausalLM"
SOURCE = "traced"
WIDTHS: WidthKeys = {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "channels": "intermediate_size"}
STOCK = ("channels",)  # its heads tile the hidden states
ATTRIBUTES: dict[str, dict[str, str]] = {}
INTERCEPT = {"heads": "attention_bias", "channels": None}


def layer_groups(config: Any, layer: int) -> list[Group]:
    """Groups of one layer."""
    widths = read_widths(config, layer, WIDTHS)
    attention, mlp = f"gpt_neox.layers.{layer}.attention", f"gpt_neox.layers.{layer}.mlp"
    return block_groups(
        layer,
        widths,
        **interleaved_qkv(f"{attention}.query_key_value", widths.head_dim),
        o=Slot(f"{attention}.dense", "in", widths.head_dim),
        channels=(Slot(f"{mlp}.dense_h_to_4h", "out", 1), Slot(f"{mlp}.dense_4h_to_h", "in", 1)),
    )
