"""The machine that a figure was measured on."""

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import onnxruntime

import edgeprune_runtime
from edgeprune_runtime.limits import cpu_quota, memory_limit_bytes


@dataclass(frozen=True)
class Machine:
    """What a reader needs to judge a figure: hardware, limits around this process, and versions.

    `memory_bytes` is the smaller of the machine's memory and the control groups' limit.
    """

    cpu: str
    cores: int
    affinity: tuple[int, ...]
    cpu_quota: float | None
    memory_bytes: int | None
    system: str
    python: str
    onnxruntime: str
    numpy: str
    edgeprune: str

    def to_dict(self) -> dict[str, object]:
        """The record as plain values."""
        return asdict(self)


def this_machine() -> Machine:
    """The machine and the limits that this process runs under."""
    sizes = [size for size in (_physical_memory_bytes(), memory_limit_bytes()) if size]
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        affinity=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        cpu_quota=cpu_quota(),
        memory_bytes=min(sizes, default=None),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        onnxruntime=onnxruntime.__version__,
        numpy=numpy.__version__,
        edgeprune=edgeprune_runtime.__version__,
    )


def cpu_name() -> str:
    """What the system calls the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            # x86 says "model name"; many ARM boards only "Hardware" or "Model".
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "Model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _physical_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
