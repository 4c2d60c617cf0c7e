import copy

import pytest
import torch
import toys
from cuts import decode, groups_of, prefill, random_keep, silenced, some_ids, uniform_keep
from transformers.pytorch_utils import Conv1D

from edgeprune.groups import Group, Slot, layer_widths
from edgeprune.shrink import LinearShape, linear_shapes, parameters_removed, shrink, unit_parameters, weight_of
from edgeprune.sources import count_parameters
from edgeprune_runtime.errors import EdgepruneError

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", toys.NAMES)
def test_cut_equals_silenced(name: str, seed: int) -> None:
    model = toys.toy(name)
    groups = groups_of(model)
    keep = random_keep(groups, seed)
    ids = some_ids(model)
    with silenced(model, groups, keep):
        expected, expected_steps = prefill(model, ids), decode(model, ids, split=4)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # the first sequence is shorter, and padded on the left
    with silenced(model, groups, keep):
        expected_padded = prefill(model, ids, mask)
    dense = prefill(model, ids)
    shrink(model, groups, keep)
    torch.testing.assert_close(prefill(model, ids), expected, **TOLERANCE)
    torch.testing.assert_close(decode(model, ids, split=4), expected_steps, **TOLERANCE)
    torch.testing.assert_close(prefill(model, ids, mask), expected_padded, **TOLERANCE)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(prefill(model, ids), expected, **TOLERANCE)
    assert (dense - expected).abs().max() > 0.1  # the cut took something that mattered


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_query_heads_on_other_kv_heads_are_noticed(name: str) -> None:
    """The test above must be able to fail: with the query heads dealt out to the wrong KV heads it does."""
    model = toys.toy(name)
    groups = groups_of(model)
    kv_heads = next(group.units for group in groups if group.kind == "kv_heads")
    keep = uniform_keep(groups, kv_heads=kv_heads, share=2, channels=40)
    ids = some_ids(model)
    with silenced(model, groups, keep):
        expected = prefill(model, ids)
    shrink(model, groups, keep)
    torch.testing.assert_close(prefill(model, ids), expected, **TOLERANCE)
    head_dim = model.config.head_dim
    for layer in model.model.layers:
        # Heads numbered KV head last (0, kv, 1, kv + 1, ...) in place of group-major.
        wrong = torch.arange(2 * kv_heads).view(kv_heads, 2).T.flatten()
        rows = (wrong.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data[rows]
        layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data[:, rows]
    assert (prefill(model, ids) - expected).abs().max() > 0.05


def test_slopes_of_other_heads_are_noticed() -> None:
    """ALiBi slopes stay with the heads that they belonged to; those of a smaller model would be other ones."""
    model = toys.toy("bloom")
    groups = groups_of(model)
    keep: dict[str, list[int]] = {}
    for group in groups:
        keep[group.name] = [1, 2, 5] if group.kind in ("heads", "kv_heads") else [*range(0, group.units, 2)]
    ids = some_ids(model)
    with silenced(model, groups, keep):
        expected = prefill(model, ids)
    shrink(model, groups, keep)
    torch.testing.assert_close(prefill(model, ids), expected, **TOLERANCE)
    attentions = [block.self_attention for block in model.transformer.h]
    for attention in attentions:
        attention.alibi_heads = [0, 1, 2]  # the slopes of the first heads that there were
    assert (prefill(model, ids) - expected).abs().max() > 0.01
    model.transformer.num_heads = 3  # the slopes of a model that has three heads in all
    for attention in attentions:
        attention.dense_heads = 3
    assert (prefill(model, ids) - expected).abs().max() > 0.01


def test_slopes_are_named_by_the_heads_of_the_first_model_however_often_it_is_cut() -> None:
    model = toys.toy("bloom")
    for heads in ([1, 3, 4, 5], [0, 2, 3]):
        groups = groups_of(model)
        shrink(model, groups, {group.name: heads for group in groups if group.kind in ("heads", "kv_heads")})
    assert [widths.alibi_heads for widths in layer_widths(groups_of(model), {})] == [(1, 4, 5)] * 3
    assert model.config.n_head == 6
    assert [block.self_attention.alibi_heads for block in model.transformer.h] == [[1, 4, 5]] * 3


def test_modules_that_read_their_config_see_their_own_sizes_and_follow_the_rest() -> None:
    model = toys.toy("phi3")
    groups = groups_of(model)
    shrink(model, groups, {"layers.1.heads": [0, 2, 4]})
    attention = model.model.layers[1].self_attn
    assert (attention.config.num_attention_heads, model.config.num_attention_heads) == (3, 6)
    model.set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"
    twin = copy.deepcopy(model)
    assert twin.model.layers[1].self_attn.config.num_attention_heads == 3
    torch.testing.assert_close(prefill(twin, some_ids(model)), prefill(model, some_ids(model)))


def test_weights_are_seen_as_out_by_in_however_they_are_stored() -> None:
    linear, transposed = torch.nn.Linear(5, 3), Conv1D(3, 5)
    transposed.weight.data = linear.weight.data.T.contiguous()
    assert LinearShape.of(linear) == LinearShape.of(transposed) == LinearShape(3, 5, has_bias=True)
    assert torch.equal(weight_of(linear), weight_of(transposed))
    with torch.no_grad():
        weight_of(transposed)[2, 4] = 7.0
    assert transposed.weight[4, 2] == 7.0


@pytest.mark.parametrize("name", toys.NAMES)
def test_parameters_removed_is_what_leaves(name: str) -> None:
    model = toys.toy(name)
    groups = groups_of(model)
    keep = random_keep(groups, seed=3)
    shapes = linear_shapes(model, groups)
    before = count_parameters(model)
    by_units = sum((group.units - len(keep[group.name])) * unit_parameters(group, shapes) for group in groups)
    removed = parameters_removed(groups, keep, shapes)
    assert removed == by_units
    shrink(model, groups, keep)
    assert before - count_parameters(model) == removed


def test_parameters_removed_counts_a_corner_once() -> None:
    """A Linear that loses rows and columns loses their crossing once."""
    groups = [
        Group("a", "channels", 0, 4, (Slot("m", "out", 1), Slot("n", "in", 1))),
        Group("b", "channels", 1, 5, (Slot("m", "in", 1),)),
    ]
    shapes = {"m": LinearShape(4, 5, has_bias=True), "n": LinearShape(3, 4, has_bias=False)}
    removed = parameters_removed(groups, {"a": [0, 1], "b": [4]}, shapes)
    assert removed == (4 * 5 + 4) - (2 * 1 + 2) + 3 * 4 - 3 * 2


def test_fused_projection_is_cut_by_its_slots() -> None:
    """Two slots of one module: unit u leaves from both halves, and only it."""
    model = toys.toy("llama")
    mlp = model.model.layers[0].mlp
    group = Group(
        "fused", "channels", 0, 40,
        (Slot("model.layers.0.mlp.gate_proj", "out", 1), Slot("model.layers.0.mlp.gate_proj", "out", 1, start=40),
         Slot("model.layers.0.mlp.down_proj", "in", 2)),
    )  # fmt: skip
    weight = mlp.gate_proj.weight.clone()
    expected = torch.cat([weight[[1, 3]], weight[[41, 43]]])
    heads = [other for other in groups_of(model) if other.kind != "channels"]
    rest = [other for other in groups_of(model) if other.kind == "channels" and other.layer > 0]
    shrink(model, [*heads, group, *rest], {"fused": [1, 3]})
    torch.testing.assert_close(mlp.gate_proj.weight, torch.nn.Parameter(expected), rtol=0, atol=0)
    assert mlp.gate_proj.out_features == 4
    assert mlp.down_proj.in_features == 4


@pytest.mark.parametrize("name", toys.NAMES)
def test_a_pruned_model_can_be_pruned_again(name: str) -> None:
    model = toys.toy(name)
    for seed in (4, 5):
        groups = groups_of(model)
        keep = random_keep(groups, seed)
        ids = some_ids(model)
        with silenced(model, groups, keep):
            expected = prefill(model, ids)
        shrink(model, groups, keep)
        torch.testing.assert_close(prefill(model, ids), expected, **TOLERANCE)
        assert layer_widths(groups_of(model), {}) == layer_widths(groups, keep)


def test_uniform_widths_leave_a_stock_config() -> None:
    model = toys.toy("qwen2")
    groups = groups_of(model)
    shrink(model, groups, uniform_keep(groups, kv_heads=1, share=2, channels=32))
    assert not model.config.is_heterogeneous
    sizes = (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.intermediate_size)
    assert sizes == (2, 1, 32)
    assert model.config.head_dim == 8


def test_a_keep_that_cannot_be_cut_leaves_the_model_alone() -> None:
    model = toys.toy("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(EdgepruneError, match="unequal query heads"):
        shrink(model, groups_of(model), {"layers.0.heads": [0, 1, 2, 4]})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_stays_trainable_stays_trainable() -> None:
    model = toys.toy("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    shrink(model, groups_of(model), {"layers.0.channels": [0, 1, 2]})
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.gate_proj.weight.requires_grad
