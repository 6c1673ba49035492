"""What ran: counters, the log of fallbacks, strict mode, and the tape that ``explain`` plays back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import flags
from ..calls import Call
from ..errors import BackendError
from ..spec import NetSpec, Spec

if TYPE_CHECKING:
    from .select import Choice

log = logging.getLogger("resnet_fast")

_calls: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[str] = Counter()
_logged: set[str] = set()
_strict = False
_tape: list[Ran | Stock] | None = None


class Ran(NamedTuple):
    """An op call that dispatch served."""

    call: Call
    spec: Spec
    choice: Choice
    state: Any


class Stock(NamedTuple):
    """A module that ran its stock PyTorch forward, and why."""

    module: Any
    reason: str


def chosen(spec: Spec | NetSpec, choice: Choice) -> None:
    """Before a call runs: a fallback from a faster backend is logged once per reason, or raises in strict mode."""
    if choice.fell_back:
        # training on the reference is the normal course on a CPU; a fused backend missing in eval is worth a warning
        fall_back(f"{spec.op} runs on {choice.impl.backend}: {choice.fell_back}", quiet=spec.grad or spec.batch_stats)


def ran(call: Any, spec: Spec | NetSpec, choice: Choice, state: Any) -> None:
    """Count a call."""
    if isinstance(spec, NetSpec):  # its parts are what a reader of counters and explanations knows
        states = state if isinstance(state, list) else [None] * len(spec.parts)
        parts: list[tuple[Any, Any, Any]] = list(zip(call.parts, spec.parts, states, strict=True))
    else:
        parts = [(call, spec, state)]
    for part, part_spec, part_state in parts:
        _calls[(part_spec.op, choice.impl.backend)] += 1
        if _tape is not None:
            _tape.append(Ran(part, part_spec, choice, part_state))


def stock(module: Any, op: str, reason: str) -> None:
    """Count a module that runs its stock forward. Silent while a compiler traces (it would count traces, not calls)."""
    if torch.compiler.is_compiling():
        return
    fall_back(f"{op} runs its stock layers: {reason}", quiet=False)
    _calls[(op, "stock")] += 1
    if _tape is not None:
        _tape.append(Stock(module, reason))


def fall_back(text: str, quiet: bool = False) -> None:
    """Count a fallback; log it once (``quiet``: as information only), or raise in strict mode."""
    if _strict or flags.STRICT.enabled():
        raise BackendError(f"strict mode: {text}")
    _fallbacks[text] += 1
    if text not in _logged:
        _logged.add(text)
        log.log(logging.INFO if quiet else logging.WARNING, text)


def count(op: str, backend: str) -> None:
    """Count a call that is no single op's: a replayed graph."""
    _calls[(op, backend)] += 1


def watched() -> bool:
    """Is a tape being recorded, which wants to see every op?"""
    return _tape is not None


@contextmanager
def strict() -> Iterator[None]:
    """Inside the ``with``, a fallback to slower or stock code raises BackendError instead of being counted."""
    global _strict
    before, _strict = _strict, True
    try:
        yield
    finally:
        _strict = before


def stats() -> dict[str, dict[str, int]]:
    """Since the start or the last :func:`reset_stats`: ``calls`` by ``op/backend``, ``fallbacks`` by reason."""
    return {
        "calls": {f"{op}/{backend}": n for (op, backend), n in sorted(_calls.items())},
        "fallbacks": dict(_fallbacks),
    }


def reset_stats() -> None:
    """Set every counter to zero, and let each fallback be logged again."""
    _calls.clear()
    _fallbacks.clear()
    _logged.clear()


@contextmanager
def tape() -> Iterator[list[Ran | Stock]]:
    """Record what runs inside the ``with``, in order."""
    global _tape
    before, _tape = _tape, []
    try:
        yield _tape
    finally:
        _tape = before
