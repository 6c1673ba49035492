"""Statistics, vectors and gradient coefficients of a BatchNorm in training, against fp64 and stock PyTorch."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import folding, numerics
from resnet_fast.backends.triton.training import (
    batch_norm,
    block_end,
    conv_wgrad,
    cudnn_passes,
    norm_gradient,
    pack,
    pool,
)
from resnet_fast.backends.triton.training import vectors as v
from resnet_fast.backends.triton.training.arrival import counters_for
from resnet_fast.backends.triton.training.vectors import Act
from resnet_fast.calls import Norm, Pool
from resnet_fast.spec import LaunchSpec
from resnet_fast.tuning.configs import Config
from tests.support import batch_norm_cases as cases
from tests.support.grids import covering
from tests.support.launch_cases import conv
from tests.support.wgrad_cases import SMS
from tests.support.wgrad_cases import case as wgrad_case

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_outputs")]

TILE = Config("conv_wgrad", 32, 32, 64)
SHAPES = [(1, 1, 1, 2), (3, 20, 7, 5), (1, 64, 9, 11), (1, 136, 5, 3), (2, 5, 17, 19)]


def batch(gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = cases.EPS) -> Norm:
    return Norm(gamma, beta, None, None, True, 0.1, eps)


def vectors_of(
    y: Tensor, norm: Norm, bias: Tensor | None = None, centre: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    partials, rows = cudnn_passes.statistics(y)
    out = batch_norm.outputs(y.shape[1], y.dtype, y.device)
    batch_norm.finalize(partials, rows, y.numel() // y.shape[1], norm, bias, centre, out)
    return out


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_statistics_of_every_tile(
    shape: tuple[int, int, int, int], dtype: torch.dtype, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudnn_passes, "walk", cases.walks_of(steps))
    y = cases.raw(*shape, dtype)
    partials, rows = cudnn_passes.statistics(y)
    flat = y.double().permute(0, 2, 3, 1).flatten(0, 2)
    tiles = flat.split(rows)
    assert partials.shape == (2, len(tiles), shape[1]) and partials.dtype == torch.float32
    mean = torch.stack([t.mean(0) for t in tiles])
    m2 = torch.stack([(t - t.mean(0)).square().sum(0) for t in tiles])
    torch.testing.assert_close(partials[0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(partials[1].double(), m2, rtol=1e-5, atol=1e-5)
    assert torch.equal(partials, cudnn_passes.statistics(y)[0])


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("steps", [1, 4])
def test_variance_where_the_mean_is_a_hundred_deviations(
    dtype: torch.dtype, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudnn_passes, "walk", cases.walks_of(steps))
    y = cases.raw(3, 72, 13, 9, dtype, mean=100.0)
    rows, _ = vectors_of(y, batch(eps=0.0))
    mean, var = cases.moments(y)
    error = (rows[v.INVSTD].double() ** -2 / var - 1).abs().max().item()
    assert error <= 1e-4, error
    assert ((rows[v.MEAN].double() - mean).abs() / var.sqrt()).max() <= 1e-4


# --------------------------------------------------------------------------------------------------------- finalize


MERGES = [*covering(product([1, 2, 129], [1, 8, 100], [0.0, 1000.0])), (6272, 128, 1000.0)]


@pytest.mark.parametrize("tiles,chunk,outlier", MERGES)
def test_merge_of_many_tiles(tiles: int, chunk: int, outlier: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a mean of 100 standard deviations, and a first tile that may differ from the others."""
    monkeypatch.setattr(batch_norm, "chunks_of", lambda tiles: (-(-tiles // chunk), chunk))
    c, rows = 5, 4
    count = tiles * rows - 3
    n = torch.full((tiles, 1), float(rows), dtype=torch.float64)
    n[-1] = rows - 3
    partials = torch.stack([100 + torch.randn(tiles, c) / math.sqrt(rows), torch.rand(tiles, c) * 2 * n.float()])
    partials[0, 0] += outlier
    mean = (n * partials[0].double()).sum(0) / count
    var = (partials[1].double() + n * (partials[0].double() - mean).square()).sum(0) / count
    got, _ = batch_norm.finalized(cases.guard(partials), rows, count, batch(eps=0.0), torch.float32)
    torch.testing.assert_close(got[v.MEAN].double(), mean, rtol=1e-6, atol=1e-6 * outlier)
    torch.testing.assert_close(got[v.INVSTD].double() ** -2, var, rtol=1e-5, atol=0)
    if count > 1:
        torch.testing.assert_close(got[v.BATCH_VAR].double(), var * count / (count - 1), rtol=1e-5, atol=0)
    assert got[v.INV_COUNT].unique().item() == pytest.approx(1 / count, rel=1e-6)
    again, _ = batch_norm.finalized(partials, rows, count, batch(eps=0.0), torch.float32)
    assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("parameters", [None, torch.float32, torch.float16, torch.bfloat16])
def test_vectors_follow_their_definition(dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    c = 37
    y = cases.raw(3, c, 5, 7, dtype)
    gamma, beta = cases.affine(c)
    norm = batch() if parameters is None else batch(cases.guard(gamma.to(parameters)), cases.guard(beta.to(parameters)))
    bias, centre = cases.guard(torch.randn(c)), torch.randn(c)
    centre[:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), 7e4])
    rows, _ = vectors_of(y, norm, bias, cases.guard(centre))
    mean, var = cases.moments(y)
    count = y.numel() // c
    scale = (var + cases.EPS).rsqrt() * (1.0 if norm.weight is None else norm.weight.double())
    shift = (0.0 if norm.bias is None else norm.bias.double()) - mean * scale
    known = torch.where((centre - bias).abs() <= 65504, centre - bias, 0.0)
    invstd, unbiased = (var + cases.EPS).rsqrt(), var * count / (count - 1)
    want = {
        v.CENTRE: known, v.MEAN: mean, v.INVSTD: invstd, v.SCALE: scale, v.SHIFT: shift,
        v.INV_COUNT: torch.full((c,), 1 / count), v.BATCH_MEAN: mean + known + bias, v.BATCH_VAR: unbiased,
    }  # fmt: skip
    for row, value in want.items():
        error = (rows[row].double() - value).abs()
        assert (error <= 2e-6 * (1 + value.abs())).all(), (row, error)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("centred,strided,momentum", covering(product([True, False], [True, False], [0.1, 1.0, 1 / 3])))
def test_running_statistics_are_those_of_stock(
    dtype: torch.dtype, centred: bool, strided: bool, momentum: float
) -> None:
    """``dtype``: of the running statistics. The running mean is what y was centred by, less the bias."""
    y, c = cases.raw(3, 37, 5, 4, torch.float32), 37
    bias = torch.randn(c)
    step = 2 if strided else 1
    fields = [cases.guard(t.to(dtype)) for t in (torch.randn(step * c), torch.rand(step * c))]
    mean, var = (t[::step] for t in fields)
    true = y + cases.per_channel(mean.float()) if centred else y + cases.per_channel(bias)
    want = [mean.double(), var.double()]
    F.batch_norm(true.double(), *want, None, None, True, momentum, cases.EPS)
    untouched = [t.clone() for t in fields]
    norm = Norm(None, None, mean, var, True, momentum, cases.EPS)
    centre = mean if centred else None
    partials, rows = cudnn_passes.statistics(y)
    out = batch_norm.outputs(c, y.dtype, y.device)
    arguments = (cases.guard(partials), rows, y.numel() // c, norm, cases.guard(bias), centre, out)
    batch_norm.finalize(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(fields, untouched, strict=True))
    batch_norm.finalize(*arguments, update=True)
    eps = max(1e-6, torch.finfo(dtype).eps)
    for found, wanted in zip((mean, var), want, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2 * eps, atol=2 * eps)
    if strided:
        assert all(torch.equal(a[1::2], b[1::2]) for a, b in zip(fields, untouched, strict=True))


def constant(
    norm: Norm, channels: int, bias: Tensor | None, centre: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    out = batch_norm.outputs(channels, dtype, torch.device("cpu"))
    batch_norm.constant(norm, bias, centre, out)
    return out


def clamped(y: Tensor, clamp: Tensor) -> Tensor:
    lo, hi = (cases.per_channel(clamp[i].double()) for i in (v.LO, v.HI))
    return torch.minimum(torch.maximum(y.double(), lo), hi)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:])
@pytest.mark.parametrize("make", ["batch", "constant"])
def test_clamp_is_the_activation(dtype: torch.dtype, make: str) -> None:
    """FOLD * (clamp(y) - THR) = relu(SCALE*y + SHIFT), within the rounding of the threshold; all forms of a channel."""
    y = cases.raw(2, 40, 5, 6, dtype)
    gamma, beta = cases.affine(40)
    gamma[2:6] = torch.tensor([1e-9, -1e-9, 1e-9, -1e-30])  # no 16-bit threshold: constant
    beta[2:6] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    beta[6] = 0.0
    gamma[7], beta[7] = 0.0, 0.0
    if make == "batch":
        rows, clamp = vectors_of(y, batch(gamma, beta))
    else:
        mean, var = cases.moments(y)
        norm = Norm(gamma, beta, mean.float(), var.float(), eps=cases.EPS)
        rows, clamp = constant(norm, 40, None, None, dtype)
    assert clamp is not None and clamp.dtype == dtype and clamp.shape == (3, 40)
    assert torch.equal(clamp[v.THRESHOLD].float(), rows[v.THR])
    z = cases.per_channel(rows[v.FOLD].double()) * (clamped(y, clamp) - cases.per_channel(rows[v.THR].double()))
    want = cases.mapped(y, rows, torch.float64).relu()
    rounding = torch.finfo(dtype).eps * (rows[v.FOLD] * rows[v.THR]).double().abs() + 1e-6
    assert ((z - want).abs() <= cases.per_channel(rounding)).all()
    for channel in (0, 2, 3, 5):
        assert clamp[:, channel].tolist() == [1, 1, 0] and rows[v.FOLD, channel] == rows[v.SHIFT, channel] > 0
    for channel in (1, 4, 7):
        assert clamp[:, channel].tolist() == [0, 0, 0] and rows[v.FOLD, channel] == 0
    varying = torch.tensor([channel == 6 or channel > 7 for channel in range(40)])
    assert torch.equal(rows[v.FOLD][varying], rows[v.SCALE][varying])
    inf = torch.full_like(rows[v.THR], math.inf)
    positive = rows[v.SCALE] > 0
    assert torch.equal(clamp[v.LO].float()[varying], torch.where(positive, rows[v.THR], -inf)[varying])
    assert torch.equal(clamp[v.HI].float()[varying], torch.where(positive, inf, rows[v.THR])[varying])


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_broken_channels_stay_broken_and_apart(dtype: torch.dtype) -> None:
    y = cases.raw(2, 24, 4, 4, dtype)
    y[1, 3, 2, 2], y[0, 9, 1, 1] = float("nan"), float("inf")
    rows, clamp = vectors_of(y, batch(*cases.affine(24)))
    broken = torch.zeros(24, dtype=torch.bool)
    broken[[3, 9]] = True
    for row in (v.MEAN, v.INVSTD, v.SCALE, v.SHIFT, v.BATCH_MEAN, v.BATCH_VAR, v.FOLD, v.THR):
        assert torch.equal(rows[row].isnan(), broken), row
    assert clamp is None or torch.equal(clamp[v.THRESHOLD].isnan(), broken)


# --------------------------------------------------------------------------------------------------------- constant


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("present", [False, True])
def test_constant_statistics(dtype: torch.dtype, centred: bool, present: bool) -> None:
    """SCALE * (conv - (centre - bias)) + SHIFT is the norm of conv + bias, as folding.scale_shift gives it."""
    c = 21
    gamma, beta = cases.affine(c)
    running, var = torch.randn(c), torch.rand(c) + 1e-3
    norm = Norm(gamma, beta, running, var, eps=cases.EPS) if present else Norm()
    bias, centre = torch.randn(c), torch.randn(c) if centred else None
    rows, clamp = constant(norm, c, cases.guard(bias), centre, dtype)
    assert (clamp is None) == (dtype == torch.float32)
    conv = torch.randn(7, c, dtype=torch.float64)
    scale, shift = (t.double() for t in folding.scale_shift(norm, c, torch.device("cpu")))
    stored = conv if centre is None else conv - (centre - bias)
    torch.testing.assert_close(
        rows[v.SCALE].double() * stored + rows[v.SHIFT], (conv + bias) * scale + shift, rtol=1e-5, atol=1e-5
    )
    assert (rows[v.INV_COUNT] == 0).all()
    if present:
        hat = (conv + bias - running) * (var.double() + cases.EPS).rsqrt()
        torch.testing.assert_close((stored - rows[v.MEAN]) * rows[v.INVSTD].double(), hat, rtol=1e-5, atol=1e-5)
    else:
        assert (rows[v.INVSTD] == 1).all() and (rows[v.SCALE] == 1).all()


def test_a_centre_that_is_the_running_mean_leaves_beta() -> None:
    gamma, beta = cases.affine(9)
    running = 1e4 * torch.randn(9)
    rows, _ = constant(Norm(gamma, beta, running, torch.rand(9)), 9, None, running, torch.float32)
    assert torch.equal(rows[v.SHIFT], beta) and (rows[v.MEAN] == 0).all()


# ----------------------------------------------------------------------------------------------------- coefficients


def autograd(y: Tensor, g: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dy, dgamma, dbeta) of batch_norm in training, in the dtype of y."""
    y, gamma, beta = (t.detach().clone().requires_grad_() for t in (y, norm.weight, norm.bias))
    F.batch_norm(y, None, None, gamma, beta, True, 0.0, norm.eps).backward(g)
    return y.grad, gamma.grad, beta.grad


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(3, 20, 7, 5), (1, 64, 5, 9), (2, 136, 3, 3)], ids=str)
@pytest.mark.parametrize("mean", [0.5, 3.0])
def test_backward_is_that_of_stock(shape: tuple[int, int, int, int], dtype: torch.dtype, mean: float) -> None:
    y = cases.raw(*shape, dtype, mean=mean)
    g = cases.gradient(y)
    norm = batch(*cases.affine(shape[1]))
    rows, _ = vectors_of(y, norm)
    own = cases.sums(g, y, rows).float()[:, None]
    grad = norm_gradient.gradient_of(g, y, True)
    dgamma, dbeta, _ = norm_gradient.coefficients(grad, cases.guard(own), rows, (norm.weight, norm.bias, None))
    dy = cudnn_passes.apply_backward(grad._replace(coefficients=cases.guard(grad.coefficients)))
    assert dy.dtype == dtype and dy.is_contiguous(memory_format=torch.channels_last)
    double = norm._replace(weight=norm.weight.double(), bias=norm.bias.double())
    truth = autograd(y.double(), g.double(), double)
    # stock in 16 bit keeps the parameters and their gradients in fp32
    eager = autograd(y, g, norm) if dtype == torch.float32 else autograd(y.float(), g.float(), norm)
    numerics.assert_close(dy, truth[0], eager[0].to(dtype), 1)
    for got, want in ((dgamma, truth[1]), (dbeta, truth[2])):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(dy, cudnn_passes.apply_backward(grad))


@pytest.mark.parametrize("dtype", cases.DTYPES[1:])
@pytest.mark.parametrize("many", [False, True])
def test_packed_coefficients_are_the_exact_ones(dtype: torch.dtype, many: bool) -> None:
    """hi + lo is BETA to twice the digits; all 0 where A is; sums of many tiles are those of few."""
    c = 24
    y = cases.raw(2, c, 3, 4, dtype)
    rows, _ = vectors_of(y, batch(*cases.affine(c)))
    tiles = 300 if many else 2
    partials = torch.randn(2, tiles, c)
    grad = norm_gradient.gradient_of(y, y, True)
    like = torch.empty(c)
    dgamma, dbeta, _ = norm_gradient.coefficients(grad, cases.guard(partials), rows, (like, like, None))
    got, packed = grad.coefficients, grad.packed
    assert packed is not None and packed.dtype == dtype and torch.equal(packed[v.NEG_GAMMA], -packed[v.GAMMA])
    one, two = partials.double().sum(1)
    exact = rows.double()
    s1, s2 = one * exact[v.INV_COUNT], two * exact[v.INVSTD] * exact[v.INV_COUNT]
    beta, gamma = -exact[v.INVSTD] * s2, exact[v.INVSTD] * s2 * exact[v.MEAN] - s1
    a = exact[v.SCALE]
    torch.testing.assert_close(got.double(), torch.stack([a, a * beta, a * gamma]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dgamma.double(), exact[v.INVSTD] * two, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dbeta.double(), one, rtol=1e-5, atol=1e-5)
    # the 16-bit terms are roundings of the fp32 coefficients, divided by A
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    alive = a != 0
    beta, gamma = (got[row].double() / got[v.A] for row in (v.B, v.C))
    hi, lo, third, _ = packed.double()
    assert ((hi - beta).abs() <= eps * beta.abs() + tiny)[alive].all()
    assert ((hi + lo - beta).abs() <= (eps**2 + 1e-6) * beta.abs() + tiny)[alive].all()
    assert ((third - gamma).abs() <= eps * gamma.abs() + tiny)[alive].all()
    assert (packed[:, ~alive] == 0).all() and (~alive).sum() == 2


def test_a_dead_channel_survives_an_overflow() -> None:
    rows = torch.ones(10, 2)
    rows[v.SCALE, 0] = 0
    partials = torch.full((2, 1, 2), 1e30)
    image = torch.empty(1, 2, 1, 1, dtype=torch.float16)
    grad = norm_gradient.gradient_of(image, image, True)
    norm_gradient.coefficients(grad, partials, rows)
    packed = grad.packed
    assert packed is not None and (packed[:, 0] == 0).all() and packed[v.BETA_HI, 1] == -math.inf


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_constant_statistics_pass_the_gradient_through(dtype: torch.dtype) -> None:
    y = cases.raw(2, 20, 5, 3, dtype)
    mean, var = cases.moments(y)
    norm = Norm(*cases.affine(20), mean.float(), var.float(), eps=cases.EPS)
    rows, _ = constant(norm, 20, None, None, dtype)
    g = cases.gradient(y)
    own = cases.sums(g, y, rows).float()[:, None]
    grad = norm_gradient.gradient_of(g, torch.full_like(y, float("nan")), False)
    dgamma, dbeta, dbias = norm_gradient.coefficients(grad, own, rows, (norm.weight, norm.bias, norm.bias))
    assert (grad.coefficients[1:] == 0).all() and (grad.packed is None or (grad.packed == 0).all())
    torch.testing.assert_close(dbias, dbeta * rows[v.SCALE])
    dy = cudnn_passes.apply_backward(grad)
    assert torch.equal(dy, (g.float() * cases.per_channel(rows[v.SCALE])).to(dtype))
    hat = (y.double() - cases.per_channel(mean)) * cases.per_channel((var + cases.EPS).rsqrt())
    torch.testing.assert_close(dgamma.double(), (g.double() * hat).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dbeta.double(), g.double().sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- passengers

CONVS = {"1x1": conv(24, 40, 1), "3x3": conv(24, 5, 3), "groups_merged": conv(24, 24, 3, groups=6)}


def counters(c: int) -> Tensor:
    """Return a row between others, which stay as they are."""
    rows = torch.full((3, 2 + batch_norm.blocks_of(c)), -7, dtype=torch.int32)
    rows[1] = 0
    return rows


@pytest.mark.parametrize("name,tiles,exact", covering(product(CONVS, [1, 300], [True, False])))
def test_finalize_packs_the_next_weight(name: str, tiles: int, exact: bool) -> None:
    """One launch gives the bits of two, whether the packing needs the vectors or not."""
    spec, c = CONVS[name], 24
    weight = cases.guard(torch.randn(spec.co, spec.ci // spec.groups, spec.r, spec.s))
    partials = cases.guard(torch.rand(2, tiles, c))
    norm = batch(*cases.affine(c))
    want = batch_norm.finalized(partials, 4, 4 * tiles - 1, norm, torch.float16)
    w, const = pack.pack_forward(weight, torch.float16, spec, None if exact else Act(torch.empty(0), *want))
    out, used = batch_norm.outputs(c, torch.float16, weight.device), counters(c)
    found, found_const, passenger = pack.forward_passenger(weight, torch.float16, spec, None if exact else out[0])
    batch_norm.finalize(partials, 4, 4 * tiles - 1, norm, None, None, out, "", False, used[1], passenger)
    assert torch.equal(out[0], want[0]) and torch.equal(out[1], want[1])
    assert torch.equal(found, w) and (const is None if exact else torch.equal(found_const, const))
    assert (used[::2] == -7).all()


@pytest.mark.parametrize("tiles", [1, 300])
@pytest.mark.parametrize("name", CONVS)
def test_coefficients_pack_and_finish_a_wgrad(name: str, tiles: int) -> None:
    """One launch gives the bits of three; a gradient is written where it is wanted, in the parameter's dtype."""
    spec, other = CONVS[name], wgrad_case(conv(40, 48, 1, n=5, h=8, w=11), "packed")
    c = spec.co
    y = cases.raw(2, c, 3, 4, torch.float16)
    rows, _ = vectors_of(y, batch(*cases.affine(c)))
    partials, weight = cases.guard(torch.randn(2, tiles, c)), torch.randn(c, spec.ci // spec.groups, spec.r, spec.s)
    plain, want = norm_gradient.gradient_of(y, y, True), other.run(TILE)
    gamma, beta, bias = (torch.empty(c, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    gradients = norm_gradient.coefficients(plain, partials, rows, (gamma, beta, bias))
    assert [t.dtype for t in gradients] == [torch.float32, torch.bfloat16, torch.float16] and not gradients[2].any()
    grad, used = norm_gradient.gradient_of(y, y, True), counters(c)
    wt, packing = pack.dgrad_passenger(weight, torch.float16, spec, rows[v.SCALE])
    launch = LaunchSpec("conv_wgrad", (other.conv,), prologue=True)
    tile = replace(TILE, packed=True)
    dw, reduction = conv_wgrad.conv_wgrad(launch, tile, other.output_grad.grad(), other.x, SMS, other.weight())
    found = norm_gradient.coefficients(
        grad, partials, rows, (gamma, None, None), "", used[1], packing, reduction
    )  # fmt: skip
    assert torch.equal(found[0], gradients[0]) and found[1:] == (None, None)
    assert torch.equal(grad.coefficients, plain.coefficients) and torch.equal(grad.packed, plain.packed)
    assert torch.equal(wt, pack.pack_dgrad(weight, torch.float16, spec, rows[v.SCALE])) and torch.equal(dw, want)
    assert (used[::2] == -7).all()


@pytest.mark.parametrize("channels", [3, 2048])
def test_the_first_launch_of_a_pass_clears_the_counters(channels: int, poisoned_outputs: None) -> None:
    like = torch.empty(2, 64, 4, 4)
    found, *_ = counters_for(like, 4, batch_norm.blocks_of(channels), 70)
    pack.launch([], found)
    assert not found.any()
    for end in (
        lambda rows: block_end.block_end_backward(like, None, like, torch.ones(10, 64), None, None, rows),
        lambda rows: pool.pool_end_backward(torch.ones(2, 64, 2, 2), like, torch.ones(10, 64), Pool(2, 2, 0), rows),
    ):
        found, *_ = counters_for(like, 4, batch_norm.blocks_of(channels), 70)
        end(found)
        assert not found.any()


@pytest.mark.parametrize("tiles", [1, 256, 257, 6272, 100_000])
def test_chunks_hold_every_tile(tiles: int) -> None:
    chunks, chunk = batch_norm.chunks_of(tiles)
    assert (chunks - 1) * chunk < tiles <= chunks * chunk and chunks <= batch_norm.LAST_TILES
    assert chunks == 1 or chunk >= batch_norm.CHUNK


# ----------------------------------------------------------------------------------------------------------- groups


@pytest.mark.slow
def test_three_processes_are_one(tmp_path: Path) -> None:
    """Uneven processes, one empty, get the whole batch's vectors and coefficients, and their own dgamma and dbeta."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    counts = (0, 3, 1)
    line = [sys.executable, cases.__file__]
    started = [subprocess.Popen([*line, str(rank), str(tmp_path), *map(str, counts)]) for rank in range(len(counts))]
    assert [p.wait(timeout=300) for p in started] == [0] * len(counts)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(counts))]
    for name, want in cases.step(*cases.batch_of_group(sum(counts))).items():
        each = [f[name] for f in found]
        if name in ("dgamma", "dbeta"):
            assert (each[0] == 0).all()
            torch.testing.assert_close(sum(each), want, rtol=1e-4, atol=1e-4)
            continue
        assert all(torch.equal(one, each[0]) for one in each), name
        digits = 1e-5 if want.dtype == torch.float32 else torch.finfo(want.dtype).eps
        torch.testing.assert_close(each[0], want, rtol=digits, atol=1e-5)
