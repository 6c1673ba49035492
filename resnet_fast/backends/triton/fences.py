"""A fence that Triton before 3.7.1 leaves out on Hopper, added to the PTX of this backend's kernels.

`cp.async` writes to shared memory as ordinary stores do, by the generic proxy; `wgmma` reads by the async proxy.
Between the two the PTX ISA asks for `fence.proxy.async`, beside the wait and the barrier. Triton 3.6 and 3.7.0 emit it
after stores alone, and not after the copies of a pipelined loop:

    cp.async.wait_group 4;  bar.sync 0;  [fence.proxy.async.shared::cta;]  wgmma.fence...;  wgmma.mma_async...

Triton 3.7.1 puts it there itself, at the same place. docs/notes/every-version.md tells how it was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import triton

P = ParamSpec("P")
R = TypeVar("R")

MISSING = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3]) < (3, 7, 1)
"""Whether this Triton leaves the fence out."""

_ours: ContextVar[bool] = ContextVar("resnet_fast_triton_fences", default=False)


def fenced(ptx: str) -> str:
    """Return ``ptx`` with a fence before each group of products, if it copies asynchronously into shared memory."""
    if not re.search(r"cp\.async\.c[ag]\.", ptx):
        return ptx
    return re.sub(r"wgmma\.fence\.sync\.aligned;", r"fence.proxy.async.shared::cta;\n\t\g<0>", ptx)


def with_fences(function: Callable[P, R]) -> Callable[P, R]:
    """Have what ``function`` compiles fenced; return ``function`` itself where Triton does that."""
    if not MISSING:
        return function

    @wraps(function)
    def compiling(*args: P.args, **kwargs: P.kwargs) -> R:
        before = _ours.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _ours.reset(before)

    return compiling


def repair() -> None:
    """Have Triton's compiler fence the PTX of kernels that are compiled by functions :func:`with_fences`.

    The key of Triton's cache differs too, so that a kernel which was stored without the fence is not taken.
    """
    from triton.backends.nvidia.compiler import CUDABackend

    make_ptx, key = CUDABackend.make_ptx, CUDABackend.hash

    def make_fenced_ptx(self: Any, *args: Any) -> Any:
        ptx = make_ptx(self, *args)
        return fenced(ptx) if _ours.get() else ptx

    def fenced_key(self: Any) -> str:
        return f"{key(self)}-fenced" if _ours.get() else str(key(self))

    CUDABackend.make_ptx, CUDABackend.hash = make_fenced_ptx, fenced_key


if MISSING:
    repair()
