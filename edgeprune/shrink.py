"""The cut: rows and columns leave the weight matrices. No other file changes shapes.

What a cut costs is computed here too (`parameters_removed`, `unit_parameters`), from the same slots, so that a plan's
figures and the cut model cannot disagree.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from edgeprune.configs import quiet_global_reads
from edgeprune.groups import Group, Keep, LayerWidths, Side, check_keep, kept, layer_widths

# The names under which attention and MLP modules of transformers remember a width, by kind of group.
WIDTH_ATTRIBUTES = {
    "heads": ("num_heads", "num_attention_heads"),
    "kv_heads": ("num_kv_heads", "num_key_value_heads"),
    "channels": ("intermediate_size",),
}


@dataclass(frozen=True)
class LinearShape:
    """The sizes of one Linear: weight `(out_features, in_features)`, bias `(out_features,)` if it has one."""

    out_features: int
    in_features: int
    has_bias: bool

    @property
    def parameters(self) -> int:
        """Number of weights and bias entries."""
        return self.out_features * (self.in_features + self.has_bias)


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The Linear that a slot names."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear), f"a slot names {name}, which is no Linear"
    return module


def linear_shapes(model: nn.Module, groups: Sequence[Group]) -> dict[str, LinearShape]:
    """Module name -> sizes of every Linear that some group has a slot in."""
    names = dict.fromkeys(slot.module for group in groups for slot in group.slots)
    linears = {name: linear_of(model, name) for name in names}
    return {
        name: LinearShape(linear.out_features, linear.in_features, linear.bias is not None)
        for name, linear in linears.items()
    }


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
    for group in groups:
        if group.kind != "kv_heads":
            _remember(model, group, groups, keep)


def _remember(model: PreTrainedModel, group: Group, groups: Sequence[Group], keep: Keep) -> None:
    """Correct the widths that the module around a group's Linears wrote down when it was built."""
    module: Any = model.get_submodule(group.inner.module.rpartition(".")[0])
    counts = {group.kind: len(kept(keep, group))}
    for parent in (other for other in groups if other.name == group.parent):
        counts[parent.kind] = len(kept(keep, parent))
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = counts[group.kind] // counts[parent.kind]
    for kind, count in counts.items():
        for attribute in WIDTH_ATTRIBUTES[kind]:
            if hasattr(module, attribute):
                setattr(module, attribute, count)


@quiet_global_reads()
def set_widths(config: PreTrainedConfig, widths: Sequence[LayerWidths]) -> bool:
    """Write the sizes of every layer into a config; True if they are the same in all layers and stock code takes them.

    Where the layers differ, or where the stock config refuses the common size (Llama wants `hidden_size` to be a
    multiple of the head count), the sizes go into `per_layer_config` and the global ones stay as they were.
    """
    (head_dim,) = {width.head_dim for width in widths}
    config.head_dim = head_dim
    sizes = [
        {
            "num_attention_heads": width.heads,
            "num_key_value_heads": width.kv_heads,
            "intermediate_size": width.channels,
        }
        for width in widths
    ]
    config.per_layer_config = None
    if all(size == sizes[0] for size in sizes) and _takes(config, sizes[0]):
        for name, value in sizes[0].items():
            setattr(config, name, value)
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)
        return True
    config.per_layer_config = dict(enumerate(sizes))
    # Stock code (config validation, some rope variants, AutoTokenizer) reads the global sizes in passing.
    config.allow_global_per_layer_attribute_access = True
    return False


def _takes(config: PreTrainedConfig, sizes: Mapping[str, int]) -> bool:
    trial: Any = copy.copy(config)
    for name, value in sizes.items():
        setattr(trial, name, value)
    try:
        trial.validate_architecture()
    except ValueError:
        return False
    return True


def _kept_lines(
    groups: Sequence[Group], keep: Keep, shapes: Mapping[str, LinearShape]
) -> dict[tuple[str, Side], torch.Tensor]:
    """(module, side) -> bool of that side's length, False where a row or column leaves, for each side with a slot."""
    lines: dict[tuple[str, Side], torch.Tensor] = {}
    for group in groups:
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[list(kept(keep, group))] = False
        for slot in group.slots:
            shape = shapes[slot.module]
            length = shape.out_features if slot.side == "out" else shape.in_features
            side = lines.setdefault((slot.module, slot.side), torch.ones(length, dtype=torch.bool))
            # A view: fused projections have several slots on one side, each marks its own stretch.
            side[slot.start : slot.start + group.units * slot.size].view(group.units, slot.size)[gone] = False
    return lines


def _cut(linear: nn.Linear, side: Side, lines: torch.Tensor) -> None:
    lines = lines.to(linear.weight.device)
    linear.weight = _part(linear.weight, 0 if side == "out" else 1, lines)
    if side == "in":
        linear.in_features = len(lines)
        return
    linear.out_features = len(lines)
    if linear.bias is not None:
        linear.bias = _part(linear.bias, 0, lines)


def _part(parameter: torch.Tensor, dim: int, lines: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, lines), requires_grad=parameter.requires_grad)
