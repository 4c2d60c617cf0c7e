"""OPT: separate q/k/v/out projections, one query head per KV head, plain MLP; norms before or after either.

The projections of narrow embeddings (opt-350m) lie outside the blocks, so a cut does not touch them.
"""

from typing import Any

from edgeprune.groups import Group, Slot, WidthKeys, block_groups, read_widths

BASE = "OPTForCausalLM"
SOURCE = "traced"
WIDTHS: WidthKeys = {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "channels": "ffn_dim"}
STOCK = ("channels",)  # its heads tile the hidden states
ATTRIBUTES = {"self_attn": {"num_heads": "heads"}}
INTERCEPT = {"heads": "enable_bias", "channels": "enable_bias"}


def groups(config: Any) -> list[Group]:
    """Groups of every layer."""
    return [group for layer in range(config.num_hidden_layers) for group in _layer_groups(config, layer)]


def _layer_groups(config: Any, layer: int) -> list[Group]:
    widths = read_widths(config, layer, WIDTHS)
    block = f"model.decoder.layers.{layer}"
    return block_groups(
        layer,
        widths,
        q=Slot(f"{block}.self_attn.q_proj", "out", widths.head_dim),
        k=Slot(f"{block}.self_attn.k_proj", "out", widths.head_dim),
        v=Slot(f"{block}.self_attn.v_proj", "out", widths.head_dim),
        o=Slot(f"{block}.self_attn.out_proj", "in", widths.head_dim),
        channels=(Slot(f"{block}.fc1", "out", 1), Slot(f"{block}.fc2", "in", 1)),
    )


def mlp(config: Any) -> tuple[str, ...]:
    """The modules that make the MLP, if its output is what is added; opt-350m norms the sum."""
    return ("fc1", "activation_fn", "fc2") if config.do_layer_norm_before else ()
