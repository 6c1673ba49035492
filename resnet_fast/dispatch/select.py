"""Choose the implementation that runs a Spec, with the reasons against the others. No other module decides this.

Precedence of a request: ``use_backend(...)`` around the call, the op's ``backend`` argument (set by
``accelerate(model, backend=...)``), ``RESNET_FAST_BACKEND``, ``auto``. A request by name succeeds or raises. ``auto``
takes the highest rank among those that accept. A fallback from a faster backend is counted, logged once per reason, and
an error in strict mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import flags
from ..calls import Call, NetCall
from ..errors import BackendError
from ..impl import Choice, Impl
from ..spec import ITEMSIZE, YES, NetSpec, Spec, Verdict
from . import catalog, profiling, record

_override: ContextVar[str | None] = ContextVar("resnet_fast_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` on backend ``name``, or raise; ``auto`` lets dispatch choose.

    It applies to this thread (and asyncio task) and to the graphs that autograd records in it, like ``torch.no_grad``.
    ``RESNET_FAST_BACKEND`` applies to the process.

    Args:
        name: ``auto``, ``reference``, ``onednn``, ``triton`` or ``cuda``.

    Raises:
        UserError: there is no such backend.
    """
    before = _override.get()
    _override.set(flags.check_backend(name))
    try:
        yield
    finally:
        _override.set(before)


def requested(argument: str) -> str:
    """Return the requested backend: by context, by the op's argument, by the environment, else ``auto``."""
    override = _override.get()
    if override is not None:
        return override
    if argument != "auto":
        return argument
    return flags.BACKEND.read()


def choose(spec: Spec | NetSpec, device: torch.device, backend: str = "auto") -> Choice:
    """Return the implementation for ``spec`` on a device, and why not the others.

    Raises:
        BackendError: the backend was requested by name and cannot run the spec.
    """
    wanted, trains = requested(backend), spec.grad or spec.batch_stats
    refusals, lasts = _refuse_training(spec.op, device, wanted) if trains else ((), True)
    found = _choose(spec, device, wanted, catalog.fingerprint(), refusals)
    return found if lasts else replace(found, lasts=False)


def _refuse_training(op: str, device: torch.device, wanted: str) -> tuple[tuple[tuple[str, Verdict], ...], bool]:
    """Return the backends of ``wanted`` whose kernels may not train on a device, with the verdict; and if it lasts."""
    refusals, every = [], True
    for impl in catalog.ranked(op, device):
        if impl.training and wanted in ("auto", impl.backend) and catalog.works(impl.backend):
            verdict, lasts = impl.trainer.trains_on(device)
            every &= lasts
            if not verdict:
                refusals.append((impl.backend, verdict))
    return tuple(refusals), every


def forget() -> None:
    """Choose anew at the next call of every problem, because what CPU tensors can run on has changed."""
    for known in (catalog.ranked, catalog.prepares, catalog.compiles, _choose):
        known.cache_clear()


def runs_batches_alike(call: Call | NetCall, spec: Spec | NetSpec, one: Choice, backend: str) -> bool:
    """Return whether a call in batch-invariant mode runs as a whole; otherwise image by image.

    Args:
        call: the call.
        spec: its problem.
        one: the choice for one of its images.
        backend: as for :func:`choose`.

    Raises:
        BackendError: the batch is too large for the backend that runs its images, or the backend cannot run them.
    """
    if not one.impl.batch_invariant:
        return False
    whole = choose(spec, call.x.device, backend)
    if whole.impl.backend != one.impl.backend:
        why = dict(whole.refused).get(one.impl.backend, "")
        raise BackendError(
            f"batch-invariant mode: expected {one.impl.backend!r}, which runs one image, to run {spec}, got a refusal "
            f"({why}); use smaller batches"
        )
    return True


@lru_cache(maxsize=8192)
def _choose(
    spec: Spec | NetSpec,
    device: torch.device,
    wanted: str,
    fingerprint: tuple[bool, ...],
    refusals: tuple[tuple[str, Verdict], ...],
) -> Choice:
    availability = catalog.availability()
    if wanted != "auto" and not availability[flags.check_backend(wanted)]:
        raise BackendError(f"backend {wanted!r} is not available: {availability[wanted].reason}")
    verdicts = {name: verdict for name, verdict in availability.items() if not verdict}
    accepted = []
    for impl in catalog.impls(spec.op):
        if impl.backend in verdicts:
            continue
        verdict = impl.runs_on(device) and impl.supports(spec) and dict(refusals).get(impl.backend, YES)
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
        if i.rank > best.rank and i.backend in verdicts and availability[i.backend] and i.runs_on(device)
    ]
    others = {i.backend: Verdict(False, f"{best.backend} ranks higher") for i in accepted if i is not best}
    return Choice(best, _reasons(verdicts | others), "; ".join(refused_faster), loud=bool(refusals))


def _reasons(verdicts: dict[str, Verdict]) -> tuple[tuple[str, str], ...]:
    return tuple((name, v.reason) for name, v in verdicts.items())


def prepare(call: Call | NetCall, spec: Spec | NetSpec, choice: Choice, earlier: list[Any]) -> Any:
    """Return the state that the chosen implementation derives from the call's parameters.

    None if it derives nothing, or if the output has no elements (an empty batch).
    """
    impl = choice.impl
    return impl.prepare(call, spec, earlier) if impl.prepares and all(spec.out_shape()) else None


def execute(call: Call | NetCall, spec: Spec | NetSpec, choice: Choice, state: Any) -> Tensor:
    """Run the call and count it. If the implementation refuses the values of its tensors, the reference runs.

    That also applies to a backend requested by name: a net returns NaN for NaN, as the stock net does.
    """
    impl = choice.impl
    if choice.fell_back:
        record.fell_back(spec, choice)
    if state is None and impl.prepares:
        y: Any = call.x.new_empty(spec.out_shape())
    elif impl.announces and profiling.is_running():
        y = profiling.profiled(spec, lambda: impl.run(call, spec, state))
    else:
        y = impl.run(call, spec, state)
    if isinstance(y, Verdict):
        choice = replace(stock(spec, choice, y.reason), fell_back=y.reason)
        record.fell_back(spec, choice)
        y, state = choice.impl.run(call, spec, None), None
    record.ran(call, spec, choice, state)
    return y


def run(call: Call | NetCall, spec: Spec | NetSpec, choice: Choice) -> Tensor:
    """Prepare and run once, without keeping the state."""
    return execute(call, spec, choice, prepare(call, spec, choice, []))


def trace(call: Call) -> Tensor:
    """Run the reference's ATen operations on fake or symbolic tensors, for a tracer."""
    y: Tensor = _reference(call.op).run(call, None, None)
    return y


def stock(spec: Spec | NetSpec, choice: Choice, reason: str) -> Choice:
    """Return the reference in place of ``choice``. This is no fallback: the reference is faster for now."""
    refused = tuple((name, why) for name, why in choice.refused if name != "reference")
    return Choice(_reference(spec.op), (*refused, (choice.impl.backend, reason)))


def _reference(op: str) -> Impl:
    return next(impl for impl in catalog.impls(op) if impl.backend == "reference")


def _trainer(device: torch.device, dtype: torch.dtype, backend: str) -> Impl | None:
    """Return the implementation with training kernels for such an input; None if there is none.

    One that was asked for by name is returned also where it may not train: the op then raises the reason.
    """
    wanted, name = requested(backend), _name(dtype)
    for impl in catalog.ranked("conv_bn_act", device):
        if name not in impl.trains or not catalog.works(impl.backend):
            continue
        if wanted == impl.backend or (wanted == "auto" and impl.trainer.trains_on(device)[0]):
            return impl
    return None


def trains(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    """Return whether a backend has training kernels of its own for such an input."""
    return _trainer(device, dtype, backend) is not None


def trains_nhwc(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    """Return whether a net in training should convert its input to channels_last once.

    True where training kernels that work in NHWC will run.
    """
    impl = _trainer(device, dtype, backend)
    return impl is not None and impl.nhwc and (impl.rank > 0 or requested(backend) == impl.backend)


def _for_nets(device: torch.device, backend: str) -> Impl:
    """Return the implementation that is asked first for a whole net in eval mode."""
    wanted = requested(backend)
    for impl in catalog.ranked("net", device):
        if wanted == impl.backend or (wanted == "auto" and catalog.works(impl.backend)):
            return impl
    return _reference("net")


def runs_whole_batches(device: torch.device, backend: str) -> bool:
    """Return whether a net in batch-invariant mode runs its batch as a whole, where its backend takes the problem."""
    return _for_nets(device, backend).batch_invariant


def prefers_nhwc(device: torch.device, backend: str) -> bool:
    """Return whether a net in eval mode should convert its input to channels_last once."""
    return _for_nets(device, backend).nhwc


def batch_tile(n: int, largest: int, dtype: torch.dtype, device: torch.device, backend: str) -> int:
    """Return how many images of a batch of ``n`` to send through a whole net in eval mode at a time.

    Args:
        n: images in the batch.
        largest: elements of one image's largest activation.
        dtype: of the input.
        device: of the input.
        backend: the op's ``backend`` argument.
    """
    tile = _for_nets(device, backend).tile
    if tile is None or not flags.BATCH_TILE.enabled():
        return n
    images = tile(largest, ITEMSIZE.get(_name(dtype), 4))
    return n if images >= n else 1 << (images.bit_length() - 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
