"""Check a request against this machine's cores and free memory before the work starts.

A container may have less than the machine, so Linux's control groups (both versions) count too. If the system does not
report free memory, only the fixed limits apply.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

MOST_BATCH = 2**20
MOST_SIDE = 2**14
"""The largest batch and the largest side of an image that any command accepts."""

PER_CORE, AT_LEAST = 8, 32
"""Most threads or worker processes: 8 per core, or 32 on a machine with few cores. More would only wait for each other,
and a thousand exhaust a small machine."""

LEAST_PLANES = 3 + 2 * 16
"""Values per pixel of the input that every net holds at once: the image, and the input and output of a first layer with
16 channels (CIFAR's nets), or 64 at half the side."""

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def cores(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Return the cores that this process may use: its affinity, limited by its control groups' share (rounded up)."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu", proc, cgroups):
        quota, period = _numbers(folder / "cpu.max", 2) or (
            *(_numbers(folder / "cpu.cfs_quota_us", 1) or (-1,)),
            *(_numbers(folder / "cpu.cfs_period_us", 1) or (0,)),
        )
        if quota > 0 and period > 0:
            own = min(own, -(-quota // period))
    return max(1, own)


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Return the bytes that can still be allocated, by the system and by the process's control groups.

    None if the system does not report it.
    """
    free = _free(proc)
    for folder in _groups("memory", proc, cgroups):
        limit = _numbers(folder / "memory.max", 1) or _numbers(folder / "memory.limit_in_bytes", 1)
        used = _numbers(folder / "memory.current", 1) or _numbers(folder / "memory.usage_in_bytes", 1)
        if limit and used:
            left = max(0, limit[0] - used[0] + _cached(folder / "memory.stat"))
            free = left if free is None else min(free, left)
    return free


def _free(proc: Path) -> int | None:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups for ``controller``, and their parents, which limit it too."""
    for line in _lines(proc / "self" / "cgroup"):
        _, names, path = line.split(":", 2)
        if names == "":
            top = cgroups
        elif controller in names.split(","):
            top = next((p for p in (cgroups / names, cgroups / controller) if p.is_dir()), cgroups)
        else:
            continue
        folder = top / path.strip().lstrip("/")
        while folder != top and top in folder.parents:
            yield folder
            folder = folder.parent
        yield top


def _cached(stat: Path) -> int:
    """Return the bytes of unused file pages, which count as usage but which the kernel frees on demand."""
    for line in _lines(stat):
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file") and value.strip().isdigit():
            return int(value)
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _numbers(path: Path, count: int) -> tuple[int, ...]:
    """Return the first ``count`` integers of a file; an empty tuple if it has fewer, or says ``max``."""
    words = " ".join(_lines(path)).split()[:count]
    return tuple(map(int, words)) if len(words) == count and all(w.lstrip("-").isdigit() for w in words) else ()


def check_count(name: str, value: int | None, least: int, most: int, why: str = "") -> None:
    """Check ``least`` <= ``value`` <= ``most``; None passes.

    Args:
        name: the option as the user types it.
        why: a reason for ``most``, appended to it in the message.

    Raises:
        UserError: ``value`` is out of range.
    """
    if value is not None and value < least:
        raise UserError(f"{name} >= {least}", str(value), f"correct {name}")
    if value is not None and value > most:
        raise UserError(f"{name} <= {most:,}{why}", f"{value:,}", f"lower {name}")


def check_threads(value: int | None, name: str = "--threads") -> None:
    """Raise UserError unless ``value`` threads are reasonable for this machine's cores."""
    most = max(AT_LEAST, PER_CORE * cores())
    check_count(name, value, 1, most, f" on these {cores()} cores")


def check_workers(value: int | None, name: str = "--workers") -> None:
    """Raise UserError unless ``value`` worker processes are reasonable for this machine's cores; 0 is allowed."""
    most = max(AT_LEAST, PER_CORE * cores())
    check_count(name, value, 0, most, f" on these {cores()} cores")


def check_memory(needed: int, what: str, todo: str) -> None:
    """Raise UserError if ``needed`` bytes for ``what`` are more than :func:`available_memory`."""
    free = available_memory()
    if free is not None and needed > free:
        raise UserError(f"{what} to fit into the {_size(free)} of memory that are free", f"{_size(needed)}", todo)


def check_input(
    batch: int | None,
    side: int | None,
    itemsize: int = 4,
    planes: int = LEAST_PLANES,
    names: tuple[str, str] = ("--batch", "--image"),
) -> None:
    """Check that a batch (``batch``, 3, ``side``, ``side``) is within the limits and fits into free memory.

    Args:
        batch: number of images; None passes.
        side: height and width in pixels; None passes.
        itemsize: bytes of a value.
        planes: values per pixel that are in memory at once; 0 if only sizes are computed.
        names: the two options as the user types them.

    Raises:
        UserError: a limit is exceeded, or memory is short.
    """
    check_count(names[0], batch, 1, MOST_BATCH)
    check_count(names[1], side, 1, MOST_SIDE)
    if planes and batch is not None and side is not None:
        needed = batch * side * side * planes * itemsize
        check_memory(needed, f"{batch:,} images of {side}x{side}", f"lower {names[0]} or {names[1]}")


def _size(number: int) -> str:
    value, unit = float(number), "bytes"
    for larger in ("KB", "MB", "GB", "TB", "PB", "EB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:,.3g} {unit}"
