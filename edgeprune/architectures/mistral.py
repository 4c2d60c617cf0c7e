"""Mistral: the blocks of Llama (the sliding window does not touch the groups), so the groups are Llama's."""

from edgeprune.architectures.llama import ATTRIBUTES, STOCK, WIDTHS, layer_groups

__all__ = ["ATTRIBUTES", "BASE", "SOURCE", "STOCK", "WIDTHS", "layer_groups"]

BASE = "MistralForCausalLM"
SOURCE = "decoder"
