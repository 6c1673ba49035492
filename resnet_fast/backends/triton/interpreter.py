"""Repair what the interpreter of Triton does unlike a GPU.

Loop bounds that are kernel arguments: ``range(0, K, BLOCK_K)`` calls ``__index__`` of a scalar. Triton 3.6 returns
``int()`` of an array of one element, which NumPy refuses since 2.4; Triton 3.8 squeezes the array first. Compiled
kernels are not affected.

Products in batch-invariant mode: a tensor core computes every row of a tile alike. NumPy's matrix product does not: it
takes rows in groups, and those that are left over are added in another order (half the rows of a 64x32 tile that were
all equal came out different). In the mode each row's products are added by a plain loop.
"""

from __future__ import annotations

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
