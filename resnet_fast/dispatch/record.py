"""Record what ran: counters, the log of fallbacks, strict mode, and the tape that ``explain`` reads.

Counters belong to the process, and threads may count at the same time. Strict mode and the tape belong to the thread
(and asyncio task) that entered their ``with``, like ``torch.no_grad``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from .. import flags, invariance
from ..calls import Call, NetCall
from ..errors import BackendError
from ..impl import Choice
from ..locks import ForkSafeLock
from ..spec import NetSpec, Spec

log = logging.getLogger("resnet_fast")

_calls: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[str] = Counter()
_logged: set[str] = set()
_counting = ForkSafeLock()  # adding to a counter is a read and a write
_strict: ContextVar[bool] = ContextVar("resnet_fast_strict", default=False)
_tape: ContextVar[list[Ran | Stock] | None] = ContextVar("resnet_fast_tape", default=None)
_muted: ContextVar[bool] = ContextVar("resnet_fast_muted", default=False)


class Ran(NamedTuple):
    """An op call that a backend ran."""

    call: Call
    spec: Spec
    choice: Choice
    state: Any


class Stock(NamedTuple):
    """A module that ran its stock PyTorch forward, and why."""

    module: Any
    reason: str
    op: str


def fell_back(spec: Spec | NetSpec, choice: Choice) -> None:
    """Log once per reason that a call runs on a slower backend, or raise in strict mode. Call it before the run."""
    # training on the reference is the normal course on a CPU; a fused backend missing in eval is worth a warning
    quiet = (spec.grad or spec.batch_stats) and not choice.loud
    fall_back(f"{spec.op} runs on {choice.impl.backend}: {choice.fell_back}", quiet)


def ran(call: Call | NetCall, spec: Spec | NetSpec, choice: Choice, state: Any) -> None:
    """Count a call by its parts, so that counters and explanations show the layers of a net."""
    backend = choice.impl.backend
    with _counting:
        for part in spec.parts:
            _calls[(part.op, backend)] += 1
    recording = _tape.get()
    if recording is not None:
        states = state if isinstance(state, list) else [state] * len(spec.parts)
        for part_call, part_spec, part_state in zip(call.parts, spec.parts, states, strict=True):
            recording.append(Ran(part_call, part_spec, choice, part_state))


def stock(module: Any, op: str, reason: str, quiet: bool = False) -> None:
    """Count a module that runs its stock forward.

    Does nothing while a compiler traces, because that would count traces, not calls. ``quiet``: log at INFO level.

    Raises:
        BackendError: in strict and in batch-invariant mode.
    """
    if torch.compiler.is_compiling() or _muted.get():
        return
    refuse_stock(f"{op} would run its stock layers: {reason}")
    fall_back(f"{op} runs its stock layers: {reason}", quiet)
    count(op, "stock")
    recording = _tape.get()
    if recording is not None:
        recording.append(Stock(module, reason, op))


def refuse_stock(reason: str) -> None:
    """Raise in batch-invariant mode, in which layers outside of the ops must not run on a batch.

    Raises:
        BackendError: the mode is on; ``reason`` says what would run instead of the ops.
    """
    if invariance.is_on():
        raise BackendError(f"batch-invariant mode: expected layers that run as our ops; {reason}; {invariance.TODO}")


def fall_back(text: str, quiet: bool = False) -> None:
    """Count a fallback and log it once, at INFO level if ``quiet``; raise in strict mode."""
    if _muted.get():
        return
    if is_strict():
        raise BackendError(f"strict mode: {text}")
    with _counting:
        _fallbacks[text] += 1
        first = text not in _logged
        _logged.add(text)
    if first:
        log.log(logging.INFO if quiet else logging.WARNING, text)


def count(op: str, backend: str) -> None:
    """Count a call of ``op``, or an event of another kind, such as the replay of a graph."""
    with _counting:
        _calls[(op, backend)] += 1


def watched() -> bool:
    """Return whether this thread records a tape, which must see every op."""
    return _tape.get() is not None


def is_strict() -> bool:
    """Return whether a fallback is an error, in this thread or in the process."""
    return _strict.get() or flags.STRICT.enabled()


@contextmanager
def muted() -> Iterator[None]:
    """Record no stock module and no fallback inside the ``with``: a net is planned there and does not run."""
    before = _muted.set(True)
    try:
        yield
    finally:
        _muted.reset(before)


@contextmanager
def strict() -> Iterator[None]:
    """Raise BackendError inside the ``with`` for every fallback to slower or stock code, instead of counting it.

    It applies to this thread (and asyncio task). ``RESNET_FAST_STRICT=1`` applies to the process.
    """
    before = _strict.get()
    _strict.set(True)
    try:
        yield
    finally:
        _strict.set(before)


def stats() -> dict[str, dict[str, int]]:
    """Return what ran in this process since its start or the last :func:`reset_stats`.

    Returns:
        ``calls``: number of calls by ``op/backend``. ``fallbacks``: number of fallbacks by reason.
    """
    with _counting:
        return {
            "calls": {f"{op}/{backend}": n for (op, backend), n in sorted(_calls.items())},
            "fallbacks": dict(_fallbacks),
        }


def reset_stats() -> None:
    """Set every counter to zero, and let each fallback be logged again."""
    with _counting:
        _calls.clear()
        _fallbacks.clear()
        _logged.clear()


@contextmanager
def tape() -> Iterator[list[Ran | Stock]]:
    """Record what this thread runs inside the ``with``, in order."""
    recording: list[Ran | Stock] = []
    before = _tape.get()
    _tape.set(recording)
    try:
        yield recording
    finally:
        _tape.set(before)
