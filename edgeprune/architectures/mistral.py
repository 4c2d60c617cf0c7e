"""Mistral: the blocks of Llama (the sliding window does not touch the groups), so the groups are Llama's."""

from edgeprune.architectures.llama import groups

__all__ = ["BASE", "SOURCE", "groups"]

BASE = "MistralForCausalLM"
SOURCE = "decoder"
