r"""The end of a residual block in training: BatchNorm + shortcut + ReLU of a raw output, and its gradient.

    z[m, c] = relu( SCALE*y + SHIFT + shortcut )          shortcut: nothing | a tensor | SCALE_d*yd + SHIFT_d, yd raw
    g[m, c] = dz where z > 0        per walk of rows: sum g,  sum g * (y - MEAN)  and, for yd,  sum g * (yd - MEAN_d)

    y (N, C, H, W) NHWC, seen as rows m of C channels; the vectors of vectors.py

Saved bytes, in passes over a tensor of the size of y. Forward: stock 2 + 3 + 2 for the norm, the add and the ReLU, and
2 more for a projection's norm; here 3. Backward: stock 3 + 2 for the ReLU and the sums of BatchNorm, and 2 for a
projection; here 4, and 1 for a projection. All branches use the same g. Without a shortcut the forward turns a raw
output into an activation, for the convolutions that run on cuDNN.

      forward: one tile per program         backward: a program walks down m; every thread sums for its channels
        [ y ] [ shortcut ] -> [ z ]           [ dz ] [ z ] [ y ] [ yd ] -> [ g ]   sum g   sum g*(y - MEAN)   ...
                                              [ dz ] [ z ] [ y ] [ yd ] -> [ g ]     + in registers, step by step
                                                                                     = once over the threads, at the end

Saved launches. The vectors of the last norm, and of the projection's, need not be ready: programs that come first
finalize them (batch_norm.py) in the order of arrival.py, and then wait with their rows of y and of the shortcut at
hand. Programs that come later find them ready, by one atomic. Backward, the last programs to arrive turn the sums into
coefficients (norm_gradient.py), and programs behind them pack the weights of the dgrads that follow (pack.py).

Numerics: fp32 in the order scale, shift, add, ReLU, with one rounding at the store; PyTorch rounds after the norm and
after the add. ReLU keeps NaN, and its gradient passes where z is NaN, as in ATen. Sums are of g as stored.

Alone: ``TRITON_INTERPRET=1 python -m pytest tests/backends/triton/training/test_block_end.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import submit, upcasts
from ..tiles import relu, round_to
from .arrival import clear_in_first_program
from .batch_norm import BLOCK_C as MERGED_C
from .batch_norm import FINALIZATION_NUMBERS, FIRST_T, finalization_arguments, finalize_first, wait_for_vectors
from .norm_gradient import SUMMED, Finish, finish_arguments, finish_last
from .pack import NO_DGRAD, Passenger, pack_dgrad_program
from .passes import (
    MEAN,
    SCALE,
    SHIFT,
    channels_of_program,
    empty_image,
    grid_of,
    mask_of,
    rows_of,
    tile_of,
    vector,
    walk,
)


@triton.jit(do_not_specialize=["M", *FINALIZATION_NUMBERS])
def _block_end_fwd_kernel(
    y_ptr, vectors_ptr, shortcut_ptr, shortcut_vectors_ptr, z_ptr, M,
    partials_ptr, merged_ptr, counters_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr, mean_ptr, var_ptr, found_ptr,
    tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride,
    partials_d_ptr, merged_d_ptr, counters_d_ptr, gamma_d_ptr, beta_d_ptr, bias_d_ptr, centre_d_ptr, mean_d_ptr,
    var_d_ptr, found_d_ptr, tiles_d, chunks_d, chunk_d, rows_d, count_d, eps_d, keep_d, momentum_d,
    mean_stride_d, var_stride_d,
    C: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    MERGED_T: tl.constexpr, MERGED_C: tl.constexpr,
):  # fmt: skip
    CACHE: tl.constexpr = "" if partials_ptr is None else ".cg"
    if partials_ptr is not None:
        early = finalize_first(
            partials_ptr, merged_ptr, counters_ptr, gamma_ptr, beta_ptr, bias_ptr, centre_ptr, mean_ptr, var_ptr,
            found_ptr, tiles, chunks, chunk, rows, count, eps, keep, momentum, mean_stride, var_stride,
            partials_d_ptr, merged_d_ptr, counters_d_ptr, gamma_d_ptr, beta_d_ptr, bias_d_ptr, centre_d_ptr, mean_d_ptr,
            var_d_ptr, found_d_ptr, tiles_d, chunks_d, chunk_d, rows_d, count_d, eps_d, keep_d, momentum_d,
            mean_stride_d, var_stride_d,
            C, MERGED_T, MERGED_C,
        )  # fmt: skip
    tile, c = channels_of_program(C, BLOCK_C)
    first = tile * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    mask = mask_of(row < M - first, c, C, BLOCK_C)
    start, at = first.to(tl.int64) * C, row[:, None] * C + c[None, :]
    y = tl.load(y_ptr + start + at, mask=mask, other=0.0)
    if shortcut_ptr is not None:
        shortcut = tl.load(shortcut_ptr + start + at, mask=mask, other=0.0)
    if partials_ptr is not None:
        wait_for_vectors(early, counters_ptr, partials_d_ptr, C, MERGED_C)
    z = y.to(tl.float32) * vector(vectors_ptr, c, SCALE, C, CACHE) + vector(vectors_ptr, c, SHIFT, C, CACHE)
    if shortcut_ptr is not None:
        shortcut = shortcut.to(tl.float32)
        if shortcut_vectors_ptr is not None:
            scale = vector(shortcut_vectors_ptr, c, SCALE, C, CACHE)
            shortcut = shortcut * scale + vector(shortcut_vectors_ptr, c, SHIFT, C, CACHE)
        z += shortcut
    if RELU:
        z = relu(z)
    tl.store(z_ptr + start + at, round_to(z, z_ptr.dtype.element_ty, UPCAST), mask=mask)


def block_end(
    y: Tensor,
    vectors: Tensor,
    shortcut: Tensor | None,
    shortcut_vectors: Tensor | None,
    relu: bool,
    finalizations: Sequence[Passenger] = (),
) -> Tensor:
    """Return z (N, C, H, W), dense NHWC.

    Args:
        y: raw output (N, C, H, W), dense NHWC.
        vectors: (10, C) of its norm.
        shortcut: added tensor (N, C, H, W), dense NHWC, or None.
        shortcut_vectors: (10, C) if the shortcut is raw too, otherwise None.
        relu: whether a ReLU follows.
        finalizations: of :func:`batch_norm.finalization`, which compute those vectors that are not known yet.
    """
    z, tile = empty_image(y), tile_of(y, 4)
    submit(
        _block_end_fwd_kernel, grid_of(-(-rows_of(y) // tile[0]), y, tile[1]),
        y, vectors, shortcut, shortcut_vectors, z, rows_of(y), *finalization_arguments(finalizations),
        C=y.shape[1], RELU=relu, UPCAST=upcasts(y.dtype), BLOCK_M=tile[0], BLOCK_C=tile[1],
        MERGED_T=FIRST_T, MERGED_C=MERGED_C,
    )  # fmt: skip
    return z


@triton.jit
def _block_end_bwd_program(
    dz_ptr, z_ptr, y_ptr, vectors_ptr, yd_ptr, shortcut_vectors_ptr, g_ptr, partials_ptr, partials_d_ptr,
    arrivals_ptr, M, tiles, steps, chunks, chunk,
    merged_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr,
    merged_d_ptr, coefficients_d_ptr, packed_d_ptr, dgamma_d_ptr, dbeta_d_ptr, dbias_d_ptr,
    C: tl.constexpr, BATCH: tl.constexpr, BATCH_D: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SUMMED_T: tl.constexpr,
):  # fmt: skip
    tile, c = channels_of_program(C, BLOCK_C)
    first = tile * steps * BLOCK_M
    rows = min(M - first, steps * BLOCK_M)
    start = first.to(tl.int64) * C
    mean = vector(vectors_ptr, c, MEAN, C)
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    sum_y = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    if yd_ptr is not None:
        mean_d = vector(shortcut_vectors_ptr, c, MEAN, C)
        sum_d = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for step in range(0, steps):
        row = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = mask_of(row < rows, c, C, BLOCK_C)
        at = row[:, None] * C + c[None, :]
        dz = tl.load(dz_ptr + start + at, mask=mask, other=0.0)
        y = tl.load(y_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        if yd_ptr is not None:
            yd = tl.load(yd_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        g = dz.to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.where(z <= 0.0, 0.0, g)
            tl.store(g_ptr + start + at, round_to(g, g_ptr.dtype.element_ty, UPCAST), mask=mask)
        sum_g += g
        sum_y += g * (y - mean)
        if yd_ptr is not None:
            sum_d += g * (yd - mean_d)
    out, c_mask = tile * C + c, c < C
    total = tl.sum(sum_g, axis=0)
    tl.store(partials_ptr + out, total, mask=c_mask)
    tl.store(partials_ptr + tiles * C + out, tl.sum(sum_y, axis=0), mask=c_mask)
    if yd_ptr is not None:
        tl.store(partials_d_ptr + out, total, mask=c_mask)
        tl.store(partials_d_ptr + tiles * C + out, tl.sum(sum_d, axis=0), mask=c_mask)
    if coefficients_ptr is not None:
        tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        finish_last(
            tile, tl.program_id(0) % tiles_c, c, tiles, chunks, chunk, arrivals_ptr,
            partials_ptr, merged_ptr, vectors_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr,
            partials_d_ptr, merged_d_ptr, shortcut_vectors_ptr, coefficients_d_ptr, packed_d_ptr,
            dgamma_d_ptr, dbeta_d_ptr, dbias_d_ptr,
            C, BATCH, BATCH_D, UPCAST, SUMMED_T, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "tiles", "steps", "chunks", "chunk", "counters", "packing"])
def _block_end_bwd_kernel(
    dz_ptr, z_ptr, y_ptr, vectors_ptr, yd_ptr, shortcut_vectors_ptr, g_ptr, partials_ptr, partials_d_ptr,
    counters_ptr, counters, arrivals_ptr, M, tiles, steps, chunks, chunk,
    merged_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr,
    merged_d_ptr, coefficients_d_ptr, packed_d_ptr, dgamma_d_ptr, dbeta_d_ptr, dbias_d_ptr,
    packing, weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
    weight_d_ptr, a_d_ptr, wt_d_ptr, stride_co_d, stride_ci_d, stride_r_d, stride_s_d,
    C: tl.constexpr, BATCH: tl.constexpr, BATCH_D: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SUMMED_T: tl.constexpr,
    CI: tl.constexpr, CO: tl.constexpr, GROUPS: tl.constexpr, OWN_CI: tl.constexpr, OWN_CO: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, UPCAST_W: tl.constexpr, TILE: tl.constexpr,
    D_CI: tl.constexpr, D_CO: tl.constexpr, D_GROUPS: tl.constexpr, D_OWN_CI: tl.constexpr, D_OWN_CO: tl.constexpr,
    D_R: tl.constexpr, D_S: tl.constexpr, D_UPCAST_W: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    clear_in_first_program(counters_ptr, counters)
    own = tiles * ((C + BLOCK_C - 1) // BLOCK_C)
    pid = tl.program_id(0)
    if pid < own:
        _block_end_bwd_program(
            dz_ptr, z_ptr, y_ptr, vectors_ptr, yd_ptr, shortcut_vectors_ptr, g_ptr, partials_ptr, partials_d_ptr,
            arrivals_ptr, M, tiles, steps, chunks, chunk,
            merged_ptr, coefficients_ptr, packed_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr,
            merged_d_ptr, coefficients_d_ptr, packed_d_ptr, dgamma_d_ptr, dbeta_d_ptr, dbias_d_ptr,
            C, BATCH, BATCH_D, UPCAST, BLOCK_M, BLOCK_C, SUMMED_T,
        )  # fmt: skip
    elif pid < own + packing:
        if weight_ptr is not None:
            pack_dgrad_program(
                pid - own, weight_ptr, a_ptr, wt_ptr, stride_co, stride_ci, stride_r, stride_s,
                CI, CO, GROUPS, OWN_CI, OWN_CO, R, S, TILE, UPCAST_W,
            )  # fmt: skip
    else:
        if weight_d_ptr is not None:
            pack_dgrad_program(
                pid - own - packing, weight_d_ptr, a_d_ptr, wt_d_ptr, stride_co_d, stride_ci_d, stride_r_d, stride_s_d,
                D_CI, D_CO, D_GROUPS, D_OWN_CI, D_OWN_CO, D_R, D_S, D_TILE, D_UPCAST_W,
            )  # fmt: skip


def gradient_memory(dz: Tensor, z: Tensor | None) -> Tensor:
    """Return where g is written: memory like ``dz``, which is g itself without a mask ``z``."""
    return dz if z is None else empty_image(dz)


def block_end_backward(
    dz: Tensor,
    z: Tensor | None,
    y: Tensor,
    vectors: Tensor,
    yd: Tensor | None,
    shortcut_vectors: Tensor | None,
    counters: Tensor | None = None,
    g: Tensor | None = None,
    finishes: Sequence[Finish] = (),
    arrivals: Tensor | None = None,
    packings: Sequence[Passenger] = (),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the gradient of a block's end, and the sums for the BatchNorms that it includes.

    Args:
        dz: gradient of the block's output (N, C, H, W), dense NHWC.
        z: the block's output, if it ends in a ReLU; otherwise None, and g is dz itself.
        y: raw output of the last convolution.
        vectors: (10, C) of its norm.
        yd: raw output of the projection, or None.
        shortcut_vectors: (10, C) of its norm, or None.
        counters: int32 of the launches behind this one, set to 0 (arrival.py), or None.
        g: where to write g, of :func:`gradient_memory`; None to allocate it.
        finishes: of :func:`norm_gradient.finish_of`, for y and yd, whose coefficients are written too; or none.
        arrivals: with ``finishes``, zeros (:func:`norm_gradient.arrivals_of`,) int32, which are zeros again afterwards.
        packings: up to two of :func:`pack.dgrad_passenger`, which this launch takes along.

    Returns:
        g (N, C, H, W), partial sums (2, tiles, C) fp32 for y, and the same for yd or None.
    """
    c, tile = y.shape[1], tile_of(y, 1)
    steps, tiles = walk(y, tile)
    if g is None:
        g = gradient_memory(dz, z)
    partials = y.new_empty((2, tiles, c), dtype=torch.float32)
    partials_d = None if yd is None else torch.empty_like(partials)
    finish, batch = finish_arguments(finishes, tiles, partials, 2)
    first, second = [*(p for p in packings if p.programs), NO_DGRAD, NO_DGRAD][:2]
    programs = grid_of(tiles, y, tile[1])[0] + first.programs + second.programs
    submit(
        _block_end_bwd_kernel, (programs,),
        dz, z, y, vectors, yd, shortcut_vectors, None if z is None else g, partials, partials_d,
        counters, 0 if counters is None else counters.numel(), arrivals, rows_of(y), tiles, steps, *finish,
        first.programs, *first.arguments, *second.arguments,
        C=c, UPCAST=upcasts(y.dtype), BLOCK_M=tile[0], BLOCK_C=tile[1], SUMMED_T=max(1, SUMMED // tile[1]),
        **batch, **first.constants, **second.named("D_"),
    )  # fmt: skip
    return g, partials, partials_d
