"""The one shape of every complaint: what was expected, what came, what to do."""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot be used. ``str()`` reads ``expected …, got …; <what to do>``; the CLI prints it on one line."""

    def __init__(self, expected: str, got: str, todo: str):
        self.expected, self.got, self.todo = expected, got, todo
        super().__init__(f"expected {expected}, got {got}; {todo}")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve this call, or strict mode met a fallback."""
