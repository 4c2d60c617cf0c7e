"""Reading a checkpoint folder one tensor at a time, by the names that its model gives them, and what its model is."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel

from edgeprune.checkpoint import open_decoder
from edgeprune.groups import LayerWidths
from edgeprune.groups import layer_widths as group_widths

Array = NDArray[np.float32]


class Weights:
    """The tensors of a checkpoint folder; `read` copies one of them out as float32.

    Attributes:
        model: the model on the meta device; every tensor of the folder was found to have the shape that it has there.
        blocks_name: module name of the list of decoder blocks.
    """

    def __init__(self, folder: Path) -> None:
        self._decoder = open_decoder(folder)
        self.model: PreTrainedModel = self._decoder.model
        self.blocks_name = self._decoder.blocks_name
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.model.config

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return self._shapes

    def read_stored(self, name: str) -> torch.Tensor:
        """One tensor as it is stored.

        Raises:
            EdgepruneError: if it has values that are not finite.
        """
        return self._decoder.read_tensor(name)

    def read(self, name: str) -> Array:
        """One tensor as float32.

        Raises:
            EdgepruneError: if it has values that are not finite.
        """
        return self.read_stored(name).to(torch.float32).numpy()

    def read_rows(self, names: list[str]) -> Array:
        """Several tensors as float32, joined along their first dimension."""
        arrays = [self.read(name) for name in names]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def layer_widths(self) -> list[LayerWidths]:
        """Widths of each decoder block."""
        return group_widths(self._decoder.groups, {})

    def count_parameters(self) -> tuple[int, int]:
        """Parameters of the whole model (tied ones once) and of its decoder blocks."""
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        blocks = sum(size for name, size in sizes.items() if name.startswith(f"{self.blocks_name}."))
        return sum(sizes.values()), blocks
