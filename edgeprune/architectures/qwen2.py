"""Qwen2: Llama blocks with biases on q, k and v; a row takes its bias entry along."""

from edgeprune.architectures.llama import groups

__all__ = ["BASE", "SOURCE", "groups"]

BASE = "Qwen2ForCausalLM"
SOURCE = "decoder"
