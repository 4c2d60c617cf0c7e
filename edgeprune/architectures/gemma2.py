"""Gemma 2: Llama blocks with GeGLU and a norm on both sides of attention and MLP; local and global layers alternate.

Nothing of that touches the groups: the norms, soft-caps and masks are those of whole hidden states.
"""

from typing import Any

from edgeprune.architectures.llama import ATTRIBUTES, STOCK, WIDTHS, layer_groups

__all__ = ["ATTRIBUTES", "BASE", "INTERCEPT", "SOURCE", "STOCK", "WIDTHS", "layer_groups", "mlp"]

BASE = "Gemma2ForCausalLM"
SOURCE = "decoder"
INTERCEPT = {"heads": "attention_bias"}


def mlp(config: Any) -> tuple[str, ...]:
    """The MLP and the norm behind it, whose output is added."""
    return "mlp", "post_feedforward_layernorm"
