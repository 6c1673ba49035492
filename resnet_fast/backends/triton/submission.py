"""Run a planned pass: its launches in one native call, or its launchers one by one with the reason.

A pass is planned at its first call for a problem (:mod:`.program`). Kernels that nothing has compiled before are then
compiled, several at a time (:mod:`.compiling`), each as for the launch itself. The native library (csrc/ops/submit.cpp)
gets function, grid, and each argument's bytes in the order that Triton's launcher passes them: the arguments that were
not compiled in, then two scratch pointers. A later call allocates the results, writes the addresses of its tensors and
its numbers, and submits everything, on PyTorch's current stream.

The launchers run instead where that is impossible: in Triton's interpreter, without the native library, with cuDNN or a
collective between the kernels, for a kernel that needs more than a plain launch (clusters, scratch memory), for
addresses that the kernels were not compiled for, while a launch hook such as Proton's is installed, and by request.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor
from triton import knobs

from ... import flags, native, stand_in
from ...errors import BackendError
from . import compiling, program
from .fences import with_fences
from .launch import INTERPRETED, Launched
from .program import Described, Number, Outputs, Place, PlannedLaunch, Program

Launchers = Callable[[list[Any]], list[Any]]
"""Run the launches of a pass on the tensors of a call, then its numbers, and return its results."""

Fixed = Callable[[], Sequence[Tensor]]

Runner = Callable[[Outputs, Sequence[float]], "list[Tensor | None] | None"]
"""Run a planned pass on tensors and numbers; None where it cannot run on these tensors, and nothing was launched."""

NATIVELY = "launches submitted in one native call"
"""How a planned pass runs, as :class:`Passes` prints it."""

MOST_VARIANTS = 32
"""Passes that are planned for one problem. Inputs with other strides at each call make more than are worth keeping."""

MOST_SHARED = 228 * 1024
"""Bytes of shared memory up to which a launch needs no special attribute."""

FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
"""Triton's name of an argument's type -> its format in :mod:`struct`."""

HOST_TYPES = {8: 10, 9: 8, 10: 9}
"""Element types of tensor maps that Triton's compiler numbers in another way than the driver."""


@dataclass
class Passes:
    """The passes of one problem that were called: what runs each, and every way in which one ran."""

    runners: dict[Any, Runner | None] = field(default_factory=dict)
    ways: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return "; ".join(sorted(self.ways))

    def run(
        self,
        key: Any,
        launchers: Launchers,
        leaves: list[Any],
        fixed: Fixed = tuple,
        singly: Any = None,
        numbers: Sequence[float] = (),
    ) -> list[Any]:
        """Run a pass on ``leaves`` and return its results.

        Args:
            key: everything that decides the launches, apart from the problem and the leaves' strides and dtypes.
            launchers: run on the leaves, ``fixed`` and the numbers, to plan the pass or where it has no runner.
            leaves: the tensors of the call.
            fixed: returns tensors that are the same at every call with this object, packed weights for instance.
            singly: ``singly(leaves)`` in place of ``launchers`` where the pass has no runner.
            numbers: of the call, which may differ at each call with this key. Launchers pass them to kernels.
        """
        key = (key, *[None if t is None else (t.dtype, t.stride()) for t in leaves])
        try:
            runner = self.runners[key]
        except KeyError:
            runner = self._planned(key, launchers, leaves, fixed, len(numbers))
        if runner is not None:
            if _hooked():
                self._launched_singly("a launch hook is installed")
            else:
                results = runner(leaves, numbers)
                if results is not None:
                    return results
                self._launched_singly("a tensor's address is not divisible by 16")
        machine = stand_in.present()
        with nullcontext() if machine is None else machine.one_pass():
            found: list[Any] = launchers([*leaves, *fixed(), *numbers]) if singly is None else singly(leaves)
        return found

    def _planned(self, key: Any, launchers: Launchers, leaves: list[Any], fixed: Fixed, numbers: int) -> Runner | None:
        if len(self.runners) >= MOST_VARIANTS:
            self._launched_singly(f"{MOST_VARIANTS} variants of this problem have been planned")
            return None
        found = planned(launchers, leaves, fixed(), numbers)
        if isinstance(found, str):
            if found:
                self._launched_singly(found)
            self.runners[key] = None
            return None
        self.ways.add(NATIVELY)
        self.runners[key] = found
        return found

    def _launched_singly(self, reason: str) -> None:
        self.ways.add(f"launched one by one, because {reason}")


def _hooked(*names: str) -> bool:
    """Return whether one of these hooks of Triton's is set; by default those of every launch."""
    for name in names or ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(knobs.runtime, name)
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


def planned(launchers: Launchers, leaves: Outputs, fixed: Sequence[Tensor] = (), numbers: int = 0) -> Runner | str:
    """Plan a pass and return what runs it, or the reason why its launchers have to; empty where none is launched."""
    device = next(t.device for t in leaves if t is not None)
    if INTERPRETED or device.type == "meta":  # launches on meta tensors are recorded, see ahead.py
        return ""
    if flags.SUBMIT.read() != "native":
        return f"{flags.SUBMIT.name} asks for it"
    library = native.submitter()
    if isinstance(library, str):
        return library
    found = program.plan(launchers, [*leaves, *fixed], numbers)
    if isinstance(found, str):
        return found
    return bind(found, library, device, fixed)


@with_fences
def bind(found: Program, library: Any, device: torch.device, fixed: Sequence[Tensor] = ()) -> Runner | str:
    """Compile a program's kernels for ``device``, the current one, and return what submits it."""
    launches = [Launched(s.kernel, s.grid, tuple(map(_typed, s.arguments)), s.constants, None) for s in found.steps]
    compiling.ready(launches, triton.runtime.driver.active.get_current_target().arch)
    rows, kernels = [], []
    for step, launched in zip(found.steps, launches, strict=True):
        compiled = step.kernel.run(*launched.arguments, grid=step.grid, warmup=True, **step.constants)
        row = _row(step, compiled, _loaded(compiled), found.numbers)
        if isinstance(row, str):
            return row
        rows.append(row)
        kernels.append(compiled)  # Triton unloads a kernel's code with its object
    return _Native(found, library, tuple(rows), kernels, device, fixed)


class _Native:
    """Submit a program on one device. ``fixed``: its last leaves, which a call does not pass."""

    def __init__(
        self,
        found: Program,
        library: Any,
        rows: tuple[Any, ...],
        kernels: list[Any],
        device: torch.device,
        fixed: Sequence[Tensor],
    ) -> None:
        self.program, self.device, self.submit, self.fixed, self.kernels = found, device, library.submit, fixed, kernels
        self.handle = library.program(rows)
        self.index = triton.runtime.driver.active.get_current_device() if device.index is None else device.index
        self.machine = stand_in.present()
        self.stream = triton.runtime.driver.active.get_current_stream
        first = found.leaves - len(fixed)
        self.read = [i for i in found.read if i < first]
        self.addresses = [0] * found.leaves
        for i in found.read[len(self.read) :]:
            self.addresses[i] = fixed[i - first].data_ptr()

    def __call__(self, leaves: Outputs, given: Sequence[float] = ()) -> list[Tensor | None] | None:
        found, addresses = self.program, self.addresses.copy()
        for i in self.read:
            addresses[i] = leaves[i].data_ptr()  # type: ignore[union-attr]
        fresh, arena = found.allocate(self.device)
        addresses += [t.data_ptr() for t in fresh]
        addresses.append(arena.data_ptr())
        if self.machine is not None:
            temporaries = [
                stand_in.Temporary(addresses[t.buffer] + t.offset, t.nbytes, t.first, t.last) for t in found.temporaries
            ]
            self.machine.lend([*[leaves[i] for i in self.read], *self.fixed], fresh, temporaries)
        numbers = [number.of(given) for number in found.numbers]
        try:
            if not self.submit(self.handle, addresses, numbers, self.index, self.stream(self.index)):
                return None
        except RuntimeError as error:
            fault = None if self.machine is None else self.machine.fault()
            text = f"expected to launch Triton's kernels on {self.device}, got an error {error}"
            raise fault or BackendError(text) from None
        return found.results([*leaves, *self.fixed], fresh)


# ------------------------------------------------------------------------------------- a launch as the library takes it


class _Pointer:
    """What Triton's compiler looks at of a tensor: its dtype, and whether its address is divisible by 16."""

    def __init__(self, place: Place) -> None:
        self.dtype, self.shape, self.offset = place.dtype, place.shape, place.offset

    def data_ptr(self) -> int:
        return self.offset

    def stride(self) -> tuple[int, ...]:
        return ()


_functions: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Compiled kernels whose code was loaded without a launcher of Triton's -> the driver's handle."""


def _loaded(compiled: Any) -> int:
    """Return the driver's handle of a compiled kernel, after loading its code on the current device.

    Triton loads code together with a launcher of its own, which nothing calls here. Until version 3.6 that is a C
    module for each signature, which a C compiler builds at its first use on a machine, one after another. So there the
    code alone is loaded; if Triton launches the kernel later, it loads another copy.
    """
    from triton.backends.nvidia import driver as nvidia  # the interpreter also runs on a Triton without it

    makes_c = hasattr(nvidia, "make_launcher") and stand_in.present() is None
    if compiled.module is not None or not makes_c or _hooked("kernel_load_start_hook", "kernel_load_end_hook"):
        compiled._init_handles()
        return int(compiled.function)
    if compiled not in _functions:
        about, driver = compiled.metadata, triton.runtime.driver.active
        found = driver.utils.load_binary(compiled.name, compiled.kernel, about.shared, driver.get_current_device())
        _, function, _, _, most = found
        if 32 * about.num_warps > most:
            raise triton.runtime.errors.OutOfResources(32 * about.num_warps, most, "threads")
        _functions[compiled] = function
    return _functions[compiled]


def _row(step: PlannedLaunch, compiled: Any, function: int, numbers: tuple[Number, ...]) -> tuple[Any, ...] | str:
    """Return a launch of a compiled kernel as the library takes it, or why it cannot be one."""
    about = compiled.metadata
    obstacle = _obstacle(about)
    if obstacle:
        return f"{about.name} needs {obstacle}"
    values = dict(zip(step.kernel.arg_names, step.arguments, strict=False)) | step.constants
    maps = iter(getattr(about, "tensordesc_meta", None) or ())
    arguments: list[Any] = []
    for name, kind in compiled.src.signature.items():
        packed = _packed(kind, values.get(name), maps, numbers)
        if packed is None:
            return f"{about.name} takes an argument of the type {kind}"
        arguments += packed
    grid = (*step.grid, 1, 1)[:3]
    scratch = (b"\0" * 8, b"\0" * 8)
    return about.name, function, grid, 32 * about.num_warps, about.shared, (*arguments, *scratch)


def _obstacle(about: Any) -> str:
    """Return what a kernel needs apart from a plain launch; empty if nothing."""
    needs = {
        "a cluster": about.num_ctas != 1,
        "a cooperative launch": about.launch_cooperative_grid,
        "a dependent launch": about.launch_pdl,
        "scratch memory": about.global_scratch_size or about.profile_scratch_size,
        "more shared memory than a plain launch has": about.shared > MOST_SHARED,
        "instrumentation": getattr(about, "instrumentation_mode", ""),
    }
    return next((name for name, needed in needs.items() if needed), "")


def _typed(argument: Any) -> Any:
    """Return an argument as Triton's compiler specialises it."""
    if isinstance(argument, Place):
        return _Pointer(argument)
    if isinstance(argument, Described):
        from triton.tools.tensor_descriptor import TensorDescriptor

        base = _Pointer(argument.base)
        return TensorDescriptor(base, list(argument.shape), list(argument.strides), list(argument.block))
    return 0.5 if isinstance(argument, Number) else argument  # the compiler looks at no float's value


def _packed(kind: Any, value: Any, maps: Any, numbers: tuple[Number, ...]) -> list[Any] | None:
    """Return an argument of the type ``kind`` as the kernel's parameters; None if that is not known."""
    if kind == "constexpr":
        return []
    if isinstance(value, Place) and isinstance(kind, str) and kind.startswith("*"):
        return [(value.buffer, value.offset)]
    if isinstance(value, Described):
        return _map_of(value, next(maps, None))
    if isinstance(value, Number):
        return [(numbers.index(value),)] if kind == "fp32" else None
    return [struct.pack("<" + FORMATS[kind], value)] if kind in FORMATS else None


def _map_of(value: Described, about: dict[str, Any] | None) -> list[Any] | None:
    """Return a tensor map with its shape and strides; None if the kernel reads the tensor without one."""
    if about is None or about["fp4_padded"] or about.get("is_im2col"):
        return None
    size, kind = about["elem_size"], about["elem_type"]
    strides = tuple(size * s for s in value.strides[:-1])
    tensor_map = (
        value.base.buffer, value.base.offset, HOST_TYPES.get(kind, kind), about["swizzle"], value.shape, strides,
        tuple(about["block_size"]), 0, size,
    )  # fmt: skip
    numbers = [struct.pack("<i", n) for n in value.shape] + [struct.pack("<q", n) for n in value.strides]
    return [tensor_map, *numbers]
