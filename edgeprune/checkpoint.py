"""Checkpoint folders: written whole or not at all, and believed only after they were read back.

    save          model -> folder   safetensors, config, tokenizer, plan.json; read back before it takes its name
    load_pruned   folder -> model   dense, uniform and per-layer folders alike; runs only code of edgeprune

Uniform widths give a stock `config.json`. Per-layer widths give `per_layer_config` and, beside the weights, a copy of
`modeling_edgeprune.py`, which transformers runs under `trust_remote_code=True`.
"""

import copy
import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
from edgeprune.weights import SAFETENSORS_FILE, TensorHeader, read_headers, read_json, weight_files
from edgeprune_runtime import output
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.output import atomic_folder, check_space

# Space for everything that is not weights (tokenizer, configs) and for the file system's own bookkeeping.
SPARE_BYTES = 32 * 2**20
PROBE_TOKENS = 16
FOLDER_KIND = "a checkpoint folder"

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
LOADING_KEYS = {"is_local", "local_files_only", "name_or_path"}  # how the tokenizer was loaded, not what it is

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
    base = architecture(config.model_type).BASE
    model_class: Any = (
        getattr(modeling_edgeprune, modeling_edgeprune.PREFIX + base)
        if config.is_heterogeneous
        else getattr(transformers, base)
    )
    _check_sizes(folder, model_class, config, headers)
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
    check_finite(name, model)


def check_finite(name: str | Path, model: PreTrainedModel) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        EdgepruneError: naming the tensor.
    """
    for parameter_name, parameter in model.named_parameters():
        # A sum is finite only if every summand is, and costs a fifth of a look at each; where it overflows, look.
        if parameter.detach().sum().isfinite():
            continue
        if count := int((~parameter.detach().isfinite()).sum()):
            raise EdgepruneError(
                f"{name}: {parameter_name} holds {count} NaN or infinite values; expected finite weights"
            )


@quiet_global_reads()
def save(
    model: PreTrainedModel,
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
    check_finite("the model to be saved", model)
    tensors = _tensors(model)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    check_space(out, size_bytes + SPARE_BYTES)
    with atomic_folder(out, force=force, marker=CONFIG_FILE, what=FOLDER_KIND) as part:
        return _write(part, out, model, tokenizer, plan, widths, tensors)


def check_output(out: Path, force: bool) -> None:
    """Check that a checkpoint may be written as `out`; call it before the long work.

    Raises:
        EdgepruneError: if it exists and may not be replaced.
    """
    output.check_output(out, force=force, marker=CONFIG_FILE, what=FOLDER_KIND)


def _write(
    part: Path,
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: PrunePlan | None,
    widths: Sequence[LayerWidths],
    tensors: Mapping[str, torch.Tensor],
) -> SavedCheckpoint:
    weights = part / SAFETENSORS_FILE
    weights.touch()
    mode = weights.stat().st_mode
    try:
        save_file(dict(tensors), weights, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors writes in Rust and reports the system's error as text
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    weights.chmod(mode)  # safetensors makes files that only their owner can read
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
        _drop_keys(part / TOKENIZER_CONFIG_FILE, LOADING_KEYS)
    if model.can_generate() and model.generation_config is not None:
        (part / "generation_config.json").write_text(model.generation_config.to_json_string(), encoding="utf-8")

    notes: tuple[str, ...] = ()
    config, form = _config(model, widths)
    stand_in = _stand_in(config) if form == "per-layer" and len(set(widths)) == 1 else None
    if stand_in is not None:
        set_widths(stand_in, widths)
        _write_config(part, stand_in, "uniform")
        if difference := _difference(part, model, tensors):
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
        if difference := _difference(part, model, tensors):
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


def _difference(folder: Path, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """What differs between a model and its folder read back: weights bit for bit, logits; None if nothing does."""
    try:
        copied = load_pruned(folder, model.dtype)
    except EdgepruneError as error:
        return str(error)
    found = _tensors(copied)
    if found.keys() != tensors.keys():
        return f"other tensors: {sorted(found.keys() ^ tensors.keys())[0]}"
    for name, tensor in tensors.items():
        if not torch.equal(found[name], tensor):
            return f"other values in {name}"
    vocabulary = copied.config.vocab_size
    ids = (torch.arange(PROBE_TOKENS) * 7919 % vocabulary).unsqueeze(0)
    was_training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            expected = model(ids.to(model.device), use_cache=False).logits.cpu().float()
            logits = copied(ids, use_cache=False).logits.float()
    finally:
        model.train(was_training)
    # Equal weights in equal code differ only by the kernels' order of summation.
    tolerance = 64 * torch.finfo(model.dtype).eps * float(expected.abs().max())
    distance = float((logits - expected).abs().max())
    return None if distance <= tolerance else f"logits differ by {distance:.3g}, {tolerance:.3g} allowed"


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors to be saved, on the CPU and contiguous; of tied weights the first name only."""
    first_names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first_names.setdefault(id(tensor), name)
    return {name: state[name].detach().cpu().contiguous() for name in first_names.values()}


def _check_sizes(
    folder: Path, model_class: Any, config: PreTrainedConfig, headers: Mapping[str, TensorHeader] | None
) -> None:
    """Hold the tensors that the config leads to against those in the files, before memory is taken."""
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


def _check_shapes(folder: Path, model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> None:
    expected = model.state_dict()
    missing = set(expected) - set(model.all_tied_weights_keys or ())
    for stored_name, header in headers.items():
        # A file of the bare decoder lacks the prefix; transformers puts it before the names.
        name = stored_name if stored_name in expected else f"{model.base_model_prefix}.{stored_name}"
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
