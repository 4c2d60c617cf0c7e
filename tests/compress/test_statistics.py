"""Block-by-block statistics against one pass through the whole model."""

import pytest
import torch
from toys import NAMES, toy

from edgeprune.groups import Group
from edgeprune.pruning import model_groups
from edgeprune.statistics import Method, gather
from edgeprune_runtime.errors import EdgepruneError


def some_ids(sequences: int = 4, length: int = 21) -> torch.Tensor:
    return torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(7))


def summed(model: torch.nn.Module, group: Group, of_weight: object) -> torch.Tensor:
    total = torch.zeros(group.units)
    for slot in group.slots:
        values = of_weight(model.get_submodule(slot.module).weight)
        total += values.sum(1 if slot.side == "out" else 0).reshape(group.units, -1).sum(1)
    return total


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_gradients_equal_autograd_through_the_whole_model(name: str) -> None:
    model, ids = toy(name), some_ids()
    groups = model_groups(model)
    stats = gather(model, groups, ids, Method.parse("taylor-fine"))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    for group in groups:
        expected = summed(model, group, lambda weight: (weight.detach() * weight.grad).abs())
        torch.testing.assert_close(stats.scores[group.name], expected, rtol=1e-5, atol=1e-9)


def test_fisher_is_the_mean_square_of_single_sample_gradients() -> None:
    model, ids = toy("llama"), some_ids(3)
    groups = model_groups(model)
    stats = gather(model, groups, ids, Method.parse("taylor-mixed"))
    weights = {slot.module: model.get_submodule(slot.module).weight for group in groups for slot in group.slots}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row in ids:
        gradients = torch.autograd.grad(model(row[None], labels=row[None]).loss, list(weights.values()))
        for weight_name, gradient in zip(weights, gradients, strict=True):
            squares[weight_name] += gradient**2 / len(ids)
            mean[weight_name] += gradient / len(ids)
    by_id = {id(weight): weight_name for weight_name, weight in weights.items()}

    def mixed(weight: torch.Tensor) -> torch.Tensor:
        name = by_id[id(weight)]
        return (weight.detach() * mean[name] - 0.5 * weight.detach() ** 2 * squares[name]).abs()

    for group in groups:
        torch.testing.assert_close(stats.scores[group.name], summed(model, group, mixed), rtol=1e-4, atol=1e-8)


def test_moments_are_those_of_the_inputs() -> None:
    model, ids = toy("qwen2"), some_ids()
    groups = model_groups(model)
    seen: dict[str, list[torch.Tensor]] = {}
    for group in groups:
        for slot in group.slots:
            if slot.side == "in":
                module = model.get_submodule(slot.module)
                rows = seen.setdefault(slot.module, [])
                module.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    expected = {name: torch.cat(rows) for name, rows in seen.items()}
    stats = gather(model, groups, ids, Method.parse("magnitude"))
    assert stats.moments.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(stats.moments[name].gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_moments_that_nobody_reads_are_not_gathered() -> None:
    model, ids = toy("llama"), some_ids()
    groups = model_groups(model)
    assert not gather(model, groups, ids, Method.parse("magnitude"), with_moments=False).moments
    assert gather(model, groups, ids, Method.parse("wanda-sp"), with_moments=False).moments


def test_gradients_may_see_fewer_sequences_than_the_moments() -> None:
    model, ids = toy("llama"), some_ids(6)
    groups = model_groups(model)
    some = gather(model, groups, ids, Method.parse("taylor-fine"), gradient_sequences=2)
    first = gather(model, groups, ids[:2], Method.parse("taylor-fine"))
    name = groups[-1].name
    torch.testing.assert_close(some.scores[name], first.scores[name], rtol=1e-5, atol=1e-9)
    everything = gather(model, groups, ids, Method.parse("magnitude"))
    inner = groups[-1].inner.module
    torch.testing.assert_close(some.moments[inner].gram, everything.moments[inner].gram)


def test_bfloat16_statistics_rank_units_nearly_alike() -> None:
    model, ids = toy("llama"), some_ids(8, 32)
    groups = model_groups(model)
    exact, rough = (
        gather(model, groups, ids, Method.parse("fusion"), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    for group in groups:
        pair = torch.stack([exact.scores[group.name], rough.scores[group.name]])
        assert torch.corrcoef(pair)[0, 1] > 0.99


def test_the_model_is_left_as_it_was() -> None:
    model = toy("mistral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers, graded = model.model.layers, [p.requires_grad for p in model.parameters()]
    gather(model, model_groups(model), some_ids(), Method.parse("fusion"))
    assert model.model.layers is layers
    assert [p.requires_grad for p in model.parameters()] == graded
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_blocks_and_hooks_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy("llama")
    layers = model.model.layers

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken block")

    monkeypatch.setattr(layers[1].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="broken block"):
        gather(model, model_groups(model), some_ids(), Method.parse("taylor-fine"))
    assert model.model.layers is layers
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scores_that_are_not_finite_are_refused() -> None:
    model = toy("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")
    with pytest.raises(EdgepruneError, match="not finite"):
        gather(model, model_groups(model), some_ids(), Method.parse("taylor-fine"))


def test_progress_counts_every_block_of_both_passes() -> None:
    model = toy("llama")
    told: list[tuple[str, int, int]] = []
    gather(
        model,
        model_groups(model),
        some_ids(),
        Method.parse("taylor-fine"),
        progress=lambda *step: told.append(step),
    )
    assert [step for step in told if step[0] == "statistics"] == [("statistics", i, 3) for i in range(4)]
    assert [step for step in told if step[0] == "gradients"] == [("gradients", i, 3) for i in range(4)]
