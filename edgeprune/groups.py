"""What may be cut: groups of units that live or die together, and where each unit lies in the weights.

A `Group` is pure data (no torch). An architecture file lists a model's groups; scoring, planning, cutting, refitting
and saving work on groups alone and never name an architecture.

Attention of one layer has two levels of units, as two groups:

    kv_heads   units: KV heads      slots: rows of k_proj, rows of v_proj
    heads      units: query heads   slots: rows of q_proj, columns of o_proj       parent: the kv_heads group

    query head u uses KV head u // (heads.units / kv_heads.units)      (group-major, as repeat_kv and ONNX Runtime do)

A KV head that goes takes its query heads with it, and every KV head that stays keeps the same number of query heads
(GroupQueryAttention and repeat_kv need that); `check_keep` holds both rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgeprune_runtime.errors import EdgepruneError

Side = Literal["out", "in"]
Kind = Literal["kv_heads", "heads", "channels"]

Keep = Mapping[str, Sequence[int]]
"""Group name -> sorted indices of the units that stay. A group that is not named keeps all its units."""


@dataclass(frozen=True)
class Slot:
    """Where the units of a group lie in one Linear.

    Unit `u` is the `size` rows (`side="out"`: weight rows and bias entries) or columns (`side="in"`) that begin at
    `start + u * size` of the weight `(out_features, in_features)`.
    """

    module: str
    side: Side
    size: int
    start: int = 0


@dataclass(frozen=True)
class Group:
    """Units of one kind in one layer, and all the slots that a unit takes with it."""

    name: str
    kind: Kind
    layer: int
    units: int
    slots: tuple[Slot, ...]
    parent: str | None = None

    @property
    def inner(self) -> Slot:
        """The "in" slot: the inputs of the Linear that reads these units (o_proj, down_proj)."""
        return next(slot for slot in self.slots if slot.side == "in")


@dataclass(frozen=True)
class LayerWidths:
    """The sizes of one decoder block. `head_dim` is stated, never computed from `hidden_size`."""

    heads: int
    kv_heads: int
    head_dim: int
    channels: int


def heads_per_kv_head(heads: Group, kv_heads: Group) -> int:
    """Number of query heads that share one KV head."""
    return heads.units // kv_heads.units


def kept(keep: Keep, group: Group) -> Sequence[int]:
    """Sorted indices of the units of `group` that stay."""
    return keep.get(group.name, range(group.units))


def check_keep(groups: Sequence[Group], keep: Keep) -> None:
    """Check that a keep list can be cut: known groups, sorted unique indices in range, and equal heads per KV head.

    Raises:
        EdgepruneError: if the list is not one that `shrink` may cut.
    """
    by_name = {group.name: group for group in groups}
    for name, indices in keep.items():
        if name not in by_name:
            raise EdgepruneError(
                f"plan names the group {name!r}, which this model does not have; is it for this model?"
            )
        units = by_name[name].units
        ordered = all(a < b for a, b in zip(indices, list(indices)[1:], strict=False))
        if len(indices) == 0 or not ordered or indices[0] < 0 or indices[-1] >= units:
            raise EdgepruneError(
                f"plan keeps {len(indices)} units of {name!r}; expected at least one, sorted, unique, within "
                f"0..{units - 1}"
            )
    for heads in groups:
        if heads.parent is None:
            continue
        parent = by_name[heads.parent]
        share = heads_per_kv_head(heads, parent)
        counts = dict.fromkeys(kept(keep, parent), 0)
        for head in kept(keep, heads):
            if head // share not in counts:
                raise EdgepruneError(f"plan keeps query head {head} of {heads.name!r} but not the KV head it reads")
            counts[head // share] += 1
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise EdgepruneError(
                f"plan keeps unequal query heads per KV head in {heads.name!r} ({list(counts.values())}); "
                "grouped-query attention needs the same number in each"
            )


def layer_widths(groups: Sequence[Group], keep: Keep) -> list[LayerWidths]:
    """Sizes of each layer after the cut, in layer order."""
    sizes: dict[int, dict[str, int]] = {}
    for group in groups:
        row = sizes.setdefault(group.layer, {})
        row[group.kind] = len(kept(keep, group))
        if group.kind == "kv_heads":
            row["head_dim"] = group.slots[0].size
    return [
        LayerWidths(heads=row["heads"], kv_heads=row["kv_heads"], head_dim=row["head_dim"], channels=row["channels"])
        for _, row in sorted(sizes.items())
    ]
