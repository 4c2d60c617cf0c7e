"""Gemma 3, text only: the blocks of Gemma 2 with norms over head_dim on q and k, shared by all heads."""

from edgeprune.architectures.gemma2 import mlp
from edgeprune.architectures.llama import ATTRIBUTES, STOCK, WIDTHS, layer_groups

__all__ = ["ATTRIBUTES", "BASE", "INTERCEPT", "SOURCE", "STOCK", "WIDTHS", "layer_groups", "mlp"]

BASE = "Gemma3ForCausalLM"
SOURCE = "decoder"
INTERCEPT = {"heads": "attention_bias"}
