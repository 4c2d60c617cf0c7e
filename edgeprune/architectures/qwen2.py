"""Qwen2: Llama blocks with biases on q, k and v; a row takes its bias entry along."""

from edgeprune.architectures.llama import ATTRIBUTES, STOCK, WIDTHS, layer_groups

__all__ = ["ATTRIBUTES", "BASE", "SOURCE", "STOCK", "WIDTHS", "layer_groups"]

BASE = "Qwen2ForCausalLM"
SOURCE = "decoder"
