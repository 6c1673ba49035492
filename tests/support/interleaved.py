"""Run the programs of a launch in Triton's interpreter as a GPU may: in any order, a few at a time, taking turns.

    with interleaved(seed=3, resident=2):
        launch(...)

The interpreter runs one program after another, in the order of the grid, so that no program ever waits. Here up to
``resident`` programs are begun, each in a thread, and one of them runs at a time: at every atomic a random one goes on.
When one ends, a random one of the rest begins. So a program that reads a result before it waited for it finds
it missing, and a launch whose programs wait for some that have not begun ends in :class:`Deadlock`.

Memory is that of one processor: who sees which store in which order is not modelled.
"""

from __future__ import annotations

import inspect
import itertools
import random
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 2000
"""Atomic operations one after another that change nothing, after which nobody can be going on."""


class Deadlock(RuntimeError):
    """All programs that have begun wait, and no other can begin."""


class _Turns:
    """The programs of one launch."""

    def __init__(self, run: Callable[[], None], grid: tuple[int, ...], resident: int, order: random.Random) -> None:
        from triton.runtime.interpreter import interpreter_builder

        self.run, self.resident, self.order, self.builder = run, resident, order, interpreter_builder
        self.left = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        order.shuffle(self.left)
        self.begun: dict[threading.Thread, tuple[tuple[int, ...], threading.Semaphore]] = {}
        self.done = threading.Semaphore(0)
        self.idle = 0
        self.error: BaseException | None = None

    def all(self) -> None:
        """Run all programs; raise the first error."""
        self._fill()
        self._pass_on()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def _fill(self) -> None:
        while self.left and len(self.begun) < self.resident:
            at = self.left.pop()
            thread = threading.Thread(target=self._program, daemon=True)
            self.begun[thread] = at, threading.Semaphore(0)
            thread.start()

    def _program(self) -> None:
        me = threading.current_thread()
        at, turn = self.begun[me]
        turn.acquire()
        try:
            if self.error is None:
                self.builder.set_grid_idx(*at)
                self.run()
        except BaseException as error:
            self.error = self.error or error
        del self.begun[me]
        self.idle = 0
        if self.error is not None:
            self.left.clear()
        self._fill()
        self._pass_on()

    def _pass_on(self) -> None:
        if self.begun:
            _, turn = self.begun[self.order.choice(list(self.begun))]
            turn.release()
        else:
            self.done.release()

    def switch(self, changed: bool) -> None:
        """Let a random program go on."""
        self.idle = 0 if changed else self.idle + 1
        if self.idle > PATIENCE:
            self.error = self.error or Deadlock(f"{len(self.begun)} programs wait, {len(self.left)} have not begun")
        at, turn = self.begun[threading.current_thread()]
        self._pass_on()
        turn.acquire()
        if self.error is not None:
            raise self.error
        self.builder.set_grid_idx(*at)


@contextmanager
def interleaved(seed: int = 0, resident: int = 4) -> Iterator[None]:
    """Run every launch inside the ``with`` as described above, the same way for the same ``seed``."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder

    launch, atomic = GridExecutor.__call__, InterpreterBuilder.create_atomic_rmw
    order, running = random.Random(seed), list[_Turns]()

    def run_all(plain: Any, given: dict[str, Any]) -> None:
        turns = _Turns(lambda: plain(**given), tuple(interpreter_builder.grid_dim), resident, order)
        running.append(turns)
        try:
            turns.all()
        finally:
            running.pop()

    def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
        plain, called = executor.fn, itertools.count(1)

        def program(**given: Any) -> None:
            # the interpreter would run the programs in order: at the last one, all are run
            x, y, z = interpreter_builder.grid_dim
            if next(called) == x * y * z:
                run_all(plain, given)

        # the interpreter looks for triton.language in a kernel's globals, and for its arguments in its signature
        executor.fn = types.FunctionType(program.__code__, plain.__globals__, plain.__name__, None, program.__closure__)
        executor.fn.__signature__ = inspect.signature(plain)
        try:
            return launch(executor, *args, **kwargs)
        finally:
            executor.fn = plain

    def taking_turns(builder: Any, *args: Any, **kwargs: Any) -> Any:
        found = atomic(builder, *args, **kwargs)
        if running:
            running[-1].switch(bool(args[2].data.any()))
        return found

    GridExecutor.__call__, InterpreterBuilder.create_atomic_rmw = launched, taking_turns
    try:
        yield
    finally:
        GridExecutor.__call__, InterpreterBuilder.create_atomic_rmw = launch, atomic
