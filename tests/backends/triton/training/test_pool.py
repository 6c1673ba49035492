"""BatchNorm + ReLU + max-pool and back, against PyTorch on the rounded activation: equal, winner for winner."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.backends.triton.training import pool as kernel
from resnet_fast.backends.triton.training.pool import pool_end, pool_end_backward
from resnet_fast.benchmarks.tables.counting import count
from resnet_fast.calls import Pool
from tests.support import batch_norm_cases as cases

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_outputs")]

POOLS = {
    "resnet": Pool(3, 2, 1),
    "halves": Pool(2, 2, 0),
    "dense": Pool(3, 1, 1),
    "gaps": Pool(2, 3, 1),
    "apart": Pool(3, 3, 0),
    "even": Pool(4, 2, 2),
    "wide": Pool(5, 2, 1),
    "one": Pool(1, 1, 0),
}
SHAPES = [(3, 20, 7, 5), (1, 64, 6, 9), (2, 5, 6, 4), (1, 136, 4, 5)]
STRIPS = [1, 2, 1024]
HALF = torch.float16
CASES = [("resnet", shape, dtype) for shape in SHAPES for dtype in cases.DTYPES]
CASES += [(name, SHAPES[i % 4], HALF) for i, name in enumerate(POOLS) if name != "resnet"]
NAN_CASES = [("resnet", dtype) for dtype in cases.DTYPES] + [("halves", HALF), ("dense", HALF)]


def coarse(y: Tensor) -> Tensor:
    """Return many equal values, so that the choice among equal maxima matters."""
    return cases.guarded((y.float() * 2).round().div(2).to(y.dtype))


def activation(y: Tensor, rows: Tensor) -> Tensor:
    """Return the activation in fp64, rounded as the kernels round it."""
    return cases.mapped_by_kernels(y, rows).relu().to(y.dtype).double()


def few_digits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return gradients with sums that are exact in every dtype."""
    return cases.guarded((torch.randint(-16, 17, shape).double() / 8).to(dtype))


def truth(y: Tensor, rows: Tensor, dz: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Return PyTorch's (z, g) in fp64, from the rounded activation."""
    act = activation(y, rows).requires_grad_()
    z = F.max_pool2d(act, *pool)
    (g,) = torch.autograd.grad(z, act, dz.double())
    return z.detach(), torch.ops.aten.threshold_backward(g, act.detach(), 0)


def pooled(y: Tensor, pool: Pool) -> tuple[int, ...]:
    return tuple(F.max_pool2d(torch.empty(y.shape, device="meta"), *pool).shape)


@pytest.mark.parametrize("name,shape,dtype", CASES, ids=str)
def test_forward_and_backward(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = POOLS[name]
    monkeypatch.setattr(kernel, "PROGRAMS", STRIPS[CASES.index((name, shape, dtype)) % len(STRIPS)])
    y = coarse(cases.raw(*shape, dtype))
    rows, _ = cases.vectors(y)
    dz = few_digits(pooled(y, pool), dtype)
    want_z, want_g = truth(y, rows, dz, pool)
    z = pool_end(y, rows, pool)
    assert z.dtype == dtype and z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(z.double(), want_z)
    g, partials = pool_end_backward(dz, y, rows, pool)
    assert g.dtype == dtype and g.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(g.double(), want_g)
    cases.assert_sums(partials, g, y, rows)


@pytest.mark.parametrize("strips", STRIPS[1:])
def test_strips_agree(strips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of a cut changes no bit of z and g, and a second run changes no bit at all."""
    pool, y = POOLS["resnet"], cases.raw(2, 20, 10, 5, torch.float16)
    rows, _ = cases.vectors(y)
    dz = cases.gradient(pool_end(y, rows, pool))
    monkeypatch.setattr(kernel, "PROGRAMS", 1)
    whole = pool_end(y, rows, pool), pool_end_backward(dz, y, rows, pool)[0]
    monkeypatch.setattr(kernel, "PROGRAMS", strips)
    z, (g, partials) = pool_end(y, rows, pool), pool_end_backward(dz, y, rows, pool)
    assert torch.equal(z, whole[0]) and torch.equal(g, whole[1])
    again = pool_end_backward(dz, y, rows, pool)
    assert torch.equal(g, again[0]) and torch.equal(partials, again[1])


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_gradients_round_once(dtype: torch.dtype) -> None:
    pool, y = POOLS["resnet"], cases.raw(2, 20, 6, 7, dtype)
    rows, _ = cases.vectors(y)
    dz = cases.guarded(torch.randn(pooled(y, pool)).to(dtype))
    g, partials = pool_end_backward(dz, y, rows, pool)
    torch.testing.assert_close(g.double(), truth(y, rows, dz, pool)[1], rtol=torch.finfo(dtype).eps, atol=1e-6)
    cases.assert_sums(partials, g, y, rows)


@pytest.mark.parametrize("name,dtype", NAN_CASES, ids=str)
def test_nan_wins_as_in_stock(name: str, dtype: torch.dtype) -> None:
    """Covers one NaN in a window, several, and infinities next to them; the gradient goes where PyTorch's goes."""
    pool, y = POOLS[name], coarse(cases.raw(1, 20, 6, 5, dtype))
    rows, _ = cases.vectors(y)
    for c, h, w in ((2, 0, 0), (3, 3, 3), (3, 3, 4), (3, 4, 2), (5, 5, 4), (6, 3, 3), (6, 2, 2)):
        y[0, c, h, w] = float("nan")
    y[0, 6, 3, 2] = y[0, 7, 4, 3] = y[0, 7, 4, 4] = float("inf")
    y[0, 8, 1, 1] = float("-inf")
    dz = few_digits(pooled(y, pool), dtype)
    want_z, want_g = truth(y, rows, dz, pool)
    assert torch.equal(pool_end(y, rows, pool).double().nan_to_num(1e9, 1e8), want_z.nan_to_num(1e9, 1e8))
    g, partials = pool_end_backward(dz, y, rows, pool)
    assert torch.equal(g.double(), want_g)
    broken = torch.zeros(20, dtype=torch.bool)
    broken[[2, 3, 5, 6, 7, 8]] = True
    assert not partials[0].isnan().any() and not partials[1][:, ~broken].isnan().any()


def test_memory_is_read_once() -> None:
    pool, y = POOLS["resnet"], cases.raw(2, 64, 12, 10, torch.float16)
    rows, _ = cases.vectors(y)
    with count() as counts:
        z = pool_end(y, rows, pool)
        pool_end_backward(cases.gradient(z), y, rows, pool)
    forward, backward = counts.launches
    size, small, vector = 2 * y.numel(), 2 * z.numel(), 4 * 64
    assert forward["y_ptr"].read_unique == size and forward["vectors_ptr"].read_unique == 2 * vector
    assert forward["z_ptr"].written == forward["z_ptr"].written_unique == small
    assert backward["y_ptr"].read_unique == size and backward["dz_ptr"].read_unique == small
    assert backward["g_ptr"].written == backward["g_ptr"].written_unique == size
    assert backward["vectors_ptr"].read_unique == 3 * vector
