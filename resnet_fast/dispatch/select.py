"""The only decision: which implementation runs a Spec, and why not the others.

Order of a request: ``use_backend(...)`` around the call, then the op's ``backend`` argument (what ``accelerate(model,
backend=...)`` sets), then ``RESNET_FAST_BACKEND``, then ``auto``. A request by name succeeds or raises; ``auto`` takes
the highest rank among those that accept, and a fallback from a faster backend is counted, logged once per reason, and
an error in strict mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import flags
from ..calls import Call, NetCall
from ..errors import BackendError
from ..spec import ITEMSIZE, Impl, NetSpec, Spec, Verdict
from . import catalog, record

_override: ContextVar[str | None] = ContextVar("resnet_fast_backend", default=None)


@dataclass(frozen=True)
class Choice:
    """The chosen implementation and the verdict on every other backend, by name."""

    impl: Impl
    refused: tuple[tuple[str, str], ...]
    fell_back: str = ""  # why a faster backend that works on this machine did not take this spec


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the ``with``, every op runs on backend ``name`` or raises; ``auto`` restores dispatch's own choice.

    For this thread (and asyncio task) and the graphs that autograd records in it, as ``torch.no_grad`` is;
    ``RESNET_FAST_BACKEND`` is for the process.
    """
    before = _override.get()
    _override.set(flags.check_backend(name))
    try:
        yield
    finally:
        _override.set(before)


def requested(argument: str) -> str:
    """The backend asked for: by context, by the op's argument, by the environment, else ``auto``."""
    override = _override.get()
    if override is not None:
        return override
    if argument != "auto":
        return argument
    return flags.BACKEND.read()


def choose(spec: Spec | NetSpec, device: str, backend: str = "auto") -> Choice:
    """The implementation for ``spec`` on ``device`` ("cpu", "cuda"). BackendError where a named backend cannot."""
    return _choose(spec, device, requested(backend), catalog.fingerprint())


@lru_cache(maxsize=8192)
def _choose(spec: Spec | NetSpec, device: str, wanted: str, fingerprint: tuple[bool, ...]) -> Choice:
    availability = catalog.availability()
    if wanted != "auto" and not availability[flags.check_backend(wanted)]:
        raise BackendError(f"backend {wanted!r} is not available: {availability[wanted].reason}")
    verdicts = {name: verdict for name, verdict in availability.items() if not verdict}
    accepted = []
    for impl in catalog.impls(spec.op):
        if impl.backend in verdicts:
            continue
        verdict = impl.supports(spec) if _runs_on(impl, device) else _other_device(impl, device)
        if verdict:
            accepted.append(impl)
        else:
            verdicts[impl.backend] = verdict
    if wanted != "auto":
        for impl in accepted:
            if impl.backend == wanted:
                others = {
                    i.backend: Verdict(False, f"backend {wanted!r} was asked for") for i in accepted if i is not impl
                }
                return Choice(impl, _reasons(verdicts | others))
        refusal = verdicts.get(wanted, Verdict(False, f"it has no {spec.op}"))
        raise BackendError(f"backend {wanted!r} cannot run {spec.op} {spec} on {device}: {refusal.reason}")
    best = max(accepted, key=lambda impl: impl.rank)
    refused_faster = [
        f"{i.backend}: {verdicts[i.backend].reason}"
        for i in catalog.impls(spec.op)
        if i.rank > best.rank and i.backend in verdicts and availability[i.backend] and _runs_on(i, device)
    ]
    others = {i.backend: Verdict(False, f"{best.backend} ranks higher") for i in accepted if i is not best}
    return Choice(best, _reasons(verdicts | others), "; ".join(refused_faster))


def _runs_on(impl: Impl, device: str) -> bool:
    return not impl.devices or device in impl.devices


def _other_device(impl: Impl, device: str) -> Verdict:
    return Verdict.no(f"a tensor on {' or '.join(impl.devices)}", f"one on {device}", "move the model and its input")


def _reasons(verdicts: dict[str, Verdict]) -> tuple[tuple[str, str], ...]:
    return tuple((name, v.reason) for name, v in verdicts.items())


def prepare(call: Call | NetCall, spec: Spec | NetSpec, choice: Choice, earlier: list[Any]) -> Any:
    """The state that the chosen implementation derives from the call's parameters; None if it needs none."""
    return None if choice.impl.prepare is None else choice.impl.prepare(call, spec, earlier)


def execute(call: Call | NetCall, spec: Spec | NetSpec, choice: Choice, state: Any) -> Tensor:
    """Run the call and count it. Where the implementation refuses the values at hand, the reference runs, counted.

    That holds for a backend asked for by name too: a net whose input holds NaN returns NaN, as the stock net does.
    """
    record.chosen(spec, choice)
    y = choice.impl.run(call, spec, state)
    if isinstance(y, Verdict):
        choice = replace(stock(spec, choice, y.reason), fell_back=y.reason)
        record.chosen(spec, choice)
        y, state = choice.impl.run(call, spec, None), None
    record.ran(call, spec, choice, state)
    return y


def run(call: Call | NetCall, spec: Spec | NetSpec, choice: Choice) -> Tensor:
    """Prepare and run once, keeping nothing."""
    return execute(call, spec, choice, prepare(call, spec, choice, []))


def trace(call: Call) -> Tensor:
    """What a tracer sees of a call: the reference's ATen operations, on fake or symbolic tensors."""
    return _reference(call.op).run(call, None, None)


def stock(spec: Spec | NetSpec, choice: Choice, reason: str) -> Choice:
    """In place of ``choice``, what the stock layers do: the reference. No fallback: it is the faster one for now."""
    refused = tuple((name, why) for name, why in choice.refused if name != "reference")
    return Choice(_reference(spec.op), (*refused, (choice.impl.backend, reason)))


def _reference(op: str) -> Impl:
    return next(impl for impl in catalog.impls(op) if impl.backend == "reference")


def trains(device: str, dtype: torch.dtype, backend: str) -> bool:
    """Are there training kernels of our own for such an input: is Triton here, and not another backend asked for?"""
    if requested(backend) not in ("auto", "triton") or not catalog.works("triton") or dtype == torch.float64:
        return False
    return any(impl.training is not None and _runs_on(impl, device) for impl in catalog.impls("conv_bn_act"))


def trains_nhwc(device: str, dtype: torch.dtype, backend: str) -> bool:
    """Should a net in training convert its input to channels_last once? Yes where our training kernels will run."""
    return trains(device, dtype, backend) and (device == "cuda" or requested(backend) == "triton")


def prefers_nhwc(device: str, backend: str) -> bool:
    """Should a net convert its input to channels_last once? Yes where a fused NHWC backend would run it in eval."""
    wanted = requested(backend)
    fastest = {"cpu": "onednn", "cuda": "triton"}.get(device)
    return wanted in ("onednn", "triton", "cuda") or (
        wanted == "auto" and fastest is not None and catalog.works(fastest)
    )


def batch_tile(n: int, largest: int, dtype: torch.dtype, device: str, backend: str) -> int:
    """How many images of a batch of ``n`` to send through a whole eval net at a time.

    On a CPU the activations of a large batch fall out of the last-level cache, and blocks above 32 MiB are returned to
    the system after each use, so that every layer pays page faults again (docs/notes/batch-tiling.md). A tile whose
    largest activation fits twice (input and output of a layer) avoids both. ``largest``: elements per image of it.
    """
    on_onednn = device == "cpu" and requested(backend) in ("auto", "onednn") and prefers_nhwc(device, backend)
    if not on_onednn or not flags.BATCH_TILE.enabled():
        return n
    size = max(ITEMSIZE.get(str(dtype).removeprefix("torch."), 4), 4)
    tile = max(1, last_level_cache() // (2 * largest * size))
    return n if tile >= n else 1 << (tile.bit_length() - 1)


@cache
def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache as Linux reports it; 32 MiB where it does not."""
    try:
        sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(s[:-1]) * {"K": 1 << 10, "M": 1 << 20}[s[-1]] for s in sizes)
    except (OSError, ValueError, KeyError):
        return 32 << 20
