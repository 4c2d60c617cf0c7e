"""Which equal widths stock code builds from a config, for checkpoints that load without code of edgeprune.

An architecture file names the kinds of widths that stock code takes from the config (`STOCK`); the config's own checks
say which values; and a stand-in type (`STAND_IN`) may take what the type itself refuses, if it has the same tensors.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from edgeprune.checkpoint import stand_in_config
from edgeprune.configs import architecture, quiet_global_reads
from edgeprune.groups import Group, LayerWidths, layer_widths
from edgeprune.shrink import is_stock
from edgeprune_runtime.errors import EdgepruneError


def check_stock_widths(model_type: str) -> None:
    """Check that stock code of a type builds any narrower model at all.

    Raises:
        EdgepruneError: if its MLP has a width that no config states.
    """
    if "channels" not in architecture(model_type).STOCK:
        raise EdgepruneError(
            f"--widths uniform needs a stock config, but stock {model_type!r} code has its widths hard-wired to "
            "hidden_size; expected --widths per-layer"
        )


def check_alike(groups: Sequence[Group]) -> None:
    """Check that the layers of a model are alike, so that they can stay so.

    Raises:
        EdgepruneError: if they differ.
    """
    if len(set(layer_widths(groups, {}))) > 1:
        raise EdgepruneError(
            "--widths uniform needs layers that are alike, and those of this model differ (it is pruned already); "
            "expected --widths per-layer"
        )


def stock_counts(config: PreTrainedConfig, groups: Sequence[Group]) -> Callable[[int, int], bool]:
    """Whether stock code takes (KV heads, query heads) of all layers from a config of this type or of its stand-in."""
    whole = layer_widths(groups, {})[0]
    stand_in = stand_in_config(config)
    configs = [config, stand_in] if stand_in is not None and _has_same_tensors(config, stand_in) else [config]

    @cache
    def takes(kv_heads: int, heads: int) -> bool:
        # ALiBi slopes stay with their heads, which stock code cannot say
        slopes = whole.alibi_heads if heads == whole.heads else ()
        widths: LayerWidths = replace(whole, kv_heads=kv_heads, heads=heads, alibi_heads=slopes)
        return any(is_stock(each, [widths]) for each in configs)

    return takes


@quiet_global_reads()
def _has_same_tensors(config: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether two configs lead to tensors of the same names and shapes; one layer tells."""
    shapes = []
    for each in (config, other):
        trial: Any = copy.deepcopy(each)
        trial.per_layer_config = None
        trial.num_hidden_layers = 1
        with torch.device("meta"):
            model = getattr(transformers, architecture(each.model_type).BASE)(trial)
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    return shapes[0] == shapes[1]
