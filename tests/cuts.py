"""Random cuts for tests, and the reference they are held against: the full model with the dropped units silenced."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from edgeprune.configs import config_groups
from edgeprune.groups import Group, Keep, heads_per_kv_head, kept


def groups_of(model: Any) -> list[Group]:
    return config_groups(model.config)


def random_keep(groups: Sequence[Group], seed: int) -> dict[str, list[int]]:
    """A keep list with its own widths in every layer: whole KV heads, query heads inside them, channels."""
    rng = random.Random(seed)
    keep: dict[str, list[int]] = {}

    def some(units: int) -> list[int]:
        return sorted(rng.sample(range(units), rng.randint(1, units)))

    by_name = {group.name: group for group in groups}
    for group in groups:
        if group.parent is None:
            keep[group.name] = some(group.units)
    for group in groups:
        if group.parent is not None:
            share = heads_per_kv_head(group, by_name[group.parent])
            count = rng.randint(1, share)
            keep[group.name] = [
                kv_head * share + inside
                for kv_head in keep[group.parent]
                for inside in sorted(rng.sample(range(share), count))
            ]
    return keep


def uniform_keep(groups: Sequence[Group], kv_heads: int, share: int, channels: int) -> dict[str, list[int]]:
    """The same widths in every layer, other units in each: `share` query heads in each of `kv_heads` KV heads."""
    keep: dict[str, list[int]] = {}
    by_name = {group.name: group for group in groups}
    for group in groups:
        first = group.layer % 2
        if group.kind == "kv_heads":
            keep[group.name] = list(range(group.units))[-kv_heads:] if first else list(range(kv_heads))
        elif group.kind == "channels":
            keep[group.name] = list(range(group.units))[-channels:] if first else list(range(channels))
    for group in groups:
        if group.parent is not None:
            old_share = heads_per_kv_head(group, by_name[group.parent])
            keep[group.name] = [head * old_share + inside for head in keep[group.parent] for inside in range(share)]
    return keep


def _times(factor: torch.Tensor) -> Callable[[Any, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    return lambda _, inputs: (inputs[0] * factor,)


@contextlib.contextmanager
def silenced(model: Any, groups: Sequence[Group], keep: Keep) -> Iterator[None]:
    """The full model with the activations of the dropped units set to zero where o_proj and down_proj read them.

    Activations, not weights: with a bias a unit of zero weights still speaks, because act(0 + bias) is not zero.
    """
    handles = []
    for group in groups:
        if group.kind == "kv_heads":
            continue
        slot = group.inner
        speaks = torch.zeros(group.units, slot.size)
        speaks[list(kept(keep, group))] = 1.0

        handles.append(model.get_submodule(slot.module).register_forward_pre_hook(_times(speaks.flatten())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unit_sums(model: Any, group: Group, of_weight: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Sums over the units `(units,)` of what is computed of every weight as it is stored; slow and literal."""
    total = torch.zeros(group.units)
    for slot in group.slots:
        linear = model.get_submodule(slot.module)
        values = of_weight(linear.weight)
        is_rows = (slot.side == "out") != isinstance(linear, Conv1D)
        for unit in range(group.units):
            lines = [slot.start + unit * slot.stride + line for line in range(slot.size)]
            total[unit] += (values[lines] if is_rows else values[:, lines]).sum()
    return total


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (B, T, V) of one forward pass."""
    return model(ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, split: int) -> torch.Tensor:
    """Logits (B, T, V) of a prefill of `split` tokens and one cached step for each of the others."""
    output = model(ids[:, :split], use_cache=True)
    logits = [output.logits]
    for position in range(split, ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def some_ids(model: Any, batch: int = 2, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
