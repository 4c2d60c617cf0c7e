"""Llama blocks: separate q/k/v/o projections with grouped queries, and a gated MLP (gate, up, down)."""

from typing import Any

from edgeprune.groups import KEYS, Group, Slot, block_groups, read_widths

BASE = "LlamaForCausalLM"
SOURCE = "decoder"
WIDTHS = KEYS
STOCK = ("heads", "kv_heads", "channels")
ATTRIBUTES = {"self_attn": {"num_key_value_groups": "heads_each"}, "mlp": {"intermediate_size": "channels"}}
# Stock Llama refuses head counts that do not divide hidden_size. Mistral without a window computes the same and takes
# them; a checkpoint is saved as one only after its logits were found equal.
STAND_IN = ("mistral", {"sliding_window": None})
INTERCEPT = {"heads": "attention_bias", "channels": "mlp_bias"}


def groups(config: Any) -> list[Group]:
    """Groups of every layer; the sizes are read per layer, so that a pruned model can be pruned again."""
    return [group for layer in range(config.num_hidden_layers) for group in _layer_groups(config, layer)]


def _layer_groups(config: Any, layer: int) -> list[Group]:
    widths = read_widths(config, layer, WIDTHS)
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    return block_groups(
        layer,
        widths,
        q=Slot(f"{attention}.q_proj", "out", widths.head_dim),
        k=Slot(f"{attention}.k_proj", "out", widths.head_dim),
        v=Slot(f"{attention}.v_proj", "out", widths.head_dim),
        o=Slot(f"{attention}.o_proj", "in", widths.head_dim),
        channels=(
            Slot(f"{mlp}.gate_proj", "out", 1),
            Slot(f"{mlp}.up_proj", "out", 1),
            Slot(f"{mlp}.down_proj", "in", 1),
        ),
    )
