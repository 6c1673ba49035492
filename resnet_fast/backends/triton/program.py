"""Plan the launches of a pass once, so that a later call of the same problem runs no launcher.

A launcher computes a grid and arguments from shapes, strides and dtypes, and allocates tensors. For the same problem it
does the same each time, so a pass is planned by running its launchers once, on ``meta`` tensors, while every launch is
recorded instead of made:

    launchers on meta tensors --> launches with meta tensors --> launches with (buffer, offset)         a Program
                                                                    leaf      a tensor of the call
                                                                    fresh     allocated for each run, and returned
                                                                    arena     one allocation for all temporaries

A number that may differ at each call (a momentum) is recorded as a :class:`Number`, its place among the numbers of the
call, and is part of no key: a run gets the tensors and the numbers of its call.

A temporary is placed where nothing else lives from its first to its last launch: in a returned tensor that is written
later, else in the arena. So a run holds no more memory than its launchers would.

A launcher that needs more than launches, allocations and views (a copy, a collective, cuDNN) cannot be planned:
:func:`plan` then returns the reason, and the launchers run each time. :mod:`.submission` runs a program natively,
:meth:`Program.replay` runs it launch by launch on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launch import Launched, recording, submit

ALIGNMENT = 256
"""Bytes: the start of every temporary is divisible by it, as PyTorch's allocations on a GPU are."""

ALLOCATIONS = frozenset({"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"})

Outputs = Sequence[Tensor | None]


class Place(NamedTuple):
    """A tensor that a launch reads or writes: ``offset`` bytes into a buffer of the program."""

    buffer: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Described(NamedTuple):
    """A tensor descriptor that a launch reads: its tensor, and the fields of Triton's ``TensorDescriptor``."""

    base: Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


@dataclass(frozen=True)
class Number:
    """A number of the call where a launcher passes it to a kernel: the one at ``place``, or 1 less it.

    A launcher can pass it on, or subtract it from 1. Other arithmetic and a decision by it raise TypeError: a program
    would keep the result of the call that it was planned for.
    """

    place: int
    from_one: bool = False

    def __rsub__(self, other: Any) -> Number:
        return Number(self.place, from_one=True) if other == 1 and not self.from_one else NotImplemented

    def __bool__(self) -> bool:
        raise TypeError("expected a launcher that passes a number of the call on, got one that decides by it")

    def of(self, numbers: Sequence[float]) -> float:
        """Return its value in a call with these numbers."""
        return 1 - numbers[self.place] if self.from_one else numbers[self.place]


class PlannedLaunch(NamedTuple):
    """A launch of a program.

    ``arguments``: numbers, None, numbers of the call as :class:`Number`, and tensors as :class:`Place` or
    :class:`Described`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class PlannedTemporary(NamedTuple):
    """Where a temporary is, its bytes, and its first and last launch: launches of an empty grid are not counted."""

    buffer: int
    offset: int
    nbytes: int
    first: int
    last: int


class Fresh(NamedTuple):
    """A buffer that a run allocates and returns. It is one tensor, or ``nbytes`` that several tensors share."""

    nbytes: int
    whole: Place | None


@dataclass(frozen=True)
class Program:
    """The launches of a pass for one problem.

    Buffers are numbered: first the leaves, then the fresh ones, last the arena.

    Attributes:
        steps: the launches in order.
        leaves: number of tensors that a run is given; some may be None.
        fresh: what a run allocates and returns.
        arena: bytes of all temporaries.
        outputs: where each result is; None for none.
        read: the leaves that a launch reads or writes.
        numbers: the numbers of the call that a launch takes, each once.
        temporaries: those of the launches.
    """

    steps: tuple[PlannedLaunch, ...]
    leaves: int
    fresh: tuple[Fresh, ...]
    arena: int
    outputs: tuple[Place | None, ...]
    read: tuple[int, ...]
    numbers: tuple[Number, ...] = ()
    temporaries: tuple[PlannedTemporary, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that a run allocates."""
        return self.arena + sum(f.nbytes for f in self.fresh)

    def allocate(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Return the fresh tensors and the arena, uninitialised."""
        fresh = [
            torch.empty(f.nbytes, dtype=torch.uint8, device=device)
            if f.whole is None
            else torch.empty_strided(f.whole.shape, f.whole.strides, dtype=f.whole.dtype, device=device)
            for f in self.fresh
        ]
        return fresh, torch.empty(self.arena, dtype=torch.uint8, device=device)

    def results(self, leaves: Outputs, fresh: list[Tensor]) -> list[Tensor | None]:
        """Return the results of a run."""
        first = self.leaves
        found: list[Tensor | None] = []
        for place in self.outputs:
            if place is None:
                found.append(None)
            elif place.buffer >= first and self.fresh[place.buffer - first].whole is not None:
                found.append(fresh[place.buffer - first])
            else:
                found.append(_view([*leaves, *fresh], place))
        return found

    def replay(self, leaves: Outputs, numbers: Sequence[float] = ()) -> list[Tensor | None]:
        """Run the launches one by one through :func:`.launch.submit`, on the device of the leaves."""
        fresh, arena = self.allocate(next(t.device for t in leaves if t is not None))
        return self.replay_in(leaves, fresh, arena, numbers)

    def replay_in(
        self, leaves: Outputs, fresh: list[Tensor], arena: Tensor, numbers: Sequence[float] = ()
    ) -> list[Tensor | None]:
        """:meth:`replay` in memory of :meth:`allocate`."""
        buffers = [*leaves, *fresh, arena]
        for step in self.steps:
            submit(step.kernel, step.grid, *(_real(buffers, numbers, a) for a in step.arguments), **step.constants)
        return self.results(leaves, fresh)


def _view(buffers: Outputs, place: Place) -> Tensor:
    """Return the tensor at ``place``."""
    base = buffers[place.buffer]
    assert base is not None
    start = base.storage_offset() * base.element_size() + place.offset
    found = torch.empty(0, dtype=place.dtype, device=base.device)
    return found.set_(base.untyped_storage(), start // found.element_size(), place.shape, place.strides)


def _real(buffers: Outputs, numbers: Sequence[float], argument: Any) -> Any:
    """Return an argument of a launch with the tensors and numbers of a run."""
    if isinstance(argument, Place):
        return _view(buffers, argument)
    if isinstance(argument, Number):
        return argument.of(numbers)
    if isinstance(argument, Described):
        from triton.tools.tensor_descriptor import TensorDescriptor

        base = _view(buffers, argument.base)
        return TensorDescriptor(base, list(argument.shape), list(argument.strides), list(argument.block))
    return argument


# --------------------------------------------------------------------------------------------------------- planning


class _CannotPlan(Exception):
    """Carries the reason out of a launcher."""


class _OnlyLaunches(TorchDispatchMode):
    """Let launchers allocate and view, and keep all memory apart; refuse every other operation."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._schema.name in ALLOCATIONS:
            self.kept.append(found)
        elif func._schema.is_mutable or not _views(found, args):
            raise _CannotPlan(f"{func._schema.name.replace('aten::', '')} runs between the kernels")
        return found


def _views(found: Any, args: Iterable[Any]) -> bool:
    """Return whether ``found`` is a tensor in the memory of one of ``args``."""
    return isinstance(found, Tensor) and _storage(found) in {_storage(a) for a in args if isinstance(a, Tensor)}


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def meta(leaves: Outputs) -> list[Tensor | None]:
    """Return tensors without memory, of the same shapes, strides and dtypes."""
    return [
        None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in leaves
    ]


def plan(run: Callable[[list[Any]], Outputs], leaves: Outputs, numbers: int = 0) -> Program | str:
    """Return the program of ``run``, or the reason why its launchers have to run each time.

    Args:
        run: runs launchers on tensors like ``leaves``, on any device, and then numbers, and returns the results.
        leaves: the tensors of a call, or None for those that it does not have. Only shapes, strides and dtypes count.
        numbers: how many numbers a call has.
    """
    given, mode = meta(leaves), _OnlyLaunches()
    try:
        with mode, recording() as launches:
            outputs = run([*given, *map(Number, range(numbers))])
    except _CannotPlan as reason:
        return str(reason)
    return _Places(given, launches, outputs).program()


class _Places:
    """Replace the meta tensors of recorded launches by places."""

    def __init__(self, leaves: Outputs, launches: list[Launched], outputs: Outputs) -> None:
        self.leaves, self.launches, self.given = len(leaves), launches, outputs
        self.buffers = {_storage(t): i for i, t in enumerate(leaves) if t is not None}
        self.spans: dict[int, list[int]] = {}
        self.sizes: dict[int, int] = {}
        self.read: set[int] = set()

    def program(self) -> Program:
        self._find_lifetimes()
        fresh = self._number_outputs()
        temporaries = [s for s in self.spans if s not in self.buffers]
        homes = [(self.leaves + i, f.nbytes, self._span_of(self.leaves + i)) for i, f in enumerate(fresh)]
        lives = {s: _Life(self.sizes[s], *self.spans[s]) for s in temporaries}
        self.placed, arena = _place(lives, homes, self.leaves + len(fresh))
        steps = [
            PlannedLaunch(one.kernel, one.grid, tuple(map(self._argument, one.arguments)), one.constants)
            for one in self.launches
        ]
        outputs = tuple(None if t is None else self._at(t) for t in self.given)
        read, numbers = tuple(sorted(self.read)), tuple(dict.fromkeys(_numbers(self.launches)))
        return Program(tuple(steps), self.leaves, tuple(fresh), arena, outputs, read, numbers, self._temporaries(lives))

    def _temporaries(self, lives: dict[int, _Life]) -> tuple[PlannedTemporary, ...]:
        before = [sum(0 not in one.grid for one in self.launches[:n]) for n in range(len(self.launches) + 1)]
        return tuple(
            PlannedTemporary(*self.placed[key], life.nbytes, before[life.first], before[life.last + 1] - 1)
            for key, life in lives.items()
        )

    def _find_lifetimes(self) -> None:
        """Note the first and the last launch of every storage."""
        for at, launched in enumerate(self.launches):
            for argument in launched.arguments:
                t = getattr(argument, "base", argument)
                if isinstance(t, Tensor):
                    key = _storage(t)
                    self.spans.setdefault(key, [at, at])[1] = at
                    self.sizes[key] = t.untyped_storage().nbytes()
                    if key in self.buffers:
                        self.read.add(self.buffers[key])

    def _number_outputs(self) -> list[Fresh]:
        """Return the fresh buffers, one for each storage with a result."""
        results: dict[int, list[Tensor]] = {}
        for t in self.given:
            if t is not None and _storage(t) not in self.buffers:
                results.setdefault(_storage(t), []).append(t)
        found: list[Fresh] = []
        for key, tensors in results.items():
            self.buffers[key] = self.leaves + len(found)
            nbytes = tensors[0].untyped_storage().nbytes()
            place = self._at(tensors[0])
            dense = tensors[0].numel() * tensors[0].element_size() == nbytes and place.offset == 0
            found.append(Fresh(nbytes, place if dense and len(tensors) == 1 else None))
        return found

    def _span_of(self, buffer: int) -> tuple[int, int]:
        key = next(key for key, at in self.buffers.items() if at == buffer)
        return self.spans.get(key, [0, 0])[0], len(self.launches)

    def _at(self, t: Tensor) -> Place:
        offset, key = int(t.storage_offset()) * t.element_size(), _storage(t)
        if key in self.buffers:
            buffer = self.buffers[key]
        else:
            buffer, start = self.placed[key]
            offset += start
        return Place(buffer, offset, t.dtype, tuple(t.shape), tuple(t.stride()))

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._at(argument)
        base = getattr(argument, "base", None)
        if isinstance(base, Tensor):
            return Described(
                self._at(base), tuple(argument.shape), tuple(argument.strides), tuple(argument.block_shape)
            )
        return argument


def _numbers(launches: Iterable[Launched]) -> Iterator[Number]:
    return (a for launched in launches for a in launched.arguments if isinstance(a, Number))


class _Life(NamedTuple):
    """A temporary's bytes, and its first and last launch."""

    nbytes: int
    first: int
    last: int


def _place(
    lives: dict[int, _Life], homes: list[tuple[int, int, tuple[int, int]]], arena: int
) -> tuple[dict[int, tuple[int, int]], int]:
    """Return (buffer, offset) of every temporary, and the arena's bytes. The largest is placed first.

    Args:
        lives: the temporaries.
        homes: (buffer, bytes, (first, last launch)) of the returned tensors, whose memory is free before the first.
        arena: number of the arena's buffer.
    """
    taken: dict[int, list[tuple[int, _Life]]] = {buffer: [] for buffer, _, _ in homes}
    taken[arena] = []
    placed: dict[int, tuple[int, int]] = {}
    size = 0
    for key, life in sorted(lives.items(), key=lambda item: (-item[1].nbytes, item[1].first)):
        best = (arena, _lowest(taken[arena], life, None))
        for buffer, nbytes, (first, _) in homes:
            offset = _lowest(taken[buffer], life, nbytes) if life.last < first else None
            if offset is not None:
                best = (buffer, offset)
                break
        buffer, start = best
        assert start is not None
        taken[buffer].append((start, life))
        placed[key] = (buffer, start)
        if buffer == arena:
            size = max(size, start + _rounded(life.nbytes))
    return placed, size


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _lowest(taken: list[tuple[int, _Life]], life: _Life, limit: int | None) -> int | None:
    """Return the start of the smallest gap that fits among those who live at the same time; None beyond ``limit``."""
    others = sorted((start, other) for start, other in taken if other.first <= life.last and life.first <= other.last)
    need, end = _rounded(life.nbytes), 0
    best: tuple[int, int] | None = None
    for start, other in others:
        if start - end >= need and (best is None or start - end < best[0]):
            best = (start - end, end)
        end = max(end, start + _rounded(other.nbytes))
    start = end if best is None else best[1]
    return start if limit is None or start + life.nbytes <= limit else None
