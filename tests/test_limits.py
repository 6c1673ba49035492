"""What the machine holds, as the system says it in every form, and requests that are beyond it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resnet_fast import limits
from resnet_fast.errors import UserError

GB = 10**9


def machine(root: Path, files: dict[str, str]) -> dict[str, Path]:
    """A /proc and a /sys/fs/cgroup of made-up files, as arguments."""
    for name, content in ({"proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 1000000 kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return {"proc": root / "proc", "cgroups": root / "cgroup"}


def test_this_machine_says_what_it_has() -> None:
    assert 1 <= limits.cores() <= (os.cpu_count() or 1)
    free = limits.available_memory()
    assert free is None or 2**20 < free < 2**50


def test_memory_without_control_groups(tmp_path: Path) -> None:
    assert limits.available_memory(**machine(tmp_path, {})) == 1_024_000_000
    assert limits.available_memory(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.parametrize(
    "files",
    [
        {  # version 2, in a container
            "proc/self/cgroup": "0::/\n",
            "cgroup/memory.max": "800000000\n",
            "cgroup/memory.current": "700000000\n",
            "cgroup/memory.stat": "anon 5\ninactive_file 100000000\n",
        },
        {  # version 2: the limit is that of a group above
            "proc/self/cgroup": "0::/a/b\n",
            "cgroup/a/memory.max": "300000000\n",
            "cgroup/a/memory.current": "100000000\n",
            "cgroup/a/b/memory.max": "max\n",
            "cgroup/a/b/memory.current": "5\n",
        },
        {  # version 1
            "proc/self/cgroup": "12:cpu,cpuacct:/x\n3:memory:/x\n",
            "cgroup/memory/x/memory.limit_in_bytes": "400000000\n",
            "cgroup/memory/x/memory.usage_in_bytes": "200000000\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/memory/memory.usage_in_bytes": "5\n",
        },
    ],
)
def test_memory_within_control_groups(files: dict[str, str], tmp_path: Path) -> None:
    assert limits.available_memory(**machine(tmp_path, files)) == 200_000_000


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "5000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
                "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        ({"proc/self/cgroup": "4:cpu:/\n", "cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, None),
        ({"proc/self/cgroup": "nonsense\n" * 0, "cgroup/cpu.max": "100000 100000\n"}, None),
    ],
)
def test_cores_within_control_groups(
    files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert limits.cores(**machine(tmp_path, files)) == (expected or 6)


@pytest.mark.parametrize("value", [999, 100_000, 10**30])
def test_too_many_threads_and_workers_for_the_cores(value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cores", lambda: 2)
    with pytest.raises(UserError, match=r"expected --threads <= 32 on these 2 cores, got .*; lower --threads"):
        limits.check_threads(value)
    with pytest.raises(UserError, match=r"expected --workers <= 32 on these 2 cores"):
        limits.check_workers(value)
    monkeypatch.setattr(limits, "cores", lambda: 128)
    limits.check_workers(1024)


def test_the_least_is_said_as_before() -> None:
    limits.check_workers(0)
    for check, name in ((limits.check_threads, "--threads >= 1"), (limits.check_workers, "--workers >= 0")):
        check(None)
        with pytest.raises(UserError, match=f"expected {name}, got -1"):
            check(-1)


def test_memory_that_is_not_there_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: GB)
    limits.check_memory(GB, "it", "lower it")
    with pytest.raises(UserError, match=r"expected it to fit into the 1 GB of memory that are free, got 2 GB; lower"):
        limits.check_memory(2 * GB, "it", "lower it")
    monkeypatch.setattr(limits, "available_memory", lambda: None)
    limits.check_memory(10**30, "it", "lower it")


@pytest.mark.parametrize(
    ("batch", "side", "said"),
    [
        (0, 8, "--batch >= 1"),
        (1, 0, "--image >= 1"),
        (10**9, 8, "--batch <= 1,048,576"),
        (1, 10**6, "--image <= 16,384"),
        (1000, 224, "1,000 images of 224x224 to fit into"),
    ],
)
def test_an_input_beyond_the_machine(batch: int, side: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: GB)
    with pytest.raises(UserError) as refused:
        limits.check_input(batch, side)
    assert said in str(refused.value)


def test_sizes_alone_need_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 1)
    limits.check_input(2**20, 2**14, planes=0)
    limits.check_input(None, 5)
