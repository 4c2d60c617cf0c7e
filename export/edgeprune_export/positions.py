"""What a graph must know about positions: how they rotate, who sees how far back, and where the context ends."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from edgeprune.configs import quiet_global_reads
from edgeprune_export.weights import Array
from edgeprune_runtime.errors import EdgepruneError

# The frequencies of these are the same at every length up to `context_tokens`.
STATIC_ROPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")

# Where a config states no end of the context (ALiBi has no table that could end): the length Bloom was trained on.
DEFAULT_CONTEXT_TOKENS = 2048


ROTATION_TOLERANCE = 1e-6
"""Of a cosine or sine; implementations of both differ in the last bit or two."""


@dataclass(frozen=True)
class Rotation:
    """What the cosines and sines that rotate a head are made of: `scale * cos(position * frequencies)`.

    Attributes:
        frequencies: `(rotary_dim / 2,)` float32, radians from one position to the next.
        scale: yarn and longrope make up for longer texts by it; 1 elsewhere.
    """

    frequencies: Array
    scale: float

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated."""
        return 2 * len(self.frequencies)


def context_tokens(config: PreTrainedConfig) -> int:
    """How many tokens the graphs of a model take.

    Phi-3's longrope turns to other frequencies once a text outgrows the length of its first training, which would
    rotate anew every key that is already in the cache. Up to there, and so up to here, all frequencies are constant.
    """
    stated = [getattr(config, key, None) for key in ("max_position_embeddings", "seq_length")]
    limit = next((int(tokens) for tokens in stated if tokens), DEFAULT_CONTEXT_TOKENS)
    lengths: list[int] = [
        parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings
        for parameters in _rope_parameters(config)
        if parameters.get("rope_type") == "longrope"
    ]
    return min([limit, *lengths])


def context_note(config: PreTrainedConfig) -> str | None:
    """Why the graphs of a model take fewer tokens than its config states; None where they do not."""
    stated, taken = getattr(config, "max_position_embeddings", None), context_tokens(config)
    if stated is None or stated == taken:
        return None
    return (
        f"the context ends at {taken} of the model's {stated} tokens: longrope has other frequencies beyond, which the "
        "keys in the cache would not have"
    )


def layer_kind(config: PreTrainedConfig, layer: int) -> str | None:
    """The config's word for a layer's attention ("full_attention", "sliding_attention"), if it tells kinds apart."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds is None else str(kinds[layer])


def window_of(config: PreTrainedConfig, layer: int) -> int | None:
    """How many last tokens a layer sees; None where it sees all."""
    window: int | None = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    return window if layer_kind(config, layer) in (None, "sliding_attention") else None


def uses_rope(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer rotates its queries and keys."""
    # SmolLM3 lists one flag per layer, under a name that says the opposite: 1 means that the layer rotates.
    flags = getattr(config, "no_rope_layers", None)
    return bool(flags[layer]) if flags else True


def rotations(model: PreTrainedModel) -> dict[str | None, Rotation]:
    """Rotations by kind of layer, of the model's own rotary module; one under None where all layers share it.

    Raises:
        EdgepruneError: if the frequencies depend on the running length in a way that is not known, or the module makes
            something else of them than cosines and sines.
    """
    check_rope(model.config)
    with quiet_global_reads():  # where layers differ, it reads the sizes of the dense model in passing
        rotary: Any = type(model.base_model.rotary_emb)(model.config)  # the model's own may lie on the meta device
    kinds = list(rotary.rope_type) if isinstance(rotary.rope_type, Mapping) else [None]
    return {kind: _rotation(rotary, context_tokens(model.config), kind) for kind in kinds}


def check_causal(config: PreTrainedConfig) -> None:
    """Do nothing if every token of a model sees only what came before it.

    Raises:
        EdgepruneError: if tokens see what follows: such a model embeds texts and cannot write them one token at a time.
    """
    if getattr(config, "use_bidirectional_attention", None):
        raise EdgepruneError(
            "use_bidirectional_attention is set: the tokens of this model see what follows them; expected a model that "
            "generates text"
        )


def check_rope(config: PreTrainedConfig) -> None:
    """Do nothing if a model's rotary frequencies are constant up to `context_tokens`, or it has none.

    Raises:
        EdgepruneError: naming the type of rotary embedding.
    """
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type", "default") not in STATIC_ROPES:
            raise EdgepruneError(
                f"rope_type {parameters['rope_type']!r} is not known to keep its frequencies as a text grows, which a "
                f"graph must hold; expected one of {', '.join(STATIC_ROPES)}"
            )


@contextmanager
def constant_rope(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model's rotary modules, while it is traced, from looking at the length, up to which nothing changes."""
    with ExitStack() as stack:
        rotaries: list[Any] = [module for module in model.modules() if "rope_type" in vars(module)]
        for module in rotaries:
            stack.callback(setattr, module, "rope_type", module.rope_type)
            is_nested = isinstance(module.rope_type, Mapping)
            module.rope_type = dict.fromkeys(module.rope_type, "default") if is_nested else "default"
            # What a long text before may have left there; the next forward pass sets it anew.
            for name, buffer in list(module.named_buffers(recurse=False)):
                if name.endswith("original_inv_freq"):
                    setattr(module, name.replace("original_", ""), buffer.clone())
        yield


def _rope_parameters(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """The settings of every rotary embedding of a model; some have one per kind of layer."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or ([parameters] if parameters else [])


def _rotation(rotary: Any, tokens: int, kind: str | None) -> Rotation:
    positions = torch.arange(tokens)[None]
    with torch.no_grad():
        # First of all, as the module may choose its frequencies by the length.
        tables = rotary(torch.zeros(1), positions, *([] if kind is None else [kind]))
    prefix = "" if kind is None else f"{kind}_"
    frequencies: Array = getattr(rotary, f"{prefix}inv_freq").to(torch.float32).numpy()
    found = Rotation(frequencies, float(getattr(rotary, f"{prefix}attention_scaling")))
    angles = np.arange(tokens, dtype=np.float32)[:, None] * frequencies
    for table, function in zip(tables, (np.cos, np.sin), strict=True):
        half = table[0, :, : len(frequencies)].numpy()  # the module repeats the same angles for the second half
        if not np.allclose(half, np.float32(found.scale) * function(angles), rtol=0, atol=ROTATION_TOLERANCE):
            raise EdgepruneError(
                f"{type(rotary).__name__} makes other cosines and sines of its frequencies than the decoder graph can "
                "compute; use --graph-source traced"
            )
    return found
