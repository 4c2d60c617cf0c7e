"""SmolLM3: Llama blocks; some layers use no rotary embedding, which a cut does not touch."""

from edgeprune.architectures.llama import ATTRIBUTES, INTERCEPT, STOCK, WIDTHS, layer_groups

__all__ = ["ATTRIBUTES", "BASE", "INTERCEPT", "SOURCE", "STOCK", "WIDTHS", "layer_groups"]

BASE = "SmolLM3ForCausalLM"
SOURCE = "decoder"
