"""While a model is traced, its attention goes through one function, whatever its own code does.

`attend` becomes one operator of the graph; `attend_plainly` becomes products, sums and a softmax, for runtimes that do
not know that operator. Models that use transformers' attention interface are pointed at it by their config. Older ones
compute attention in code of their own; their architecture file says which of its methods to replace, in
`attention_routes`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgeprune.configs import architecture
from edgeprune_export import interface

ATTENTION_NAME = "edgeprune_one_operator"

Attend = Callable[..., torch.Tensor]
"""`attend` or `attend_plainly`."""


class Call:
    """The masks of the call that is being traced, made from its attention mask (B, slots) int64.

    A slot is a column of the attention mask; positions and windows count real tokens only, so that padding on any side
    changes nothing.
    """

    def begin(self, mask: torch.Tensor, tokens: int) -> None:
        """Take the attention mask of a call whose last `tokens` slots are new."""
        self.mask = mask
        self._tokens = tokens
        self._positions = (mask.cumsum(1) - 1).clamp(min=0)
        slots = torch.arange(mask.shape[1])
        self._seen = (slots[None] <= slots[-tokens:, None]) & (mask[:, None, None] != 0)

    @property
    def query_positions(self) -> torch.Tensor:
        """Positions (B, T) int64 of the new tokens."""
        return self._positions[:, -self._tokens :]

    def bias(self, window: int | None) -> torch.Tensor:
        """What is added to the scores (B, 1, T, slots) float32; with a window, only that many last tokens are seen."""
        seen = self._seen
        if window is not None:
            distance = self.query_positions[:, None, :, None] - self._positions[:, None, None, :]
            seen = seen & (distance < window)
        return torch.where(seen, 0.0, interface.MASKED)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of (B, heads, T, D) queries over (B, kv_heads, slots, D) keys as one operator: (B, T, heads, D)."""
    outputs = torch.onnx.ops.attention(query, key, value, bias, scale=scale, softcap=softcap or 0.0)
    return outputs[0].transpose(1, 2)


def attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same as `attend`, in operators that every runtime knows."""
    B, heads, T, D = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    # the query heads of a KV head as more rows of one product, so that no key is copied for each of them
    scores = query.reshape(B, kv_heads, heads // kv_heads * T, D) @ key.transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores.reshape(B, heads, T, slots) + bias, dim=-1)
    attended = weights.reshape(B, kv_heads, heads // kv_heads * T, slots) @ value
    return attended.reshape(B, heads, T, value.shape[3]).transpose(1, 2)


@contextmanager
def routed(model: PreTrainedModel, call: Call, attend: Attend = attend) -> Iterator[None]:
    """Let every layer of a model attend through one function; all is as it was afterwards."""
    configs = [vars(module).get("config") for module in model.modules()]
    own = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    routes: Callable[..., Any] | None = getattr(architecture(model.config.model_type), "attention_routes", None)
    with ExitStack() as stack:
        ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = partial(_attend_as_transformers_calls_it, attend)
        stack.callback(ALL_ATTENTION_FUNCTIONS.pop, ATTENTION_NAME)
        for config in own.values():
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = ATTENTION_NAME
        for owner, name, replacement in routes(model, attend, call) if routes else ():
            assert name not in vars(owner), f"{name} of {type(owner).__name__} is replaced already"
            setattr(owner, name, replacement)
            stack.callback(delattr, owner, name)
        yield


def _attend_as_transformers_calls_it(
    attend: Attend,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scale=scale, softcap=softcap), None
