"""What a model is and what can be pruned of it, from its config alone: the model is built on the meta device.

    describe (sources)  ->  config  ->  shapes on meta, groups  ->  Inspection

The reachable ratio is that of the smallest model which `compress` would make with the same guards: its own arithmetic
(`make_problem`) answers, so that both cannot disagree.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from edgeprune.checkpoint import class_of
from edgeprune.configs import CONFIG_ERRORS, architecture, one_line, quiet_global_reads
from edgeprune.groups import Group, LayerWidths, layer_widths
from edgeprune.pruning import LARGEST_RATIO, Settings, make_problem
from edgeprune.shrink import is_stock
from edgeprune.sources import Described, count_parameters
from edgeprune.stock import stock_counts
from edgeprune.streaming import model_groups
from edgeprune_runtime.errors import EdgepruneError

MOST_PARAMETERS = 10**13
"""No model has more; lists as long as such sizes would not fit into memory."""

ANY_RATIO = 0.5
"""A ratio has to be named to ask for a problem; what is removable does not depend on it."""


@dataclass(frozen=True)
class Inspection:
    """What was recognised.

    Attributes:
        model: as the user named it.
        place: where the config was found.
        stored_type: the `model_type` that the config names.
        model_type: the one it is read as; another one where a checkpoint has a form of its own.
        layers: sizes of each decoder block.
        hidden_size: width of the hidden states.
        vocab_size: number of tokens.
        context_tokens: positions; None if the config states none.
        is_tied: head and embedding are one matrix.
        parameters: of each part, tied ones once, in `PARTS` order, and of "all".
        prunable_parameters: of all heads and channels.
        is_stock: the model as it is loads without code of edgeprune.
        stock_kinds: widths that stock code takes from the config, so that a pruned model can have a stock one.
        head_counts: for --widths uniform: (query heads, KV heads) that all layers may keep.
        graph_source: who builds its ONNX graph.
        largest_ratio: share of all parameters that can leave under the guards, per-layer widths.
        smallest: sizes of a block then.
        min_channels: the guard it was asked with.
        own_code: Python code that comes with the model, and would have to be allowed.
        refused: what is not possible, each with its reason.
    """

    model: str
    place: str
    stored_type: str
    model_type: str
    layers: tuple[LayerWidths, ...]
    hidden_size: int
    vocab_size: int
    context_tokens: int | None
    is_tied: bool
    parameters: Mapping[str, int]
    prunable_parameters: int
    is_stock: bool
    stock_kinds: tuple[str, ...]
    head_counts: tuple[tuple[int, int], ...]
    graph_source: str
    largest_ratio: float
    smallest: LayerWidths
    min_channels: int
    own_code: str | None
    refused: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for JSON."""
        return asdict(self)


PARTS = ("embedding", "attention", "MLP", "norms", "head", "other")


@quiet_global_reads()
def inspect(model: Described, *, align: int = 32, min_channels: int = 64) -> Inspection:
    """What a described model is, and what `compress` could do with it under these guards.

    Raises:
        EdgepruneError: if the config describes no model, or a guard is no positive number.
    """
    settings = Settings(ANY_RATIO, align=align, min_channels=min_channels)
    settings.check()
    config = model.config
    family = architecture(config.model_type)
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = class_of(config)(copy.deepcopy(config))
    except CONFIG_ERRORS as error:
        raise EdgepruneError(f"the config of {model.name} describes no model: {one_line(error)}") from error
    total = count_parameters(skeleton)
    if total > MOST_PARAMETERS:
        raise EdgepruneError(
            f"the config of {model.name} describes {total:,} parameters; expected those of a real model"
        )
    groups = model_groups(skeleton)
    layers = layer_widths(groups, {})
    scores = {group.name: torch.zeros(group.units) for group in groups}
    problem = make_problem(skeleton, groups, scores, settings)
    removable = [problem.removable_from(layer) for layer in problem.layers]
    layer = problem.layers[0]
    head_counts = _head_counts(config, groups, layers)
    least = max(problem.attention_choices(layer), key=lambda choice: choice.parameters)
    return Inspection(
        model=model.name,
        place=model.place,
        stored_type=model.model_type,
        model_type=config.model_type,
        layers=tuple(layers),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_tokens=getattr(config, "max_position_embeddings", None),
        is_tied=bool(skeleton.all_tied_weights_keys),
        parameters=_parts(skeleton, groups) | {"all": total},
        prunable_parameters=sum(layer.parameters for layer in problem.layers),
        is_stock=is_stock(config, layers),
        stock_kinds=tuple(family.STOCK),
        head_counts=tuple(head_counts),
        graph_source=family.SOURCE,
        largest_ratio=min(sum(removable) / total, LARGEST_RATIO),
        smallest=LayerWidths(
            heads=least.kv_heads * least.heads_each,
            kv_heads=least.kv_heads,
            head_dim=layers[0].head_dim,
            channels=problem.channel_counts(layer)[-1],
        ),
        min_channels=min_channels,
        own_code=model.own_code,
        refused=tuple(_refused(model, layers, head_counts)),
    )


def _parts(model: PreTrainedModel, groups: Sequence[Group]) -> dict[str, int]:
    """Parameters of each part; what is tied counts where it is first used."""
    around = {
        slot.module.rpartition(".")[0]: "MLP" if group.kind == "channels" else "attention"
        for group in groups
        for slot in group.slots
    }
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():  # each once
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        if module is embedding or isinstance(module, nn.Embedding):
            part = "embedding"
        elif module is head:
            part = "head"
        elif "norm" in type(module).__name__.lower():
            part = "norms"
        else:
            # blocks without a module of their own for the MLP have its Linears beside the attention
            part = next((around[place] for place in _places(owner) if place in around), "other")
        counts[part] += parameter.numel()
    return counts


def _places(module: str) -> list[str]:
    """The modules around a module, from the inside."""
    steps = module.split(".")
    return [".".join(steps[:end]) for end in range(len(steps) - 1, 0, -1)]


def _head_counts(
    config: PreTrainedConfig, groups: Sequence[Group], layers: Sequence[LayerWidths]
) -> list[tuple[int, int]]:
    """(query heads, KV heads) that all layers may keep in a stock config, the uncut ones first; empty if none."""
    whole = layers[0]
    if len(set(layers)) > 1 or "channels" not in architecture(config.model_type).STOCK:
        return []
    takes = stock_counts(config, groups)
    share = whole.heads // whole.kv_heads
    return [
        (kv_heads * each, kv_heads)
        for each in range(share, 0, -1)
        for kv_heads in range(whole.kv_heads, 0, -1)
        if takes(kv_heads, kv_heads * each)
    ]


def _refused(model: Described, layers: Sequence[LayerWidths], head_counts: Sequence[tuple[int, int]]) -> list[str]:
    """What is not possible with a model that can be pruned, each with its reason."""
    refused = []
    if model.own_code is not None:
        refused.append(f"it brings its own code ({model.own_code}): compress needs --trust-remote-code")
    if len(set(layers)) > 1:
        refused.append("--widths uniform: its layers differ already")
    elif not head_counts:
        refused.append("--widths uniform: stock code has its widths hard-wired to hidden_size")
    elif len(head_counts) == 1:
        refused.append("heads under --widths uniform: stock code makes them tile hidden_size, only channels can go")
    return refused
