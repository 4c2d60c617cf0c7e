"""Decoder whose layers differ in width, for checkpoints written by edgeprune. Needs torch and transformers only.

`config.json` names the stock `model_type` and, under the standard key `per_layer_config`, the sizes of every layer that
differs from the global ones. Stock transformers stores that key but does not build from it, so this file builds the
stock class and then gives each layer its own projections:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The class of a checkpoint is `Pruned` + the stock name, e.g. `PrunedLlamaForCausalLM`; it adds no tensor and no new
arithmetic, so the weights keep their usual names. A copy of this file lies beside every checkpoint that needs it.
"""

from functools import cache
from typing import Any

import transformers
from torch import nn

PREFIX = "Pruned"


def __getattr__(name: str) -> Any:
    """`Pruned<Stock>` for any stock class of transformers, so that a new architecture needs no entry here."""
    stock = name.removeprefix(PREFIX)
    if name == stock or not stock.endswith("ForCausalLM") or not hasattr(transformers, stock):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _pruned(getattr(transformers, stock))


@cache
def _pruned(stock: Any) -> Any:
    def build(self: Any, config: Any) -> None:
        # The stock constructor wants one size for all layers; it gets the global one and `resize` corrects the layers.
        config.allow_global_per_layer_attribute_access = True
        stock.__init__(self, config)
        resize(self, config)
        self.post_init()

    return type(PREFIX + stock.__name__, (stock,), {"__module__": __name__, "__init__": build})


def resize(model: Any, config: Any) -> None:
    """Give every decoder layer the projections that `config.per_layer_config` states (new, uninitialised weights)."""
    for layer, sizes in zip(model.model.layers, config.per_layer_config, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        queries = sizes.num_attention_heads * config.head_dim
        keys = sizes.num_key_value_heads * config.head_dim
        attention.q_proj = _linear(attention.q_proj, out_features=queries)
        attention.k_proj = _linear(attention.k_proj, out_features=keys)
        attention.v_proj = _linear(attention.v_proj, out_features=keys)
        attention.o_proj = _linear(attention.o_proj, in_features=queries)
        attention.num_key_value_groups = sizes.num_attention_heads // sizes.num_key_value_heads
        mlp.gate_proj = _linear(mlp.gate_proj, out_features=sizes.intermediate_size)
        mlp.up_proj = _linear(mlp.up_proj, out_features=sizes.intermediate_size)
        mlp.down_proj = _linear(mlp.down_proj, in_features=sizes.intermediate_size)
        mlp.intermediate_size = sizes.intermediate_size


def _linear(old: nn.Linear, *, in_features: int | None = None, out_features: int | None = None) -> nn.Linear:
    return nn.Linear(
        in_features or old.in_features,
        out_features or old.out_features,
        bias=old.bias is not None,
        device=old.weight.device,  # "meta" under from_pretrained
        dtype=old.weight.dtype,
    )
