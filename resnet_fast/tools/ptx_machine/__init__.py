"""Run compiled kernels on CPU tensors: Triton's PTX for a GPU, in a machine that checks every access.

    with ptx_machine(arch=90, seed=0) as machine:
        kernel[grid](x, y, n, BLOCK=1024)                       # any triton.jit function, on CPU tensors
        with use_backend("triton"):
            y = block(x)                                        # what a GPU runs: plans, launchers, native submission
        print(machine.launches[-1])                             # kernel, grid, threads, arguments
        print(machine.launches[-1].report.counters)

A launch goes the way that it goes on a GPU. Triton's driver is :mod:`.driver`, which packs arguments by the compiled
kernel's signature (:mod:`.arguments`). The native library submits planned passes to the functions of
:mod:`.native_launch`. :mod:`.memory` says which bytes a launch may touch, and which of them nobody has written. The
module ``_ptx`` (csrc/ptx) executes, and reports what a GPU would not: a :class:`PtxFault` names kernel, PTX line,
source line, block, warp and lane.

PTX is the compiler's output. The assembler's (SASS) is not executed here.
"""

from .faults import PtxFault
from .machine import PtxLaunch, PtxMachine, ptx_machine

__all__ = ["PtxFault", "PtxLaunch", "PtxMachine", "ptx_machine"]
