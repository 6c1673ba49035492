"""Make the interpreter of Triton 3.6 accept loop bounds that are kernel arguments, with a current NumPy.

``range(0, K, BLOCK_K)`` calls ``__index__`` of a scalar. Triton 3.6 returns ``int()`` of an array of one element, which
NumPy refuses since 2.4; Triton 3.8 squeezes the array first. Compiled kernels are not affected.
"""

from __future__ import annotations

from typing import Any


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
