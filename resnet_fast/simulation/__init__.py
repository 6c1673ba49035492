"""The cycle model: what a compiled kernel's machine code costs.

    kernel = read_kernel(cubin, "_conv_bn_act_1x1_fwd_kernel")          # instructions with control words

A compiled kernel's cost is in its machine code (SASS): which instructions the assembler chose, how it ordered them, and
when each may issue. :mod:`.listing` reads the code, :mod:`.operands` and :mod:`.touched` say which registers an
instruction touches, :mod:`.cubin` reads what the code needs of a launch.
"""

from .kernel import Kernel, read_kernel

__all__ = ["Kernel", "read_kernel"]
