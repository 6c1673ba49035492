"""The cycle model: what a compiled kernel's machine code costs.

    kernel = read_kernel(cubin, "_conv_bn_act_1x1_fwd_kernel")          # instructions with control words
    walked = walk(Launch(kernel, grid, threads, shared, parameters, memory), blocks=range(4))
    walked.paths, walked.blocks, walked.sectors                         # what a model of the hardware takes

A compiled kernel's cost is in its machine code (SASS): which instructions the assembler chose, how it ordered them, and
when each may issue. :mod:`.listing` reads the code, :mod:`.operands` and :mod:`.touched` say which registers an
instruction touches, :mod:`.cubin` reads what the code needs of a launch. :mod:`.walk` executes the part of the code
that decides branches and addresses. :mod:`.launches` gives the time.
"""

from .kernel import Kernel, read_kernel
from .walk import BlockWalk, Launch, MemoryRange, Walk, WarpWalk, walk

__all__ = ["BlockWalk", "Kernel", "Launch", "MemoryRange", "Walk", "WarpWalk", "read_kernel", "walk"]
