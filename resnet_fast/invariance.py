"""Batch-invariant mode: the numbers of an image do not depend on the other images of its batch, nor on their count.

    with resnet_fast.batch_invariant():          this thread
    RESNET_FAST_BATCH_INVARIANT=1                the process

Floating-point sums depend on their order, and libraries and heuristics choose the order by the size of the whole
problem. In this mode each backend fixes it for one image:

* a backend with ``Impl.batch_invariant`` (our own GPU kernels) runs the whole batch. Its kernels add the products of
  an output in one order at any batch size, and their plan does not follow the batch either;
* any other backend (oneDNN, PyTorch) gets one image at a time, so that each image is the same problem;
* pooling and classifier of a net follow one of the two ways (:mod:`resnet_fast.blocks.head`);
* other layers between ops (squeeze-and-excitation, a shortcut of its own) get one image at a time.

The mode is a field of every spec and part of every key, so that switching it takes effect at once. It applies to
inference: what autograd records, batch statistics, tracers and stock layers raise. docs/notes/batch-invariance.md has
the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from . import flags

ALIGNMENT = 64
"""Bytes of a cache line, to which PyTorch aligns new memory. Images inside a batch may start anywhere."""

TODO = f"leave batch_invariant(), and unset {flags.BATCH_INVARIANT.name}"

_inside: ContextVar[bool] = ContextVar("resnet_fast_batch_invariant", default=False)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Compute each image alike at any batch size and place in the batch, to the last bit, inside the ``with``.

    It applies to inference in this thread (and asyncio task). ``RESNET_FAST_BATCH_INVARIANT=1`` applies to the process.
    Results are those of one machine, one backend and one number of threads; docs/limits.md says what raises an error.
    """
    before = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(before)


def is_on() -> bool:
    """Return whether the mode is on, in this thread or in the process."""
    return _inside.get() or flags.BATCH_INVARIANT.enabled()


def alike(x: Tensor) -> Tensor:
    """Return ``x`` as every batch has it: without gaps, and aligned. ``x`` itself if it already is.

    Kernels and libraries take other paths for unaligned or scattered images, which in a larger batch would depend on
    an image's place.
    """
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense and (x.is_meta or x.data_ptr() % ALIGNMENT == 0) else x.clone()


def singly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``function(x)``; in the mode one image at a time, for layers that PyTorch runs.

    Args:
        function: layers that treat each image (N, ...) by itself.
        x: a batch (N, ...).
    """
    if torch.compiler.is_compiling() or not is_on() or not x.shape[0]:
        return function(x)
    return torch.cat([function(alike(image)) for image in x.split(1)])
