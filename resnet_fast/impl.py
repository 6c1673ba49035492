"""A backend's implementation of one op, and the choice of one: what backends declare and dispatch decides by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .current_device import on_device_of_call
from .locks import load
from .spec import YES, NetSpec, Spec, Verdict

if TYPE_CHECKING:
    import torch

    from .calls import Call, NetCall


class Training(Protocol):
    """A module whose forward and backward passes are code of its own, in place of a run that autograd records.

    ``forward(call, spec, save, update)`` returns the output, the tensors that ``backward`` needs in addition, and the
    launch plan, which prints as a text. With ``update`` its kernels move the running statistics of every norm with
    batch statistics; a forward pass that fails before its first launch leaves all of them unchanged. Otherwise, for
    ops that a compiler traces, ``statistics(call, saved)`` returns the batch's (mean, unbiased variance) of every norm
    with batch statistics, None for the others. ``backward(call, spec, saved, y, dy, needs)`` returns the gradients that
    ``needs`` asks for, None for the others; both are in the order of :meth:`resnet_fast.calls.Call.leaves`.
    ``shapes(call, spec, save)`` returns (shape, dtype, layout) of each tensor in ``saved``, for compilers.
    ``trains_on(device)`` returns a verdict on training on a device, which may take a proof there, and whether the
    verdict lasts; otherwise it is asked for again at the next call.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    statistics: Callable[..., Any]
    shapes: Callable[..., Any]
    trains_on: Callable[[torch.device], tuple[Verdict, bool]]


class PlannedCall(NamedTuple):
    """A call whose kernels are compiled ahead, with tensors on ``meta``.

    Attributes:
        call: of an op or of a whole net.
        spec: its problem.
        save: what training keeps for the backward pass.
        needs: for training, whether the gradient of each of ``Call.leaves`` is wanted; None for inference.
    """

    call: Call | NetCall
    spec: Spec | NetSpec
    save: str = "raw"
    needs: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Warmed:
    """What compiling ahead did.

    Attributes:
        kernels: number of distinct kernels that the calls launch.
        compiled: number of those that were compiled now.
        there: number of those that the compiler's cache had.
        failed: (kernel and config, reason) of each that could not be compiled.
        seconds: duration, with planning.
        workers: how many were compiled at a time.
    """

    kernels: int
    compiled: int
    there: int
    failed: tuple[tuple[str, str], ...]
    seconds: float
    workers: int

    def __str__(self) -> str:
        text = f"{self.kernels} kernels: {self.compiled} compiled, {self.there} there already, in {self.seconds:.1f} s"
        return text + "".join(f"; refused {what}: {why}" for what, why in self.failed)


class Ahead(Protocol):
    """A module of a backend whose kernels are compiled at their first launch, and can be compiled ahead of it.

    ``target_of(gpu, device)`` returns a function that describes the GPU to compile for: the one of that name, or the
    present one. ``compile_ahead(calls, target_of, on_progress)`` compiles what the calls launch and returns a
    :class:`Warmed`; it needs no GPU and launches nothing. ``meta_call(call)`` returns a call without memory.
    """

    target_of: Callable[..., Any]
    compile_ahead: Callable[..., Warmed]
    meta_call: Callable[[Any], Any]


@dataclass(frozen=True)
class Upkeep:
    """What the states of an implementation cost.

    ``elements(call, spec, earlier)``: how many weights ``prepare`` would fold and pack, without those shared with
    ``earlier`` states. ``nbytes(states)``: memory that the states hold; shared parts count once. A state that has grown
    since it was prepared sets ``grown``.
    """

    elements: Callable[[Any, Any, list[Any]], int]
    nbytes: Callable[[list[Any]], int]


@dataclass(frozen=True)
class Impl:
    """One backend's implementation of one op, and the backend's policy for it.

    Attributes:
        op: name of the op.
        backend: name of the backend.
        rank: among several that accept a spec, the highest wins. Below the reference's 0, ``auto`` never takes it.
        supports: ``supports(spec)`` returns a :class:`~resnet_fast.spec.Verdict` on a problem on one of ``devices``.
        module: the module of the functions :attr:`run` and :attr:`prepare`, imported at their first use.
        devices: the device types that it runs on; empty for all. Functions of an implementation that runs on ``cuda``
            run with the device of the call's tensors current.
        accepts: ``accepts(device)`` returns a verdict on a device of such a type. GPUs of one machine may differ.
        prepares: whether the module has ``prepare``.
        upkeep: with it, preparing must pay (:mod:`resnet_fast.packing_budget`) unless the backend was asked for by
            name.
        training: name of a :class:`Training` module, which then runs every spec with ``grad`` or batch statistics.
            Without one, an implementation that accepts ``grad`` returns a result that autograd can differentiate.
        trains: dtypes that ``training`` takes.
        nhwc: whether it works in NHWC, so that a net or a stage converts its input once.
        tile: ``tile(largest, itemsize)`` returns how many images to send through a whole net at a time, where the
            largest activation of an image has ``largest`` elements; None to send all of them.
        ahead: name of an :class:`Ahead` module, if its kernels are compiled at their first launch.
        batch_invariant: whether it computes an image alike in any batch where the spec is ``invariant``. Otherwise it
            then gets one image at a time.
        announces: whether a profiler has to be told of its convolutions, which are no ATen operators.
    """

    op: str
    backend: str
    rank: int
    supports: Callable[[Any], Verdict]
    module: str
    devices: tuple[str, ...] = ()
    accepts: Callable[[torch.device], Verdict] = lambda device: YES
    prepares: bool = False
    upkeep: Upkeep | None = None
    training: str = ""
    trains: tuple[str, ...] = ()
    nhwc: bool = False
    tile: Callable[[int, int], int] | None = None
    batch_invariant: bool = False
    announces: bool = False
    ahead: str = ""

    @cached_property
    def run(self) -> Callable[[Any, Any, Any], Any]:
        """``run(call, spec, state)``: execute a call of :mod:`resnet_fast.calls`.

        Returns the output, of the shape, dtype and layout that the spec states, which has elements; or a
        :class:`~resnet_fast.spec.Verdict` where the numbers in the call's tensors rule it out and nothing was written.
        """
        return self._entered(load(self.module).run)

    @cached_property
    def prepare(self) -> Callable[[Any, Any, list[Any]], Any]:
        """``prepare(call, spec, earlier)``: the state that ``run`` takes, computed from the call's parameters.

        Packed weights and launches; kept until a parameter changes. ``earlier``: the states of the same parameters for
        inputs of other sizes, to share parts with.
        """
        return self._entered(load(self.module).prepare)

    @cached_property
    def trainer(self) -> Training:
        """The module that ``training`` names."""
        return _Trainer(load(self.training), self._entered)

    @cached_property
    def compiler(self) -> Ahead:
        """The module that ``ahead`` names."""
        module: Any = load(self.ahead)
        return module

    def runs_on(self, device: torch.device) -> Verdict:
        """Return whether it runs on this device."""
        if self.devices and device.type not in self.devices:
            where = " or ".join(self.devices)
            return Verdict.no(f"a tensor on {where}", f"one on {device.type}", "move the model and its input")
        return self.accepts(device)

    def _entered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function(call, ...)`` on the call's device; as it is where PyTorch's operators enter it themselves.

        An implementation for every device type is made of these.
        """
        return on_device_of_call(function) if "cuda" in self.devices else function


class _Trainer:
    """A :class:`Training` module, both passes on the device of their call; autograd runs the second in its threads."""

    def __init__(self, module: Any, entered: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self._module = module
        self.forward, self.backward = entered(module.forward), entered(module.backward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(frozen=True)
class Choice:
    """The chosen implementation, and the reason against every other backend by name.

    ``fell_back``: why a faster backend that works on this machine did not take the spec; empty where none was passed
    over. ``loud``: that is worth a warning in training too, where the reference is the usual choice without a GPU.
    ``lasts``: whether the next call with the same spec may take it without asking again.
    """

    impl: Impl
    refused: tuple[tuple[str, str], ...]
    fell_back: str = ""
    loud: bool = False
    lasts: bool = True
