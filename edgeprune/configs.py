"""Configs, read as untrusted input: which architecture, which widths, no key that runs other code."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from edgeprune import plugins
from edgeprune.weights import read_json
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
CONFIG_ERRORS = (ArithmeticError, AttributeError, KeyError, RuntimeError, StrictDataclassError, TypeError, ValueError)

MAX_LAYERS = 10_000  # configs make lists of this length before anything can be compared with the weights

# What gives away a model that is no dense decoder.
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
RECURRENT_WORDS = ("mamba", "rwkv", "recurrent", "jamba", "xlstm")
ENCODER_TYPES = {"bert", "roberta", "distilbert", "electra"}  # they also have a causal head in transformers
WIDTH_KEYS = {"num_attention_heads", "num_key_value_heads", "intermediate_size"}


def architecture(model_type: str) -> ModuleType:
    """The architecture plug-in of a `model_type`."""
    return plugins.find("architectures", model_type, "architecture")


def load_config(folder: Path) -> PreTrainedConfig:
    """Config of a checkpoint folder, with `head_dim` stated and without the keys that make transformers run other code.

    Raises:
        EdgepruneError: if there is no usable `config.json`, or its architecture cannot be pruned.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise EdgepruneError(f"{folder} has no {CONFIG_FILE}; expected a model folder in Hugging Face form")
    if (folder / ADAPTER_FILE).is_file():
        raise EdgepruneError(f"{folder} holds an adapter ({ADAPTER_FILE}); merge it into its model first")
    data = read_json(folder / CONFIG_FILE)
    model_type = check_architecture(data, str(folder))
    layers = data.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise EdgepruneError(f"{folder / CONFIG_FILE} says {layers!r} layers; expected 1 to {MAX_LAYERS}")
    _check_per_layer(folder, data)
    for key in UNSAFE_CONFIG_KEYS & set(data):
        del data[key]
    try:
        config = CONFIG_MAPPING[model_type].from_dict(data)
        if getattr(config, "head_dim", None) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
        sizes = [(layer.num_attention_heads, layer.num_key_value_heads) for layer in config.per_layer_config]
        if any(heads % kv_heads for heads, kv_heads in sizes):
            raise ValueError("a layer's query heads are no multiple of its KV heads")
    except CONFIG_ERRORS as error:
        raise EdgepruneError(f"{folder / CONFIG_FILE} describes no {model_type} model: {one_line(error)}") from error
    return config


def check_architecture(config: Mapping[str, Any], name: str) -> str:
    """The `model_type` of a raw config, if edgeprune can prune it.

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
    if model_type not in plugins.names("architectures"):
        kind = _kind(model_type, config)
        raise EdgepruneError(
            f"{name} is of the architecture {model_type!r}{kind}, which cannot be pruned; known: {_known()}"
        )
    return model_type


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


def one_line(error: BaseException) -> str:
    """An exception's message on one line of bearable length, or its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_per_layer(folder: Path, data: Mapping[str, Any]) -> None:
    """Refuse a `per_layer_config` that sets anything but sizes, or sizes that are no positive counts."""
    layers = data.get("per_layer_config")
    if layers is None:
        return
    place = f"{folder / CONFIG_FILE}: per_layer_config"
    if not isinstance(layers, Mapping):
        raise EdgepruneError(f"{place} is no JSON object; expected layer numbers and their sizes")
    for layer, sizes in layers.items():
        if not str(layer).isdecimal() or not isinstance(sizes, Mapping) or not set(sizes) <= WIDTH_KEYS:
            raise EdgepruneError(
                f"{place} of layer {layer!r} is not understood; expected only {', '.join(sorted(WIDTH_KEYS))}"
            )
        if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes.values()):
            raise EdgepruneError(f"{place} of layer {layer} holds a size that is not a positive whole number")


def _kind(model_type: str, config: Mapping[str, Any]) -> str:
    """What sort of model an unknown `model_type` is, in brackets, as far as its config gives it away."""
    if "moe" in model_type or any(str(config.get(key) or 0) not in ("0", "1") for key in EXPERT_KEYS):
        return " (a mixture of experts)"
    if any(word in model_type for word in RECURRENT_WORDS):
        return " (a state-space or recurrent model)"
    stock = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401 - lazy, its get() is empty
    if config.get("is_encoder_decoder", getattr(stock, "is_encoder_decoder", False)) is True:
        return " (an encoder-decoder)"
    if model_type in ENCODER_TYPES or (stock is not None and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return " (not a decoder-only language model)"
    return ""


def _known() -> str:
    return ", ".join(plugins.names("architectures"))
