"""bn_act.cu and bn_act_bwd.cu against fp64 for every kind of channel count; their traffic, their order of sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import numerics
from tests.support.emulation import A100, H100, Emulator, conflicts

native = torch.ops.resnet_fast_native
EPS = 1e-5
SCALE, SHIFT, MEAN, INVSTD, VAR, M2 = range(6)
DGAMMA, DBETA, A, B, C = range(5)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, C, H, W. Chunks of 16 bytes: none, one per row, several, rows that begin between two, tiles of 9 and of 16 columns.
SHAPES = [
    (1, 1, 7, 7), (3, 3, 15, 7), (3, 10, 7, 1), (1, 20, 8, 8), (1, 136, 14, 8), (1, 64, 28, 15), (3, 256, 7, 8),
    (1, 2048, 7, 1), (2, 2047, 1, 7),
]  # fmt: skip
TINY = [(1, 3, 1, 2), (3, 8, 1, 1), (1, 1, 1, 7)]  # too few numbers to compare their errors with stock's
RESIDUALS = ["none", "tensor", "projection"]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, mean: float = 0.0) -> Tensor:
    """Of 1 std; channels differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) + mean
    if len(shape) == 4:
        x = x + torch.randn((1, shape[1], 1, 1), generator=generator) / 2
        return x.to(dtype).contiguous(memory_format=torch.channels_last)
    return x.to(dtype)


def parameters(c: int, seed: int) -> tuple[Tensor, Tensor]:
    return random((c,), torch.float32, seed, mean=1.0), random((c,), torch.float32, seed + 1)


def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Stock BatchNorm on the batch's statistics, the parameters in fp32 beside 16-bit tensors."""
    of = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.batch_norm(x, None, None, gamma.to(of), beta.to(of), True, 0.0, EPS)


def rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean((0, 2, 3))
    return mean, (x - mean[:, None, None]).square().sum((0, 2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(shape, mean, dtype, emulator: Path) -> None:
    x, (gamma, beta) = random(shape, dtype, 1, mean), parameters(shape[1], 2)
    with Emulator(emulator):
        vectors = native.bn_act_stats(x, gamma, beta, EPS)
        plain = native.bn_act_stats(x, None, None, EPS)
    mean64, m2 = moments(x.double())
    eager_m2 = moments(x.float())[1]
    # A mean near zero is as exact as the numbers are large.
    unit = torch.finfo(torch.float32).eps * (mean64.abs() + (m2 / rows(x)).sqrt())
    assert ((vectors[MEAN].double() - mean64).abs() <= 2 * unit).all()
    numerics.assert_close(vectors[M2], m2, eager_m2, rows(x))
    numerics.assert_close(vectors[VAR], m2 / (rows(x) - 1), eager_m2 / (rows(x) - 1), rows(x))
    invstd, eager = (m2 / rows(x) + EPS).rsqrt(), (eager_m2 / rows(x) + EPS).rsqrt()
    numerics.assert_close(vectors[INVSTD], invstd, eager, rows(x))
    scale = gamma.double() * invstd
    numerics.assert_close(vectors[SCALE], scale, gamma * eager, rows(x))
    shift = beta.double() - mean64 * scale
    unit = unit * scale.abs() + torch.finfo(torch.float32).eps * shift.abs()
    assert ((vectors[SHIFT].double() - shift).abs() <= 4 * unit).all()
    assert torch.equal(plain[SCALE], plain[INVSTD]) and torch.equal(plain[MEAN:], vectors[MEAN:])


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_statistics_far_from_zero(mean, emulator: Path) -> None:
    """The mean of squares minus the square of the mean would have no digit left."""
    x = random((3, 20, 15, 14), torch.float32, 3, mean)
    with Emulator(emulator):
        vectors = native.bn_act_stats(x, None, None, EPS)
    m2 = moments(x.double())[1]
    assert (vectors[M2].double() / m2 - 1).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TINY, ids=str)
def test_few_numbers(shape, dtype, emulator: Path) -> None:
    """There may not be a whole chunk of them."""
    x, dy, (gamma, beta) = random(shape, dtype, 30), random(shape, dtype, 31), parameters(shape[1], 32)
    with Emulator(emulator):
        vectors = native.bn_act_stats(x, gamma, beta, EPS)
        sums = native.bn_act_bwd_sums(dy, None, x, vectors, None, None, False, True)
        dx, _ = native.bn_act_bwd(dy, None, x, vectors, sums, None, False, True, False)
    mean, m2 = moments(x.double())
    want = gradients(x.double(), gamma, beta, dy.double())
    found = (vectors[MEAN], vectors[M2], sums[0, DGAMMA], sums[0, DBETA])
    for got, exact in zip(found, (mean, m2, *want[1:]), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), want[0], rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_has_no_variance(dtype, emulator: Path) -> None:
    x = random((1, 10, 1, 1), dtype, 4)
    with Emulator(emulator):
        vectors = native.bn_act_stats(x, None, None, EPS)
    assert torch.equal(vectors[MEAN], x.flatten().float())
    assert not vectors[VAR].any() and not vectors[M2].any()


def added(residual: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(residual, its affine map)."""
    r = None if residual == "none" else random(shape, dtype, 5)
    return r, torch.stack(parameters(shape[1], 6)) if residual == "projection" else None


def affine(x: Tensor, pair: Tensor) -> Tensor:
    return x * pair[0, :, None, None] + pair[1, :, None, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("shape", SHAPES + TINY, ids=str)
def test_map(shape, residual, relu, dtype, emulator: Path) -> None:
    x, pair = random(shape, dtype, 7), torch.stack(parameters(shape[1], 8))
    r, r_pair = added(residual, shape, dtype)
    with Emulator(emulator):
        y = native.bn_act_fwd(x, pair, r, r_pair, relu)
    assert y.is_contiguous(memory_format=torch.channels_last)
    pre, eager = affine(x.double(), pair.double()), affine(x.float(), pair).to(dtype)
    if r is not None:
        pre = pre + (r.double() if r_pair is None else affine(r.double(), r_pair.double()))
        eager = eager + (r if r_pair is None else affine(r.float(), r_pair).to(dtype))
    numerics.assert_close(y, pre.relu() if relu else pre, eager.relu() if relu else eager, 2, pre if relu else None)


def test_map_keeps_what_is_broken(emulator: Path) -> None:
    x = random((1, 10, 3, 1), torch.float16, 9)
    x[0, 4, 1, 0], x[0, 9, 2, 0] = float("nan"), float("inf")
    with Emulator(emulator):
        y = native.bn_act_fwd(x, torch.ones(2, 10), None, None, True)
    assert torch.equal(y.isnan(), x.isnan()) and torch.equal(y.isinf(), x.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "output", "input"])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, projection, mask, dtype, emulator: Path) -> None:
    if projection and mask == "input":
        pytest.skip("the input does not tell: something was added")
    c, m = shape[1], rows(torch.empty(shape))
    x, r, dy = random(shape, dtype, 10, 1.0), random(shape, dtype, 11), random(shape, dtype, 12)
    (gamma, beta), (gamma_r, beta_r) = parameters(c, 13), parameters(c, 14)
    with Emulator(emulator):
        vectors = native.bn_act_stats(x, gamma, beta, EPS)
        vectors_r = native.bn_act_stats(r, gamma_r, beta_r, EPS) if projection else None
        y = native.bn_act_fwd(x, vectors[:2], None, None, True)
        if mask == "output":
            y = random(shape, dtype, 15).relu()
        given, out, relu = r if projection else None, y if mask == "output" else None, mask != "none"
        sums = native.bn_act_bwd_sums(dy, out, x, vectors, given, vectors_r, relu, True)
        dx, dr = native.bn_act_bwd(dy, out, x, vectors, sums, given, relu, True, True)
        alone, nothing = native.bn_act_bwd(dy, out, x, vectors, sums, given, relu, True, False)
    assert torch.equal(alone, dx) and nothing.numel() == 0
    g = torch.ops.aten.threshold_backward(dy, y, 0) if relu else dy
    branches = [(x, gamma, beta, dx)] + ([(r, gamma_r, beta_r, dr)] if projection else [])
    for i, (at, weight, bias, found) in enumerate(branches):
        dinput, dgamma, dbeta = gradients(at.double(), weight, bias, g.double())
        eager = gradients(at, weight, bias, g)
        numerics.assert_close(found, dinput, eager[0], m)
        numerics.assert_close(sums[i, DGAMMA], dgamma, eager[1].float(), m)
        numerics.assert_close(sums[i, DBETA], dbeta, eager[2].float(), m)
    if not projection:
        assert torch.equal(dr, g)


def test_what_rounds_to_zero_did_not_pass(emulator: Path) -> None:
    """Computed anew from x, the ReLU's input must be rounded as the output was: 1e-9 is 0 in half."""
    x = torch.ones(1, 8, 3, 1, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    vectors = torch.zeros(6, 8)
    vectors[SCALE] = 1e-9
    with Emulator(emulator):
        y = native.bn_act_fwd(x, vectors[:2], None, None, True)
        sums = native.bn_act_bwd_sums(x, None, x, vectors, None, None, True, True)
        _, g = native.bn_act_bwd(x, None, x, vectors, sums, None, True, False, True)
    assert not y.any() and not sums[0, DBETA].any() and not g.any()


def gradients(x: Tensor, gamma: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Stock: of x, gamma and beta."""
    of = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [t.detach().requires_grad_() for t in (x, gamma.to(of), beta.to(of))]
    return torch.autograd.grad(norm(*leaves), leaves, g)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_on_constant_statistics(dtype, emulator: Path) -> None:
    x, dy = random((3, 20, 7, 5), dtype, 16), random((3, 20, 7, 5), dtype, 17)
    with Emulator(emulator):
        vectors = native.bn_act_stats(random((3, 20, 7, 5), dtype, 18), *parameters(20, 19), EPS)
        sums = native.bn_act_bwd_sums(dy, None, x, vectors, None, None, False, False)
        dx, _ = native.bn_act_bwd(dy, None, None, None, sums, None, False, True, False)
    want = dy.double() * vectors[SCALE].double()[:, None, None]
    numerics.assert_close(dx, want, (dy.float() * vectors[SCALE][:, None, None]).to(dtype), 1)
    xhat = (x.double() - vectors[MEAN].double()[:, None, None]) * vectors[INVSTD].double()[:, None, None]
    assert torch.allclose(sums[0, DGAMMA].double(), (dy.double() * xhat).sum((0, 2, 3)), atol=1e-4)
    assert not sums[0, B].any() and not sums[0, C].any()


def all_results(x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    """Every op once, with a projection and a ReLU."""
    vectors, vectors_r = (native.bn_act_stats(t, None, None, EPS) for t in (x, r))
    y = native.bn_act_fwd(x, vectors[:2], r, vectors_r[:2], True)
    sums = native.bn_act_bwd_sums(dy, y, x, vectors, r, vectors_r, True, True)
    return [vectors, vectors_r, y, sums, *native.bn_act_bwd(dy, y, x, vectors, sums, r, True, True, True)]


@pytest.mark.parametrize("shape", [(1, 64, 28, 15), (3, 10, 15, 14)], ids=str)
def test_same_bits_in_any_order_on_any_device(shape, emulator: Path) -> None:
    tensors = [random(shape, torch.bfloat16, seed, 3.0) for seed in (20, 21, 22)]
    with Emulator(emulator):
        want = all_results(*tensors)
    for settings in ({"seed": 1}, {"seed": 2, "sms": 1}, {"seed": 3, **A100}, {"sms": 7}):
        with Emulator(emulator, **settings):
            assert all(torch.equal(a, b) for a, b in zip(all_results(*tensors), want, strict=True)), settings


def assert_once(launch: dict, read: set[str], written: set[str], pivots: int = 0) -> None:
    """Those tensors move once and in whole sectors, and no other one of their size does; beside what is read of their
    first row, again and from caches: ``pivots`` bytes."""
    buffers = launch["buffers"]
    size = buffers["x"]["size"] if "x" in buffers else buffers["dy"]["size"]
    for name, b in buffers.items():
        if name in read:
            assert 32 * b["unique_sectors_read"] == size, name
            assert b["bytes_read"] == size + pivots and size <= 32 * b["sectors_read"] <= size + pivots, name
        elif name in written:
            assert b["bytes_written"] == 32 * b["unique_sectors_written"] == 32 * b["sectors_written"] == size, name
        elif b["size"] == size:
            assert b["bytes_read"] <= size / 100 and b["bytes_written"] == 0, name


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("channels", [64, 256, 2048])
def test_every_byte_once(channels, dtype, emulator: Path) -> None:
    x, r, dy = (random((3, channels, 14, 14), dtype, seed) for seed in (23, 24, 25))
    with Emulator(emulator, **H100) as e:
        all_results(x, r, dy)
        stats, merge, _, _, fwd, sums, merge_bwd, bwd = e.launches()
        vectors = native.bn_act_stats(x, None, None, EPS)
        e.launches()
        native.bn_act_fwd(x, vectors[:2], None, None, True)
        grads = native.bn_act_bwd_sums(dy, None, x, vectors, None, None, True, True)
        native.bn_act_bwd(dy, None, x, vectors, grads, None, True, True, False)
        plain_fwd, plain_sums, _, plain_bwd = e.launches()
    assert_once(stats, {"x"}, set(), pivots=16 * stats["threads"] * stats["blocks"])
    assert_once(fwd, {"x", "residual"}, {"y"})
    assert_once(sums, {"dy", "y", "x", "residual"}, set())
    assert_once(bwd, {"dy", "y", "x", "residual"}, {"dx", "dresidual"})
    assert_once(plain_fwd, {"x"}, {"y"})
    assert_once(plain_sums, {"dy", "x"}, set())
    assert_once(plain_bwd, {"dy", "x"}, {"dx"})
    for first, second in ((stats, merge), (sums, merge_bwd)):
        written, read = first["buffers"]["partials"], second["buffers"]["partials"]
        assert written["bytes_written"] == 32 * written["unique_sectors_written"] == written["size"]
        assert read["bytes_read"] == 32 * read["sectors_read"] == read["size"]
        assert_once(second, set(), set())
    for launch in (stats, merge, fwd, sums, merge_bwd, bwd, plain_fwd, plain_sums, plain_bwd):
        assert conflicts(launch) == {}
        if "merge" not in launch["kernel"]:
            sites = [site for site in launch["sites"] if site["kind"].startswith("global")]
            assert sites and all(site["narrowest"] == 16 for site in sites)


@pytest.mark.parametrize("channels", [3, 10, 20, 2047])
def test_any_channels_in_wide_accesses(channels, emulator: Path) -> None:
    """All but the last 14 bytes of a tensor move in chunks, each sector once or, at a tile's end, twice."""
    x, r, dy = (random((3, channels, 7, 5), torch.bfloat16, seed) for seed in (26, 27, 28))
    with Emulator(emulator) as e:
        all_results(x, r, dy)
        launches = e.launches()
    for launch in launches:
        assert conflicts(launch) == {}
        if "merge" in launch["kernel"]:
            continue
        for name, b in launch["buffers"].items():
            size, moved = b["size"], b["bytes_read"] + b["bytes_written"]
            if size != x.numel() * x.element_size() or (name == "x" and "stats" in launch["kernel"]):
                continue  # the statistics read the first row again
            behind = size % 16 if "sums" in launch["kernel"] else 0
            assert moved == size - behind, name
            assert b["sectors_read"] + b["sectors_written"] <= 1.15 * size / 32 + 8, name


@pytest.mark.parametrize("shape", [(0, 8, 7, 7), (3, 8, 0, 7)], ids=str)
def test_nothing_to_do(shape, emulator: Path) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with Emulator(emulator) as e:
        vectors, _, y, sums, dx, dr = all_results(x, x, x)
        assert e.launches() == []
    assert y.shape == dx.shape == dr.shape == shape
    assert vectors.shape == (6, 8) and sums.shape == (2, 5, 8)
    assert not vectors.any() and not sums.any()


def unaligned() -> Tensor:
    return torch.zeros(2 * 8 * 9 + 1, dtype=torch.bfloat16)[1:].view(2, 3, 3, 8).permute(0, 3, 1, 2)


BAD = {  # by what is wrong: the sentence, and the call, of x (2, 8, 3, 3) and v (6, 8)
    "float64": ("float32, float16 or bfloat16", lambda x, v: native.bn_act_stats(x.double(), None, None, EPS)),
    "nchw": ("x dense in NHWC", lambda x, v: native.bn_act_stats(x.contiguous(), None, None, EPS)),
    "three axes": ("x of shape (N, C, H, W)", lambda x, v: native.bn_act_stats(x[0], None, None, EPS)),
    "gamma": ("contiguous gamma (8) float32", lambda x, v: native.bn_act_stats(x, v[0, :7], None, EPS)),
    "beta": ("contiguous beta (8) float32", lambda x, v: native.bn_act_stats(x, None, v[0].half(), EPS)),
    "boundary": ("x on a 16-byte boundary", lambda x, v: native.bn_act_fwd(unaligned(), v[:2], None, None, True)),
    "affine": ("contiguous affine (2, 8)", lambda x, v: native.bn_act_fwd(x, v, None, None, True)),
    "residual": ("residual of shape and dtype", lambda x, v: native.bn_act_fwd(x, v[:2], x[:1], None, True)),
    "its dtype": ("residual of shape and dtype", lambda x, v: native.bn_act_fwd(x, v[:2], x.half(), None, True)),
    "no residual": ("a residual with residual_affine", lambda x, v: native.bn_act_fwd(x, v[:2], None, v[:2], True)),
    "dy": ("dy of shape and dtype", lambda x, v: native.bn_act_bwd_sums(x[:1], None, x, v, None, None, False, True)),
    "half a projection": (
        "a projection's residual and its vectors",
        lambda x, v: native.bn_act_bwd_sums(x, None, x, v, x, None, False, True),
    ),
    "no y": (
        "y where a residual was added before the ReLU",
        lambda x, v: native.bn_act_bwd_sums(x, None, x, v, x, v, True, True),
    ),
    "vectors": (
        "contiguous vectors (6, 8)",
        lambda x, v: native.bn_act_bwd_sums(x, None, x, v[:2], None, None, True, True),
    ),
    "gradients": (
        "contiguous gradients (1, 5, 8)",
        lambda x, v: native.bn_act_bwd(x, None, x, v, v, None, False, True, False),
    ),
    "no mask": (
        "y, or x and vectors where nothing was added",
        lambda x, v: native.bn_act_bwd(x, None, None, v, v[None, :5], None, True, True, False),
    ),
    "nothing wanted": (
        "a gradient that is wanted",
        lambda x, v: native.bn_act_bwd(x, None, x, v, v[None, :5], None, False, False, False),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals(what, emulator: Path) -> None:
    sentence, call = BAD[what]
    with Emulator(emulator) as e, pytest.raises(RuntimeError) as error:
        call(random((2, 8, 3, 3), torch.bfloat16, 27), torch.ones(6, 8))
    assert f"expected {sentence}" in str(error.value) and "; " in str(error.value)
    assert e.launches() == []
