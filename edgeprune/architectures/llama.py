"""Llama blocks: separate q/k/v/o projections with grouped queries, and a gated MLP (gate, up, down)."""

from typing import Any

from edgeprune.groups import Group, Slot

BASE = "LlamaForCausalLM"
SOURCE = "decoder"
# Stock Llama refuses head counts that do not divide hidden_size. Mistral without a window computes the same and takes
# them; a checkpoint is saved as one only after its logits were found equal.
STAND_IN = ("mistral", {"sliding_window": None})
# Switches that give every Linear of a kind a bias, so that a refit may add an intercept.
INTERCEPT = {"heads": "attention_bias", "channels": "mlp_bias"}


def groups(config: Any) -> list[Group]:
    """Groups of every layer; the sizes are read per layer, so that a pruned model can be pruned again."""
    return [group for layer in range(config.num_hidden_layers) for group in _layer_groups(config, layer)]


def _layer_groups(config: Any, layer: int) -> list[Group]:
    sizes = config.per_layer_config[layer]
    heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    head_dim = getattr(sizes, "head_dim", None) or config.hidden_size // heads
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    return [
        Group(
            name=f"layers.{layer}.kv_heads",
            kind="kv_heads",
            layer=layer,
            units=kv_heads,
            slots=(Slot(f"{attention}.k_proj", "out", head_dim), Slot(f"{attention}.v_proj", "out", head_dim)),
        ),
        Group(
            name=f"layers.{layer}.heads",
            kind="heads",
            layer=layer,
            units=heads,
            slots=(Slot(f"{attention}.q_proj", "out", head_dim), Slot(f"{attention}.o_proj", "in", head_dim)),
            parent=f"layers.{layer}.kv_heads",
        ),
        Group(
            name=f"layers.{layer}.channels",
            kind="channels",
            layer=layer,
            units=sizes.intermediate_size,
            slots=(
                Slot(f"{mlp}.gate_proj", "out", 1),
                Slot(f"{mlp}.up_proj", "out", 1),
                Slot(f"{mlp}.down_proj", "in", 1),
            ),
        ),
    ]
