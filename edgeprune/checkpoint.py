"""Checkpoint folders: written whole or not at all, and believed only after they were read back.

    save           model -> folder     safetensors, config, tokenizer, plan.json; read back before it takes its name
    load_pruned    folder -> model     dense, uniform and per-layer folders alike; runs only code of edgeprune
    open_decoder   folder -> Decoder   the same, its blocks read one at a time

Uniform widths give a stock `config.json`. Per-layer widths give `per_layer_config` and, beside the weights, a copy of
`modeling_edgeprune.py`, which transformers runs under `trust_remote_code=True`.

A model is written and compared block by block, so that one that does not fit into memory is saved as any other.
"""

import copy
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from edgeprune import modeling_edgeprune
from edgeprune.configs import (
    CONFIG_ERRORS,
    CONFIG_FILE,
    UNSAFE_CONFIG_KEYS,
    architecture,
    load_config,
    one_line,
    quiet_global_reads,
)
from edgeprune.groups import LayerWidths
from edgeprune.plan import PrunePlan
from edgeprune.shrink import set_widths
from edgeprune.streaming import Decoder, check_finite
from edgeprune.weights import (
    FLOATS,
    SAFETENSORS_FILE,
    SafetensorsWriter,
    TensorHeader,
    read_headers,
    read_json,
    read_tensor,
    tensor_files,
    weight_files,
)
from edgeprune_runtime import output
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.output import atomic_folder, check_space

# Space for everything that is not weights (tokenizer, configs) and for the file system's own bookkeeping.
SPARE_BYTES = 32 * 2**20
PROBE_TOKENS = 16
FOLDER_KIND = "a checkpoint folder"

GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
LOADING_KEYS = {"is_local", "local_files_only", "name_or_path"}  # how the tokenizer was loaded, not what it is

# Llamas of old store the rotary frequencies of every layer; transformers passes over them too.
IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$")

# UnpicklingError: torch's answer to a pickle that wants to run code.
LOAD_ERRORS = (EOFError, KeyError, OSError, RuntimeError, SafetensorError, ValueError, UnpicklingError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedCheckpoint:
    """What `save` wrote. `notes` says what a reader of the folder should know (also in `plan.json`)."""

    folder: Path
    form: Literal["uniform", "per-layer"]
    model_type: str
    size_bytes: int
    notes: tuple[str, ...]


@quiet_global_reads()
def load_pruned(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Model of a checkpoint folder, dense or pruned (uniform or per layer), in eval mode, on the CPU.

    The folder's own Python files are never run; a per-layer folder is built by edgeprune's copy of the modelling code.

    Raises:
        EdgepruneError: if the folder is incomplete or damaged, or does not hold what its config says.
    """
    folder = Path(folder)
    config = load_config(folder)
    headers = read_headers(folder)
    model_class = _model_class(config)
    _skeleton(folder, model_class, config, headers)  # refuses what does not belong together before memory is taken
    try:
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=headers is not None,
            weights_only=True,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise EdgepruneError(f"cannot load the weights of {folder}: {one_line(error)}") from error
    check_loaded(folder, model, info)
    return cast(PreTrainedModel, model.eval())


@quiet_global_reads()
def open_decoder(folder: str | Path, *, keeps_blocks: bool = False) -> Decoder:
    """Decoder of a checkpoint folder, dense or pruned, in eval mode, on the CPU; its blocks are not read yet.

    Args:
        folder: safetensors, config and tokenizer.
        keeps_blocks: blocks stay in memory once they were read.

    Raises:
        EdgepruneError: if the folder is incomplete or damaged, holds torch pickles, or not what its config says.
    """
    folder = Path(folder)
    config = load_config(folder)
    headers = read_headers(folder)
    if headers is None:
        raise EdgepruneError(f"{folder} holds torch pickles; expected safetensors, which can be read block by block")
    model = _skeleton(folder, _model_class(config), config, headers)
    files = tensor_files(folder)
    stored = {_model_name(model, name): (file, name) for name, file in files.items()}
    unused = sorted(name for name in stored if name not in model.state_dict() and not IGNORED_TENSORS.search(name))
    if unused:
        raise EdgepruneError(
            f"{folder} has a tensor that its config does not expect: {unused[0]} ({len(unused)} in all); config and "
            "weights do not belong together"
        )
    for tied, source in (model.all_tied_weights_keys or {}).items():  # either of two may be the one in the file
        if source not in stored:
            stored[source] = stored[tied]
    dtypes = {name: FLOATS.get(headers[stored[name][1]].dtype) for name in model.state_dict() if name in stored}
    if strange := [name for name, dtype in dtypes.items() if dtype is None]:
        raise EdgepruneError(
            f"{folder}: {strange[0]} is stored as {headers[stored[strange[0]][1]].dtype}; expected floats, prune "
            "before quantising"
        )
    with torch.device("meta"):
        shapes = {name: torch.empty(headers[stored[name][1]].shape, dtype=dtypes[name]) for name in dtypes}
    model.load_state_dict(shapes, strict=False, assign=True)
    model.tie_weights()
    if (folder / GENERATION_CONFIG_FILE).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    readers = {name: partial(read_tensor, *place) for name, place in stored.items()}
    return Decoder(model, readers, keeps_blocks=keeps_blocks, name=str(folder))


def check_loaded(name: str | Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that a load filled every tensor from the file, used all of the file, and that every number is finite.

    Raises:
        EdgepruneError: naming the first tensor that is missing, left over, or not finite.
    """
    for key, what in (
        ("missing_keys", "lacks the tensor"),
        ("mismatched_keys", "has a wrong shape of"),
        ("unexpected_keys", "has a tensor that its config does not expect:"),
    ):
        if found := sorted(map(str, info[key])):
            raise EdgepruneError(
                f"{name} {what} {found[0]} ({len(found)} in all); config and weights do not belong together"
            )
    for parameter_name, parameter in model.named_parameters():
        check_finite(str(name), parameter_name, parameter)


@quiet_global_reads()
def save(
    model: PreTrainedModel | Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PrunePlan | None,
    widths: Sequence[LayerWidths],
    out: str | Path,
    force: bool = False,
) -> SavedCheckpoint:
    """Write a model as a checkpoint folder, read it back, compare, and only then give it its name.

    Args:
        model: the model as it is to be saved, already cut.
        tokenizer: saved beside it; None saves none.
        plan: how it was cut; None for a dense model.
        widths: sizes of each layer (`layer_widths`).
        out: the folder; must not exist, or be a checkpoint folder that `force` allows to replace.
        force: replace an earlier checkpoint, once the new one is complete.

    Raises:
        EdgepruneError: if `out` exists, the disk is full, a weight is not finite, or the copy does not equal the model.
            Nothing is left behind then, and an earlier folder is untouched.
    """
    out = Path(out).absolute()
    check_output(out, force)
    decoder = Decoder.of(model)
    headers = {name: TensorHeader.of(tensor) for name, tensor in decoder.tensors().items()}
    check_space(out, sum(header.size_bytes for header in headers.values()) + SPARE_BYTES)
    with atomic_folder(out, force=force, marker=CONFIG_FILE, what=FOLDER_KIND) as part:
        _write_weights(part / SAFETENSORS_FILE, decoder, headers)
        return _write(part, out, decoder, tokenizer, plan, widths)


def check_output(out: Path, force: bool) -> None:
    """Check that a checkpoint may be written as `out`; call it before the long work.

    Raises:
        EdgepruneError: if it exists and may not be replaced.
    """
    output.check_output(out, force=force, marker=CONFIG_FILE, what=FOLDER_KIND)


def _write_weights(file: Path, decoder: Decoder, headers: Mapping[str, TensorHeader]) -> None:
    """Write all tensors, block by block, each checked to be finite."""
    with SafetensorsWriter(file, headers, {"format": "pt"}) as writer:

        def write(name: str, tensor: torch.Tensor) -> None:
            check_finite("the model to be saved", name, tensor)
            writer.write(name, tensor)

        state = decoder.tensors()
        for name in decoder.outside_names():
            write(name, state[name])
        for layer in range(decoder.layers):
            with decoder.block(layer) as block:
                for name, tensor in block.state_dict().items():
                    write(decoder.prefix(layer) + name, tensor)


def _write(
    part: Path,
    out: Path,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PrunePlan | None,
    widths: Sequence[LayerWidths],
) -> SavedCheckpoint:
    """Write what belongs to the weights in `part`, and compare the whole."""
    model = decoder.model
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
        _drop_keys(part / TOKENIZER_CONFIG_FILE, LOADING_KEYS)
    if model.can_generate() and model.generation_config is not None:
        (part / GENERATION_CONFIG_FILE).write_text(model.generation_config.to_json_string(), encoding="utf-8")

    notes: tuple[str, ...] = ()
    config, form = _config(model, widths)
    stand_in = _stand_in(config) if form == "per-layer" and len(set(widths)) == 1 else None
    if stand_in is not None:
        set_widths(stand_in, widths)
        _write_config(part, stand_in, "uniform")
        if difference := _difference(part, decoder):
            logger.info("not saved as model_type %s: %s", stand_in.model_type, difference)
            stand_in = None
    if stand_in is not None:
        notes = (
            f"saved with model_type {stand_in.model_type!r}, which computes the same (compared): stock "
            f"{config.model_type!r} code refuses {widths[0].heads} heads at hidden_size {config.hidden_size}",
        )
        config, form = stand_in, "uniform"
    else:
        if form == "per-layer" and len(set(widths)) == 1:
            notes = (
                f"saved with per_layer_config although all layers are alike: stock {config.model_type!r} code refuses "
                f"{widths[0].heads} heads at hidden_size {config.hidden_size}",
            )
        _write_config(part, config, form)
        if difference := _difference(part, decoder):
            raise RuntimeError(f"the saved checkpoint does not equal the model: {difference}")
    if plan is not None:
        replace(plan, notes=(*plan.notes, *notes)).save(part)
    size_bytes = sum(file.stat().st_size for file in part.iterdir())
    return SavedCheckpoint(out, form, config.model_type, size_bytes, notes)


def _drop_keys(file: Path, keys: set[str]) -> None:
    data = read_json(file)
    rest = {key: value for key, value in data.items() if key not in keys}
    file.write_text(json.dumps(rest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(
    model: PreTrainedModel, widths: Sequence[LayerWidths]
) -> tuple[PreTrainedConfig, Literal["uniform", "per-layer"]]:
    """The config to be saved, apart from the model's own."""
    config = copy.deepcopy(model.config)
    form: Literal["uniform", "per-layer"] = "uniform" if set_widths(config, widths) else "per-layer"
    config.dtype = model.dtype
    return config, form


def _stand_in(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A config of the type that the architecture names as its stand-in, with the same sizes; None if it names none."""
    named = getattr(architecture(config.model_type), "STAND_IN", None)
    if named is None:
        return None
    model_type, settings = named
    data = config.to_dict()
    for key in ("model_type", "per_layer_config", "allow_global_per_layer_attribute_access"):
        data.pop(key, None)
    stand_in: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(data | settings)
    return stand_in


def _write_config(folder: Path, config: PreTrainedConfig, form: Literal["uniform", "per-layer"]) -> None:
    base = architecture(config.model_type).BASE
    class_name = base if form == "uniform" else modeling_edgeprune.PREFIX + base
    data = json.loads(config.to_json_string())
    for key in UNSAFE_CONFIG_KEYS | {"quantization_config", "_model_name_or_path"}:
        data.pop(key, None)
    data["architectures"] = [class_name]
    source = Path(modeling_edgeprune.__file__)
    if form == "per-layer":
        data["auto_map"] = {"AutoModelForCausalLM": f"{source.stem}.{class_name}"}
        shutil.copyfile(source, folder / source.name)
    (folder / CONFIG_FILE).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _difference(folder: Path, decoder: Decoder) -> str | None:
    """What differs between a model and its folder read back: weights bit for bit, logits; None if nothing does."""
    try:
        copied = open_decoder(folder)
    except EdgepruneError as error:
        return str(error)
    expected, found = decoder.tensors(), copied.tensors()
    if found.keys() != expected.keys():
        return f"other tensors: {sorted(found.keys() ^ expected.keys())[0]}"
    for name in decoder.outside_names():
        if not torch.equal(found[name], expected[name].cpu()):
            return f"other values in {name}"
    ids = (torch.arange(PROBE_TOKENS) * 7919 % copied.config.vocab_size).unsqueeze(0)
    hidden, calls = decoder.embed(ids)
    hidden_of_copy, calls_of_copy = copied.embed(ids)
    for layer in range(decoder.layers):
        with decoder.block(layer) as block, copied.block(layer) as block_of_copy:
            tensors = block_of_copy.state_dict()
            for name, tensor in block.state_dict().items():
                if tensors[name].dtype != tensor.dtype or not torch.equal(tensors[name], tensor.cpu()):
                    return f"other values in {decoder.prefix(layer)}{name}"
        with torch.no_grad(), decoder.block(layer, torch.float32) as block:
            hidden = decoder.run(layer, block, hidden, calls)
        with torch.no_grad(), copied.block(layer, torch.float32) as block:
            hidden_of_copy = copied.run(layer, block, hidden_of_copy, calls_of_copy)
    with torch.no_grad():
        logits, logits_of_copy = decoder.logits(hidden), copied.logits(hidden_of_copy)
    # Equal weights in equal code differ only by the kernels' order of summation, and by rotary frequencies that a model
    # in memory may hold in its own dtype.
    tolerance = 64 * torch.finfo(decoder.model.dtype).eps * float(logits.abs().max())
    distance = float((logits_of_copy - logits.cpu()).abs().max())
    return None if distance <= tolerance else f"logits differ by {distance:.3g}, {tolerance:.3g} allowed"


def _model_class(config: PreTrainedConfig) -> Any:
    """The stock class of a config's architecture, or the one whose layers may differ in width."""
    base = architecture(config.model_type).BASE
    if config.is_heterogeneous:
        return getattr(modeling_edgeprune, modeling_edgeprune.PREFIX + base)
    return getattr(transformers, base)


def _model_name(model: PreTrainedModel, stored_name: str) -> str:
    """What the model calls a stored tensor: a file of the bare decoder lacks the prefix, transformers puts it there."""
    prefixed = f"{model.base_model_prefix}.{stored_name}"
    return prefixed if prefixed in model.state_dict() else stored_name


def _skeleton(
    folder: Path, model_class: Any, config: PreTrainedConfig, headers: Mapping[str, TensorHeader] | None
) -> PreTrainedModel:
    """The model on the meta device; the tensors that the config leads to are held against those in the files."""
    if headers is not None and config.num_hidden_layers > len(headers):
        raise EdgepruneError(
            f"{folder / CONFIG_FILE} says {config.num_hidden_layers} layers, the weights hold {len(headers)} tensors"
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(copy.deepcopy(config))
    except CONFIG_ERRORS as error:
        raise EdgepruneError(f"{folder / CONFIG_FILE} describes no model: {one_line(error)}") from error
    if headers is None:
        _check_pickle_sizes(folder, model)
    else:
        _check_shapes(folder, model, headers)
    return model


def _check_shapes(folder: Path, model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> None:
    expected = model.state_dict()
    missing = set(expected) - set(model.all_tied_weights_keys or ())
    for stored_name, header in headers.items():
        name = _model_name(model, stored_name)
        if name in expected and tuple(expected[name].shape) != header.shape:
            raise EdgepruneError(
                f"{folder}: {name} has the shape {header.shape}, its config expects {tuple(expected[name].shape)}; "
                "config and weights do not belong together"
            )
        missing.discard(name)
    # Of two tied tensors either may be the one in the file.
    missing -= {source for tied, source in (model.all_tied_weights_keys or {}).items() if tied in headers}
    if missing:
        raise EdgepruneError(
            f"{folder} lacks the tensor {min(missing)} ({len(missing)} in all); config and weights do not belong "
            "together"
        )


def _check_pickle_sizes(folder: Path, model: PreTrainedModel) -> None:
    """Torch files tell no shapes before they are read, but no number in them takes less than one byte."""
    count = sum(parameter.numel() for parameter in model.parameters())
    size_bytes = sum(file.stat().st_size for file in weight_files(folder))
    if count > size_bytes:
        raise EdgepruneError(
            f"{folder / CONFIG_FILE} describes {count:,} parameters, the weight files have {size_bytes:,} bytes; "
            "config and weights do not belong together"
        )
