"""Which instructions of a CPU matter to ONNX Runtime's kernels, and whether this one has them.

Linux tells them in `/proc/cpuinfo`, macOS by `sysctl`; elsewhere they are unknown, which is said and not guessed.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
SYSCTL = "/usr/sbin/sysctl"
_SYSCTL_SECONDS = 5.0

X86_MACHINES = ("x86_64", "amd64", "i386", "i686", "x86")
ARM_MACHINES = ("aarch64", "arm64", "armv8l", "armv7l")


@dataclass(frozen=True)
class Feature:
    """A set of instructions: `flags` are its names in what systems print, `use` says what it does for a bundle.

    `without` says what its absence costs; empty where it costs nothing.
    """

    name: str
    flags: tuple[str, ...]
    use: str
    without: str = ""


X86 = (
    Feature(
        "AVX2",
        ("avx2", "avx20"),
        "products of every precision work on eight numbers at a time",
        "every precision is slow here; take the smallest model that does",
    ),
    Feature(
        "AVX-512 VNNI",
        ("avx512vnni",),
        "int8 and int4 with inputs rounded to 8 bits (--accuracy-level 4) multiply 64 bytes at a time",
    ),
    Feature(
        "AVX-VNNI",
        ("avxvnni",),
        "int8 and int4 with inputs rounded to 8 bits (--accuracy-level 4) multiply 32 bytes at a time",
    ),
    Feature("AMX int8", ("amxint8",), "dynamic int8 products (MatMulInteger) of long prompts are fast"),
    Feature(
        "AMX bf16",
        ("amxbf16",),
        "torch prunes fast in bfloat16 (--dtype bfloat16); ONNX Runtime's CPU kernels do not compute in bfloat16",
    ),
)
ARM = (
    Feature(
        "dotprod",
        ("asimddp", "dotprod"),
        "int8 and int4 with inputs rounded to 8 bits (--accuracy-level 4) multiply 16 bytes at a time",
    ),
    Feature("i8mm", ("i8mm",), "int8 and int4 with rounded inputs are faster still, in prompts most of all"),
    Feature("fp16", ("asimdhp", "fp16"), "fp16 is computed as it is; elsewhere it is turned into float32 first"),
    Feature(
        "bf16",
        ("bf16",),
        "ONNX Runtime can multiply float32 in bfloat16 where a session asks for it, which loses digits; edgeprune does "
        "not ask",
    ),
    Feature("SVE", ("sve",), "no variant depends on it"),
)
FAST_INT8 = frozenset({"AVX-512 VNNI", "AVX-VNNI", "dotprod", "i8mm"})
"""Any of these makes products of 8-bit integers fast."""


def features_of(machine: str) -> tuple[Feature, ...]:
    """What matters on a machine as `platform.machine` names it; nothing where that is not known."""
    name = machine.lower()
    return X86 if name in X86_MACHINES else ARM if name in ARM_MACHINES else ()


def cpu_flags() -> frozenset[str] | None:
    """Names of this CPU's instruction sets in lower case without `_` and `.`; None where the system does not tell."""
    if sys.platform == "darwin":
        try:
            command = [SYSCTL, "hw.optional", "machdep.cpu"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SYSCTL_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return parse_sysctl(done.stdout)
    try:
        return parse_cpuinfo(CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def parse_cpuinfo(text: str) -> frozenset[str] | None:
    """The flags that *every* processor of a `/proc/cpuinfo` has: of big and little cores a thread may get either."""
    found = [
        frozenset(map(_plain, value.split()))
        for line in text.splitlines()
        for key, _, value in [line.partition(":")]
        if key.strip() in ("flags", "Features") and value.strip()
    ]
    return frozenset.intersection(*found) if found else None


def parse_sysctl(text: str) -> frozenset[str] | None:
    """The flags in what `sysctl hw.optional machdep.cpu` prints."""
    found: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        name = key.rpartition(".")[2]
        if key.startswith("hw.optional.") and value.strip() == "1":
            found.add(_plain(name.removeprefix("FEAT_")))
        elif key.startswith("machdep.cpu.") and name.endswith("features"):
            found.update(map(_plain, value.split()))
    return frozenset(found) or None


def _plain(flag: str) -> str:
    return re.sub(r"[_.]", "", flag.lower())
