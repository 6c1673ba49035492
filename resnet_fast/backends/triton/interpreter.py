"""Repair what the interpreter of Triton does unlike a GPU, and skip what it does for nothing.

Loop bounds that are kernel arguments: ``range(0, K, BLOCK_K)`` calls ``__index__`` of a scalar. Triton 3.6 returns
``int()`` of an array of one element, which NumPy refuses since 2.4; Triton 3.8 squeezes the array first. Compiled
kernels are not affected.

Products in batch-invariant mode: a tensor core computes every row of a tile alike. NumPy's matrix product does not: it
takes rows in groups, and those that are left over are added in another order (half the rows of a 64x32 tile that were
all equal came out different). In the mode each row's products are added by a plain loop.

What it repeats, or computes for nothing, is more than half of its time. Without that every kernel computes the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ... import invariance


def repair() -> None:
    """Patch the interpreter. Idempotent and harmless with later versions; takes effect at the next launch."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor
    if getattr(plain, "__module__", None) == __name__:
        return

    def patched(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    plain_dot = interpreter.InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        wide = d.data.dtype
        if not invariance.is_on() or a.data.ndim != 2 or a.data.dtype.kind != "f" or b.data.dtype.kind != "f":
            return plain_dot(self, a, b, d, *options)
        products = np.einsum("mk,kn->mn", a.data.astype(wide), b.data.astype(wide))
        return interpreter.TensorHandle(products + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot


def quicken() -> None:
    """Skip what the interpreter repeats or computes for nothing. Idempotent; takes effect at the next launch."""
    from triton.runtime import interpreter

    if getattr(interpreter._patch_lang, "__module__", None) != __name__:
        _patch_language_once_per_launch(interpreter)
        _check_no_overflow_in_vain(interpreter.interpreter_builder)
        _know_dtypes(interpreter)


def _patch_language_once_per_launch(interpreter: Any) -> None:
    """Patch the functions of ``triton.language`` once per launch for each module's globals.

    The interpreter does so when a launch begins, and again, to no effect, whenever the kernel calls a jitted function.
    """
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


def _check_no_overflow_in_vain(builder: Any) -> None:
    """Leave out the check of sums and products of integers for overflow, whose result the interpreter discards.

    It repeats each operation in 64 bits, compares the result with the bounds of 32, and hands the comparison to
    ``device_assert``, which does nothing without ``debug``.
    """
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _know_dtypes(interpreter: Any) -> None:
    """Look NumPy's type of a scalar type up in one table, which the interpreter builds anew for each question."""
    import triton.language as tl

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
