"""The machine while it is entered: it launches compiled kernels on CPU tensors, and keeps what it counted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import native, ops, stand_in
from ...errors import UserError, missing_package
from .faults import PtxFault

if TYPE_CHECKING:
    from .driver import LoadedKernel
    from .memory import Memory

GPUS = {80: "a100", 89: "rtx4090", 90: "h100", 120: "rtx5090"}
"""Architectures that the machine executes -> the GPU that kernels are planned for."""

ABSENT = {
    86: "take 89, whose kernels have the same instructions",
    100: "its tensor cores (tcgen05) are not modelled; take 90, or 120 for a GeForce card of that generation",
}
"""Architectures that people ask for and that the machine does not execute -> what to do."""

MOST_INSTRUCTIONS = 2_000_000_000
"""Warp instructions after which a launch counts as one that never ends."""

Rewrite = Callable[[str, str], str]
"""Called with a kernel's name and PTX; returns the PTX to execute in its place."""


@dataclass(frozen=True)
class PtxLaunch:
    """A launch that the machine executed.

    Attributes:
        kernel: name of the kernel.
        grid: blocks along each axis.
        threads: threads of a block.
        shared: bytes of dynamic shared memory.
        arguments: in words.
        parameters: the bytes of each parameter, scratch pointers last.
        binary: the kernel's cubin, which a GPU would execute; empty where nobody assembled it.
        report: what the engine reports: ``counters``, and ``findings`` where the machine is not strict.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: str
    parameters: tuple[bytes, ...]
    binary: bytes = field(default=b"", repr=False)
    report: Any = None

    def __str__(self) -> str:
        return f"{self.kernel}[{', '.join(map(str, self.grid))}] of {self.threads} threads ({self.arguments})"


def ptx_machine(
    arch: int = 90,
    seed: int = 0,
    limit: int = MOST_INSTRUCTIONS,
    strict: bool = True,
    rewrite: Rewrite | None = None,
    tf32: bool = False,
    pedantic: bool = False,
) -> PtxMachine:
    """Return a machine to enter by ``with``: inside, Triton's launches run on CPU tensors, compiled for ``arch``.

    ``use_backend("triton")`` then also takes CPU tensors, and plans for an A100 (80), an RTX 4090 (89), an H100 (90) or
    an RTX 5090 (120).

    Args:
        arch: compute capability times ten: 80, 89, 90 or 120.
        seed: of the order in which warps run. Results must not depend on it.
        limit: warp instructions of one launch after which it counts as one that never ends.
        strict: raise the first finding; otherwise findings are kept in ``launches[i].report``.
        rewrite: changes a kernel's PTX before it is executed, to try what the machine notices. It is called once for
            each compiled kernel, before its first launch.
        tf32: round the products of float32 convolutions to TF32, as a GPU does by default. Stock PyTorch on a CPU, with
            which results are compared, does not.
        pedantic: also report what PTX forbids and compilers rely on: copies for an mbarrier whose initialisation no
            fence follows, only a barrier.

    Raises:
        UserError: another architecture.
    """
    return PtxMachine(arch, seed, limit, strict, rewrite, tf32, pedantic)


class PtxMachine:
    """See :func:`ptx_machine`. ``launches``: what ran, in order. ``engine``: the module that executes PTX."""

    def __init__(
        self,
        arch: int,
        seed: int,
        limit: int,
        strict: bool,
        rewrite: Rewrite | None,
        tf32: bool,
        pedantic: bool = False,
        engine: Any = None,
    ) -> None:
        if arch not in GPUS:
            todo = ABSENT.get(arch, "choose one of them")
            raise UserError(f"an architecture among {', '.join(map(str, GPUS))}", repr(arch), todo)
        self.arch, self.seed, self.limit, self.strict = arch, seed, limit, strict
        self.gpu, self.tf32, self.pedantic = GPUS[arch], tf32, pedantic
        self.engine = engine
        self.launches: list[PtxLaunch] = []
        self._rewrite = rewrite
        self._memory: Memory | None = None
        self._modules: dict[str, Any] = {}
        self._before: Any = None

    def __enter__(self) -> PtxMachine:
        """Become the GPU of this process.

        Raises:
            UserError: no Triton or no assembler in it, Triton's interpreter is on, or a machine is entered already.
            BackendError: the package was built without the machine.
        """
        _check_process()
        if self.engine is None:
            self.engine = native.ptx()
        from triton.runtime import driver as triton_driver

        from . import native_launch
        from .driver import MachineDriver

        self._before = getattr(triton_driver, "_active", None)
        self._natively = native_launch.NativeLaunches(self)
        stand_in.put(self)
        triton_driver.set_active(MachineDriver(self.arch, self.gpu, self.launch))
        library = native_launch.library()
        if library is not None:
            self._natively.install(library)
        _decide_anew()
        return self

    def __exit__(self, *error: object) -> None:
        from triton.runtime import driver as triton_driver

        from . import native_launch

        library = native_launch.library()
        if library is not None:
            self._natively.remove(library)
        triton_driver.set_active(self._before)
        stand_in.put(None)
        self._memory = None
        _decide_anew()

    # ------------------------------------------------------------------------------------------------------- memory

    @property
    def memory(self) -> Memory:
        """The memory of the pass that runs now, or else of the launch."""
        if self._memory is None:
            from .memory import Memory

            return Memory(self.engine)
        return self._memory

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Keep account of written bytes over all launches inside the ``with``, and of memory allocated there."""
        from .memory import Memory

        outer, self._memory = self._memory, Memory(self.engine)
        try:
            with self._memory.watched():
                yield
        finally:
            self._memory = outer

    def lend(
        self, used: Sequence[Tensor | None], fresh: Sequence[Tensor], temporaries: Sequence[stand_in.Temporary]
    ) -> None:
        """Let the pass that is submitted next touch this memory and no other. Only ``used`` has been written to."""
        from .memory import Memory

        self._memory = Memory(self.engine)
        for i, t in enumerate(used):
            if t is not None:
                self._memory.add(t, f"tensor {i} of the pass")
        for i, t in enumerate(fresh):
            self._memory.add(t, f"new tensor {i} of the pass", written=False)
        self._memory.lend(temporaries)

    def fault(self) -> Exception | None:
        """Return the exception of the last native launch that failed, and forget it."""
        found, self._natively.caught = self._natively.caught, None
        return found

    # ----------------------------------------------------------------------------------------------------- launches

    def launch(
        self, kernel: LoadedKernel, grid: tuple[int, int, int], threads: int, shared: int, given: Sequence[Any]
    ) -> None:
        """Launch a kernel with the arguments that Triton was given.

        Raises:
            PtxFault: the launch did what it must not.
            UserError: arguments that are no parameters of the kernel.
        """
        from . import arguments

        memory = self.memory
        found = arguments.parameters(kernel.names, kernel.kinds, kernel.maps, given, memory, self.engine)
        for name, size in zip(("global_scratch", "profile_scratch"), kernel.scratch, strict=True):
            nbytes = arguments.scratch_bytes(size, grid, kernel.cluster[0])
            space = torch.empty(nbytes, dtype=torch.uint8) if nbytes else None
            if space is not None:
                memory.add(space, name, written=False)
            found.append(arguments.pointer(name, space, memory))
        words = ", ".join(one.text for one in found if one.text and "_scratch" not in one.name)
        self.run(kernel, grid, threads, shared, [one.packed for one in found], words, memory)

    def declared(self, kernel: LoadedKernel) -> Any:
        """Return (name, type, bytes, alignment) of each parameter that the PTX of a kernel declares."""
        return self._module(kernel).kernels[kernel.name]["params"]

    def run(
        self,
        kernel: LoadedKernel,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        packed: list[bytes],
        words: str,
        memory: Memory | None = None,
    ) -> None:
        """Execute a launch with these parameters.

        Raises:
            PtxFault: the launch did what it must not.
            UserError: a grid of other than whole numbers of 31 bits.
        """
        from . import arguments

        if not all(hasattr(n, "__index__") and -(2**31) <= n < 2**31 for n in grid):
            raise UserError(f"a grid of {kernel.name} of whole numbers below 2**31", repr(grid), "split the launch")
        arguments.check(kernel.name, self.declared(kernel), packed)
        if 0 in grid:
            return
        title = kernel.title or kernel.name
        launched = PtxLaunch(title, grid, threads, shared, words, tuple(packed), kernel.binary)
        try:
            report = self._module(kernel).launch(
                kernel.name, grid, (threads, 1, 1), shared, packed, (memory or self.memory).checked,
                seed=self.seed + len(self.launches), cluster=kernel.cluster, limit=self.limit, strict=self.strict,
                pedantic=self.pedantic,
            )  # fmt: skip
        except self.engine.Fault as found:
            raise PtxFault(found, str(launched)) from None
        self.launches.append(replace(launched, report=report))

    def _module(self, kernel: LoadedKernel) -> Any:
        found = self._modules.get(kernel.text)
        if found is None:
            text = kernel.text if self._rewrite is None else self._rewrite(kernel.name, kernel.text)
            if not isinstance(text, str):
                todo = "return the text that it was given to change nothing"
                raise UserError(f"PTX of {kernel.name} from the rewrite", type(text).__name__, todo)
            found = self.engine.Module(text, kernel.name)
            self._check_target(kernel.name, found.target)
            found.check(kernel.name)
            self._modules[kernel.text] = found
        return found

    def _check_target(self, kernel: str, target: str) -> None:
        """Raise UserError for PTX that a GPU of ``arch`` would not load: of a later one, or of features of another."""
        parts = re.fullmatch(r"sm_(\d+)([a-z]?)", target)
        if parts is None or int(parts[1]) > self.arch or (parts[2] and int(parts[1]) != self.arch):
            todo = "enter a machine of that architecture, or leave .target as the compiler wrote it"
            raise UserError(f"PTX of {kernel} that a GPU of sm_{self.arch} loads", f".target {target}", todo)


def _check_process() -> None:
    """Raise UserError if no machine can be entered in this process now."""
    if stand_in.present() is not None:
        raise UserError("no machine inside another", "a PTX machine that is entered already", "leave it first")
    try:
        import triton
    except ImportError as error:
        raise missing_package("triton", "whose compiler makes the PTX", error) from None
    if triton.knobs.runtime.interpret:
        raise UserError(
            "a process that compiles Triton's kernels", "TRITON_INTERPRET=1", "unset it and start the process again"
        )
    try:
        assembler = triton.knobs.nvidia.ptxas.path
    except Exception as error:  # Triton raises RuntimeError where it finds none that works
        assembler = str(error)
    if not os.access(assembler, os.X_OK):
        raise UserError(
            "ptxas, the assembler in Triton's package", assembler, "install triton again, or set TRITON_PTXAS_PATH"
        )


def _decide_anew() -> None:
    """Forget what was decided for CPU tensors before the machine was entered or left."""
    from ...backends.triton import device

    ops.forget_decisions()
    device.forget_devices()
