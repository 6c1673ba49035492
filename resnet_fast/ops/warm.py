"""``warm(model, x)``: compile every kernel that a model launches ahead of its first run, several at a time.

    model, x --copied without memory--> forward on meta tensors --each op call is planned, not run--> calls --> compiled

Nothing is launched and no GPU is needed: kernels can be compiled for a GPU that this machine lacks, so that an image
ships with a filled cache. :mod:`.ready` does the same at the first call of inference on a GPU, and
:func:`ready_to_train` at the first training step of a net. A block that is trained by itself compiles each of its
passes when it plans it (``backends/triton/submission.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..calls import Call
from ..current_device import numbered
from ..dispatch import catalog, record, select
from ..errors import BackendError, UserError
from ..impl import Ahead, Impl, PlannedCall, Warmed
from ..progress import OnProgress, announced, is_off, log
from ..spec import Spec
from .run import autocast, planned_by
from .specs import spec_of
from .train import needs_gradient

TRAINING_SIZES = 8
"""Number of input sizes of a net in training that are compiled ahead. To plan one takes about a second, and after some
sizes there are few new kernels, see docs/notes/cold-start.md."""

_seen: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


def warm(
    model: nn.Module,
    x: Tensor,
    train: bool = False,
    batches: Iterable[int] = (),
    gpu: str | None = None,
    rounded: torch.dtype | None = None,
    on_progress: OnProgress | None = None,
) -> Warmed:
    """Compile the kernels that ``model(x)`` launches and that this machine has not compiled yet.

    ::

        model = resnet_fast.accelerate(model.cuda().eval())
        print(resnet_fast.warm(model, x, batches=(1, 8, 256)))

    Args:
        model: an accelerated model, on any device. Nothing in it changes, and nothing runs on its tensors.
        x: an input of the dtype and image size that will run, on any device. Its values are not read.
        train: plan a training step, forward and backward. A model in eval mode is planned as after ``model.train()``,
            one in training mode as it is, with any layer that is frozen.
        batches: batch sizes; by default that of ``x``.
        gpu: compile for the GPU of this name (``h100``, see ``resnet-fast roofline``); by default the present one.
        rounded: the dtype of autocast; by default that of the autocast which is active for CUDA.
        on_progress: called before the first kernel and after each.

    Returns:
        What was compiled. A config that cannot be compiled is refused, and the next one is taken: ``failed``.

    Raises:
        UserError: ``model`` is no module, ``x`` no tensor; an unknown GPU; a batch below 1; no convolution whose
            kernels are compiled at their launch. BackendError: no compiler here; no GPU here, and none named.
    """
    if not isinstance(model, nn.Module):
        raise UserError("an nn.Module", type(model).__name__, "pass the model itself")
    if not isinstance(x, Tensor):
        raise UserError("a tensor to warm with", type(x).__name__, "pass an input as the model takes it")
    sizes = _batch_sizes(batches) or x.shape[:1]
    ahead = _ahead()
    target_of = ahead.target_of(gpu, x.device)
    here = None if gpu is not None else numbered(x.device if x.is_cuda else torch.device("cuda"))
    if rounded is None and torch.is_autocast_enabled("cuda"):
        rounded = torch.get_autocast_dtype("cuda")
    shadow = _shadow(model)
    if not train or not model.training:
        shadow.train(train)
    found: list[PlannedCall] = []
    for n in sizes:
        shape = (n, *x.shape[1:])
        if 0 in shape:
            raise UserError("an input with elements", f"shape {shape}", "warm with the batches that will run")
        found += _calls_of(shadow, shape, x.dtype, train, rounded, here)
    if not found:
        raise UserError(
            "an accelerated model with kernels that are compiled at their launch",
            "none",
            "call resnet_fast.accelerate(model) first; resnet_fast.explain(model, x) says what runs and why",
        )
    return ahead.compile_ahead(found, target_of, on_progress)


def _batch_sizes(batches: Iterable[int]) -> tuple[int, ...]:
    sizes: tuple[Any, ...] = tuple(batches) if isinstance(batches, Iterable) else (None,)
    if not all(isinstance(n, int) and n > 0 for n in sizes):
        raise UserError("batches of at least 1, such as (1, 8)", repr(batches), "correct batches")
    return sizes


def _ahead() -> Ahead:
    """Return the module of the one backend that compiles at a launch. BackendError if it cannot here."""
    impl = next((impl for impl in catalog.impls("conv_bn_act") if impl.ahead), None)
    if impl is None:
        raise BackendError("expected a compiler of kernels, got an interpreter; unset TRITON_INTERPRET")
    try:
        return impl.compiler
    except ImportError as error:
        raise BackendError(f"expected a compiler of kernels, got none: {error}; pip install {impl.backend}") from error


def _shadow(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with parameters and buffers on ``meta``, and without hooks, which act elsewhere."""
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        bare = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        memo[id(t)] = nn.Parameter(bare, t.requires_grad) if isinstance(t, nn.Parameter) else bare
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return shadow


def _calls_of(
    shadow: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    train: bool,
    rounded: torch.dtype | None,
    here: torch.device | None,
) -> list[PlannedCall]:
    """Return the calls of a model on ``meta`` whose kernels are compiled at their launch, for a channels_last input.

    ``here``: choose backends as on this device; None for any that supports the problem.
    """
    found: list[PlannedCall] = []

    def plan(call: Call, backend: str, save: str) -> Tensor:
        inner = call if rounded is None else autocast(call, rounded)
        graph = train and needs_gradient(call)
        spec: Spec = spec_of(inner, graph or call.batch_stats)
        impl = _chosen(spec, backend, here)
        if impl is not None:
            needs = tuple(t is not None and t.requires_grad for t in call.leaves())
            found.append(PlannedCall(inner, spec, save, needs if graph or call.batch_stats else None))
        y = torch.empty(spec.out_shape(), dtype=call.x.dtype, device="meta", memory_format=torch.channels_last)
        return y.requires_grad_() * 1 if graph else y  # no leaf, which a stock ReLU could not change in place

    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    with planned_by(plan), record.muted(), torch.set_grad_enabled(train):
        shadow(x)
    return found


def _chosen(spec: Spec, backend: str, here: torch.device | None) -> Impl | None:
    """Return the implementation that runs ``spec`` on a GPU if it compiles at its launch, else None."""
    if here is not None:
        impl = select.choose(spec, here, backend).impl
        return impl if impl.ahead else None
    wanted = select.requested(backend)
    fit = (i for i in catalog.impls(spec.op) if i.ahead and wanted in ("auto", i.backend) and i.supports(spec))
    return next(fit, None)


def ready_to_train(model: nn.Module, x: Tensor) -> None:
    """Compile what a training step of ``model(x)`` launches at its first call with such an input.

    Further input sizes than :data:`TRAINING_SIZES` are left to their launches.
    If the model cannot be planned, each launch compiles its own kernel, as with RESNET_FAST_COMPILE_WORKERS=0.
    """
    rounded = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    key = (x.shape, x.dtype, x.device, rounded, model.training, torch.is_grad_enabled())
    seen = _seen.setdefault(model, set())
    if key in seen or len(seen) >= TRAINING_SIZES:
        return
    seen.add(key)
    if is_off() or not x.numel():
        return
    ahead = _ahead()
    try:
        shadow = _shadow(model)
        found = _calls_of(shadow, tuple(x.shape), x.dtype, torch.is_grad_enabled(), rounded, x.device)
    except Exception as error:  # a layer of the user's that does not run without memory
        log.info("kernels are compiled one by one: the model cannot be planned (%s: %s)", type(error).__name__, error)
        return
    with announced() as progress:
        ahead.compile_ahead(found, ahead.target_of(None, x.device), progress)
