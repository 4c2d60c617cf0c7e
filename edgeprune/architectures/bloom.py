"""Bloom: one fused projection that holds [q k v] of head after head, plain MLP, positions by ALiBi.

ALiBi gives each head a slope that follows from its number among *all* heads of the dense model. So n_head stays what
it was, the model goes on to compute the biases of all heads, and every layer picks those of the heads it has kept
(`alibi_heads`). Stock code can state neither that nor an MLP other than 4 * hidden_size, so that a pruned Bloom is
always saved per layer.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from edgeprune.groups import Group, Slot, WidthKeys, block_groups, interleaved_qkv, read_widths

BASE = "BloomForCausalLM"
SOURCE = "traced"
WIDTHS: WidthKeys = {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "channels": "intermediate_size"}
STOCK = ()
ATTRIBUTES = {"self_attention": {"num_heads": "heads"}}
ALIBI = "self_attention"
RETURNS_TUPLE = True
INTERCEPT = {"heads": None, "channels": None}


def layer_groups(config: Any, layer: int) -> list[Group]:
    """Groups of one layer."""
    widths = read_widths(config, layer, WIDTHS, channels=4 * config.hidden_size)
    if not widths.alibi_heads:
        widths = replace(widths, alibi_heads=_first_heads(widths.heads))
    attention, mlp = f"transformer.h.{layer}.self_attention", f"transformer.h.{layer}.mlp"
    return block_groups(
        layer,
        widths,
        **interleaved_qkv(f"{attention}.query_key_value", widths.head_dim),
        o=Slot(f"{attention}.dense", "in", widths.head_dim),
        channels=(Slot(f"{mlp}.dense_h_to_4h", "out", 1), Slot(f"{mlp}.dense_4h_to_h", "in", 1)),
    )


@lru_cache(maxsize=1)
def _first_heads(heads: int) -> tuple[int, ...]:
    # one tuple for all layers: an untrusted config may name many of both
    return tuple(range(heads))


def mlp(config: Any) -> tuple[str, ...]:
    """What the MLP adds to the rest of a block, without the rest, which Bloom's own module adds."""
    return "mlp.dense_h_to_4h", "mlp.gelu_impl", "mlp.dense_4h_to_h"


def attention_routes(model: Any, attend: Any, call: Any) -> Iterator[tuple[Any, str, Any]]:
    """Replacements, as (owner, attribute, value), under which attention goes through `attend` while it is traced."""
    decoder = model.transformer
    build = decoder.build_alibi_tensor
    # The traced call brings a mask that is ready to be added, which no longer tells where tokens stand.
    yield decoder, "build_alibi_tensor", lambda _, heads, dtype: build(call.mask, heads, dtype)
    for block in decoder.h:
        yield block.self_attention, "forward", partial(_attention, block.self_attention, attend)


def _attention(
    attention: Any, attend: Any, x: Any, residual: Any, *, alibi: Any, attention_mask: Any, layer_past: Any, **_: Any
) -> tuple[Any, None]:
    query, key, value = attention._reshape(attention.query_key_value(x))
    key, value = layer_past.update(key, value, attention.layer_idx)
    bias = attention_mask + alibi.unflatten(0, (-1, attention.num_heads))
    output = attend(query, key, value, bias, scale=attention.inv_norm_factor)
    return attention.dense(output.flatten(2)) + residual, None
