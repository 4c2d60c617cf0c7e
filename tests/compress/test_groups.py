from typing import Any

import pytest
import torch
import toys
from cuts import groups_of, random_keep
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from edgeprune.configs import layout
from edgeprune.groups import Group, LayerWidths, Slot, blocks_name, check_keep, kept, layer_widths
from edgeprune.shrink import LinearShape, linear_of
from edgeprune_runtime.errors import EdgepruneError

KV_HEADS, SHARE, HEAD_DIM, CHANNELS = 3, 4, 8, 16


def layer_groups(layer: int) -> list[Group]:
    kv_heads = Group(
        f"{layer}.kv", "kv_heads", layer, KV_HEADS, (Slot("k", "out", HEAD_DIM), Slot("v", "out", HEAD_DIM))
    )
    heads = Group(
        f"{layer}.q", "heads", layer, KV_HEADS * SHARE,
        (Slot("q", "out", HEAD_DIM), Slot("o", "in", HEAD_DIM)), parent=kv_heads.name,
    )  # fmt: skip
    channels = Group(f"{layer}.mlp", "channels", layer, CHANNELS, (Slot("up", "out", 1), Slot("down", "in", 1)))
    return [kv_heads, heads, channels]


GROUPS = [*layer_groups(0), *layer_groups(1)]


def literal_rule(keep: dict[str, list[int]]) -> bool:
    """The rules of `check_keep` once more, said slowly."""
    for group in GROUPS:
        units = keep.get(group.name, list(range(group.units)))
        if not units or units != sorted(set(units)) or not set(units) <= set(range(group.units)):
            return False
    for layer in (0, 1):
        alive = keep.get(f"{layer}.kv", list(range(KV_HEADS)))
        queries = keep.get(f"{layer}.q", list(range(KV_HEADS * SHARE)))
        per_kv_head = [[q for q in queries if q // SHARE == kv_head] for kv_head in range(KV_HEADS)]
        sizes = {len(per_kv_head[kv_head]) for kv_head in alive}
        if len(sizes) != 1 or 0 in sizes or any(per_kv_head[dead] for dead in set(range(KV_HEADS)) - set(alive)):
            return False
    return True


indices = st.lists(st.integers(-1, KV_HEADS * SHARE), max_size=8)
mostly_sorted = st.one_of(indices, indices.map(lambda units: sorted({unit for unit in units if unit >= 0})))
grouped = st.builds(
    lambda alive, inside: (sorted(alive), [kv * SHARE + unit for kv in sorted(alive) for unit in sorted(inside)]),
    st.sets(st.integers(0, KV_HEADS - 1), min_size=1),
    st.sets(st.integers(0, SHARE - 1), min_size=1),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([group.name for group in GROUPS]), mostly_sorted), st.none() | grouped)
def test_check_keep_agrees_with_the_literal_rule(keep: dict[str, list[int]], attention: Any) -> None:
    if attention is not None:
        keep = keep | {"0.kv": attention[0], "0.q": attention[1]}
    if literal_rule(keep):
        check_keep(GROUPS, keep)
        for layer, width in enumerate(layer_widths(GROUPS, keep)):
            units = {group.kind: len(kept(keep, group)) for group in GROUPS if group.layer == layer}
            assert width == LayerWidths(units["heads"], units["kv_heads"], HEAD_DIM, units["channels"])
            assert width.heads % width.kv_heads == 0
    else:
        with pytest.raises(EdgepruneError, match=r"^plan keeps"):
            check_keep(GROUPS, keep)


def test_a_group_of_another_model_is_refused() -> None:
    with pytest.raises(EdgepruneError, match="which this model does not have"):
        check_keep(GROUPS, {"9.mlp": [0]})


def test_layers_come_in_order() -> None:
    widths = layer_widths(list(reversed(GROUPS)), {"1.mlp": [0, 1]})
    assert [width.channels for width in widths] == [CHANNELS, 2]


@pytest.mark.parametrize("name", toys.NAMES)
def test_groups_describe_the_model(name: str) -> None:
    """Together the slots of a side name every row or column of its Linear once, so that nothing escapes a cut."""
    model = toys.toy(name)
    groups = groups_of(model)
    lines: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        for slot in group.slots:
            lines.setdefault((slot.module, slot.side), []).extend(slot.lines(range(group.units)))
            assert slot.side == "out" or slot.stride == slot.size
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    assert {module for module, _ in lines} == {name for name in linears if f".{blocks_name(groups)}." in f".{name}."}
    for (module, side), found in lines.items():
        shape = LinearShape.of(linear_of(model, module))
        assert sorted(found) == list(range(shape.out_features if side == "out" else shape.in_features))
    check_keep(groups, random_keep(groups, seed=0))


@pytest.mark.parametrize("name", toys.NAMES)
def test_architectures_name_attributes_that_stock_modules_have(name: str) -> None:
    """Attributes of other versions of transformers would be written and never read."""
    model = toys.toy(name)
    table = layout(model.config.model_type, groups_of(model))
    for layer, widths in enumerate(layer_widths(groups_of(model), {})):
        block = model.get_submodule(f"{table['blocks']}.{layer}")
        counts = {
            **widths.counts, "heads_each": widths.heads // widths.kv_heads, "inner": widths.heads * widths.head_dim
        }  # fmt: skip
        for module, attributes in table["attributes"].items():
            found = {attribute: getattr(block.get_submodule(module), attribute) for attribute in attributes}
            assert found == {attribute: counts[width] for attribute, width in attributes.items()}
        for module in table["config_readers"]:
            assert block.get_submodule(module).config is model.config


@pytest.mark.parametrize(("start", "stride"), [(0, 0), (5, 0), (2, 9)])
def test_lines_of_a_slot_are_those_of_its_units(start: int, stride: int) -> None:
    slot = Slot("m", "out", 3, start=start, stride=stride)
    step = stride or 3
    expected = [start + unit * step + line for unit in (0, 2, 3) for line in (0, 1, 2)]
    assert slot.lines((0, 2, 3)) == expected
    every = torch.arange(64)
    assert torch.equal(every[slot.all_lines(4)], every[slot.lines(range(4))])
