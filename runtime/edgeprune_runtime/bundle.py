"""The bundle: the folder that travels to the device, and its manifest `edgeprune.json`.

    folder/
      edgeprune.json                the manifest: shapes per layer, hashes, versions, results
      config.json  generation_config.json  tokenizer.json  tokenizer_config.json  [chat_template.jinja]
      genai_config.json             for onnxruntime-genai
      golden.npz                    token sequences with the torch model's logits (see `validate.py`)
      onnx/model.onnx  onnx/model.onnx_data  [onnx/model_q4.onnx ...]
      [packed/]                     of one machine, in no manifest (see `packed.py`)

A graph's inputs are `input_ids` int64 (batch_size, sequence_length), `attention_mask` int64 (batch_size,
total_sequence_length) and for each layer i `past_key_values.{i}.key/value` float32 (batch_size, kv_heads_i,
past_sequence_length, head_dim_i), with integers for kv_heads_i and head_dim_i; its outputs are `logits` float32
(batch_size, sequence_length, vocab_size) and `present.{i}.key/value`. Nothing of a bundle is trusted: it may come from
anyone.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.untrusted import Fields, Json, file_inside, read_json

SCHEMA_VERSION = 1
MANIFEST_FILE = "edgeprune.json"
GOLDEN_FILE = "golden.npz"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
GENAI_CONFIG_FILE = "genai_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
ORT_SUFFIX = ".ort"
"""How a graph in ONNX Runtime's own format ends, which phones take."""

MAX_MANIFEST_BYTES = 16 << 20
# Far above any decoder that exists, and low enough that no product of two of them asks for absurd memory.
MAX_LAYERS = 4096
MAX_HEADS = 1 << 14
MAX_WIDTH = 1 << 22
MAX_VOCAB = 1 << 24
MAX_ACCURACY_LEVEL = 4

GraphSource = Literal["decoder", "traced", "plain"]
Padding = Literal["both", "right"]


# Variant -> its dtype in transformers.js, and how that library expects its graph's file name to end.
_TRANSFORMERS_JS = {
    "fp32": ("fp32", ""),
    "fp16": ("fp16", "_fp16"),
    "int8": ("q8", "_quantized"),
    "int8-dynamic": ("int8", "_int8"),
    "int4": ("q4", "_q4"),
}


def graph_file(variant: str) -> str:
    """Relative path of a variant's graph, named as transformers.js looks for it: `onnx/model.onnx` for fp32."""
    return f"onnx/model{_TRANSFORMERS_JS[variant][1]}.onnx"


def transformers_js_dtype(variant: str) -> str:
    """What transformers.js calls a variant."""
    return _TRANSFORMERS_JS[variant][0]


def golden_file(variant: str) -> str:
    """Relative path of a variant's golden sequences: `golden.npz` for fp32."""
    return GOLDEN_FILE if variant == "fp32" else f"golden_{variant}.npz"


def data_file(variant: str) -> str:
    """Relative path of a variant's external data, named as transformers.js expects it."""
    return f"{graph_file(variant)}_data"


@dataclass(frozen=True)
class ModelInfo:
    """What the bundle was made from."""

    name: str
    model_type: str
    source: str


@dataclass(frozen=True)
class Layer:
    """Widths of one decoder block, as they are in the graph."""

    heads: int
    kv_heads: int
    head_dim: int
    channels: int


@dataclass(frozen=True)
class Variant:
    """One graph of the bundle.

    `tolerance` is the largest absolute error of a logit against the torch model that counts as equal; `parity` holds
    what was measured when the bundle was written. That model has the variant's own weights, rounded ones included;
    `fidelity` holds how far these are from the float32 model, empty where nothing is rounded. `golden` are the
    variant's own token sequences with logits; None for those of the bundle. `accuracy_level` is that of ONNX Runtime's
    products with quantised weights: 4 rounds their inputs to 8 bits, 0 and 1 compute in float32; None where nothing is
    quantised, or a bundle is too old to say.
    """

    graph: str
    data: tuple[str, ...]
    graph_source: GraphSource
    tolerance: float
    parity: Mapping[str, Json] = field(default_factory=dict)
    fidelity: Mapping[str, Json] = field(default_factory=dict)
    golden: str | None = None
    accuracy_level: int | None = None


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters, tied weights once: of the whole model, and of its decoder blocks."""

    all: int
    blocks: int


ZEROS = "zeros"
"""Key of a manifest's results: what was counted in a graph with zeros in a pattern."""


@dataclass(frozen=True)
class FileRecord:
    """What a file of the bundle must be."""

    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file as it stands on disk."""
        return cls(sha256_of(path), path.stat().st_size)

    @classmethod
    def read(cls, fields: Fields) -> "FileRecord":
        """The record in a JSON object that nobody vouches for.

        Raises:
            EdgepruneError: if it is none.
        """
        record = cls(fields.text("sha256"), fields.count("size_bytes"))
        if len(record.sha256) != 64 or set(record.sha256) - set("0123456789abcdef"):
            raise EdgepruneError(f"{fields.where}.sha256 is not 64 lower-case hex digits")
        return record


@dataclass(frozen=True)
class Manifest:
    """All that a device must know about a bundle, and all that a reader wants to know about how it came to be.

    `padding` says on which side of a row in a batch the graphs take padding correctly. `files` lists every file of the
    bundle but the manifest. `plan` is the summary of what was cut, None for a dense model. `notes` are sentences that a
    reader should know, such as why the context is shorter than the model's. `target` is what the bundle was made for,
    None for nothing in particular; it binds nobody.
    """

    edgeprune_version: str
    model: ModelInfo
    default_variant: str
    variants: Mapping[str, Variant]
    layers: tuple[Layer, ...]
    vocab_size: int
    hidden_size: int
    context_tokens: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    padding: Padding
    parameters: Parameters
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    golden: str = GOLDEN_FILE
    plan: Mapping[str, Json] | None = None
    results: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    target: str | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Json]:
        """The manifest as plain JSON values."""
        return cast("dict[str, Json]", json.loads(json.dumps(asdict(self), allow_nan=False)))

    def save(self, folder: Path) -> Path:
        """Write the manifest into `folder` and return its path."""
        path = folder / MANIFEST_FILE
        path.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of a bundle folder.

        Raises:
            EdgepruneError: if there is none, or it is not a manifest of this schema version.
        """
        if not folder.is_dir():
            raise EdgepruneError(f"{str(folder)!r} is not a folder; give the folder of a bundle")
        path = folder / MANIFEST_FILE
        if not path.exists():
            raise EdgepruneError(f"{folder} has no {MANIFEST_FILE}, so it is not a bundle; {_instead_of(folder)}")
        return cls.from_json(read_json(path, limit_bytes=MAX_MANIFEST_BYTES), where=str(path))

    @classmethod
    def from_json(cls, document: Mapping[str, Json], where: str = MANIFEST_FILE) -> "Manifest":
        """The manifest in a JSON object that nobody vouches for; `where` names it in errors.

        Raises:
            EdgepruneError: naming the first field that is missing, of the wrong type or out of range.
        """
        top = Fields(document, where)
        version = top.count("schema_version")
        if version != SCHEMA_VERSION:
            raise EdgepruneError(
                f"{where} has schema_version {version}, this edgeprune reads {SCHEMA_VERSION}; "
                "install the edgeprune that wrote it or export again"
            )
        model, parameters = top.fields("model"), top.fields("parameters")
        vocab_size = top.count("vocab_size", low=1, high=MAX_VOCAB)
        manifest = cls(
            edgeprune_version=top.text("edgeprune_version"),
            model=ModelInfo(model.text("name"), model.text("model_type"), model.text("source")),
            default_variant=top.text("default_variant"),
            variants={
                _printable(name, f"{where}.variants"): _variant(Fields.nested(f"{where}.variants.{name}", value))
                for name, value in top.mapping("variants").items()
            },
            layers=tuple(
                _layer(Fields.nested(f"{where}.layers[{index}]", value))
                for index, value in enumerate(top.items("layers"))
            ),
            vocab_size=vocab_size,
            hidden_size=top.count("hidden_size", low=1, high=MAX_WIDTH),
            context_tokens=top.count("context_tokens", low=1, high=1 << 31),
            bos_token_id=top.optional_count("bos_token_id", high=vocab_size - 1),
            eos_token_ids=top.counts("eos_token_ids", high=vocab_size - 1),
            pad_token_id=top.optional_count("pad_token_id", high=vocab_size - 1),
            padding=cast("Padding", top.text("padding", one_of=("both", "right"))),
            parameters=Parameters(parameters.count("all"), parameters.count("blocks")),
            files={
                name: FileRecord.read(Fields.nested(f"{where}.files.{name}", value))
                for name, value in top.mapping("files").items()
            },
            versions={name: top.fields("versions").text(name) for name in top.mapping("versions")},
            golden=top.path("golden"),
            plan=None if top.values.get("plan") is None else top.mapping("plan"),
            results=top.mapping("results"),
            notes=top.texts("notes") if "notes" in top.values else (),
            target=None if top.values.get("target") is None else top.text("target"),
        )
        manifest._check_references(where)
        return manifest

    def _check_references(self, where: str) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise EdgepruneError(f"{where}.layers has {len(self.layers)} entries; 1..{MAX_LAYERS} were expected")
        if self.default_variant not in self.variants:
            raise EdgepruneError(
                f"{where}.default_variant is {self.default_variant!r}, which is not among its variants"
            )
        needed = {self.golden}
        for variant in self.variants.values():
            needed |= {variant.graph, *variant.data} | ({variant.golden} if variant.golden else set())
        if missing := sorted(needed - self.files.keys()):
            raise EdgepruneError(f"{where}.files does not list {missing[0]!r}; make the bundle again")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its files exist with the sizes that the manifest states, and a variant is chosen.

    `ort_file` is the relative path of that variant in ONNX Runtime's own format, where that is to be run.
    """

    folder: Path
    manifest: Manifest
    variant_name: str
    ort_file: str | None = None

    @property
    def variant(self) -> Variant:
        """The chosen variant."""
        return self.manifest.variants[self.variant_name]

    @property
    def golden(self) -> str:
        """Relative path of the token sequences that the chosen variant is held against."""
        return self.variant.golden or self.manifest.golden

    @property
    def path(self) -> Path:
        """What was opened: the folder, or the file in the ORT format."""
        return self.folder / self.ort_file if self.ort_file else self.folder

    @property
    def graph_path(self) -> Path:
        """Where the graph lies that is to be run."""
        return self.folder / (self.ort_file or self.variant.graph)

    @property
    def graph_files(self) -> tuple[str, ...]:
        """Relative paths of that graph and its data."""
        return (self.ort_file,) if self.ort_file else (self.variant.graph, *self.variant.data)

    @property
    def is_sparse(self) -> bool:
        """Whether weights have zeros in a pattern, which was counted when the bundle was written."""
        return ZEROS in self.manifest.results

    @property
    def size_bytes(self) -> int:
        """Bytes of that graph and its data."""
        return sum(self.manifest.files[name].size_bytes for name in self.graph_files)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the float32 KV cache of one token takes over all layers."""
        return sum(2 * 4 * layer.kv_heads * layer.head_dim for layer in self.manifest.layers)

    def file(self, relative: str) -> Path:
        """A file of the bundle that the manifest does not have to list, such as the tokenizer.

        Raises:
            EdgepruneError: if it is missing or a link leads out of the bundle.
        """
        return file_inside(self.folder, relative, "the bundle")


def open_bundle(folder: Path | str, variant: str | None = None, verify: bool = False) -> Bundle:
    """The bundle in `folder` with one of its variants chosen (None: the manifest's default).

    Every file that the manifest lists must exist with the size it states; `verify` also compares the SHA-256. A file of
    the bundle in ONNX Runtime's own format may be given instead of the folder: `BUNDLE/ort/model.ort`.

    Raises:
        EdgepruneError: in one line, at the first thing that is not as the manifest says.
    """
    bundle = find_bundle(folder, variant)
    for name in bundle.manifest.files:
        check_file(bundle, name, verify=verify)
    return bundle


def find_bundle(folder: Path | str, variant: str | None = None) -> Bundle:
    """The bundle that `open_bundle` opens, its manifest read and no other file looked at.

    Raises:
        EdgepruneError: if there is none, or it has no such variant or file.
    """
    folder, ort_file = Path(folder), None
    try:
        if folder.suffix == ORT_SUFFIX and not folder.is_dir():
            folder, ort_file = _bundle_of(folder)
        manifest = Manifest.load(folder)
    except OSError as error:  # a name too long for the system, or a folder that is closed to us
        raise EdgepruneError(
            f"{str(folder)!r} is no usable path ({error.strerror}); give the folder of a bundle"
        ) from error
    chosen = variant or (manifest.default_variant if ort_file is None else _variant_of(manifest, ort_file))
    if chosen not in manifest.variants:
        raise EdgepruneError(f"{folder} has no variant {chosen!r}; it has {', '.join(sorted(manifest.variants))}")
    if ort_file is not None and chosen != _variant_of(manifest, ort_file):
        raise EdgepruneError(f"{folder / ort_file} is not the variant {chosen!r}; give the file alone")
    return Bundle(folder, manifest, chosen, ort_file)


def _instead_of(folder: Path) -> str:
    """What to do with a folder that is no bundle."""
    inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_FILE}"))
    if inside:
        return f"give the one inside, {inside[0]}"
    if (folder / "config.json").is_file():
        return "make one of this checkpoint with `edgeprune export`"
    return "make one with `edgeprune compress`"


def _bundle_of(file: Path) -> tuple[Path, str]:
    """The bundle that a file in the ORT format lies in, and the file's path relative to it."""
    folder = file.absolute().parent.parent
    if not (folder / MANIFEST_FILE).is_file():
        raise EdgepruneError(
            f"{file} does not lie in the folder ort/ of a bundle, where its tokenizer and widths are; give "
            "BUNDLE/ort/NAME.ort, which `edgeprune export --target mobile` writes"
        )
    return folder, f"{file.absolute().parent.name}/{file.name}"


def _variant_of(manifest: Manifest, ort_file: str) -> str:
    """The variant that a file in the ORT format is; they have the name of their graph."""
    name = Path(ort_file).stem
    found = [key for key, variant in manifest.variants.items() if Path(variant.graph).stem == name]
    if ort_file not in manifest.files or not found:
        listed = ", ".join(file for file in manifest.files if file.endswith(ORT_SUFFIX)) or "none"
        raise EdgepruneError(f"the manifest of the bundle does not list {ort_file}; in the ORT format it has {listed}")
    return found[0]


def check_file(bundle: Bundle, name: str, *, verify: bool) -> None:
    """Compare one listed file with its record: the size, and with `verify` the SHA-256.

    Raises:
        EdgepruneError: if it differs.
    """
    record = bundle.manifest.files[name]
    path = file_inside(bundle.folder, name, f"{MANIFEST_FILE}.files")
    size = path.stat().st_size
    if size != record.size_bytes:
        raise EdgepruneError(
            f"{path} has {size} bytes, the manifest states {record.size_bytes}; copy the bundle again, whole"
        )
    if verify and sha256_of(path) != record.sha256:
        raise EdgepruneError(f"{path} does not have the SHA-256 that the manifest states; copy the bundle again")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _printable(name: str, where: str) -> str:
    if not name.isprintable():
        raise EdgepruneError(f"{where} has the name {name!r}; one of printable characters was expected")
    return name


def _variant(fields: Fields) -> Variant:
    return Variant(
        graph=fields.path("graph"),
        data=fields.paths("data"),
        graph_source=cast("GraphSource", fields.text("graph_source", one_of=get_args(GraphSource))),
        tolerance=fields.number("tolerance", low=0.0),
        parity=fields.mapping("parity"),
        fidelity=fields.mapping("fidelity") if "fidelity" in fields.values else {},
        golden=None if fields.values.get("golden") is None else fields.path("golden"),
        accuracy_level=fields.optional_count("accuracy_level", high=MAX_ACCURACY_LEVEL),
    )


def _layer(fields: Fields) -> Layer:
    layer = Layer(
        heads=fields.count("heads", low=1, high=MAX_HEADS),
        kv_heads=fields.count("kv_heads", low=1, high=MAX_HEADS),
        head_dim=fields.count("head_dim", low=1, high=MAX_HEADS),
        channels=fields.count("channels", low=1, high=MAX_WIDTH),
    )
    if layer.heads % layer.kv_heads:
        raise EdgepruneError(f"{fields.where} has {layer.heads} heads, not a multiple of its {layer.kv_heads} kv_heads")
    return layer
