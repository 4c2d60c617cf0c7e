"""Decoder whose layers differ in width, for checkpoints written by edgeprune. Needs torch and transformers only.

`config.json` names the stock `model_type` and, under the standard key `per_layer_config`, the sizes of every layer that
differs from the global ones. Stock transformers stores that key but does not build from it, so this file builds the
stock class and then gives each layer its own projections:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The class of a checkpoint is `Pruned` + the stock name, e.g. `PrunedLlamaForCausalLM`; it adds no tensor and no new
arithmetic, so the weights keep their usual names. A copy of this file lies beside every checkpoint that needs it.

It knows no architecture. What it must know of one is data, under the key `edgeprune` of the config:

    blocks          module name of the list of blocks
    head_dim        size of a head
    widths          "heads", "kv_heads", "channels" -> the key of `per_layer_config` that counts them
    linears         path inside a block -> "out", "in" -> of each width, how many rows or columns one unit has
    attributes      path inside a block -> attribute -> the width that the module remembers in it; also "heads_each"
                    (query heads per KV head) and "inner" (heads * head_dim)
    config_readers  paths of modules that read widths off their config as they run
    alibi           path of the module that is called with the biases of all heads of the dense model, or null
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

PREFIX = "Pruned"
STOCK_ENDINGS = ("ForCausalLM", "LMHeadModel")


def __getattr__(name: str) -> Any:
    """`Pruned<Stock>` for any stock class of transformers, so that a new architecture needs no entry here."""
    stock = name.removeprefix(PREFIX)
    if name == stock or not stock.endswith(STOCK_ENDINGS) or not hasattr(transformers, stock):
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
    """Give every block the projections that `config.per_layer_config` states (new, uninitialised weights)."""
    layout = config.edgeprune
    for block, sizes in zip(model.get_submodule(layout["blocks"]), config.per_layer_config, strict=True):
        counts = {kind: getattr(sizes, key) for kind, key in layout["widths"].items()}
        for name, sides in layout["linears"].items():
            lines = {side: sum(counts[kind] * each for kind, each in kinds.items()) for side, kinds in sides.items()}
            _reshape(block.get_submodule(name), lines)
        adapt(block, layout, config, counts, getattr(sizes, "alibi_heads", ()))


def adapt(
    block: nn.Module, layout: Mapping[str, Any], config: Any, counts: Mapping[str, int], alibi_heads: Sequence[int]
) -> None:
    """Tell the modules of a block its widths, where they go by other things than the shapes of their weights.

    Args:
        block: its projections have their sizes.
        layout: what is known of the architecture, as the head of this file says.
        config: the model's.
        counts: "heads", "kv_heads", "channels" -> how many the block has.
        alibi_heads: with ALiBi: the heads of the dense model whose slopes its heads use.
    """
    heads, kv_heads = counts["heads"], counts["kv_heads"]
    widths = {**counts, "heads_each": heads // kv_heads, "inner": heads * layout["head_dim"]}
    for name, attributes in layout["attributes"].items():
        for attribute, width in attributes.items():
            setattr(block.get_submodule(name), attribute, widths[width])
    for name in layout["config_readers"]:
        reader: Any = block.get_submodule(name)
        reader.config = LayerConfig(config, {key: counts[kind] for kind, key in layout["widths"].items()})
    if layout["alibi"] is not None:
        attention: Any = block.get_submodule(layout["alibi"])
        if not hasattr(attention, "alibi_heads"):
            attention.register_forward_pre_hook(_pick_slopes, with_kwargs=True)
        attention.alibi_heads, attention.dense_heads = list(alibi_heads), config.num_attention_heads


class LayerConfig:
    """A config as the modules of one block see it: its own sizes, and all else as the model's config says just now."""

    def __init__(self, config: Any, sizes: Mapping[str, int]) -> None:
        vars(self).update(_config=config, _sizes=sizes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these before there is a state
            raise AttributeError(name)
        sizes: Mapping[str, int] = vars(self)["_sizes"]
        return sizes[name] if name in sizes else getattr(vars(self)["_config"], name)


def _pick_slopes(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Of the ALiBi biases of all heads of the dense model, `(B * heads, 1, T)`, those of the heads that are left."""
    alibi: torch.Tensor = kwargs["alibi"].unflatten(0, (-1, attention.dense_heads))
    return args, {**kwargs, "alibi": alibi[:, attention.alibi_heads].flatten(0, 1)}


def _reshape(linear: Any, lines: Mapping[str, int]) -> None:
    """Give a Linear new weights of so many rows ("out") and columns ("in"); a side that is not named stays."""
    is_transposed = isinstance(linear, Conv1D)  # it stores (in, out)
    rows, columns = reversed(linear.weight.shape) if is_transposed else linear.weight.shape
    rows, columns = lines.get("out", rows), lines.get("in", columns)
    shape = (columns, rows) if is_transposed else (rows, columns)
    linear.weight = nn.Parameter(linear.weight.new_empty(shape))  # on "meta" under from_pretrained
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.new_empty(rows))
    if is_transposed:
        linear.nx, linear.nf = columns, rows
    else:
        linear.in_features, linear.out_features = columns, rows
    linear._is_hf_initialized = False  # transformers' own mark; what it stood for is gone
