"""Llama blocks: separate q/k/v/o projections with grouped queries, and a gated MLP (gate, up, down)."""

from typing import Any

from edgeprune.groups import KEYS, Group, Slot, block_groups, read_widths, separate_qkv

BASE = "LlamaForCausalLM"
SOURCE = "decoder"
WIDTHS = KEYS
STOCK = ("heads", "kv_heads", "channels")
ATTRIBUTES = {"self_attn": {"num_key_value_groups": "heads_each"}, "mlp": {"intermediate_size": "channels"}}
# Stock Llama refuses head counts that do not divide hidden_size. Mistral without a window computes the same and takes
# them; a checkpoint is saved as one only after its logits were found equal.
STAND_IN = ("mistral", {"sliding_window": None})
INTERCEPT = {"heads": "attention_bias", "channels": "mlp_bias"}


def layer_groups(config: Any, layer: int) -> list[Group]:
    """Groups of one layer; its own sizes are read, so that a pruned model can be pruned again."""
    widths = read_widths(config, layer, WIDTHS)
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    return block_groups(
        layer,
        widths,
        **separate_qkv(attention, widths.head_dim),
        o=Slot(f"{attention}.o_proj", "in", widths.head_dim),
        channels=(
            Slot(f"{mlp}.gate_proj", "out", 1),
            Slot(f"{mlp}.up_proj", "out", 1),
            Slot(f"{mlp}.down_proj", "in", 1),
        ),
    )
