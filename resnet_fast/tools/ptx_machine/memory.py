"""Which bytes a launch may touch, and which of them nobody has written.

Every allocation that a launch is given is registered with its exact size: the storages of its tensors. Inside a pass
(:meth:`Memory.watched`) memory that PyTorch allocates uninitialised is filled with 0xFF, which is a NaN in every float
dtype, and registered as unwritten: a kernel that reads a byte of it before one has been written is reported. What
PyTorch's own operators write there counts as written. Outside a pass every byte of a tensor counts as written.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...backends.triton.program import ALLOCATIONS

UNWRITTEN = 0xFF


class Memory:
    """The allocations of one pass, or of one launch outside a pass, as ``engine`` (the module ``_ptx``) checks them."""

    def __init__(self, engine: Any) -> None:
        self.checked = engine.Memory()
        self._starts: list[int] = []
        self._names: list[tuple[int, str]] = []  # bytes and name, by place in _starts
        self._held: list[Any] = []  # so that no address is used again while it is registered

    def add(self, t: Tensor, name: str, written: bool = True) -> None:
        """Register the whole storage of ``t``, once. ``written``: whether its bytes have values."""
        storage = t.untyped_storage()
        dtype = str(t.dtype).removeprefix("torch.")
        label = f"{name} ({dtype} {tuple(t.shape)}, {storage.nbytes()} bytes)"
        self.add_range(storage.data_ptr(), storage.nbytes(), label, written)
        self._held.append(storage)

    def add_range(self, start: int, nbytes: int, label: str, written: bool = True, writable: bool = True) -> None:
        """Register ``nbytes`` bytes from the address ``start`` on, once, under a name for reports."""
        if nbytes == 0 or self._at(start) is not None:
            return
        if not written:
            ctypes.memset(start, UNWRITTEN, nbytes)
        self.checked.add(start, nbytes, label, written=written, writable=writable)
        place = bisect_right(self._starts, start)
        self._starts.insert(place, start)
        self._names.insert(place, (nbytes, label))

    def _at(self, address: int) -> int | None:
        place = bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._starts[place] + self._names[place][0]:
            return None
        return place

    def name_of(self, address: int) -> str:
        """Return an address in words: the allocation that it is in, and how far."""
        place = self._at(address)
        if place is None:
            return hex(address)
        past = address - self._starts[place]
        return self._names[place][1] + (f" + {past} bytes" if past else "")

    def wrote(self, t: Tensor) -> None:
        """Note that PyTorch has written to ``t``; what lies between the elements of a view counts too."""
        if t.numel() and self._at(t.data_ptr()) is not None:
            span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            self.checked.write(t.data_ptr(), span * t.element_size())

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
