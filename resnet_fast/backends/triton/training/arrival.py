r"""Order the programs of one launch: who arrives last at a counter, and who waits for whom.

    programs of a channel block      [ chunk 0 ] [ chunk 1 ] [ chunk 2 ]   store partial results, then ``arrive``
                                           \          |          /
    the one that arrives last                  merges them in the order of the chunks, not of arrival
                                                      |
    programs that need its result          ``wait`` until every channel block has arrived

So one launch does the work of two or three, and its result does not depend on which program is last.

Counters. A pass (forward or backward) of a call has one row of int32 per norm: TICKET, READY, then one per channel
block. The pass's first launch sets all to 0, and each row is used by one launch of the pass. Passes on other streams
have other memory, a CUDA graph's replay clears its own, and a pass that failed leaves nothing behind.

The backward pass begins with the end of the block, which counts arrivals itself. No launch before it can clear these
counters, so the forward pass does, and saves them with its other tensors. The end leaves zeros: the program that
arrives last sets its counter to 0. So a second backward pass of the same graph finds zeros too, on the same stream, as
autograd runs it; what a saved-tensor hook brings back is zeros as well.

Memory. ``arrive`` is a release of everything that the program has stored, and an acquire of what others released
there: a barrier of the program's threads comes before the atomic addition, and Triton passes its result on behind
another one. L1 is not coherent, so what other programs of the launch stored is read past it (``cache_modifier=".cg"``).

No deadlock. How the GPU orders programs does not matter, in either of two ways:

    numbered   A program's work is the number that it draws from TICKET. One that waits has a higher number than those
               it waits for: they have begun, and wait for nothing. (finalize with packing, batch_norm.py)
    claimed    A program's work is its place in the grid, as in other kernels. If what it needs is not ready, it first
               draws numbers from TICKET and does the work of each, until none is left; then it waits. So whoever comes
               first does the work, and it has all begun, in programs that wait for nothing before they have done it.
               Once it is ready, a program costs one atomic, and none draws a number. (block_end.py, pool.py)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TICKET, READY, BLOCKS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Places in a row of counters: programs that have begun, channel blocks that are ready, the first channel block's."""

WIDTH = tl.constexpr(1024)

ROW = 64
"""A row's length is divisible by it, so that rows share no cache line."""


def counters_for(like: Tensor, norms: int, blocks: int, arrivals: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return counters to be cleared, int32: all, then as parts of them (norms, 2 + blocks or more) and (arrivals,).

    Args:
        like: a tensor on the device.
        norms: rows, one for each norm of the pass.
        blocks: the most channel blocks of a norm.
        arrivals: further counters, for the end of a block in the backward pass.
    """
    row, first = -(-(2 + blocks) // ROW) * ROW, -(-arrivals // ROW) * ROW
    every = like.new_empty(first + norms * row, dtype=torch.int32)
    return every, every[first:].view(norms, row), every[:arrivals]


@triton.jit
def clear_in_first_program(counters_ptr, counters):
    """Set ``counters`` counters to 0, in a launch that does not use them; nothing if ``counters_ptr`` is None."""
    if counters_ptr is not None:  # noqa: SIM102 (the compiler decides the outer condition, the program the inner one)
        if tl.program_id(0) == 0:
            for start in range(0, counters, WIDTH):
                at = start + tl.arange(0, WIDTH)
                tl.store(counters_ptr + at, tl.zeros_like(at), mask=at < counters)


@triton.jit
def draw(counter_ptr):
    """Return the next number, from 0; no other program gets it."""
    return tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def arrive(counter_ptr):
    """Return how many programs arrived before this one, after all its stores."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def arrived(counter_ptr):
    """Return how many programs have arrived; what they had stored by then can be read."""
    return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@triton.jit
def wait(counter_ptr, programs):
    """Return when ``programs`` programs have arrived."""
    while arrived(counter_ptr) < programs:
        pass
