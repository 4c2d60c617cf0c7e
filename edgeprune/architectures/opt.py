"""OPT: separate q/k/v/out projections, one query head per KV head, plain MLP; norms before or after either.

The projections of narrow embeddings (opt-350m) lie outside the blocks, so a cut does not touch them.
"""

from typing import Any

from edgeprune.groups import Group, Slot, WidthKeys, block_groups, read_widths, separate_qkv

BASE = "OPTForCausalLM"
SOURCE = "traced"
WIDTHS: WidthKeys = {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "channels": "ffn_dim"}
STOCK = ("channels",)  # its heads tile the hidden states
ATTRIBUTES = {"self_attn": {"num_heads": "heads"}}
INTERCEPT = {"heads": "enable_bias", "channels": "enable_bias"}


def layer_groups(config: Any, layer: int) -> list[Group]:
    """Groups of one layer."""
    widths = read_widths(config, layer, WIDTHS)
    block = f"model.decoder.layers.{layer}"
    return block_groups(
        layer,
        widths,
        **separate_qkv(f"{block}.self_attn", widths.head_dim),
        o=Slot(f"{block}.self_attn.out_proj", "in", widths.head_dim),
        channels=(Slot(f"{block}.fc1", "out", 1), Slot(f"{block}.fc2", "in", 1)),
    )


def mlp(config: Any) -> tuple[str, ...]:
    """The modules that make the MLP, if its output is what is added; opt-350m norms the sum."""
    return ("fc1", "activation_fn", "fc2") if config.do_layer_norm_before else ()
