"""What consumers of a bundle are held against: the tokens that the runtime of this project writes."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.generate import Generation
from edgeprune_runtime.session import PREFILL_CHUNK_TOKENS, Decoder
from edgeprune_runtime.tokenizer import Tokenizer

WriteBundle = Callable[[Any, Any, Sequence[Sequence[int]], Sequence[int]], Path]
"""Of a model, its tokenizer, and for each layer the KV heads and the number of channels that stay."""

WithFloatProducts = Callable[[Path], Path]
"""Of a bundle, the same one whose products do not round their inputs."""

BUNDLES = ("toy_bundle", "smollm2_bundle")
"""Fixtures that make the bundles of these tests."""

VARIANTS = ("fp32", "int8", "int8-dynamic", "int4")
BLOCKWISE = ("int8", "int4")
"""Their products round inputs to 8 bits where a runtime has kernels for that; without these they are in float32."""
NEW_TOKENS = 24
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, a baker found",
    " ".join(f"On day {day} the crew of the ship counted {7 * day} barrels." for day in range(1, 60)),
)
"""The last is longer than what the runtime feeds at once."""


@cache
def prompts(bundle: Path) -> tuple[tuple[int, ...], ...]:
    """The texts in a bundle's tokens."""
    tokenizer = Tokenizer.load(open_bundle(bundle))
    longest = PREFILL_CHUNK_TOKENS + 8
    found = tuple(tuple(tokenizer.encode(text)[:longest]) for text in TEXTS)
    assert len(found[-1]) == longest
    return found


@cache
def decoder(bundle: Path, variant: str) -> Decoder:
    """A session over a variant, kept for all tests."""
    return Decoder(open_bundle(bundle, variant), threads=1)


@cache
def greedy(bundle: Path, variant: str, prompt: tuple[int, ...], tokens: int = NEW_TOKENS) -> list[int]:
    """What the runtime writes after a prompt, without the token that ends a text."""
    return list(Generation(decoder(bundle, variant), prompt, max_new_tokens=tokens))


def until_end(bundle: Path, tokens: Sequence[int]) -> list[int]:
    """Tokens that another runtime wrote, up to the one that ends a text; behind it rows of a batch are filled."""
    ends = open_bundle(bundle).manifest.eos_token_ids
    found = [int(token) for token in tokens]
    return found[: next((place for place, token in enumerate(found) if token in ends), len(found))]
