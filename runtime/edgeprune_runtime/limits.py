"""What this process may use: processors and memory, under affinity and control groups; and a limit set on purpose."""

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from edgeprune_runtime.errors import EdgepruneError

MAX_THREADS = 1024
"""The most that may be asked for: beyond what any one model has work for, and far below what overflows."""

CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
# A cgroup without a limit reports a number near 2**63; nothing real comes close to this.
_NO_LIMIT = 1 << 60


def parse_size(text: str) -> int:
    """Bytes in a size such as `512MiB`, `1.5GiB`, `300MB` or `1000000`.

    Raises:
        EdgepruneError: if the text is not a size that a memory can have.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size < _NO_LIMIT:
        raise EdgepruneError(f"{text!r} is not a size; write it like 512MiB, 1.5GiB or 300MB")
    return int(size)


def usable_cpus() -> int:
    """Processors that this process may keep busy: its affinity, cut by its groups' CPU quota and by `MAX_THREADS`."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, min(cpus, math.ceil(quota or cpus), MAX_THREADS))


def cpu_quota(root: Path = CGROUP_ROOT) -> float | None:
    """Processors' worth of time that the control groups grant, None where they set no quota."""
    quotas = []
    for folder in _own_groups(root, "cpu"):
        version2 = _words(folder / "cpu.max")
        quota, period = version2 if len(version2) == 2 else (_word(folder / "cpu.cfs_quota_us"), "")
        period = period or _word(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit_bytes(root: Path = CGROUP_ROOT) -> int | None:
    """Bytes that the control groups grant, None where they set no limit."""
    found = []
    for folder in _own_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _word(folder / name)
            if text.isdigit() and int(text) < _NO_LIMIT:
                found.append(int(text))
    return min(found, default=None)


def peak_rss_bytes() -> int | None:
    """The largest resident set this process has had, as the kernel counted it; None where the system does not tell."""
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def rss_bytes() -> int | None:
    """Resident memory of this process as it is now; None where the system does not tell."""
    return _status_bytes("VmRSS")


def own_rss_bytes() -> int | None:
    """Resident memory that is this process's own, which the system cannot drop and read again; None where not told."""
    return _status_bytes("RssAnon")


def _status_bytes(name: str) -> int | None:
    """A line of the kernel's account of this process, in bytes."""
    lines = _lines(Path("/proc/self/status"))
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), None)


@contextlib.contextmanager
def memory_group(limit_bytes: int, root: Path = CGROUP_ROOT) -> Iterator[Path | None]:
    """A new version 2 control group with that memory limit for a child to join; None where we may not make one.

    It is made beside or below our own group, only where the memory controller is already handed down: the settings of
    existing groups are not touched.
    """
    folder = _make_group(limit_bytes, root)
    try:
        yield folder
    finally:
        if folder is not None:
            with contextlib.suppress(
                OSError
            ):  # a group whose last process has not quite gone stays, empty and harmless
                folder.rmdir()


def limit_this_process(limit_bytes: int, group: Path | None) -> str:
    """Put this process under a memory limit and return how it is enforced, for the report.

    A control group counts what is resident, as a small device does. Without one `RLIMIT_DATA` bounds what the process
    allocates; pages of the mapped model file are not in it, so the caller compares the peak RSS with the limit
    afterwards.

    Raises:
        EdgepruneError: where this system offers neither.
    """
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        return "cgroup v2 memory.max"
    if sys.platform == "win32":
        raise EdgepruneError(
            "--memory is enforced by Linux control groups or rlimits, which Windows lacks; leave it out"
        )
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return "RLIMIT_DATA, and peak RSS compared afterwards"


def _make_group(limit_bytes: int, root: Path) -> Path | None:
    own = _own_path(root, "")
    if own is None or not (root / "cgroup.controllers").exists():
        return None
    for base in (own, own.parent):
        if not base.is_relative_to(root) or "memory" not in _words(base / "cgroup.subtree_control"):
            continue
        folder = base / f"edgeprune-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / "memory.max").write_text(str(limit_bytes))
            if (folder / "memory.swap.max").exists():
                (folder / "memory.swap.max").write_text("0")
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        return folder
    return None


def _own_groups(root: Path, controller: str) -> Iterator[Path]:
    """Our control group's folder and those above it, of version 2 and of a version 1 controller."""
    for mount, own in ((root, _own_path(root, "")), (root / controller, _own_path(root / controller, controller))):
        folder = own or mount
        while True:
            yield folder
            if folder == mount or folder == folder.parent:
                break
            folder = folder.parent


def _own_path(mount: Path, controller: str) -> Path | None:
    """Folder below `mount` of the group we are in: `controller` of version 1, or version 2 where it is empty."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            folder = mount / path.lstrip("/")
            # Inside a container the path may be the host's, which does not exist here: the mount is our group then.
            return folder if folder.is_dir() else mount
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _word(path: Path) -> str:
    return next(iter(_words(path)), "")
