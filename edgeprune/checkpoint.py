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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from edgeprune import modeling_edgeprune
from edgeprune.configs import (
    CONFIG_ERRORS,
    CONFIG_FILE,
    LAYOUT_KEY,
    UNSAFE_CONFIG_KEYS,
    architecture,
    load_config,
    one_line,
    quiet_global_reads,
    unpacking,
)
from edgeprune.groups import LayerWidths
from edgeprune.patterns import Found, check_pattern
from edgeprune.plan import PLAN_FILE, PrunePlan, SparsityRecord
from edgeprune.shrink import linear_of, linear_shapes, oriented, set_widths
from edgeprune.streaming import Decoder, Reader, check_finite, model_groups
from edgeprune.weights import (
    FLOATS,
    SAFETENSORS_FILE,
    SafetensorsWriter,
    TensorHeader,
    Unpack,
    read_headers,
    read_json,
    read_pickles,
    tensor_readers,
    weight_files,
)
from edgeprune_runtime import output
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.output import Kind, atomic_folder, check_space

# Space for everything that is not weights (tokenizer, configs) and for the file system's own bookkeeping.
SPARE_BYTES = 32 * 2**20
PROBE_TOKENS = 16
CHECKPOINT = Kind("a checkpoint folder", (CONFIG_FILE, SAFETENSORS_FILE))
PRUNED = Kind("a pruned checkpoint", (CONFIG_FILE, SAFETENSORS_FILE, PLAN_FILE))

CARD_FILE = "README.md"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
LOADING_KEYS = {"is_local", "local_files_only", "name_or_path"}  # how the tokenizer was loaded, not what it is

# Llamas of old store the rotary frequencies of every layer, GPT families the causal masks; transformers computes both.
IGNORED_TENSORS = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|(attn\.)?attention\.(masked_)?bias)$")

# UnpicklingError: torch's answer to a pickle that wants to run code. AttributeError and TypeError: what transformers
# makes of one that holds other things than tensors by name.
LOAD_ERRORS = (
    AttributeError, EOFError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, UnpicklingError,
    ValueError,
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedCheckpoint:
    """What `save` wrote. `notes` says what a reader of the folder should know (also in `plan.json`).

    `zeros` is what was counted in the file of a sparse model.
    """

    folder: Path
    form: Literal["uniform", "per-layer"]
    model_type: str
    size_bytes: int
    notes: tuple[str, ...]
    zeros: Found | None = None


@quiet_global_reads()
def load_pruned(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Model of a checkpoint folder, dense or pruned (uniform or per layer), in eval mode, on the CPU.

    The folder's own Python files are never run; a per-layer folder is built by edgeprune's copy of the modelling code.

    Raises:
        EdgepruneError: if the folder is incomplete or damaged, or does not hold what its config says.
    """
    folder = Path(folder)
    config = load_config(folder)
    if (unpack := unpacking(folder)) is not None:
        return _load_unpacked(folder, config, unpack, dtype)
    headers = read_headers(folder)
    model_class = class_of(config)
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
    unpack = unpacking(folder)
    headers = read_headers(folder, unpack)
    if headers is None:
        raise EdgepruneError(f"{folder} holds torch pickles; expected safetensors, which can be read block by block")
    return _decoder(folder, config, headers, tensor_readers(folder, unpack), keeps_blocks=keeps_blocks)


def _load_unpacked(folder: Path, config: PreTrainedConfig, unpack: Unpack, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model of a folder whose tensors have to be unpacked first."""
    headers = read_headers(folder, unpack)
    if headers is not None:
        readers = tensor_readers(folder, unpack)
    else:
        _skeleton(folder, class_of(config), config, None)
        try:
            tensors = read_pickles(folder, unpack)
            headers = {name: TensorHeader.of(tensor) for name, tensor in tensors.items()}
        except LOAD_ERRORS as error:
            raise EdgepruneError(f"cannot load the weights of {folder}: {one_line(error)}") from error
        readers = {name: tensor.clone for name, tensor in tensors.items()}
    decoder = _decoder(folder, config, headers, readers, keeps_blocks=True)
    with decoder.whole() as model:
        for parameter in model.parameters():  # and no buffer: rotary frequencies stay float32
            parameter.data = parameter.data.to(dtype)
        return model


def _decoder(
    folder: Path,
    config: PreTrainedConfig,
    headers: Mapping[str, TensorHeader],
    tensors: Mapping[str, Reader],
    *,
    keeps_blocks: bool,
) -> Decoder:
    """Decoder of these tensors, by the names that they have in the folder; none of them is read yet."""
    model = _skeleton(folder, class_of(config), config, headers)
    stored = {name: in_folder for in_folder, name in _model_names(model, headers).items()}
    unused = sorted(name for name in stored if name not in model.state_dict() and not IGNORED_TENSORS.search(name))
    if unused:
        raise EdgepruneError(
            f"{folder} has a tensor that its config does not expect: {unused[0]} ({len(unused)} in all); config and "
            "weights do not belong together"
        )
    for tied, source in (model.all_tied_weights_keys or {}).items():  # either of two may be the one in the file
        if source not in stored:
            stored[source] = stored[tied]
    dtypes = {name: FLOATS.get(headers[stored[name]].dtype) for name in model.state_dict() if name in stored}
    if strange := [name for name, dtype in dtypes.items() if dtype is None]:
        raise EdgepruneError(
            f"{folder}: {strange[0]} is stored as {headers[stored[strange[0]]].dtype}; expected floats, prune "
            "before quantising"
        )
    with torch.device("meta"):
        shapes = {name: torch.empty(headers[stored[name]].shape, dtype=dtypes[name]) for name in dtypes}
    model.load_state_dict(shapes, strict=False, assign=True)
    model.tie_weights()
    readers = {name: tensors[in_folder] for name, in_folder in stored.items()}
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
        if found := sorted(name for name in map(str, info[key]) if not IGNORED_TENSORS.search(name)):
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
    beside: Mapping[str, bytes] | None = None,
) -> SavedCheckpoint:
    """Write a model as a checkpoint folder, read it back, compare, and only then give it its name.

    Args:
        model: the model as it is to be saved, already cut.
        tokenizer: saved beside it; None saves none.
        plan: how it was cut; None for a dense model.
        widths: sizes of each layer (`layer_widths`).
        out: the folder; must not exist, or be a checkpoint folder that `force` allows to replace.
        force: replace an earlier checkpoint, once the new one is complete.
        beside: more files of the folder by name, such as its model card.

    Raises:
        EdgepruneError: if `out` exists, the disk is full, or a weight is not finite. Nothing is left behind then, and
            an earlier folder is untouched.
        GateError: likewise, if the copy does not compute what the model computes.
    """
    out = Path(out).absolute()
    check_output(out, force)
    decoder = Decoder.of(model)
    headers = {name: TensorHeader.of(tensor) for name, tensor in decoder.tensors().items()}
    check_space(out, sum(header.size_bytes for header in headers.values()) + SPARE_BYTES)
    with atomic_folder(out, force=force, kind=CHECKPOINT) as part:
        _write_weights(part / SAFETENSORS_FILE, decoder, headers)
        for name, content in (beside or {}).items():
            (part / name).write_bytes(content)
        return _write(part, out, decoder, tokenizer, plan, widths)


def check_output(out: Path, force: bool) -> None:
    """Check that a checkpoint may be written as `out`; call it before the long work.

    Raises:
        EdgepruneError: if it exists and may not be replaced.
    """
    output.check_output(out, force=force, kind=CHECKPOINT)


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
    stand_in = stand_in_config(config) if form == "per-layer" and len(set(widths)) == 1 else None
    if stand_in is not None:
        set_widths(stand_in, widths)
        _write_config(part, stand_in, "uniform")
        if difference := _difference(part, decoder):
            logger.info("not saved as model_type %s: %s", stand_in.model_type, difference)
            stand_in = None
    if stand_in is not None:
        notes = (
            f"saved with model_type {stand_in.model_type!r}, which computes the same (compared): "
            f"{_refused(config, widths)}",
        )
        config, form = stand_in, "uniform"
    else:
        if form == "per-layer" and all(width.counts == widths[0].counts for width in widths):
            notes = (f"saved with per_layer_config although all layers are alike: {_refused(config, widths)}",)
        _write_config(part, config, form)
        if difference := _difference(part, decoder):
            raise GateError(
                f"read back in stock {config.model_type} code, the checkpoint is not the model: {difference}; nothing "
                "is written (a model whose own code computes something else cannot be saved so)"
            )
    zeros = None
    if plan is not None:
        replace(plan, notes=(*plan.notes, *notes)).save(part)
        zeros = _stored_zeros(part, plan.sparsity) if plan.sparsity else None
    size_bytes = sum(file.stat().st_size for file in part.iterdir())
    return SavedCheckpoint(out, form, config.model_type, size_bytes, notes, zeros)


def _stored_zeros(folder: Path, record: SparsityRecord) -> Found:
    """The zeros of a sparse model, counted in the file that was written.

    Raises:
        GateError: if one of its Linears breaks the pattern.
    """
    stored = open_decoder(folder)

    def read(name: str) -> torch.Tensor:
        return oriented(linear_of(stored.model, name), stored.read_tensor(f"{name}.weight"))

    return check_pattern(record, read, "the checkpoint")


def _refused(config: PreTrainedConfig, widths: Sequence[LayerWidths]) -> str:
    """Why layers that are alike do not make a stock config, in words."""
    heads, channels = widths[0].heads, widths[0].channels
    fixed = set(widths[0].counts) - set(architecture(config.model_type).STOCK)
    what = f"{heads} heads and {channels} channels" if "channels" in fixed else f"{heads} heads"
    return f"stock {config.model_type!r} code refuses {what} at hidden_size {config.hidden_size}"


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


def stand_in_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A config of the type that the architecture names as its stand-in, with the same sizes.

    None if it names none, or that type refuses a value which the model's own takes (Mistral a dropout of null).
    """
    named = getattr(architecture(config.model_type), "STAND_IN", None)
    if named is None:
        return None
    model_type, settings = named
    data = config.to_dict()
    for key in ("model_type", "per_layer_config", "allow_global_per_layer_attribute_access", LAYOUT_KEY):
        data.pop(key, None)
    try:
        stand_in: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(data | settings)
    except StrictDataclassError:
        return None
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


def class_of(config: PreTrainedConfig) -> Any:
    """The stock class of a config's architecture, or the one whose layers may differ in width."""
    base = architecture(config.model_type).BASE
    if config.is_heterogeneous:
        return getattr(modeling_edgeprune, modeling_edgeprune.PREFIX + base)
    return getattr(transformers, base)


def _model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """What the model calls each stored tensor.

    As transformers does, old names are replaced (GPT-NeoX called its head embed_out), and the prefix is put before the
    names of a bare decoder's file.
    """
    known = model.state_dict().keys()
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    names = {}
    for in_folder in stored:
        name = in_folder
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        prefixed = f"{model.base_model_prefix}.{name}"
        names[in_folder] = prefixed if prefixed in known else name
    return names


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
    _check_slots(folder, model)
    if (folder / GENERATION_CONFIG_FILE).is_file():
        model.generation_config = _generation_config(folder)
    if headers is None:
        _check_pickle_sizes(folder, model)
    else:
        _check_shapes(folder, model, headers)
    return model


def _generation_config(folder: Path) -> GenerationConfig:
    read_json(folder / GENERATION_CONFIG_FILE)  # says what is wrong with a file that transformers only stumbles over
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (*CONFIG_ERRORS, OSError) as error:
        raise EdgepruneError(
            f"{folder / GENERATION_CONFIG_FILE} describes no generation: {one_line(error)}; fetch it again or remove it"
        ) from error


def _check_slots(folder: Path, model: PreTrainedModel) -> None:
    """Hold the groups that follow from a config against what its code builds, which may read other keys of it."""
    lines: dict[tuple[str, str], int] = {}
    groups = model_groups(model)
    for group in groups:
        for slot in group.slots:
            key = (slot.module, slot.side)
            lines[key] = lines.get(key, 0) + group.units * slot.size
    shapes = linear_shapes(model, groups)
    for (module, side), count in lines.items():
        built = shapes[module].out_features if side == "out" else shapes[module].in_features
        if built != count:
            raise EdgepruneError(
                f"{folder / CONFIG_FILE} leads to heads or channels of {count} {side} features in {module}, and "
                f"{model.config.model_type} code builds {built}; its sizes do not belong together"
            )


def _check_shapes(folder: Path, model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> None:
    expected = model.state_dict()
    missing = set(expected) - set(model.all_tied_weights_keys or ())
    found = {name: headers[in_folder] for in_folder, name in _model_names(model, headers).items()}
    for name, header in found.items():
        if name in expected and tuple(expected[name].shape) != header.shape:
            raise EdgepruneError(
                f"{folder}: {name} has the shape {header.shape}, its config expects {tuple(expected[name].shape)}; "
                "config and weights do not belong together"
            )
        missing.discard(name)
    # Of two tied tensors either may be the one in the file.
    missing -= {source for tied, source in (model.all_tied_weights_keys or {}).items() if tied in found}
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
