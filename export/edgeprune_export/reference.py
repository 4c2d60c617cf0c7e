"""What the torch model computes: the side of the comparison that is right by definition."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

Ids = Sequence[int]
Logits = NDArray[np.float32]


def logits_of(model: PreTrainedModel, ids: Ids) -> Logits:
    """Logits (T, V) float32 of one sequence, in one pass without a cache."""
    rows = torch.tensor([list(ids)])
    with torch.inference_mode():
        # Nothing is padding, even where a text holds the padding token; some models warn if nobody says so.
        output: torch.Tensor = model(rows, attention_mask=torch.ones_like(rows), use_cache=False).logits[0]
    return output.to(torch.float32).numpy()


def continue_greedily(model: PreTrainedModel, ids: Ids, tokens: int) -> list[int]:
    """The most likely continuation of a sequence."""
    cache = DynamicCache()
    chosen: list[int] = []
    step = torch.tensor([list(ids)])
    with torch.inference_mode():
        while len(chosen) < tokens:
            logits = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            chosen.append(int(logits[0, -1].argmax()))
            step = torch.tensor([chosen[-1:]])
    return chosen


def kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(KV heads, head_dim) of each layer, read off a cache that the model itself has filled."""
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    return [(int(keys.shape[1]), int(keys.shape[3])) for keys in cache_tensors(cache)[::2]]


def cache_tensors(cache: DynamicCache) -> list[torch.Tensor]:
    """Keys and values of a filled cache, layer by layer."""
    layers: list[Any] = cache.layers  # transformers' union of layer kinds, of which only DynamicLayer occurs here
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]
