"""Which bytes a launch may touch, and which of them nobody has written.

Every allocation that a launch is given is registered with its exact size: the storages of its tensors. Inside a pass
(:meth:`Memory.watched`) memory that PyTorch allocates uninitialised is filled with 0xFF, which is a NaN in every float
dtype, and registered as unwritten: a kernel that reads a byte of it before one has been written is reported. What
PyTorch's own operators write there counts as written. Outside a pass every byte of a tensor counts as written.

A kernel sees other addresses than the CPU's (:meth:`Memory.device`). Each storage has a range of its own, far from all
others, so that no access past its end lands in another one; and it begins at a multiple of 512, as PyTorch's
allocations on a GPU do, so that a kernel's accesses are as aligned as they are there.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...backends.triton.program import ALLOCATIONS
from ...stand_in import Temporary

UNWRITTEN = 0xFF

ALIGNMENT, APART = 512, 1 << 20
"""Bytes: the start of every storage is divisible by the one, and at least the other lie between two."""

SPECIALISED = 16
"""Triton compiles for pointers divisible by it by what it sees, the CPU's address."""

FIRST = 1 << 44
"""The first address of a kernel: none of the CPU's, and of no other state space of the machine's."""


class _Range(NamedTuple):
    """An allocation: a kernel's address of it, bytes, and its name for reports."""

    device: int
    nbytes: int
    label: str


class Memory:
    """The allocations of one pass, or of one launch outside a pass, as ``engine`` (the module ``_ptx``) checks them."""

    def __init__(self, engine: Any) -> None:
        self.checked = engine.Memory()
        self._starts: list[int] = []
        self._ranges: list[_Range] = []  # by place in _starts
        self._next = FIRST
        self._temporaries: Sequence[Temporary] = ()
        self._live: list[tuple[Temporary, _Range]] = []
        self._launch = 0  # of the pass
        self._held: list[Any] = []  # so that no address is used again while it is registered

    def add(self, t: Tensor, name: str, written: bool = True) -> None:
        """Register the whole storage of ``t``, once. ``written``: whether its bytes have values."""
        storage = t.untyped_storage()
        start = storage.data_ptr()
        if self._at(start) is not None:
            return
        dtype = str(t.dtype).removeprefix("torch.")
        label = f"{name} ({dtype} {tuple(t.shape)}, {storage.nbytes()} bytes)"
        found = _Range(self._next + start % SPECIALISED, storage.nbytes(), label)
        self._register(start, found, written)
        self._held.append(storage)

    def add_range(self, start: int, nbytes: int, label: str, written: bool = True, writable: bool = True) -> None:
        """Register ``nbytes`` bytes, once, that a kernel finds at the CPU's address ``start``."""
        if self._at(start) is None:
            self._register(start, _Range(start, nbytes, label), written, writable)

    def _register(self, start: int, found: _Range, written: bool, writable: bool = True) -> None:
        if found.nbytes == 0:
            return
        self._map(start, found, written, writable)
        place = bisect_right(self._starts, start)
        self._starts.insert(place, start)
        self._ranges.insert(place, found)

    def _map(self, start: int, found: _Range, written: bool, writable: bool = True) -> None:
        if not written:
            ctypes.memset(start, UNWRITTEN, found.nbytes)
        self.checked.add(found.device, found.nbytes, found.label, written=written, writable=writable, host=start)
        self._next = -(-(self._next + found.nbytes + APART) // ALIGNMENT) * ALIGNMENT

    def lend(self, temporaries: Sequence[Temporary]) -> None:
        """Register temporaries of a pass, each for the launches from its first to its last: see :meth:`next_launch`.

        A temporary may lie in the memory of a result that a later launch writes. Until then it is the temporary's.
        """
        self._temporaries, self._launch = temporaries, -1
        self.next_launch()

    def next_launch(self) -> None:
        """Take away the temporaries whose last launch is over, and register those whose first one is next."""
        self._launch += 1
        launch = self._launch
        for one, found in self._live:
            if one.last < launch:
                self.checked.remove(found.device)
        self._live = [(one, found) for one, found in self._live if one.last >= launch]
        for i, one in enumerate(self._temporaries):
            if one.first == launch and one.nbytes:
                found = _Range(self._next, one.nbytes, f"temporary {i} of the pass ({one.nbytes} bytes)")
                self._map(one.address, found, written=False)
                self._live.append((one, found))

    def _found(self, address: int) -> tuple[int, _Range] | None:
        """Return the start of the allocation with the CPU's ``address``, and what it is."""
        for one, found in self._live:
            if one.address <= address < one.address + one.nbytes:
                return one.address, found
        place = self._at(address)
        return None if place is None else (self._starts[place], self._ranges[place])

    def _at(self, address: int) -> int | None:
        place = bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._starts[place] + self._ranges[place].nbytes:
            return None
        return place

    def device(self, address: int) -> int:
        """Return where a kernel finds the byte at the CPU's ``address``: nowhere, if it is in no allocation."""
        found = self._found(address)
        return address if found is None else found[1].device + address - found[0]

    def name_of(self, address: int) -> str:
        """Return an address of the CPU in words: the allocation that it is in, and how far."""
        found = self._found(address)
        if found is None:
            return hex(address)
        start, about = found
        return about.label + (f" + {address - start} bytes" if address > start else "")

    def wrote(self, t: Tensor) -> None:
        """Note that PyTorch has written to ``t``; what lies between the elements of a view counts too."""
        if t.numel() and self._at(t.data_ptr()) is not None:
            span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            self.checked.write(self.device(t.data_ptr()), span * t.element_size())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Register what PyTorch allocates inside the ``with`` as unwritten, and what its operators write there."""
        with _Allocations(self):
            yield


class _Allocations(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory, self._count = memory, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.device.type == "cpu" and func._schema.name in ALLOCATIONS:
            self._count += 1
            self._memory.add(found, f"allocation {self._count} of the pass", written=False)
        elif func._schema.is_mutable:
            for argument, given in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Tensor):
                    self._memory.wrote(given)
        return found
