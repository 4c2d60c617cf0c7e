"""What a machine has for running bundles: one finding per line, each with what to do.

`look` reads the machine; everything else only judges what was read, so that any machine can be judged in a test. A
finding is `ok`, a `note` (worth knowing, nothing fails) or a `problem` (something will not run). Whether a bundle fits
the machine is the business of `doctor_bundle`.
"""

import importlib.metadata
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnxruntime

import edgeprune_runtime
from edgeprune_runtime.cpu_features import cpu_flags, features_of
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.limits import memory_limit_bytes, usable_cpus
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import format_bytes
from edgeprune_runtime.session import PROVIDERS, package_of
from edgeprune_runtime.untrusted import Json

Level = Literal["ok", "note", "problem"]

MIN_ONNXRUNTIME = (1, 31)
MIN_GENAI = (0, 15)
"""The first onnxruntime-genai that reads each layer's own KV heads off the graph."""

GENAI = "onnxruntime-genai"
OTHER_PACKAGES = ("tokenizers", GENAI, "torch", "transformers")
"""Looked up by their metadata alone: importing torch here would cost what the doctor is asked about."""

LOW_DISK_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: what was found about `subject`, and what to do about it.

    `figures` are the numbers in it, for programs.
    """

    level: Level
    subject: str
    found: str
    advice: str = ""
    figures: Mapping[str, Json] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Json]:
        """The finding as plain values."""
        return {
            "level": self.level,
            "subject": self.subject,
            "found": self.found,
            "advice": self.advice,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True)
class Here:
    """What was read of this machine.

    `versions` holds None for a package that is not installed; `onnxruntime_packages` are the installed distributions
    that carry ONNX Runtime. `cpu_flags` are None where the system does not tell, `memory_available_bytes` likewise.
    """

    python: str
    edgeprune: str
    onnxruntime: str
    onnxruntime_packages: tuple[str, ...]
    versions: Mapping[str, str | None]
    providers: tuple[str, ...]
    cpu: str
    processor: str
    cpu_flags: frozenset[str] | None
    cores: int
    affinity: tuple[int, ...]
    cpu_quota: float | None
    threads: int
    memory_bytes: int | None
    memory_limit_bytes: int | None
    memory_available_bytes: int | None
    disk_free_bytes: int

    @property
    def features(self) -> frozenset[str]:
        """Names of the instruction sets that matter and are here."""
        flags = self.cpu_flags or frozenset()
        return frozenset(each.name for each in features_of(self.processor) if flags.intersection(each.flags))

    @property
    def room_bytes(self) -> int | None:
        """Memory that a process may still take, as far as the system tells."""
        known = (self.memory_available_bytes, self.memory_limit_bytes, self.memory_bytes)
        return min((size for size in known if size is not None), default=None)


def look(place: Path) -> Here:
    """Read the machine; `place` is the folder whose disk counts."""
    machine = this_machine()
    return Here(
        python=machine.python,
        edgeprune=edgeprune_runtime.__version__,
        onnxruntime=onnxruntime.__version__,
        onnxruntime_packages=tuple(sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", ())))),
        versions={name: _version(name) for name in OTHER_PACKAGES},
        providers=tuple(onnxruntime.get_available_providers()),
        cpu=machine.cpu,
        processor=platform.machine(),
        cpu_flags=cpu_flags(),
        cores=machine.cores,
        affinity=machine.affinity,
        cpu_quota=machine.cpu_quota,
        threads=usable_cpus(),
        memory_bytes=machine.memory_bytes,
        memory_limit_bytes=memory_limit_bytes(),
        memory_available_bytes=_memory_available_bytes(),
        disk_free_bytes=_disk_free_bytes(place),
    )


def examine_machine(here: Here, provider: str = "cpu") -> tuple[Finding, ...]:
    """What a machine has for running bundles on an execution provider.

    Raises:
        EdgepruneError: if there is no execution provider of that name.
    """
    return (
        *_examine_packages(here),
        _examine_providers(here, provider),
        *_examine_cpu(here),
        _examine_threads(here),
        _examine_memory(here),
        _examine_disk(here),
    )


def count_problems(findings: Sequence[Finding]) -> int:
    """How many of the findings are problems."""
    return sum(finding.level == "problem" for finding in findings)


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (1, 31, 1) of `1.31.1.dev4`."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def dotted(numbers: Iterable[int]) -> str:
    """A version of those numbers."""
    return ".".join(map(str, numbers))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _disk_free_bytes(place: Path) -> int:
    """Free bytes of the disk that a folder is on; of the one we stand on where there is no such folder."""
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return shutil.disk_usage(Path.cwd()).free


def _memory_available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """What the kernel could give without swapping, caches given back; None where it does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def _examine_packages(here: Here) -> Iterator[Finding]:
    yield Finding("ok", "python", here.python)
    yield Finding("ok", "edgeprune", here.edgeprune)
    if release(here.onnxruntime) < MIN_ONNXRUNTIME:
        found, least = here.onnxruntime, dotted(MIN_ONNXRUNTIME)
        yield Finding(
            "problem", "onnxruntime", f"{found}, {least} or later is needed", f"pip install 'onnxruntime>={least}'"
        )
    else:
        yield Finding("ok", "onnxruntime", here.onnxruntime)
    if len(here.onnxruntime_packages) > 1:
        names = ", ".join(here.onnxruntime_packages)
        yield Finding(
            "problem", "onnxruntime", f"{names} overwrite each other's files", "uninstall all of them, then install one"
        )
    yield _examine_genai_version(here.versions[GENAI])
    yield Finding("ok", "tokenizers", here.versions["tokenizers"] or "not found")
    for name in ("torch", "transformers"):
        version = here.versions[name]
        if version is None:
            yield Finding(
                "note",
                name,
                "not installed, and not needed to run bundles",
                "to prune and export: pip install 'edgeprune[compress]'",
            )
        else:
            yield Finding("ok", name, version)


def _examine_genai_version(version: str | None) -> Finding:
    subject, least = GENAI, dotted(MIN_GENAI)
    if version is None:
        return Finding(
            "note",
            subject,
            "not installed; it is another way to run bundles, from Python, C++, C# and Java",
            "if you want it: pip install 'edgeprune[genai]'",
        )
    if release(version) < MIN_GENAI:
        return Finding(
            "problem",
            subject,
            f"{version}, which takes one KV head count for all layers",
            f"pip install 'onnxruntime-genai>={least}'",
        )
    return Finding("ok", subject, version)


def _examine_providers(here: Here, provider: str) -> Finding:
    if provider not in PROVIDERS:
        raise EdgepruneError(f"unknown provider {provider!r}; known: {', '.join(PROVIDERS)}")
    short = {name: key for key, name in PROVIDERS.items()}
    names = [short.get(name, name.removesuffix("ExecutionProvider").lower()) for name in here.providers]
    found = f"this ONNX Runtime has {', '.join(names)}"
    if PROVIDERS[provider] not in here.providers:
        return Finding(
            "problem",
            "providers",
            f"{found}, and not {provider}",
            f"install {package_of(provider)}, {dotted(MIN_ONNXRUNTIME)} or later, "
            "in place of this one, or take --provider cpu",
        )
    return Finding("ok", "providers", found, figures={"providers": list(here.providers)})


def _examine_cpu(here: Here) -> Iterator[Finding]:
    features = features_of(here.processor)
    if here.cpu_flags is None or not features:
        yield Finding(
            "note",
            "cpu",
            f"{here.cpu} ({here.processor}); its instruction sets are unknown, as this system does not tell them",
            "measure: edgeprune bench BUNDLE --variant ...",
        )
        return
    yield Finding("ok", "cpu", f"{here.cpu} ({here.processor})")
    for feature in features:
        if feature.name in here.features:
            yield Finding("ok", feature.name, f"yes: {feature.use}")
        else:
            yield Finding("note", feature.name, f"no; with it {feature.use}", feature.without)


def _examine_threads(here: Here) -> Finding:
    allowed = f"{len(here.affinity)} of them allowed" if here.affinity else "all of them allowed"
    quota = f"a quota of {here.cpu_quota:g}" if here.cpu_quota else "no quota"
    threads = "1 thread" if here.threads == 1 else f"{here.threads} threads"
    found = f"{here.cores} cores, {allowed}, {quota}: {threads} will be used"
    figures: dict[str, Json] = {"cores": here.cores, "threads": here.threads}
    if here.cpu_quota and not here.cpu_quota.is_integer():
        return Finding(
            "note", "threads", found, "a quota of whole processors would not stop threads in mid-step", figures
        )
    return Finding("ok", "threads", found, figures=figures)


def _examine_memory(here: Here) -> Finding:
    if here.room_bytes is None:
        return Finding("note", "memory", "unknown, as this system does not tell", "measure: edgeprune bench BUNDLE")
    parts = [] if here.memory_available_bytes is None else [f"{format_bytes(here.memory_available_bytes)} available"]
    if here.memory_bytes is not None:
        parts.append(f"{format_bytes(here.memory_bytes)} in all")
    limit = here.memory_limit_bytes
    parts.append(f"limited to {format_bytes(limit)} by the container" if limit is not None else "no container limit")
    return Finding("ok", "memory", ", ".join(parts), figures={"room_bytes": here.room_bytes})


def _examine_disk(here: Here) -> Finding:
    found, figures = f"{format_bytes(here.disk_free_bytes)} free", {"free_bytes": here.disk_free_bytes}
    if here.disk_free_bytes < LOW_DISK_BYTES:
        return Finding("note", "disk", found, "make room before another bundle is copied here", figures)
    return Finding("ok", "disk", found, figures=figures)
