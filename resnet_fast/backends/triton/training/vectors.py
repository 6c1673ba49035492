"""Define the per-channel vectors of one BatchNorm in a training step, and how kernels read a tensor through them.

A convolution stores its output ``y`` raw: before BatchNorm, minus a per-channel constant ``centre`` that is known
before the launch (the running mean; BatchNorm is invariant to a shift of its input), rounded once. BatchNorm and ReLU
turn it into

    act = relu(SCALE * y + SHIFT)         SCALE = gamma * INVSTD        SHIFT = beta - MEAN * SCALE

with MEAN and INVSTD of ``y`` as stored. No activation is written: a kernel that needs it reads ``y`` through these
vectors, in one of two ways.

exact    fp32 arithmetic, rounded to the dtype of ``y`` before a product.
packed   16-bit arithmetic on two elements per instruction: for SCALE > 0

             relu(SCALE*y + SHIFT) = FOLD * (clamp(y) - THR)     clamp(y) = min(max(y, lo), hi)
             FOLD = SCALE    lo = THR = -SHIFT/SCALE rounded to 16 bit    hi = inf    (SCALE < 0: lo = -inf, hi = THR)

         FOLD goes into the weight of the reading convolution (per input channel), and the constant
         ``-sum(w * FOLD * THR)`` per output channel into its epilogue. Padding reads as THR, which is activation 0.
         A channel is constant if its scale is 0, or so small that 16 bit cannot hold THR (|SHIFT| > 65504 |SCALE|):
         lo = hi = 1, THR = 0, FOLD = SHIFT if SHIFT > 0, otherwise lo = hi = THR = 0, FOLD = 0.
         An element passes ReLU if clamp(y) != THR in 16 bit, in every use, so that there is only one boundary.

The gradient of a raw output is not written either. With g the gradient of BatchNorm's output,

    dy = A*g + B*y + C            exact
    dy = A*q,  q = g + (BETA*y + GAMMA)      packed; BETA = B/A in two 16-bit terms (hi + lo), GAMMA = C/A

    A = SCALE    B = -A * INVSTD * s2    C = A * (INVSTD * s2 * MEAN - s1)    s1 = mean(g)   s2 = mean(g * xhat)

and B = C = 0 for a norm on constant statistics. xhat = (y - MEAN) * INVSTD. (Ioffe and Szegedy 2015, section 3.)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

CENTRE, MEAN, INVSTD, SCALE, SHIFT, INV_COUNT, BATCH_MEAN, BATCH_VAR, FOLD, THR = range(10)
"""Rows of ``vectors`` (10, C) fp32. INV_COUNT: 1 / values per channel over all processes, 0 for constant statistics.
BATCH_MEAN, BATCH_VAR: of the convolution's true output (centre added, variance unbiased), for the running statistics.
THR: the threshold as stored in 16 bit, widened."""

LO, HI, THRESHOLD = range(3)
"""Rows of ``clamp`` (3, C), in the dtype of ``y``; only for 16-bit tensors."""

A, B, C = range(3)
"""Rows of ``coefficients`` (3, C) fp32."""

BETA_HI, BETA_LO, GAMMA, NEG_GAMMA = range(4)
"""Rows of ``packed`` coefficients (4, C), in the dtype of ``y``; only for 16-bit tensors. NEG_GAMMA: -GAMMA, which
conv_dgrad reads in place of g outside the image."""


class Act(NamedTuple):
    """A convolution's input (N, C, H, W) in NHWC: raw with the vectors of its norm and ReLU, or an activation."""

    y: Tensor
    vectors: Tensor | None = None
    clamp: Tensor | None = None


class Grad(NamedTuple):
    """The gradient of a raw output (N, C, Ho, Wo): ``g`` and the coefficients that turn it into dy.

    ``batch``: the norm used the batch's statistics. Otherwise ``dy = A*g``, and ``y`` is not read. Without coefficients
    the norm is folded into the weight (fold.py), and ``dy = g``.
    """

    g: Tensor
    y: Tensor | None = None
    coefficients: Tensor | None = None
    packed: Tensor | None = None
    batch: bool = False

    def vectors(self, packed: bool) -> Tensor | None:
        """Return what a kernel reads g through; None where it takes it as it is."""
        return self.packed if packed else self.coefficients
