"""GPT-NeoX (Pythia): one fused projection that holds [q k v] of head after head, plain MLP beside the attention."""

from typing import Any

from edgeprune.groups import Group, Slot, WidthKeys, block_groups, read_widths

BASE = "GPTNeoXForCausalLM"
SOURCE = "traced"
WIDTHS: WidthKeys = {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "channels": "intermediate_size"}
STOCK = ("channels",)  # its heads tile the hidden states
ATTRIBUTES: dict[str, dict[str, str]] = {}
INTERCEPT = {"heads": "attention_bias", "channels": None}


def groups(config: Any) -> list[Group]:
    """Groups of every layer."""
    return [group for layer in range(config.num_hidden_layers) for group in _layer_groups(config, layer)]


def _layer_groups(config: Any, layer: int) -> list[Group]:
    widths = read_widths(config, layer, WIDTHS)
    size = widths.head_dim
    attention, mlp = f"gpt_neox.layers.{layer}.attention", f"gpt_neox.layers.{layer}.mlp"
    return block_groups(
        layer,
        widths,
        q=Slot(f"{attention}.query_key_value", "out", size, stride=3 * size),
        k=Slot(f"{attention}.query_key_value", "out", size, start=size, stride=3 * size),
        v=Slot(f"{attention}.query_key_value", "out", size, start=2 * size, stride=3 * size),
        o=Slot(f"{attention}.dense", "in", size),
        channels=(Slot(f"{mlp}.dense_h_to_4h", "out", 1), Slot(f"{mlp}.dense_4h_to_h", "in", 1)),
    )
