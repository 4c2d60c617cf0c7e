"""Block-by-block statistics against one pass through the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import unit_sums
from toys import NAMES, toy

from edgeprune.distributed import Ranks
from edgeprune.groups import Group
from edgeprune.journal import Journal
from edgeprune.pruning import model_groups
from edgeprune.shrink import oriented
from edgeprune.statistics import GRAM_STRIP, InputSums, Method, Moments, gather, moments_of, share_out
from edgeprune_runtime.errors import EdgepruneError


def some_ids(sequences: int = 4, length: int = 21) -> torch.Tensor:
    return torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_gradients_equal_autograd_through_the_whole_model(name: str) -> None:
    model, ids = toy(name), some_ids()
    groups = model_groups(model)
    stats = gather(model, groups, ids, Method.parse("taylor-fine"))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    for group in groups:
        expected = unit_sums(model, group, lambda weight: (weight.detach() * weight.grad).abs())
        torch.testing.assert_close(stats.scores[group.name], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_effects_of_masks_are_what_the_gradients_of_all_weights_give(name: str) -> None:
    model, ids = toy(name), some_ids()
    groups = model_groups(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    stats = gather(model, groups, ids, Method.parse("taylor-coarse"))
    model(ids, labels=ids).loss.backward()
    for group in groups:
        of_units = torch.zeros(group.units)
        for slot in group.slots:
            module = model.get_submodule(slot.module)
            effect = oriented(module, module.weight.detach() * module.weight.grad).sum(1 if slot.side == "out" else 0)
            of_units += effect[slot.all_lines(group.units)].abs().reshape(group.units, slot.size).sum(1)
        torch.testing.assert_close(stats.scores[group.name], of_units, rtol=1e-4, atol=1e-7)


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
        torch.testing.assert_close(stats.scores[group.name], unit_sums(model, group, mixed), rtol=1e-4, atol=1e-8)


def literal_mask_fisher(model: Any, group: Group, reader: Group, ids: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of the squared gradient of a sequence's summed loss for a mask on one token's units."""
    linear, slot = model.get_submodule(reader.inner.module), reader.inner
    channels = reader.units * slot.size
    total, targets = torch.zeros(group.units, dtype=torch.float64), 0
    for row in ids:
        for token in range(len(row) - 1):
            mask = torch.ones(group.units, requires_grad=True)

            def silence(_: Any, inputs: Any, token: int = token, mask: torch.Tensor = mask) -> tuple[torch.Tensor]:
                factors = torch.ones(inputs[0].shape[1:]).index_put(
                    (torch.tensor(token), slot.start + torch.arange(channels)),
                    mask.repeat_interleave(channels // group.units),
                )
                return (inputs[0] * factors,)

            hook = linear.register_forward_pre_hook(silence)
            logits = model(row[None]).logits[0, :-1]
            hook.remove()
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"), mask)
            total += gradient.double().square()
            targets += 1
    return total / targets


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen3"])
def test_mask_fisher_equals_one_mask_per_token_in_the_whole_model(name: str) -> None:
    model, ids = toy(name, num_hidden_layers=2), some_ids(2, 5)
    groups = model_groups(model)
    stats = gather(model, groups, ids, Method.parse("fisher"))
    singly = {g.name: literal_mask_fisher(model, g, g, ids) / 2 for g in groups if g.kind != "kv_heads"}
    for group in groups:
        readers = [other for other in groups if other.parent == group.name]
        if readers:
            joint = literal_mask_fisher(model, group, readers[0], ids) / 2
            apart = singly[readers[0].name].reshape(group.units, -1).sum(1)
            assert (name == "llama-mha") == torch.allclose(joint, apart)
            expected = (joint - apart).clamp_min(0.0)
        else:
            expected = singly[group.name]
        # a difference of two sums is exact only as far as they are
        torch.testing.assert_close(
            stats.scores[group.name], expected.float(), rtol=1e-5, atol=2e-6 * float(expected.max())
        )


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_mask_fisher_equals_autograd_through_the_whole_model(name: str) -> None:
    model, ids = toy(name), some_ids()
    groups = model_groups(model)
    read: dict[str, torch.Tensor] = {}
    for group in groups:
        if group.kind != "kv_heads":

            def keep(_: Any, inputs: Any, module: str = group.inner.module) -> None:
                read[module] = inputs[0]

            model.get_submodule(group.inner.module).register_forward_pre_hook(keep)
    loss = model(ids, labels=ids).loss * ids[:, 1:].numel()
    gradients = dict(zip(read, torch.autograd.grad(loss, list(read.values())), strict=True))
    stats = gather(toy(name), groups, ids, Method.parse("fisher"), step_tokens=21)
    assert stats.loss == pytest.approx(loss.item() / ids[:, 1:].numel(), rel=1e-5)
    for group in groups:
        if group.kind != "kv_heads":
            effects = (read[group.inner.module] * gradients[group.inner.module]).detach().double()
            of_units = effects.reshape(-1, group.units, group.inner.size).sum(2)
            expected = of_units.square().sum(0) / ids[:, 1:].numel() / 2
            torch.testing.assert_close(stats.scores[group.name], expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("method", "read"), [("fisher", (48, 80)), ("taylor-coarse", ())])
def test_masks_take_no_gradients_of_weights(
    method: str, read: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, grad = toy("llama"), torch.autograd.grad
    wanted: list[list[tuple[int, ...]]] = []

    def counted(outputs: Any, inputs: Any, *rest: Any) -> Any:
        if isinstance(inputs, list):  # of a block, not of the tail
            wanted.append([tuple(x.shape) for x in inputs])
        return grad(outputs, inputs, *rest)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    gather(model, model_groups(model), some_ids(), Method.parse(method))
    assert wanted == [[(4, 21, width) for width in (48, *read)]] * 3


@pytest.mark.parametrize("graded", [1, 2])
def test_mask_fisher_sees_the_graded_sequences_alone(graded: int) -> None:
    model, ids = toy("qwen2"), some_ids(5)
    groups, method = model_groups(model), Method.parse("fisher")
    some = gather(model, groups, ids, method, gradient_sequences=graded)
    first = gather(model, groups, ids[:graded], method)
    assert some.loss == pytest.approx(first.loss)
    for name, scores in first.scores.items():
        torch.testing.assert_close(some.scores[name], scores, rtol=1e-5, atol=1e-9)
    assert some.moments[groups[-1].inner.module].gram.shape == (80, 80)


def test_interrupted_mask_fisher_continues_where_it_was(tmp_path: Path) -> None:
    model, ids = toy("llama"), some_ids()
    groups, method = model_groups(model), Method.parse("fisher")
    expected = gather(model, groups, ids, method)

    def interrupt(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("gradients", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(model, groups, ids, method, journal=Journal(tmp_path), progress=interrupt)
    assert "gradients-1" in Journal(tmp_path)
    found = gather(model, groups, ids, method, journal=Journal(tmp_path))
    assert all(torch.equal(found.scores[name], scores) for name, scores in expected.scores.items())


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


@pytest.mark.parametrize("inputs", [1, GRAM_STRIP, 2 * GRAM_STRIP + 1])
@pytest.mark.parametrize("held_out", [0, 30])
def test_a_gram_matrix_of_any_size_is_whole_and_symmetric(inputs: int, held_out: int) -> None:
    x = torch.randn(100, inputs, generator=torch.Generator().manual_seed(0))
    sums = InputSums(inputs), InputSums(inputs)
    for of_part, rows in zip(sums, (x[held_out:], x[:held_out]), strict=True):
        of_part.add(rows[:20])
        of_part.add(rows[20:])
    moments = moments_of(*sums)
    torch.testing.assert_close(moments.gram, x.T @ x / 100, rtol=1e-4, atol=1e-4)
    assert torch.equal(moments.gram, moments.gram.T)
    if held_out:
        torch.testing.assert_close(
            moments.held_out_gram, x[:held_out].T @ x[:held_out] / held_out, rtol=1e-4, atol=1e-4
        )


def test_moments_that_nobody_reads_are_not_kept() -> None:
    model, ids = toy("llama"), some_ids()
    groups = model_groups(model)
    for method in ("magnitude", "wanda-sp"):
        assert not gather(model, groups, ids, Method.parse(method), with_moments=False).moments


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


@pytest.mark.parametrize("sequences", [1, 5, 16, 64])
@pytest.mark.parametrize("sample", [1, 3])
def test_what_is_graded_held_out_or_one_sample_does_not_depend_on_who_does_it(sequences: int, sample: int) -> None:
    graded = max(1, sequences // 2)

    def roles(size: int) -> set[tuple[int, bool, bool]]:
        found = []
        for rank in range(size):
            pieces = share_out(sequences, graded, 8, sample, Ranks(rank, size))
            rows = [row for piece in pieces for row in range(piece.rows.start, piece.rows.stop)]
            assert rows == list(range(len(rows)))
            assert [piece.is_graded for piece in pieces] == sorted((p.is_graded for p in pieces), reverse=True)
            for piece in pieces:
                numbers = range(piece.numbers.start, piece.numbers.stop)
                found += [(number, piece.is_graded, piece.is_held_out) for number in numbers]
                assert not piece.is_graded or piece.first % sample == 0 or piece.is_held_out
        assert len(found) == len(set(found)) == sequences
        return set(found)

    alone = roles(1)
    assert sum(is_held_out for _, _, is_held_out in alone) == sequences // 8
    assert all(roles(size) == alone for size in (2, 3, 7))


def test_moments_survive_the_journal_exactly() -> None:
    model, ids = toy("llama"), some_ids(16)
    for sequences in (16, 4):  # with and without tokens kept aside
        stats = gather(model, model_groups(model), ids[:sequences], Method.parse("magnitude"))
        for moments in stats.moments.values():
            again = Moments.unpacked(moments.packed())
            for name in ("gram", "mean", "held_out_gram", "held_out_mean"):
                before, after = getattr(moments, name), getattr(again, name)
                assert (before is None and after is None) or torch.equal(before, after)
            assert torch.equal(moments.gram, moments.gram.T)
            assert again.held_out_share == moments.held_out_share == (sequences // 8) / sequences


def test_held_out_moments_are_those_of_the_last_sequences() -> None:
    model, ids = toy("llama"), some_ids(16)
    groups = model_groups(model)
    stats = gather(model, groups, ids, Method.parse("magnitude"))
    last, first = (gather(model, groups, part, Method.parse("magnitude")) for part in (ids[14:], ids[:7]))
    name = groups[-1].inner.module
    held_out = stats.moments[name].held_out_gram
    assert held_out is not None
    torch.testing.assert_close(held_out, last.moments[name].gram)
    assert first.moments[name].held_out_gram is None
