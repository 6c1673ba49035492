"""Count what a Triton kernel does while it runs in Triton's interpreter: bytes, sectors, FLOPs, and no access outside.

    with count() as counts:
        launch(x, w, y)
    counts.launches[0]["x_ptr"].read_unique

A fused kernel promises traffic ("x is read once, y is written once, nothing in between"). This checks the promise
without a GPU: every load and store of every program passes through four methods of Triton's interpreter, and those are
wrapped while the context is open. Per launch and argument tensor:

    total     bytes of every lane whose mask is true: what the programs ask for
    unique    bytes touched at least once: what memory must deliver if caches are perfect
    sectors   32-byte sectors touched at least once: the same, in the unit that a GPU's memory delivers

Three decisions that are not obvious:

- Addresses are numbers in the interpreter, without provenance, and malloc may put two tensors side by side: a kernel
  that runs off the end of one would be counted as a reader of the other. So a launch's tensors are moved, for its
  duration, into one mapping with wide gaps between them, and an access into a gap raises :class:`OutOfBounds`.
- Arguments that share a storage (a block's input that is also its residual) share one entry, ``x_ptr=res_ptr``: the
  bytes are the same bytes, and count once as unique. Either name finds it.
- Wrapped are the masked load and store alone (and atomics): plain loads, block pointers and tensor descriptors all end
  there, in Triton 3.6 and 3.8. What a descriptor cuts off at its shape is a false mask, and not counted.
"""

from __future__ import annotations

import inspect
import math
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

SECTOR = 32
"""Bytes that a GPU's memory system moves at once."""

GAP = 1 << 26
"""Bytes between two tensors of a launch. Reserved addresses, not memory."""


class NotInterpreted(RuntimeError):
    """Kernels are compiled in this process, and what looks into Triton's interpreter has nothing to look into."""


class OutOfBounds(IndexError):
    """A kernel touched memory that belongs to none of its arguments, or not at a multiple of the element's size."""


@dataclass
class TensorTraffic:
    """What one launch did to one storage. Bytes; sectors of 32 bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: int
    read: int = 0
    read_unique: int = 0
    read_sectors: int = 0
    written: int = 0
    written_unique: int = 0
    written_sectors: int = 0

    @property
    def unique(self) -> int:
        """Bytes that must move once: read or written; a byte that is both moves twice."""
        return self.read_unique + self.written_unique


@dataclass
class CountedLaunch:
    """One kernel launch. ``launch["x_ptr"]`` is an argument's :class:`TensorTraffic`."""

    kernel: str
    grid: tuple[int, ...] = ()
    flops: int = 0
    dots: int = 0
    tensors: list[TensorTraffic] = field(default_factory=list)

    def __getitem__(self, name: str) -> TensorTraffic:
        for t in self.tensors:
            if name in t.name.split("="):
                return t
        raise KeyError(f"{self.kernel} has no tensor argument {name!r}; it has {[t.name for t in self.tensors]}")

    @property
    def read(self) -> int:
        return sum(t.read for t in self.tensors)

    @property
    def written(self) -> int:
        return sum(t.written for t in self.tensors)

    @property
    def unique(self) -> int:
        """The traffic that perfect caches would leave: compare with ``spec.min_bytes()``."""
        return sum(t.unique for t in self.tensors)

    @property
    def sectors(self) -> int:
        return sum(t.read_sectors + t.written_sectors for t in self.tensors)


@dataclass
class LaunchCounts:
    """Every launch made while :func:`count` was open, in order."""

    launches: list[CountedLaunch] = field(default_factory=list)

    @property
    def only(self) -> CountedLaunch:
        """The launch, where there was exactly one."""
        if len(self.launches) != 1:
            raise ValueError(f"expected one launch, got {[launch.kernel for launch in self.launches]}")
        return self.launches[0]

    @property
    def unique(self) -> int:
        return sum(launch.unique for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    def report(self) -> str:
        """A Markdown table: one row per launch and tensor, and one with each launch's sums and FLOPs."""
        head = ("kernel", "tensor", "read", "unique", "sectors", "written", "unique", "sectors", "FLOPs")
        rows = [head, ("---", "---", *["---:"] * 7)]
        for launch in self.launches:
            for t in launch.tensors:
                numbers = (t.read, t.read_unique, t.read_sectors, t.written, t.written_unique, t.written_sectors)
                label = f"{t.name} {t.dtype} {'x'.join(map(str, t.shape))}"
                rows.append((launch.kernel, label, *(f"{n:,}" for n in numbers), ""))
            fields = ("read", "read_unique", "read_sectors", "written", "written_unique", "written_sectors")
            sums = (sum(getattr(t, f) for t in launch.tensors) for f in fields)
            grid = "x".join(map(str, launch.grid))
            rows.append((launch.kernel, f"all, grid {grid}", *(f"{n:,}" for n in sums), f"{launch.flops:,}"))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


class _Region:
    """One storage: where it is during the launch, and which of its elements were touched."""

    def __init__(self, traffic: TensorTraffic, base: int, unit: int) -> None:
        self.traffic, self.base, self.unit = traffic, base, unit
        self.end = base + traffic.storage
        self.touched: dict[str, np.ndarray] = {}
        self.allowed: np.ndarray | None = None  # by byte: part of some argument's view

    def mark(self, kind: str, start: np.ndarray, width: int) -> None:
        """``start``: byte offsets of elements of ``width`` bytes."""
        if width < self.unit:  # a pointer cast to a narrower type: count in its steps from now on
            self.touched = {k: np.repeat(m, self.unit // width) for k, m in self.touched.items()}
            self.unit = width
        if kind not in self.touched:
            self.touched[kind] = np.zeros(-(-self.traffic.storage // self.unit), dtype=bool)
        if self.unit > 1:
            start = start >> np.uint64(self.unit.bit_length() - 1)
        index = start.view(np.int64)
        for step in range(width // self.unit):
            self.touched[kind][index + step if step else index] = True

    def finish(self) -> None:
        """Write unique bytes and sectors into the traffic record."""
        for kind, touched in self.touched.items():
            per_sector = SECTOR // self.unit
            whole = np.zeros(-(-len(touched) // per_sector) * per_sector, dtype=bool)
            whole[: len(touched)] = touched
            setattr(self.traffic, f"{kind}_unique", int(np.count_nonzero(touched)) * self.unit)
            sectors = np.count_nonzero(whole.reshape(-1, per_sector).any(axis=1))
            setattr(self.traffic, f"{kind}_sectors", int(sectors))


class _LaunchRecorder:
    """The launch that is running: its regions by address, and the record that it fills."""

    def __init__(self, kernel: str, inside_views: bool) -> None:
        self.launch = CountedLaunch(kernel)
        self.inside_views = inside_views
        self.regions: list[_Region] = []
        self.bases: list[int] = []

    def place(self, named: dict[str, Any]) -> None:
        """Move every storage among the arguments (host copies that the interpreter made) into one gapped mapping."""
        groups: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, arg in named.items():
            for tensor in _tensors(arg):
                if tensor.untyped_storage().nbytes():
                    groups.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        sizes = [members[0][1].untyped_storage().nbytes() for members in groups.values()]
        offsets, total = [], GAP
        for size in sizes:
            offsets.append(total)
            total += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE + GAP
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        arena = mmap.mmap(-1, total, flags=flags)
        for members, size, offset in zip(groups.values(), sizes, offsets, strict=True):
            moved = torch.frombuffer(arena, dtype=torch.uint8, count=size, offset=offset)
            storage = moved.untyped_storage()
            storage.copy_(members[0][1].untyped_storage())
            for _, t in members:  # the interpreter made these tensor objects for this launch
                t.set_(storage, t.storage_offset(), t.size(), t.stride())
            first = members[0][1]
            names = "=".join(dict.fromkeys(name for name, _ in members))
            dtype = str(first.dtype).removeprefix("torch.")
            traffic = TensorTraffic(names, dtype, tuple(first.shape), size)
            region = _Region(traffic, storage.data_ptr(), min(t.element_size() for _, t in members))
            if self.inside_views:
                region.allowed = np.zeros(size, dtype=bool)
                allowed = torch.from_numpy(region.allowed)
                for _, t in members:
                    at, item = t.storage_offset() * t.element_size(), t.element_size()
                    allowed.as_strided((*t.shape, item), (*(s * item for s in t.stride()), 1), at).fill_(True)
            self.regions.append(region)
            self.launch.tensors.append(traffic)
        self.bases = [region.base for region in self.regions]

    def access(self, kind: str, pointers: Any, mask: np.ndarray | None) -> None:
        """Count one load (``kind`` "read") or store ("written") of a block of pointers."""
        data = pointers.data
        count = data.size if mask is None else int(np.count_nonzero(mask))
        if not count:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # a mask that was computed may be an array of integers, which would index instead of select
        addresses = data.reshape(-1) if mask is None or count == data.size else data[np.asarray(mask, dtype=bool)]
        low, high = int(addresses.min()), int(addresses.max())
        at = bisect_right(self.bases, low) - 1
        if at >= 0 and high + width <= self.regions[at].end:
            self._count(self.regions[at], kind, addresses, width)
            return
        # a block of pointers into several tensors, or an error
        owner = np.searchsorted(np.array(self.bases, dtype=np.uint64), addresses, side="right") - 1
        ends = np.array([region.end for region in self.regions], dtype=np.uint64)
        bad = (owner < 0) | (addresses + np.uint64(width) > ends[owner]) if self.regions else np.ones(count, dtype=bool)
        if bad.any():
            self._refuse(kind, int(addresses[bad][0]), width, int(bad.sum()), "outside of its storage")
        for i in np.unique(owner):
            self._count(self.regions[i], kind, addresses[owner == i], width)

    def _count(self, region: _Region, kind: str, addresses: np.ndarray, width: int) -> None:
        start = addresses - np.uint64(region.base)
        if int(np.bitwise_or.reduce(start)) & (width - 1):
            wrong = (start & np.uint64(width - 1)) != 0
            self._refuse(kind, int(addresses[wrong][0]), width, int(wrong.sum()), "not aligned to its size")
        if region.allowed is not None and not (good := region.allowed[start.view(np.int64)]).all():
            text = "inside its storage but outside of the tensor"
            self._refuse(kind, int(addresses[~good][0]), width, int((~good).sum()), text)
        setattr(region.traffic, kind, getattr(region.traffic, kind) + len(addresses) * width)
        region.mark(kind, start, width)

    def _refuse(self, kind: str, address: int, width: int, lanes: int, why: str) -> None:
        from triton.runtime.interpreter import interpreter_builder

        verb = "reads" if kind == "read" else "writes"
        where = "no tensor at all"
        if self.regions:
            near = min(self.regions, key=lambda r: max(r.base - address, address - r.end, 0))
            where = (
                f"argument {near.traffic.name!r} ({near.traffic.dtype} {list(near.traffic.shape)}, storage of "
                f"{near.traffic.storage} bytes) at byte offset {address - near.base}"
            )
        raise OutOfBounds(
            f"{self.launch.kernel}, program {interpreter_builder.grid_idx}: {verb} {width} bytes of {where}, "
            f"{why}; {lanes} lane(s) of this access do"
        )

    def dot(self, a: np.ndarray, b: np.ndarray) -> None:
        """Two operations per product: (..., M, K) x (..., K, N)."""
        self.launch.flops += 2 * math.prod(a.shape) * b.shape[-1]
        self.launch.dots += 1


def _tensors(arg: Any) -> Iterator[torch.Tensor]:
    """The tensors in a kernel argument: itself, a descriptor's or reinterpreted tensor's base, a tuple's members."""
    if isinstance(arg, torch.Tensor):
        yield arg
    elif isinstance(arg, (tuple, list)):
        for member in arg:
            yield from _tensors(member)
    elif hasattr(arg, "base"):
        yield from _tensors(arg.base)


def _cause(error: BaseException | None) -> OutOfBounds | None:
    """The interpreter wraps errors, once per level of device functions."""
    while error is not None and not isinstance(error, OutOfBounds):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def count(*, inside_views: bool = False) -> Iterator[LaunchCounts]:
    """Count every launch of a Triton kernel inside the ``with``; needs ``TRITON_INTERPRET=1`` since triton's import.

    The tensors of a launch that raised are as they were.

    Args:
        inside_views: an access must stay inside the argument tensors themselves, and not just inside their storages:
            for kernels whose pointers never leave the view that was passed.

    Raises:
        OutOfBounds: from the launch, before the access is made.
        NotInterpreted: without the interpreter.
        RuntimeError: if another ``count()`` is open.
    """
    import triton

    if os.environ.get("TRITON_INTERPRET") != "1" or not triton.knobs.runtime.interpret:
        raise NotInterpreted("count() looks into Triton's interpreter: set TRITON_INTERPRET=1 before triton's import")
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    hooks = _Hooks(inside_views)
    wraps: list[tuple[type, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
        (GridExecutor, "__call__", hooks.launch),
        (GridExecutor, "_init_args_hst", hooks.host_arguments),
        (InterpreterBuilder, "create_masked_load", lambda f: hooks.memory(f, 1, "read")),
        (InterpreterBuilder, "create_masked_store", lambda f: hooks.memory(f, 2, "written")),
        (InterpreterBuilder, "create_atomic_rmw", lambda f: hooks.memory(f, 3, "read", "written")),
        (InterpreterBuilder, "create_atomic_cas", lambda f: hooks.memory(f, None, "read", "written")),
        (InterpreterBuilder, "create_dot", hooks.dot),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in wraps]
    if any(getattr(plain, "__module__", None) == __name__ for _, _, plain in originals):
        raise RuntimeError("count() is already open: one at a time")
    try:
        for owner, name, wrap in wraps:
            setattr(owner, name, wrap(getattr(owner, name)))
        yield hooks.counts
    finally:
        for owner, name, plain in originals:
            setattr(owner, name, plain)


class _Hooks:
    """Wrappers of the interpreter's methods: each does its counting and calls ``plain``, what it wraps."""

    def __init__(self, inside_views: bool) -> None:
        self.inside_views = inside_views
        self.counts = LaunchCounts()
        self.running: list[_LaunchRecorder] = []

    def launch(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        from triton.runtime.interpreter import interpreter_builder

        def wrapped(executor: Any, *args: Any, **kwargs: Any) -> Any:
            recorder = _LaunchRecorder(executor.fn.__name__, self.inside_views)
            self.running.append(recorder)
            try:
                result = plain(executor, *args, **kwargs)
            except Exception as error:
                if (found := _cause(error)) is not None:
                    raise found from None
                raise
            finally:
                self.running.pop()
            for region in recorder.regions:
                region.finish()
            recorder.launch.grid = tuple(interpreter_builder.grid_dim)
            self.counts.launches.append(recorder.launch)
            return result

        return wrapped

    def host_arguments(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(executor: Any, args: Any, kwargs: Any) -> Any:
            args_host, kwargs_host = plain(executor, args, kwargs)
            names = inspect.getfullargspec(executor.fn).args
            self.running[-1].place(dict(zip(names, args_host, strict=False)) | kwargs_host)
            return args_host, kwargs_host

        return wrapped

    def memory(self, plain: Callable[..., Any], mask: int | None, *kinds: str) -> Callable[..., Any]:
        """``mask``: which positional argument of ``plain`` holds it; its pointers are found by their name."""
        names = [p for p in inspect.signature(plain).parameters if p != "self"]
        pointer = next(i for i, name in enumerate(names) if name in ("ptr", "ptrs"))

        def wrapped(builder: Any, *args: Any, **kwargs: Any) -> Any:
            if self.running:
                for kind in kinds:
                    self.running[-1].access(kind, args[pointer], None if mask is None else args[mask].data)
            return plain(builder, *args, **kwargs)

        return wrapped

    def dot(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(builder: Any, *args: Any, **kwargs: Any) -> Any:
            if self.running:
                self.running[-1].dot(args[0].data, args[1].data)
            return plain(builder, *args, **kwargs)

        return wrapped
