"""Qwen3: Llama blocks with an RMS norm over head_dim on q and k, shared by all heads and so untouched by a cut."""

from edgeprune.architectures.llama import ATTRIBUTES, STOCK, WIDTHS, layer_groups

__all__ = ["ATTRIBUTES", "BASE", "INTERCEPT", "SOURCE", "STOCK", "WIDTHS", "layer_groups"]

BASE = "Qwen3ForCausalLM"
SOURCE = "decoder"
INTERCEPT = {"heads": "attention_bias"}
