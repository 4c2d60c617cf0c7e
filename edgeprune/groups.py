"""What may be cut: groups of units that live or die together, and where each unit lies in the weights.

A `Group` is pure data (no torch). An architecture file lists a model's groups; scoring, planning, cutting, refitting
and saving work on groups alone and never name an architecture.

Attention of one layer has two levels of units, as two groups:

    kv_heads   units: KV heads      slots: rows of k_proj, rows of v_proj
    heads      units: query heads   slots: rows of q_proj, columns of o_proj       parent: the kv_heads group

    query head u uses KV head u // (heads.units / kv_heads.units)      (group-major, as repeat_kv and ONNX Runtime do)

A KV head that goes takes its query heads with it, and every KV head that stays keeps the same number of query heads
(GroupQueryAttention and repeat_kv need that); `check_keep` holds both rules. Plain multi-head attention is the case of
one query head per KV head.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgeprune_runtime.errors import EdgepruneError

Side = Literal["out", "in"]
Kind = Literal["kv_heads", "heads", "channels"]

Keep = Mapping[str, Sequence[int]]
"""Group name -> sorted indices of the units that stay. A group that is not named keeps all its units."""


@dataclass(frozen=True)
class Slot:
    """Where the units of a group lie in one Linear.

    Unit `u` is the `size` rows (`side="out"`: weight rows and bias entries) or columns (`side="in"`) that begin at
    `start + u * stride` of the weight `(out_features, in_features)`. Columns of neighbouring units touch; rows need
    not: a fused projection may hold [q k v] of one head after the other, three slots with `stride = 3 * size`.
    """

    module: str
    side: Side
    size: int
    start: int = 0
    stride: int = 0
    """Distance between units; 0 says `size`: they touch."""

    def __post_init__(self) -> None:
        """State the stride."""
        object.__setattr__(self, "stride", self.stride or self.size)

    def lines(self, units: Iterable[int]) -> list[int]:
        """Indices of the rows or columns of these units, unit by unit."""
        return [
            line
            for first in (self.start + unit * self.stride for unit in units)
            for line in range(first, first + self.size)
        ]

    def all_lines(self, units: int) -> slice | list[int]:
        """Index of the rows or columns of the first `units` units; a slice, which copies nothing, where they touch."""
        if self.stride == self.size:
            return slice(self.start, self.start + units * self.size)
        return self.lines(range(units))


@dataclass(frozen=True)
class Group:
    """Units of one kind in one layer, and all the slots that a unit takes with it.

    Attributes:
        name: unique in the model.
        kind: what the units are.
        layer: number of the decoder block.
        units: how many there are.
        slots: where they lie.
        parent: of query heads: name of the group of KV heads that they read.
        alibi_heads: of query heads with ALiBi: for each, the head of the dense model whose slope it uses. Slopes are a
            function of the head's number, and a head keeps its own when its neighbours go.
    """

    name: str
    kind: Kind
    layer: int
    units: int
    slots: tuple[Slot, ...]
    parent: str | None = None
    alibi_heads: tuple[int, ...] = ()

    @property
    def inner(self) -> Slot:
        """The "in" slot: the inputs of the Linear that reads these units (o_proj, down_proj)."""
        return next(slot for slot in self.slots if slot.side == "in")


@dataclass(frozen=True)
class LayerWidths:
    """The sizes of one decoder block, and with ALiBi the head of the dense model whose slope each query head uses.

    `head_dim` is stated: hidden_size / heads is wrong after a cut.
    """

    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    alibi_heads: tuple[int, ...] = ()

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of units by kind of group."""
        return {"kv_heads": self.kv_heads, "heads": self.heads, "channels": self.channels}


WidthKeys = Mapping[Kind, str]
"""Kind of group -> the config key that states the number of its units."""

ALIBI_KEY = "alibi_heads"
"""Per-layer config key of the slopes that a layer's heads use (`LayerWidths.alibi_heads`)."""

KEYS: WidthKeys = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "channels": "intermediate_size"}
"""Width keys of grouped-query attention."""


def read_widths(config: Any, layer: int, keys: WidthKeys, *, channels: int = 0) -> LayerWidths:
    """Sizes of one block from a transformers config, dense or pruned.

    Args:
        config: global sizes, and those of layers that differ from them.
        layer: number of the block.
        keys: the architecture's names.
        channels: what stands for a width of the MLP that the config leaves open.
    """
    sizes = config.per_layer_config[layer]
    return LayerWidths(
        heads=getattr(sizes, keys["heads"]),
        kv_heads=getattr(sizes, keys["kv_heads"]),
        # configs without the key belong to code that makes the heads tile the hidden states
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        channels=getattr(sizes, keys["channels"], None) or channels,
        alibi_heads=tuple(getattr(sizes, ALIBI_KEY, ())),
    )


def separate_qkv(attention: str, size: int) -> dict[str, Slot]:
    """Slots of queries, keys and values for `block_groups`, where each has its own Linear: q_proj, k_proj, v_proj."""
    return {part: Slot(f"{attention}.{part}_proj", "out", size) for part in "qkv"}


def stacked_qkv(module: str, widths: LayerWidths) -> dict[str, Slot]:
    """The same where one Linear has all rows of the queries, then of the keys, then of the values."""
    queries, keys = widths.heads * widths.head_dim, widths.kv_heads * widths.head_dim
    starts = {"q": 0, "k": queries, "v": queries + keys}
    return {part: Slot(module, "out", widths.head_dim, start=start) for part, start in starts.items()}


def interleaved_qkv(module: str, size: int) -> dict[str, Slot]:
    """The same where one Linear has [q k v] of one head after the other."""
    return {part: Slot(module, "out", size, start=i * size, stride=3 * size) for i, part in enumerate("qkv")}


def block_groups(
    layer: int, widths: LayerWidths, *, q: Slot, k: Slot, v: Slot, o: Slot, channels: Sequence[Slot]
) -> list[Group]:
    """The groups of one decoder block, from where its heads and channels lie."""
    kv_heads = f"layers.{layer}.kv_heads"
    return [
        Group(kv_heads, "kv_heads", layer, widths.kv_heads, (k, v)),
        Group(
            f"layers.{layer}.heads",
            "heads",
            layer,
            widths.heads,
            (q, o),
            parent=kv_heads,
            alibi_heads=widths.alibi_heads,
        ),
        Group(f"layers.{layer}.channels", "channels", layer, widths.channels, tuple(channels)),
    ]


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
    layers: dict[int, dict[Kind, Group]] = {}
    for group in groups:
        layers.setdefault(group.layer, {})[group.kind] = group
    return [
        LayerWidths(
            heads=len(kept(keep, of["heads"])),
            kv_heads=len(kept(keep, of["kv_heads"])),
            head_dim=of["kv_heads"].slots[0].size,
            channels=len(kept(keep, of["channels"])),
            alibi_heads=tuple(of["heads"].alibi_heads[head] for head in kept(keep, of["heads"]))
            if of["heads"].alibi_heads
            else (),
        )
        for _, of in sorted(layers.items())
    ]


def blocks_name(groups: Sequence[Group]) -> str:
    """Module name of the list of decoder blocks, from the slots: `model.layers.3.mlp.up_proj` -> `model.layers`."""
    group = groups[0]
    return group.slots[0].module.partition(f".{group.layer}.")[0]
