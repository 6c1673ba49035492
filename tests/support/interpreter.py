"""Make Triton's interpreter quicker without changing what it computes."""

from __future__ import annotations

import dataclasses
from typing import Any


def quicken() -> None:
    """Skip what the interpreter repeats or computes for nothing. It takes effect at the next launch."""
    _patch_language_once_per_launch()
    _check_no_overflow_in_vain()
    _know_dtypes()


def _patch_language_once_per_launch() -> None:
    """Skip what the interpreter repeats at every call of a device function.

    It replaces the functions of ``triton.language`` when a launch begins, and again, to no effect, whenever the kernel
    calls a jitted function: a quarter of the time of these tests. Here it does so once for each module's globals.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # the end of a launch takes its patches back
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh


def _check_no_overflow_in_vain() -> None:
    """Leave out the check of sums and products of integers for overflow, whose result the interpreter discards.

    It repeats each operation in 64 bits, compares the result with the bounds of 32, and hands the comparison to
    ``device_assert``, which does nothing without ``debug``: half of the time of these tests.
    """
    from triton.runtime.interpreter import interpreter_builder

    if not interpreter_builder.options.debug:
        interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)


def _know_dtypes() -> None:
    """Look NumPy's type of a scalar type up in one table, which the interpreter builds anew for each question."""
    import triton.language as tl
    from triton.runtime import interpreter

    look_up = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        scalar = dtype.element_ty if type(dtype) is tl.block_type else dtype
        if type(scalar) is not tl.dtype:
            return look_up(dtype)
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = remembered
