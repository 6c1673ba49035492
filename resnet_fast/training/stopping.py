"""Signals that tell a run to stop: they are remembered, and the run looks at them between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
"""Sent by a scheduler, by the keyboard, and by a terminal or connection that closes."""


class StopRequests:
    """Remembers the first signal of :data:`NAMES`. Only the main thread of a program receives signals."""

    def __init__(self) -> None:
        self.name = ""
        self.terminals: list[int] = []

    @contextmanager
    def heard(self) -> Iterator[StopRequests]:
        """Listen to signals. One that the process ignores already (``nohup``, ``&`` in a script) stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self.terminals = [file for file in (1, 2) if os.isatty(file)]
        before = {number: signal.signal(number, self._remember) for number in heeded}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if name == "SIGHUP":
            self._leave_terminal()
        if self.name:  # a second signal does not wait for the step
            raise KeyboardInterrupt
        self.name = name

    def _leave_terminal(self) -> None:
        """Send output to the null device if the terminal is gone: printing would fail, and the run must still save."""
        gone = [file for file in self.terminals if not os.isatty(file)]
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for file in gone:
                os.dup2(nowhere, file)
            os.close(nowhere)
