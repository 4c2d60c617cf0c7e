"""SmolLM3: Llama blocks; some layers use no rotary embedding, which a cut does not touch."""

from edgeprune.architectures.llama import INTERCEPT, groups

__all__ = ["BASE", "INTERCEPT", "SOURCE", "groups"]

BASE = "SmolLM3ForCausalLM"
SOURCE = "decoder"
