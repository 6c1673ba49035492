"""Load the operand tiles of conv_wgrad: the place of each row in x, the gradient tile and the activation tile.

A K step has BLOCK_K rows: BLOCK_K / STREAMS neighbouring pixels of every stream (conv_wgrad.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import round_to
from . import vectors
from .conv_dgrad import packed_gradient
from .conv_fwd import activate, clamp
from .wgrad_sum import channel_vector

SCALE, SHIFT = tl.constexpr(vectors.SCALE), tl.constexpr(vectors.SHIFT)
LO, HI = tl.constexpr(vectors.LO), tl.constexpr(vectors.HI)
A, B, C = tl.constexpr(vectors.A), tl.constexpr(vectors.B), tl.constexpr(vectors.C)
BETA_HI, BETA_LO, GAMMA = tl.constexpr(vectors.BETA_HI), tl.constexpr(vectors.BETA_LO), tl.constexpr(vectors.GAMMA)


@triton.jit
def of_rows(per_stream, per_pixel, STREAMS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return ``per_stream`` (STREAMS,) + ``per_pixel`` (BLOCK_K / STREAMS,) for the rows of a step, (BLOCK_K,).

    Both count images or pixels. Multiply by a stride afterwards: after a reshape Triton 3.6 knows no alignment.
    """
    return tl.reshape(per_stream[:, None] + per_pixel[None, :], (BLOCK_K,))


@triton.jit
def to_rows(per_pixel, STREAMS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return ``per_pixel`` (BLOCK_K / STREAMS,) repeated for every stream, (BLOCK_K,)."""
    return tl.reshape(tl.broadcast_to(per_pixel[None, :], (STREAMS, BLOCK_K // STREAMS)), (BLOCK_K,))


@triton.jit
def next_places(n, ho, wo, dn, dh, dw, Ho, Wo):
    """Advance a place by ``dn`` images, ``dh`` rows and ``dw`` pixels, less than an image and less than a row."""
    wo += dw
    over = wo >= Wo
    wo = tl.where(over, wo - Wo, wo)
    ho += dh + over.to(tl.int32)
    over = ho >= Ho
    ho = tl.where(over, ho - Ho, ho)
    return n + dn + over.to(tl.int32), ho, wo


@triton.jit
def place_in_x(
    x_tile, n, ho, wo, real, down, across, H, W, x_stride_n, done,
    C_IN: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr,
    LINEAR: tl.constexpr, STREAMS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the addresses (rows, columns) in x of a step's pixels (n, ho, wo), and whether they are inside x.

    The second result has shape (rows, 1) or (rows, columns). LINEAR: the pixels of x are those of dy, and ``x_tile``
    begins with the first pixel of the split, ``done`` pixels before the step.
    """
    if LINEAR:
        lane = tl.arange(0, BLOCK_K // STREAMS)
        return x_tile + (to_rows(done + lane, STREAMS, BLOCK_K) * C_IN)[:, None], real[:, None]
    else:
        h, w = ho * STRIDE_H, wo * STRIDE_W
        image, pixel = to_rows(n, STREAMS, BLOCK_K) * x_stride_n, to_rows(h * W + w, STREAMS, BLOCK_K) * C_IN
        x_at = x_tile + (image + pixel)[:, None]
        if not PADDED:
            return x_at, real[:, None]
        elif WINDOW:
            h, w = to_rows(h, STREAMS, BLOCK_K)[:, None] + down, to_rows(w, STREAMS, BLOCK_K)[:, None] + across
            return x_at, real[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        else:
            h, w = h + down, w + across
            inside = to_rows((h >= 0) & (h < H) & (w >= 0) & (w < W), STREAMS, BLOCK_K)
            return x_at, (real & inside)[:, None]


@triton.jit
def gradient_tile(
    g_at, y_at, real, co_mask, first, second, third,
    BATCH: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return dy (exact) or q (packed) of a tile (channels, rows); rows that are not ``real`` have dy = 0 or q = GAMMA.

    ``first`` to ``third`` (channels,): A, B, C or BETA_HI, BETA_LO, GAMMA.
    """
    mask = real[None, :] if EVEN else real[None, :] & co_mask[:, None]
    g = tl.load(g_at, mask=mask, other=0.0)
    if PACKED:
        if BATCH:
            y = tl.load(y_at, mask=mask, other=0.0)
            shape: tl.constexpr = g.shape
            hi, lo = first[:, None].broadcast_to(shape), second[:, None].broadcast_to(shape)
            g = packed_gradient(g, y, hi, lo, third[:, None].broadcast_to(shape), UPCAST)
        return g
    else:
        dy = g.to(tl.float32) * first[:, None]
        if BATCH:
            y = tl.load(y_at, mask=mask, other=0.0)
            dy += y.to(tl.float32) * second[:, None] + tl.where(real[None, :], third[:, None], 0.0)
        return round_to(dy, g.dtype, UPCAST)


@triton.jit
def activation_tile(
    x_at, outside, inside, ci_mask, first, second,
    PROLOGUE: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return act (exact), z (packed) or x of a tile (rows, columns).

    Where not ``inside``, (rows, 1) or (rows, columns): act = x = 0, and z is the clamp of the row THRESHOLD, at the
    addresses ``outside``, or of 0 without padding. ``first``, ``second`` (columns,): LO, HI or SCALE, SHIFT. ALIGN: see
    conv_fwd.py. WINDOW: the columns are no run of channels, and z outside is the row THRESHOLD itself.
    """
    if PROLOGUE and PACKED and PADDED and not WINDOW:
        at = tl.where(inside, x_at, outside)
        at = tl.max_contiguous(tl.multiple_of(at, (ALIGN, ALIGN)), (1, x_at.shape[1]))
        x = tl.load(at) if EVEN else tl.load(at, mask=ci_mask[None, :], other=0.0)
    else:
        x = tl.load(x_at, mask=inside if EVEN else inside & ci_mask[None, :], other=0.0)
    if PROLOGUE:
        shape: tl.constexpr = x.shape
        first, second = first[None, :].broadcast_to(shape), second[None, :].broadcast_to(shape)
        if not PACKED:
            x = activate(x, first, second, inside, True, UPCAST)
        elif PADDED and WINDOW:
            zero = tl.load(outside, mask=ci_mask[None, :], other=0.0).broadcast_to(shape)
            z = clamp(x, first, second, UPCAST)
            x = tl.where(inside, z, zero.to(z.dtype))
        else:
            x = clamp(x, first, second, UPCAST)
    return x


@triton.jit
def gradient_vectors(grad_ptr, co, co_mask, BATCH: tl.constexpr, PACKED: tl.constexpr, C_OUT: tl.constexpr):
    """Load what :func:`gradient_tile` takes as ``first`` to ``third``, each (channels,); 0 where it reads none."""
    first, second, third = 0.0, 0.0, 0.0
    if PACKED and BATCH:
        first = channel_vector(grad_ptr, co, co_mask, BETA_HI, C_OUT)
        second = channel_vector(grad_ptr, co, co_mask, BETA_LO, C_OUT)
        third = channel_vector(grad_ptr, co, co_mask, GAMMA, C_OUT)
    elif not PACKED:
        first = channel_vector(grad_ptr, co, co_mask, A, C_OUT)
        second = channel_vector(grad_ptr, co, co_mask, B, C_OUT)
        third = channel_vector(grad_ptr, co, co_mask, C, C_OUT)
    return first, second, third


@triton.jit
def activation_vectors(act_ptr, ci, ci_mask, PROLOGUE: tl.constexpr, PACKED: tl.constexpr, C_IN: tl.constexpr):
    """Load what :func:`activation_tile` takes as ``first`` and ``second``, each (columns,); 0 without a prologue."""
    first, second = 0.0, 0.0
    if PROLOGUE:
        first = channel_vector(act_ptr, ci, ci_mask, LO if PACKED else SCALE, C_IN)
        second = channel_vector(act_ptr, ci, ci_mask, HI if PACKED else SHIFT, C_IN)
    return first, second
