"""The packed copy of a variant: its graph with the weights laid out as the kernels of one machine want them.

    BUNDLE/packed/int4/
      packed.json                             what it is made for, from which files, and a seal
      model_q4.onnx  model_q4.onnx_data       the optimised graph, its weights, and the same weights packed

Kernels do not multiply by weights as a bundle stores them: when a session opens, ONNX Runtime packs them into memory of
the process, while the mapped file is resident too. A packed copy holds the outcome, which is mapped instead. It belongs
to this machine, not to the bundle: no manifest lists it, and deleting its folder takes nothing away. `edgeprune pack`
makes it.

ONNX Runtime believes the lengths of packed weights, and a kernel reads past one that is too short. So a copy only
counts where the same user made it: its record is sealed with a key that never leaves his home. That is no matter of
trust in the weights, which the manifest's author could have written as he liked anyway.
"""

import hashlib
import hmac
import json
import os
import platform
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnxruntime

from edgeprune_runtime.bundle import Bundle, FileRecord, sha256_of
from edgeprune_runtime.cpu_features import cpu_flags, features_of
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.machine import cpu_name
from edgeprune_runtime.output import Kind
from edgeprune_runtime.untrusted import Fields, Json, file_inside, read_json, relative_path

PACKED_FOLDER = "packed"
RECORD_FILE = "packed.json"
PACKED = Kind("a packed copy", (RECORD_FILE,))
SCHEMA_VERSION = 1
PROVIDER = "cpu"
"""The execution provider that the packed weights are for."""

MAX_RECORD_BYTES = 1 << 20
KEY_BYTES = 32


@dataclass(frozen=True)
class Host:
    """What packed weights are made for: a version of ONNX Runtime, and a processor by its instruction sets.

    `features` are the names of those that kernels differ by; None where the system does not tell, and then only the
    same processor is the same.
    """

    onnxruntime: str
    processor: str
    cpu: str
    features: tuple[str, ...] | None

    @classmethod
    def here(cls) -> "Host":
        """This machine."""
        processor, flags = platform.machine(), cpu_flags()
        known = features_of(processor)
        features = tuple(each.name for each in known if flags.intersection(each.flags)) if flags and known else None
        return cls(onnxruntime.__version__, processor, cpu_name(), features)

    @classmethod
    def read(cls, fields: Fields) -> "Host":
        """The machine in a record."""
        has_features = fields.values.get("features") is not None
        return cls(
            fields.text("onnxruntime"),
            fields.text("processor"),
            fields.text("cpu"),
            fields.texts("features") if has_features else None,
        )

    def difference(self, here: "Host") -> str:
        """Why weights packed for this are none for `here`; empty where they are."""
        if self.onnxruntime != here.onnxruntime:
            return f"it was made by onnxruntime {self.onnxruntime}, and here is {here.onnxruntime}"
        is_same = self.cpu == here.cpu if self.features is None or here.features is None else True
        if self.processor != here.processor or self.features != here.features or not is_same:
            return f"it was made for {self._words()}, and here is {here._words()}"
        return ""

    def _words(self) -> str:
        features = "unknown features" if self.features is None else ", ".join(self.features) or "none of the features"
        return f"{self.cpu} ({self.processor}, {features})"


@dataclass(frozen=True)
class PackedCopy:
    """A packed copy that lies in a bundle; `refusal` says why it is not run, empty where it is."""

    folder: Path
    graph: Path
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    refusal: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether it is run instead of the variant's own graph."""
        return not self.refusal

    @property
    def size_bytes(self) -> int:
        """Bytes of its graph and weights."""
        return sum(record.size_bytes for record in self.files.values())

    def check_bytes(self) -> None:
        """Do nothing if its files have the SHA-256 that its record states; reads all of them.

        Raises:
            EdgepruneError: naming the first that has not.
        """
        for name, record in self.files.items():
            if sha256_of(self.folder / name) != record.sha256:
                raise EdgepruneError(f"{self.folder / name} does not have the SHA-256 that {RECORD_FILE} states")

    def sentence(self, variant: str) -> str:
        """For a reader: whether it is run."""
        if self.is_usable:
            return f"{variant} runs from its packed copy, {self.folder}"
        return f"{variant} runs without its packed copy: {self.refusal}; {self.advice(variant)}"

    def advice(self, variant: str) -> str:
        """What to do where it is not run."""
        return f"edgeprune pack BUNDLE --variant {variant} makes it anew"


def packed_folder(bundle: Bundle) -> Path:
    """Where the packed copy of the chosen variant lies, or would.

    Raises:
        EdgepruneError: if the variant's name is no name for a folder, or a link stands on the way.
    """
    name = relative_path(bundle.variant_name, "the variant's name")
    if "/" in name:
        raise EdgepruneError(f"the variant's name is {name!r}; one without '/' was expected, to name a folder by")
    folder = bundle.folder / PACKED_FOLDER / name
    if folder.parent.is_symlink() or folder.is_symlink():
        raise EdgepruneError(f"{folder} is reached through a link, which may lead anywhere; delete the link")
    return folder


def find_packed(bundle: Bundle, provider: str = PROVIDER) -> PackedCopy | None:
    """The packed copy of the chosen variant, usable or with the reason why not; None where there is none."""
    if bundle.ort_file is not None or not os.path.lexists(bundle.folder / PACKED_FOLDER / bundle.variant_name):
        return None
    folder = bundle.folder / PACKED_FOLDER / bundle.variant_name
    try:
        return _read(bundle, packed_folder(bundle), provider)
    except EdgepruneError as error:
        return PackedCopy(folder, folder, refusal=str(error))
    except OSError as error:
        return PackedCopy(folder, folder, refusal=f"{folder} cannot be read ({error.strerror})")


def usable_packed(bundle: Bundle, provider: str = PROVIDER) -> PackedCopy | None:
    """The packed copy that is run instead of the chosen variant's own graph, if one is."""
    found = find_packed(bundle, provider)
    return found if found is not None and found.is_usable else None


def write_record(folder: Path, bundle: Bundle, graph: str) -> None:
    """Write and seal the record of a packed copy whose files all lie in `folder`.

    Raises:
        EdgepruneError: if the key for the seal cannot be made.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    record: dict[str, Json] = {
        "schema_version": SCHEMA_VERSION,
        "host": asdict(Host.here()),
        "source": _source(bundle),
        "graph": graph,
        "files": {path.name: asdict(FileRecord.of(path)) for path in files},
    }
    record["seal"] = _seal(record, _new_key())
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def _read(bundle: Bundle, folder: Path, provider: str) -> PackedCopy:
    """The copy that a record describes, once all that it says was checked."""
    path = file_inside(folder, RECORD_FILE, PACKED_FOLDER)
    document = read_json(path, limit_bytes=MAX_RECORD_BYTES)
    record = Fields(document, str(path))
    if record.count("schema_version") != SCHEMA_VERSION:
        raise EdgepruneError("another version of edgeprune made it")
    key = _key()
    if key is None or not hmac.compare_digest(_bytes(record.text("seal")), _bytes(_seal(document, key))):
        raise EdgepruneError("it was not made here by this user")
    if difference := Host.read(record.fields("host")).difference(Host.here()):
        raise EdgepruneError(difference)
    if dict(record.mapping("source")) != _source(bundle):
        raise EdgepruneError(f"{bundle.variant_name} has changed since it was made")
    files = {name: FileRecord.read(record.fields("files").fields(name)) for name in record.mapping("files")}
    graph = record.path("graph")
    for name, each in files.items():
        found = file_inside(folder, name, f"{path}.files").stat().st_size
        if found != each.size_bytes:
            raise EdgepruneError(f"{folder / name} has {found} bytes, {RECORD_FILE} states {each.size_bytes}")
    # The graph says where each packed weight begins and ends; it is small, and must be the one that was checked.
    if graph not in files:
        raise EdgepruneError(f"{RECORD_FILE} does not list its graph {graph!r}")
    if sha256_of(folder / graph) != files[graph].sha256:
        raise EdgepruneError(f"{folder / graph} does not have the SHA-256 that {RECORD_FILE} states")
    if provider != PROVIDER:
        raise EdgepruneError(f"it is for the provider {PROVIDER}, and {provider} was asked for")
    return PackedCopy(folder, folder / graph, files)


def _source(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of the files that the chosen variant is made of, as the manifest states them."""
    return {name: bundle.manifest.files[name].sha256 for name in (bundle.variant.graph, *bundle.variant.data)}


def _seal(record: Mapping[str, Json], key: bytes) -> str:
    """HMAC-SHA256 of a record without its seal, in hex."""
    unsealed = {name: value for name, value in record.items() if name != "seal"}
    try:
        text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"))
    except RecursionError as error:
        raise EdgepruneError(f"{RECORD_FILE} is nested too deeply") from error
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _bytes(text: str) -> bytes:
    # JSON can hold half a character, which no encoding takes.
    return text.encode("utf-8", "backslashreplace")


def _key_file() -> Path:
    given = os.environ.get("XDG_DATA_HOME")
    try:
        return (Path(given) if given else Path.home() / ".local" / "share") / "edgeprune" / "packed.key"
    except RuntimeError as error:
        raise EdgepruneError("this user has no home folder to keep a key in; set HOME or XDG_DATA_HOME") from error


def _key() -> bytes | None:
    """This user's key; None before the first copy was made."""
    try:
        key = _key_file().read_bytes()
    except OSError:
        return None
    return key if len(key) == KEY_BYTES else None


def _new_key() -> bytes:
    """This user's key, made where there is none."""
    if (key := _key()) is not None:
        return key
    path = _key_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(key := secrets.token_bytes(KEY_BYTES))
    except OSError as error:
        raise EdgepruneError(
            f"cannot write {path} ({error.strerror}), the key that seals packed copies; set XDG_DATA_HOME to a folder "
            "that you may write to"
        ) from error
    return key
