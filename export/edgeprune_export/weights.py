"""Reading a checkpoint folder one tensor at a time, and the widths its tensors really have."""

from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import PreTrainedConfig

from edgeprune.configs import architecture
from edgeprune.groups import Group, LayerWidths
from edgeprune.groups import layer_widths as group_widths
from edgeprune.weights import read_headers, weight_files
from edgeprune_runtime.errors import EdgepruneError

Array = NDArray[np.float32]


class Weights:
    """The tensors of a checkpoint folder, memory-mapped; `read` copies one of them out as float32.

    Use it as a context manager; the files are closed on leaving.
    """

    def __init__(self, folder: Path) -> None:
        headers = read_headers(folder)
        if headers is None:
            raise EdgepruneError(f"{folder} holds torch pickles; expected safetensors, save the model as such first")
        self._shapes = {name: header.shape for name, header in headers.items()}
        self._handles: dict[str, Any] = {}
        self._stack = ExitStack()
        for path in weight_files(folder):
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
            self._handles |= dict.fromkeys(handle.keys(), handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it.

        Raises:
            EdgepruneError: if the checkpoint has no such tensor.
        """
        if name not in self._shapes:
            raise EdgepruneError(
                f"the checkpoint has no tensor {name!r}; expected the weights that its config.json describes"
            )
        return self._shapes[name]

    def read(self, name: str) -> Array:
        """One tensor as float32.

        Raises:
            EdgepruneError: if it is missing, or has values that are not finite.
        """
        self.shape(name)
        tensor: torch.Tensor = self._handles[name].get_tensor(name).to(torch.float32)
        # A finite sum proves finite values without a second array; an infinite one may also be an overflow.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise EdgepruneError(f"{name} has NaN or infinite values; expected finite weights, repair the checkpoint")
        return tensor.numpy()

    def read_rows(self, names: list[str]) -> Array:
        """Several tensors as float32, joined along their first dimension."""
        arrays = [self.read(name) for name in names]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def layer_widths(config: PreTrainedConfig, weights: Weights) -> list[LayerWidths]:
    """Widths of each decoder block, read off the tensors' shapes through the groups of its architecture.

    Raises:
        EdgepruneError: if the shapes of a layer do not fit together.
    """
    groups: list[Group] = architecture(config.model_type).groups(config)
    counts = {group.name: _units(group, weights) for group in groups}
    for group in groups:
        if group.parent is not None and counts[group.name] % counts[group.parent]:
            raise EdgepruneError(
                f"layer {group.layer} has {counts[group.name]} query heads on {counts[group.parent]} KV heads; "
                "expected the same number on each"
            )
    # Only names and unit sizes of the groups are used: how many units there are is for the weights to say.
    return group_widths(groups, {group.name: range(counts[group.name]) for group in groups})


def _units(group: Group, weights: Weights) -> int:
    """Number of units of a group, the same in each of its slots; a slot is a whole side of its Linear."""
    found = {}
    for slot in group.slots:
        lines = weights.shape(f"{slot.module}.weight")[0 if slot.side == "out" else 1]
        units, rest = divmod(lines, slot.size)
        if units == 0 or rest:
            raise EdgepruneError(f"{slot.module} has {lines} {slot.side} features; expected whole units of {slot.size}")
        found[slot.module] = units
    if len(set(found.values())) != 1:
        raise EdgepruneError(
            f"the weights of {group.name} disagree: {found}; expected the same number of units in each"
        )
    return next(iter(found.values()))


def count_parameters(config: PreTrainedConfig, weights: Weights) -> tuple[int, int]:
    """Parameters of the whole checkpoint (a tied head once) and of its decoder blocks."""
    sizes = {
        name: prod(weights.shape(name))
        for name in weights.names
        if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    blocks = sum(size for name, size in sizes.items() if name.startswith("model.layers."))
    return sum(sizes.values()), blocks
