"""How a run is told to stop: signals that are remembered, and looked at between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGHUP")
"""From a scheduler, from the keyboard, and from a terminal or connection that closes."""


class StopRequests:
    """Remembers the first of :data:`NAMES`. Only a program's main thread hears signals."""

    def __init__(self) -> None:
        self.name = ""
        self.terminals: list[int] = []

    @contextmanager
    def heard(self) -> Iterator[StopRequests]:
        """Listen. A signal that the caller has the process ignore (``nohup``, ``&`` in a script) stays ignored."""
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
        """Print nowhere where the terminal is gone: whatever is printed to it fails, and the run still has to save."""
        gone = [file for file in self.terminals if not os.isatty(file)]
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for file in gone:
                os.dup2(nowhere, file)
            os.close(nowhere)
