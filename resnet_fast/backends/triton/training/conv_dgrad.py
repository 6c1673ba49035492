r"""Draft."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....spec import ConvSpec, LaunchSpec
from ....tuning.configs import Config
from ....tuning.routes import merged_groups
from ..launch import INTERPRETED, upcasts
from ..tiles import multiply, pixel_of_row, round_to, row_offset, tile_of_program
from . import vectors
from .vectors import Act, Grad

MEAN, SCALE, SHIFT = tl.constexpr(vectors.MEAN), tl.constexpr(vectors.SCALE), tl.constexpr(vectors.SHIFT)
LO, HI, THRESHOLD = tl.constexpr(vectors.LO), tl.constexpr(vectors.HI), tl.constexpr(vectors.THRESHOLD)
BETA_HI, BETA_LO, GAMMA = tl.constexpr(vectors.BETA_HI), tl.constexpr(vectors.BETA_LO), tl.constexpr(vectors.GAMMA)


@triton.jit
def packed_gradient(g, y, beta_hi, beta_lo, gamma, inside, PADDED: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        wide = y.to(tl.float32)
        q = round_to(wide * beta_lo.to(tl.float32) + gamma.to(tl.float32), y.dtype, True)
        q = round_to(wide * beta_hi.to(tl.float32) + q.to(tl.float32), y.dtype, True).to(tl.float32)
        if PADDED:
            q = tl.where(inside, q, 0.0)
        return round_to(g.to(tl.float32) + q, y.dtype, True)
    q = tl.fma(y, beta_hi, tl.fma(y, beta_lo, gamma))
    if PADDED:
        return tl.fma(q, inside.to(y.dtype), g)
    return g + q


@triton.jit
def exact_gradient(g, y, coefficients_ptr, k, CO: tl.constexpr, C: tl.constexpr, inside, PADDED: tl.constexpr, BATCH: tl.constexpr, UPCAST: tl.constexpr):
    dy = g.to(tl.float32) * tl.load(coefficients_ptr + k, mask=k < CO, other=0.0)[None, :]
    if BATCH:
        b = tl.load(coefficients_ptr + (C + k), mask=k < CO, other=0.0)[None, :]
        c = tl.load(coefficients_ptr + (2 * C + k), mask=k < CO, other=0.0)[None, :]
        if PADDED:
            c = tl.where(inside, c, 0.0)
        dy += y.to(tl.float32) * b + c
    return round_to(dy, g.dtype, UPCAST)


@triton.jit
def inside_bits(at, size, ok, TAPS: tl.constexpr, STEP: tl.constexpr):
    bits = tl.zeros_like(at)
    for t in tl.static_range(TAPS):
        bits |= (ok & (at - t * STEP >= 0) & (at - t * STEP < size)).to(tl.int32) << t
    return bits


@triton.jit
def accumulate_taps(
    acc, g_ptr, y_ptr, rows, h, w, row_mask, w_rows, w_mask, coefficients_ptr, taps_h, taps_w, Ho, Wo,
    CO: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    MOST_H: tl.constexpr, MOST_W: tl.constexpr, BACK_H: tl.constexpr, BACK_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    PADDED: tl.constexpr, PACKED: tl.constexpr, BATCH: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (CO + BLOCK_K - 1) // BLOCK_K
    lane = tl.arange(0, BLOCK_K)
    rows = rows[:, None] + lane[None, :]
    w_rows = w_rows[:, None] + lane[None, :]
    if PADDED:
        in_h = inside_bits(h, Ho, row_mask, MOST_H, BACK_H)
        in_w = inside_bits(w, Wo, row_mask, MOST_W, BACK_W)
    for step in range(0, taps_h * taps_w * blocks):
        tap = step // blocks
        first = (step % blocks) * BLOCK_K
        k = first + lane
        i, j = tap // taps_w, tap % taps_w
        inside = ((in_h >> i) & (in_w >> j) & 1 if PADDED else row_mask.to(tl.int32))[:, None]
        at = rows + (first - (i * BACK_H * Wo + j * BACK_W) * C)
        w_at = w_rows + ((i * STEP_H * S + j * STEP_W) * CO + first)
        mask = inside != 0
        if CO % BLOCK_K != 0:
            mask = mask & (k < CO)[None, :]
            b = tl.load(w_at, mask=w_mask[:, None] & (k < CO)[None, :], other=0.0)
        elif EVEN_N:
            b = tl.load(w_at)
        else:
            b = tl.load(w_at, mask=w_mask[:, None], other=0.0)
        g = tl.load(g_ptr + at, mask=mask, other=0.0)
        y = tl.load(y_ptr + at, mask=mask, other=0.0) if BATCH else g
        if not PACKED:
            a = exact_gradient(g, y, coefficients_ptr, k, CO, C, inside != 0, PADDED, BATCH, UPCAST)
        elif BATCH:
            hi = tl.load(coefficients_ptr + (BETA_HI * C + k), mask=k < CO, other=0.0)
            lo = tl.load(coefficients_ptr + (BETA_LO * C + k), mask=k < CO, other=0.0)
            gamma = tl.load(coefficients_ptr + (GAMMA * C + k), mask=k < CO, other=0.0)
            a = packed_gradient(g, y, hi[None, :], lo[None, :], gamma[None, :], inside, PADDED, UPCAST)
        else:
            a = g
        acc = multiply(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit(do_not_specialize=["images", "H", "W", "Ho", "Wo", "tiles_m", "Hs", "Ws"])
def _conv_dgrad_kernel(
    g_ptr, y_ptr, wt_ptr, coefficients_ptr, add_ptr, strided_ptr, below_ptr, rule_ptr, vectors_ptr, dx_ptr, partials_ptr,
    tiles_m, images, H, W, Ho, Wo, Hs, Ws,
    CO: tl.constexpr, CI: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    INVERSE_H: tl.constexpr, INVERSE_W: tl.constexpr, WIDE: tl.constexpr,
    ADD_H: tl.constexpr, ADD_W: tl.constexpr,
    PACKED: tl.constexpr, BATCH: tl.constexpr, BELOW_PACKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = CO * GROUPS
    C_IN: tl.constexpr = CI * GROUPS
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W
    TILES_N: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
    PADDED: tl.constexpr = PAD_H + PAD_W > 0 or PHASES > 1 or R * S > 1
    pid_m, pid_n = tile_of_program(tl.program_id(0), tiles_m * PHASES, TILES_N, GROUP_M)
    group = tl.program_id(1)
    phase, tile = pid_m % PHASES, pid_m // PHASES
    ph, pw = phase // STRIDE_W, phase % STRIDE_W
    Hp = (H - ph + (STRIDE_H - 1)) // STRIDE_H
    Wp = (W - pw + (STRIDE_W - 1)) // STRIDE_W
    pixels = Hp * Wp
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = m < images * pixels
    n, h, w = pixel_of_row(m, tl.maximum(Hp, 1), tl.maximum(Wp, 1))
    h, w = ph + h * STRIDE_H, pw + w * STRIDE_W
    within = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ci, ci_mask = group * CI + within, within < CI

    # taps
    GCD_H: tl.constexpr = STRIDE_H // STEP_H
    GCD_W: tl.constexpr = STRIDE_W // STEP_W
    BACK_H: tl.constexpr = DIL_H // GCD_H
    BACK_W: tl.constexpr = DIL_W // GCD_W
    MOST_H: tl.constexpr = (R + STEP_H - 1) // STEP_H
    MOST_W: tl.constexpr = (S + STEP_W - 1) // STEP_W
    r = (ph + PAD_H) // GCD_H * INVERSE_H % STEP_H
    s = (pw + PAD_W) // GCD_W * INVERSE_W % STEP_W
    taps_h = (R - r + (STEP_H - 1)) // STEP_H
    taps_w = (S - s + (STEP_W - 1)) // STEP_W
    taps_h = tl.where((ph + PAD_H) % GCD_H == 0, taps_h, 0)
    taps_w = tl.where((pw + PAD_W) % GCD_W == 0, taps_w, 0)
    if STEP_H * STEP_W == 1:
        taps_h = R
        taps_w = S
    ho, wo = (h + PAD_H - r * DIL_H) // STRIDE_H, (w + PAD_W - s * DIL_W) // STRIDE_W
    first_n = tile * BLOCK_M // tl.maximum(pixels, 1)
    image = Ho * Wo * C
    start = row_offset(first_n, image) + group * CO
    n_off = (n - first_n).to(tl.int64) if WIDE else n - first_n
    rows = n_off * image + (ho * Wo + wo) * C
    w_rows = wt_ptr + (ci * (R * S * CO) + (r * S + s) * CO)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate_taps(
        acc, g_ptr + start, y_ptr + start if BATCH else g_ptr, rows, ho, wo, row_mask, w_rows, ci_mask, coefficients_ptr + group * CO, taps_h, taps_w, Ho, Wo,
        CO, C, S, MOST_H, MOST_W, BACK_H, BACK_W, STEP_H, STEP_W, PADDED, PACKED, BATCH, CI % BLOCK_N == 0, BLOCK_K, PRECISION, UPCAST,
    )

    p = (n * H + h) * W + w
    at = row_offset(p, C_IN)[:, None] + ci[None, :]
    mask = row_mask[:, None] & ci_mask[None, :]
    if add_ptr is not None:
        acc += tl.load(add_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if strided_ptr is not None:
        touched = row_mask & (h % ADD_H == 0) & (w % ADD_W == 0)
        q = (n * Hs + h // ADD_H) * Ws + w // ADD_W
        acc += tl.load(strided_ptr + (row_offset(q, C_IN)[:, None] + ci[None, :]), mask=touched[:, None] & ci_mask[None, :], other=0.0).to(tl.float32)
    if below_ptr is not None:
        below = tl.load(below_ptr + at, mask=mask, other=0.0)
        wide = below.to(tl.float32)
        if BELOW_PACKED:
            lo = tl.load(rule_ptr + LO * C_IN + ci, mask=ci_mask, other=0.0).to(tl.float32)
            hi = tl.load(rule_ptr + HI * C_IN + ci, mask=ci_mask, other=0.0).to(tl.float32)
            thr = tl.load(rule_ptr + THRESHOLD * C_IN + ci, mask=ci_mask, other=0.0).to(tl.float32)
            keep = tl.minimum(tl.maximum(wide, lo[None, :]), hi[None, :]) != thr[None, :]
        else:
            scale = tl.load(vectors_ptr + SCALE * C_IN + ci, mask=ci_mask, other=0.0)
            shift = tl.load(vectors_ptr + SHIFT * C_IN + ci, mask=ci_mask, other=0.0)
            keep = ~(wide * scale[None, :] + shift[None, :] <= 0.0)
        acc = tl.where(keep & mask, acc, 0.0)
    dx = round_to(acc, dx_ptr.dtype.element_ty, UPCAST)
    tl.store(dx_ptr + at, dx, mask=mask)
    if below_ptr is not None:
        mean = tl.load(vectors_ptr + MEAN * C_IN + ci, mask=ci_mask, other=0.0)
        v = dx.to(tl.float32)
        out = partials_ptr + (row_offset(pid_m, C_IN) + ci)
        tl.store(out, tl.sum(v, 0), mask=ci_mask)
        tl.store(out + row_offset(tiles_m * PHASES, C_IN), tl.sum(v * (wide - mean[None, :]), 0), mask=ci_mask)


def conv_dgrad(
    launch: LaunchSpec, config: Config, wt: Tensor, grad: Grad, below: Act | None, below_packed: bool,
    add: Tensor | None, add_strided: tuple[Tensor, tuple[int, int]] | None, compact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    conv, groups = launch.last, merged_groups(launch.last)
    if compact:
        conv = conv.with_(h=conv.ho, w=conv.wo, stride=(1, 1))
    g, packed = grad.g, config.packed
    ci, co = conv.ci // groups, conv.co // groups
    (sh, sw), (dh, dw) = conv.stride, conv.dilation
    steps = sh // gcd(sh, dh), sw // gcd(sw, dw)
    inverse = [pow(d // gcd(s, d), -1, step) if step > 1 else 0 for s, d, step in zip(conv.stride, conv.dilation, steps)]
    tiles_m = -(-conv.n * -(-conv.h // sh) * -(-conv.w // sw) // config.block_m)
    tiles = tiles_m * sh * sw
    dx = g.new_empty((conv.n, conv.h, conv.w, conv.ci)).permute(0, 3, 1, 2)
    partials = None if below is None else g.new_empty((2, tiles, conv.ci), dtype=torch.float32)
    strided, (add_h, add_w) = add_strided or (None, (1, 1))
    hs, ws = (1, 1) if strided is None else strided.shape[2:]
    pixels = max(1, (conv.h // sh) * (conv.w // sw))
    wide = min(conv.n, config.block_m // pixels + 2) * conv.ho * conv.wo * conv.co >= 1 << 31
    arguments: dict[str, Any] = {}
    if not INTERPRETED:
        arguments = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    _conv_dgrad_kernel[(tiles * -(-ci // config.block_n), groups)](
        g, grad.y if grad.batch else None, wt, grad.packed if packed else grad.coefficients,
        add, strided, None if below is None else below.y,
        below.clamp if below is not None and below_packed else None, None if below is None else below.vectors,
        dx, partials,
        tiles_m, conv.n, conv.h, conv.w, conv.ho, conv.wo, hs, ws,
        CO=co, CI=ci, GROUPS=groups, R=conv.r, S=conv.s,
        STRIDE_H=sh, STRIDE_W=sw, PAD_H=conv.padding[0], PAD_W=conv.padding[1], DIL_H=dh, DIL_W=dw,
        STEP_H=steps[0], STEP_W=steps[1], INVERSE_H=inverse[0], INVERSE_W=inverse[1], WIDE=wide,
        ADD_H=add_h, ADD_W=add_w, PACKED=packed, BATCH=grad.batch, BELOW_PACKED=below_packed,
        PRECISION="tf32" if conv.tf32 else "ieee", UPCAST=upcasts(g.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m, **arguments,
    )
    return dx, partials
