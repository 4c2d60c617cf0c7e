"""Sizes, quotas and limits are read from control groups of either version, and memory groups are made with care."""

import os
from pathlib import Path

import pytest

from edgeprune_runtime import limits
from edgeprune_runtime.errors import EdgepruneError


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("1.5GiB", 3 << 29), ("300MB", 300_000_000), ("2k", 2000), ("7", 7), (" 1 gib ", 1 << 30)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert limits.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "0", "many", "1TiB", "1e9", "MiB", "0.5", "2000000000GiB", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(EdgepruneError, match="is not a size"):
        limits.parse_size(text)


def _groups(monkeypatch: pytest.MonkeyPatch, lines: str, tmp_path: Path) -> None:
    listing = tmp_path / "proc-cgroup"
    listing.write_text(lines)
    real = limits._lines
    monkeypatch.setattr(limits, "_lines", lambda path: real(listing if path == Path("/proc/self/cgroup") else path))


def test_version_2_limits_are_the_tightest_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _groups(monkeypatch, "0::/outer/inner\n", tmp_path)
    root = tmp_path / "cgroup"
    (root / "outer/inner").mkdir(parents=True)
    (root / "outer/cpu.max").write_text("150000 100000\n")
    (root / "outer/inner/cpu.max").write_text("max 100000\n")
    (root / "outer/inner/memory.max").write_text("max\n")
    (root / "outer/memory.max").write_text("1048576\n")
    assert limits.cpu_quota(root) == 1.5
    assert limits.memory_limit_bytes(root) == 1 << 20


def test_version_1_limits_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _groups(monkeypatch, "4:memory:/job\n1:cpu,cpuacct:/elsewhere\n", tmp_path)
    root = tmp_path / "cgroup"
    (root / "cpu").mkdir(parents=True)
    (root / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    (root / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (root / "memory/job").mkdir(parents=True)
    (root / "memory/job/memory.limit_in_bytes").write_text("4096\n")
    (root / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert limits.cpu_quota(root) == 0.5
    assert limits.memory_limit_bytes(root) == 4096


def test_no_control_groups_mean_no_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _groups(monkeypatch, "", tmp_path)
    assert limits.cpu_quota(tmp_path / "absent") is None
    assert limits.memory_limit_bytes(tmp_path / "absent") is None


def test_threads_heed_quota_and_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    for quota, cpus in ((None, 4), (2.5, 3), (0.3, 1), (64.0, 4)):
        monkeypatch.setattr(limits, "cpu_quota", lambda quota=quota: quota)
        assert limits.usable_cpus() == cpus
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4096), raising=False)
    monkeypatch.setattr(limits, "cpu_quota", lambda: None)
    assert limits.usable_cpus() == limits.MAX_THREADS


def test_memory_group_is_made_only_where_the_controller_is_handed_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _groups(monkeypatch, "0::/app/job\n", tmp_path)
    root = tmp_path / "cgroup"
    (root / "app/job").mkdir(parents=True)
    with limits.memory_group(1 << 20, root) as group:
        assert group is None
    (root / "cgroup.controllers").write_text("cpu memory\n")
    (root / "app/job/cgroup.subtree_control").write_text("\n")
    with limits.memory_group(1 << 20, root) as group:
        assert group is None
    (root / "app/cgroup.subtree_control").write_text("memory\n")
    with limits.memory_group(1 << 20, root) as group:
        assert group is not None
        assert group.parent == root / "app"
        assert (group / "memory.max").read_text() == str(1 << 20)
        assert limits.limit_this_process(1 << 20, group) == "cgroup v2 memory.max"
        assert (group / "cgroup.procs").read_text() == str(os.getpid())


def test_peak_rss_is_plausible() -> None:
    peak = limits.peak_rss_bytes()
    assert peak is None or (10 << 20) < peak < (1 << 40)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_memory_of_its_own_is_part_of_what_is_resident() -> None:
    own, resident, peak = limits.own_rss_bytes(), limits.rss_bytes(), limits.peak_rss_bytes()
    assert own is not None
    assert resident is not None
    assert peak is not None
    # The kernel brings its counts up to date in batches of pages.
    assert 0 < own <= resident + (1 << 20) <= peak + (2 << 20)
