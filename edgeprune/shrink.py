"""The cut: rows and columns leave the weight matrices. No other file changes shapes.

What a cut costs is computed here too (`parameters_removed`, `unit_parameters`), from the same slots, so that a plan's
figures and the cut model cannot disagree.

A Linear is an `nn.Linear` or the `Conv1D` of transformers, which stores its weight as `(in, out)`. `oriented` knows the
difference; everything else reads and writes weights as `(out, in)`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edgeprune import modeling_edgeprune
from edgeprune.configs import LAYOUT_KEY, architecture, config_groups, layout, quiet_global_reads
from edgeprune.groups import (
    ALIBI_KEY,
    Group,
    Keep,
    LayerWidths,
    Side,
    WidthKeys,
    blocks_name,
    check_keep,
    kept,
    layer_widths,
)

Linear = nn.Linear | Conv1D


@dataclass(frozen=True)
class LinearShape:
    """The sizes of one Linear: weight `(out_features, in_features)`, bias `(out_features,)` if it has one."""

    out_features: int
    in_features: int
    has_bias: bool

    @classmethod
    def of(cls, linear: Linear) -> "LinearShape":
        """Sizes of a Linear, which may lie on meta."""
        rows, columns = weight_of(linear).shape
        return cls(rows, columns, has_bias=linear.bias is not None)

    @property
    def parameters(self) -> int:
        """Number of weights and bias entries."""
        return self.out_features * (self.in_features + self.has_bias)


def linear_of(model: nn.Module, name: str) -> Linear:
    """The Linear that a slot names."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | Conv1D), f"a slot names {name}, which is no Linear"
    return module


def oriented(linear: Linear, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix of the shape that a Linear's weight is stored in, as `(out, in)`, or back again: a view."""
    return matrix.T if isinstance(linear, Conv1D) else matrix


def weight_of(linear: Linear) -> torch.Tensor:
    """A Linear's weight as `(out, in)`: a view, through which it may be written."""
    return oriented(linear, linear.weight)


def linear_shapes(model: nn.Module, groups: Sequence[Group]) -> dict[str, LinearShape]:
    """Module name -> sizes of every Linear that some group has a slot in."""
    names = dict.fromkeys(slot.module for group in groups for slot in group.slots)
    return {name: LinearShape.of(linear_of(model, name)) for name in names}


def parameters_removed(groups: Sequence[Group], keep: Keep, shapes: Mapping[str, LinearShape]) -> int:
    """Number of parameters that leave with a cut; exact also where a Linear loses rows and columns at once."""
    cut = {(module, side): int((~rows).sum()) for (module, side), rows in _kept_lines(groups, keep, shapes).items()}
    removed = 0
    for module, shape in shapes.items():
        after = LinearShape(
            shape.out_features - cut.get((module, "out"), 0),
            shape.in_features - cut.get((module, "in"), 0),
            shape.has_bias,
        )
        removed += shape.parameters - after.parameters
    return removed


def unit_parameters(group: Group, shapes: Mapping[str, LinearShape]) -> int:
    """Number of parameters that one unit of `group` takes with it, in its own slots.

    A KV head also takes its query heads: add `heads_per_kv_head` times their figure. Figures of several units add up as
    long as no Linear has slots on both sides; `parameters_removed` is exact in any case.
    """
    return sum(
        slot.size * (shapes[slot.module].in_features + shapes[slot.module].has_bias)
        if slot.side == "out"
        else slot.size * shapes[slot.module].out_features
        for slot in group.slots
    )


def shrink(model: PreTrainedModel, groups: Sequence[Group], keep: Keep) -> None:
    """Cut a model in place to the units of `keep`: weights, biases, the widths its modules remember, and its config.

    The order of what stays is preserved. The config says the new sizes afterwards, so `groups(model.config)` describes
    the cut model and it can be cut again.

    Raises:
        EdgepruneError: if `keep` is not a list that may be cut; the model is untouched then.
    """
    check_keep(groups, keep)
    shrink_blocks(model, groups, keep)
    set_widths(model.config, layer_widths(groups, keep))


def shrink_blocks(model: PreTrainedModel, groups: Sequence[Group], keep: Keep) -> None:
    """Cut the blocks that these groups lie in, and no other; `keep` was checked, and the config is left to the caller.

    The blocks may lie on the meta device: their shapes are cut then.
    """
    shapes = linear_shapes(model, groups)
    for (module, side), lines in _kept_lines(groups, keep, shapes).items():
        if not lines.all():
            _cut(linear_of(model, module), side, lines.nonzero().squeeze(1))
    table, blocks = layout(model.config.model_type, groups), blocks_name(groups)
    for layer, widths in zip(sorted({group.layer for group in groups}), layer_widths(groups, keep), strict=True):
        block = model.get_submodule(f"{blocks}.{layer}")
        with quiet_global_reads():
            modeling_edgeprune.adapt(block, table, model.config, widths.counts, widths.alibi_heads)


@quiet_global_reads()
def set_widths(config: PreTrainedConfig, widths: Sequence[LayerWidths]) -> bool:
    """Write the sizes of every layer into a config; True if stock code builds them (`is_stock`).

    Where it does not, the sizes go into `per_layer_config` and the global ones stay as they were.
    """
    (head_dim,) = {width.head_dim for width in widths}
    config.head_dim = head_dim
    stock = is_stock(config, widths)
    config.per_layer_config = None
    config.__dict__.pop(LAYOUT_KEY, None)
    if stock:
        for key, value in _stock_sizes(config, widths[0]).items():
            setattr(config, key, value)
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)
        return True
    keys: WidthKeys = architecture(config.model_type).WIDTHS
    sizes = [{key: width.counts[kind] for kind, key in keys.items()} for width in widths]
    slopes = [{ALIBI_KEY: list(width.alibi_heads)} if width.alibi_heads else {} for width in widths]
    config.per_layer_config = {layer: sizes[layer] | slopes[layer] for layer in range(len(widths))}
    # Stock code (config validation, some rope variants, AutoTokenizer) reads the global sizes in passing.
    config.allow_global_per_layer_attribute_access = True
    setattr(config, LAYOUT_KEY, layout(config.model_type, config_groups(config)))
    return False


@quiet_global_reads()
def is_stock(config: PreTrainedConfig, widths: Sequence[LayerWidths]) -> bool:
    """Whether stock code builds these sizes from a config without per-layer ones.

    The layers must be alike, the sizes that differ from the config's such as stock code takes from it (`STOCK` of the
    architecture), and their values such as the config allows (Llama wants `hidden_size` to be a multiple of the heads).
    """
    if len(set(widths)) > 1:
        return False
    trial: Any = copy.copy(config)
    trial.per_layer_config = None
    trial.__dict__.pop("allow_global_per_layer_attribute_access", None)
    family = architecture(config.model_type)
    global_widths = layer_widths(config_groups(trial), {})[0]
    if global_widths.alibi_heads != widths[0].alibi_heads or any(
        count != widths[0].counts[kind] for kind, count in global_widths.counts.items() if kind not in family.STOCK
    ):
        return False
    try:
        for key, value in _stock_sizes(config, widths[0]).items():
            setattr(trial, key, value)
        trial.validate()
    except (StrictDataclassError, ValueError):
        return False
    return True


def _stock_sizes(config: PreTrainedConfig, widths: LayerWidths) -> dict[str, int]:
    family = architecture(config.model_type)
    return {key: widths.counts[kind] for kind, key in family.WIDTHS.items() if kind in family.STOCK}


def _kept_lines(
    groups: Sequence[Group], keep: Keep, shapes: Mapping[str, LinearShape]
) -> dict[tuple[str, Side], torch.Tensor]:
    """(module, side) -> bool of that side's length, False where a row or column leaves, for each side with a slot."""
    lines: dict[tuple[str, Side], torch.Tensor] = {}
    for group in groups:
        gone = sorted(set(range(group.units)).difference(kept(keep, group)))
        for slot in group.slots:
            shape = shapes[slot.module]
            length = shape.out_features if slot.side == "out" else shape.in_features
            side = lines.setdefault((slot.module, slot.side), torch.ones(length, dtype=torch.bool))
            side[slot.lines(gone)] = False  # fused projections have several slots on one side
    return lines


def _cut(linear: Linear, side: Side, lines: torch.Tensor) -> None:
    lines = lines.to(linear.weight.device)
    weight = weight_of(linear).detach().index_select(0 if side == "out" else 1, lines)
    is_trainable = linear.weight.requires_grad
    linear.weight = nn.Parameter(oriented(linear, weight).contiguous(), requires_grad=is_trainable)
    if side == "out" and linear.bias is not None:
        bias = linear.bias.detach().index_select(0, lines)
        linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    rows, columns = weight.shape
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = columns, rows
    else:
        linear.in_features, linear.out_features = columns, rows
