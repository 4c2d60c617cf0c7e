"""Configs, read as untrusted input: which architecture, which widths, no key that runs other code."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from optimum.utils.normalized_config import NormalizedConfigManager
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from edgeprune import plugins
from edgeprune.groups import ALIBI_KEY, Group, blocks_name, layer_widths
from edgeprune.weights import Unpack, read_json
from edgeprune_runtime.errors import EdgepruneError

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"

# Keys that make transformers run other code, fetch it, or read other files than the ones that were checked.
UNSAFE_CONFIG_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "fusion_config",
    "kernel_config",
    "transformers_weights",
}
CONFIG_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError,
    ValueError,
)  # fmt: skip
"""What transformers and torch raise over sizes and settings that no model has."""

MAX_LAYERS = 10_000  # configs make lists of this length before anything can be compared with the weights

MAX_HEADS = 100_000

# What gives away a model that is no dense decoder of text, in its type and in the keys of its config.
SENSE_KEYS = ("vision_config", "audio_config", "audio_encoder", "audio_encoder_config", "vq_config")
RECURRENT_WORDS = ("mamba", "rwkv", "recurrent", "jamba", "xlstm", "hybrid")
RECURRENT_KEYS = ("mamba_", "ssm_", "conv_kernel", "conv_L_cache", "linear_num_", "linear_attn_", "lru_", "state_size")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")

LAYOUT_KEY = "edgeprune"
"""What a saved model's code must know of its blocks. Ours asks the architecture file, and believes no folder."""


def architecture(model_type: str) -> ModuleType:
    """The architecture plug-in of a `model_type`."""
    return plugins.find("architectures", model_type, "architecture")


def config_groups(config: PreTrainedConfig) -> list[Group]:
    """The groups of every layer, as the architecture file lists them for the sizes that the config states now."""
    family = architecture(config.model_type)
    return [group for layer in range(config.num_hidden_layers) for group in family.layer_groups(config, layer)]


@contextlib.contextmanager
def quiet_global_reads() -> Iterator[None]:
    """Silence transformers' warning about global sizes of a per-layer config; reading them here is meant."""
    noisy = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


@quiet_global_reads()
def load_config(folder: Path) -> PreTrainedConfig:
    """Config of a checkpoint folder, with `head_dim` stated and without the keys that make transformers run other code.

    Raises:
        EdgepruneError: if there is no usable `config.json`, or its architecture cannot be pruned.
    """
    if not (folder / CONFIG_FILE).is_file():
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
        hint = f"; give the one inside, {inside[0]}" if inside else ""
        raise EdgepruneError(f"{folder} has no {CONFIG_FILE}; expected a model folder in Hugging Face form{hint}")
    if (folder / ADAPTER_FILE).is_file():
        raise EdgepruneError(f"{folder} holds an adapter ({ADAPTER_FILE}); merge it into its model first")
    data = read_json(folder / CONFIG_FILE)
    model_type = check_architecture(data, str(folder))
    data = stock_config(data, str(folder))
    stock = CONFIG_MAPPING[model_type]
    for key in ("num_hidden_layers", stock.attribute_map.get("num_hidden_layers", "num_hidden_layers")):
        layers = data.get(key, 1)
        if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
            raise EdgepruneError(f"{folder / CONFIG_FILE} says {layers!r} layers; expected 1 to {MAX_LAYERS}")
    _check_per_layer(folder, data, model_type)
    for key in (UNSAFE_CONFIG_KEYS | {LAYOUT_KEY}) & set(data):
        del data[key]
    try:
        config = stock.from_dict(data)
        groups = checked_groups(config)
        if config.is_heterogeneous:
            setattr(config, LAYOUT_KEY, layout(model_type, groups))
    except CONFIG_ERRORS as error:
        raise EdgepruneError(f"{folder / CONFIG_FILE} describes no {model_type} model: {one_line(error)}") from error
    return config


def checked_groups(config: PreTrainedConfig) -> list[Group]:
    """The groups of every layer of a config that nobody vouches for; its `head_dim` is stated then.

    Raises:
        ValueError: and others of `CONFIG_ERRORS`, if its sizes are none of a model.
    """
    _state_head_dim(config)
    groups = config_groups(config)
    _check_heads(config, groups)
    return groups


def _state_head_dim(config: PreTrainedConfig) -> None:
    """Write `head_dim` into a config that leaves it open; raise ValueError over a width or heads of no model."""
    named: Any = config
    with contextlib.suppress(KeyError):  # optimum does not know every type; those have the usual names
        named = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    heads, width = named.num_attention_heads, named.hidden_size
    if not 0 < heads <= MAX_HEADS:
        raise ValueError(f"it has {heads} attention heads; expected 1 to {MAX_HEADS}")
    if width < 1:
        raise ValueError(f"its hidden states have {width} numbers; expected at least 1")
    if getattr(config, "head_dim", None) is None:
        config.head_dim = width // heads


def _check_heads(config: PreTrainedConfig, groups: Sequence[Group]) -> None:
    """Raise ValueError if the query heads of a layer cannot share its KV heads, or use slopes that there are not."""
    heads = config.num_attention_heads
    has_slopes = hasattr(architecture(config.model_type), "ALIBI")
    by_name = {group.name: group for group in groups}
    for group in groups:
        if group.parent is None:
            continue
        if group.units % by_name[group.parent].units:
            raise ValueError("a layer's query heads are no multiple of its KV heads")
        if has_slopes and (len(group.alibi_heads) != group.units or group.alibi_heads[-1] >= heads):
            raise ValueError(f"{ALIBI_KEY} of a layer does not name one of the {heads} heads for each that it has")


def check_architecture(config: Mapping[str, Any], name: str) -> str:
    """The `model_type` of a raw config, if edgeprune can prune it; of a form of its own, the one that it becomes.

    Raises:
        EdgepruneError: if it cannot; the message says what the model is instead.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise EdgepruneError(f"the config of {name} names no model_type; expected one of {_known()}")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else "?"
        raise EdgepruneError(
            f"{name} is quantised ({method}); expected the original float weights, prune before quantising"
        )
    if model_type not in known_types():
        kind = _kind(model_type, config)
        raise EdgepruneError(
            f"{name} is of the architecture {model_type!r}{kind}, which cannot be pruned; known: {_known()}"
        )
    return str(stock_config(config, name)["model_type"])


def has_own_form(config: Mapping[str, Any]) -> bool:
    """Whether a raw config belongs to a checkpoint whose form is converted as it is read (`BECOMES`)."""
    return hasattr(architecture(str(config["model_type"])), "BECOMES")


def stock_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A raw config of a known `model_type`; of a checkpoint in a form of its own, that of the stock type it becomes.

    Raises:
        EdgepruneError: if the form is one that cannot be converted.
    """
    if not has_own_form(config):
        return dict(config)
    converted: dict[str, Any] = architecture(str(config["model_type"])).stock_config(config, name)
    return converted


def unpacking(folder: Path) -> Unpack | None:
    """What makes a stock model's tensors of those stored in a folder; None where they are the same."""
    config = read_json(folder / CONFIG_FILE)
    return partial(architecture(str(config["model_type"])).unpack, config) if has_own_form(config) else None


def layout(model_type: str, groups: Sequence[Group]) -> dict[str, Any]:
    """What `modeling_edgeprune` must know of an architecture, as the head of that file describes it."""
    family, first = architecture(model_type), min(group.layer for group in groups)
    of_block = [group for group in groups if group.layer == first]
    prefix = f"{blocks_name(groups)}.{first}."
    linears: dict[str, dict[str, dict[str, int]]] = {}
    for group in of_block:
        for slot in group.slots:
            units = linears.setdefault(slot.module.removeprefix(prefix), {}).setdefault(slot.side, {})
            units[group.kind] = units.get(group.kind, 0) + slot.size
    return {
        "blocks": blocks_name(groups),
        "head_dim": layer_widths(of_block, {})[0].head_dim,
        "widths": dict(family.WIDTHS),
        "linears": linears,
        "attributes": {name: dict(attributes) for name, attributes in family.ATTRIBUTES.items()},
        "config_readers": list(getattr(family, "CONFIG_READERS", ())),
        "alibi": getattr(family, "ALIBI", None),
    }


def one_line(error: BaseException) -> str:
    """An exception's message on one line of bearable length, or its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_per_layer(folder: Path, data: Mapping[str, Any], model_type: str) -> None:
    """Refuse a `per_layer_config` that sets anything but sizes and slopes, or sizes that are no positive counts."""
    layers = data.get("per_layer_config")
    if layers is None:
        return
    family = architecture(model_type)
    slopes = {ALIBI_KEY} if getattr(family, "ALIBI", None) else set[str]()
    known = {*family.WIDTHS.values(), *slopes}
    place = f"{folder / CONFIG_FILE}: per_layer_config"
    if not isinstance(layers, Mapping):
        raise EdgepruneError(f"{place} is no JSON object; expected layer numbers and their sizes")
    for layer, sizes in layers.items():
        if not str(layer).isdecimal() or not isinstance(sizes, Mapping) or not set(sizes) <= known:
            raise EdgepruneError(
                f"{place} of layer {layer!r} is not understood; expected only {', '.join(sorted(known))}"
            )
        if not all(_is_count(size) and size > 0 for key, size in sizes.items() if key not in slopes):
            raise EdgepruneError(f"{place} of layer {layer} holds a size that is not a positive whole number")
        heads = sizes.get(ALIBI_KEY, [])
        if not isinstance(heads, list) or not all(_is_count(head) and head >= 0 for head in heads):
            raise EdgepruneError(f"{place} of layer {layer}: {ALIBI_KEY} is no list of head numbers")
        if heads != sorted(set(heads)):
            raise EdgepruneError(f"{place} of layer {layer}: {ALIBI_KEY} is not sorted, or names a head twice")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(model_type: str, config: Mapping[str, Any]) -> str:
    """What sort of model an unknown `model_type` is, in brackets, as far as its type or its config gives it away."""
    stock = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401 - lazy, its get() is empty
    keys = {*config, *getattr(stock, "__dataclass_fields__", ())}
    if any(key in keys for key in SENSE_KEYS):
        return " (multimodal)"
    if any(word in model_type for word in RECURRENT_WORDS) or any(key.startswith(RECURRENT_KEYS) for key in keys):
        return " (a state-space, recurrent or hybrid model)"
    experts = (config.get(key, getattr(stock, key, None)) for key in EXPERT_KEYS)
    if "moe" in model_type or any(str(count or 0) not in ("0", "1") for count in experts):
        return " (a mixture of experts)"
    if config.get("is_encoder_decoder", getattr(stock, "is_encoder_decoder", False)) is True:
        return " (an encoder-decoder)"
    is_encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES  # some of them also have a causal head
    if stock is not None and (is_encoder or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return " (not a decoder-only language model)"
    return ""


def known_types() -> list[str]:
    """The `model_type`s that can be pruned; a plug-in's name has hyphens where theirs has underscores."""
    return [name.replace("-", "_") for name in plugins.names("architectures")]


def _known() -> str:
    return ", ".join(known_types())
