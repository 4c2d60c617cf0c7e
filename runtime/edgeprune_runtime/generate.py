"""Generating text on the device: greedy or sampled, one token at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.session import Decoder, Logits

StopReason = Literal["eos", "length", "context"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise EdgepruneError(f"temperature is {self.temperature}; 0 (greedy) or more was expected")
        if self.top_k < 0:
            raise EdgepruneError(f"top-k is {self.top_k}; 0 (all tokens) or more was expected")
        if not 0.0 < self.top_p <= 1.0:
            raise EdgepruneError(f"top-p is {self.top_p}; more than 0 and at most 1 was expected")

    def choose(self, logits: Logits, generator: np.random.Generator) -> int:
        """The next token for logits (V,)."""
        if self.temperature == 0.0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        scaled = (logits[order].astype(np.float64) - float(logits[order[0]])) / self.temperature
        chances = np.exp(scaled)
        chances /= chances.sum()
        # The nucleus: the fewest tokens whose chances reach top_p, the one that crosses it included.
        kept = 1 + int(np.searchsorted(chances.cumsum(), self.top_p))
        chances = chances[:kept] / chances[:kept].sum()
        return int(generator.choice(order[:kept], p=chances))


GREEDY = Sampling()


class Generation:
    """Tokens as they are generated; iterate over it once, then `stop_reason` says why it ended.

    An end-of-text token ends it and is not given out.
    """

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> None:
        if max_new_tokens < 1:
            raise EdgepruneError(f"max-new-tokens is {max_new_tokens}; at least 1 was expected")
        self._decoder = decoder
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self.stop_reason: StopReason | None = None

    def __iter__(self) -> Iterator[int]:
        manifest = self._decoder.manifest
        generator = np.random.default_rng(self._sampling.seed)
        logits, cache = self._decoder.prefill([self._prompt], room_tokens=self._max_new_tokens - 1)
        for count in range(1, self._max_new_tokens + 1):
            token = self._sampling.choose(logits[0], generator)
            if token in manifest.eos_token_ids:
                self.stop_reason = "eos"
                return
            yield token
            if count == self._max_new_tokens:
                break
            if cache.tokens == manifest.context_tokens:
                self.stop_reason = "context"
                return
            logits, cache = self._decoder.step([token], cache)
        self.stop_reason = "length"
