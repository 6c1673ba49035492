"""oneDNN's ReLU turns NaN into 0: where a call holds NaN or infinity, or may overflow, the stock layers run instead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fast
from resnet_fast.backends.onednn import bottleneck, bounds, conv_bn_act
from resnet_fast.backends.onednn.conv_bn_act import DTYPES
from tests.support.op_cases import BLOCKS, LAYOUTS, OPS, Problem, make

FLOATS = [getattr(torch, name) for name in DTYPES]
NAN, INF = math.nan, math.inf


def kinds(y: Tensor) -> Tensor:
    """Return 0 for each finite number, 1 for NaN, 2 for infinity, 3 for negative infinity."""
    return y.isnan() * 1 + y.isposinf() * 2 + y.isneginf() * 3


def assert_stock(p: Problem, reason: str, backend: str = "onednn") -> Tensor:
    """Assert that ``p`` equals stock PyTorch bit for bit and counts one fallback with this reason."""
    resnet_fast.reset_stats()
    with torch.no_grad():
        ours, stock = p.run(backend), p.eager()
    torch.testing.assert_close(ours, stock, rtol=0, atol=0, equal_nan=True)
    ((text, count),) = resnet_fast.stats()["fallbacks"].items()
    assert count == 1 and text.startswith(f"{p.op} runs on reference: ") and reason in text
    assert resnet_fast.stats()["calls"] == {f"{p.op}/reference": 1}
    with resnet_fast.strict(), torch.no_grad(), pytest.raises(resnet_fast.BackendError, match=reason):
        p.run(backend)
    return ours


def test_the_primitive_does_hide_nan() -> None:
    """If this fails, oneDNN keeps NaN and bounds.py is no longer needed."""
    p = make("conv_bn_act", layout="nhwc")
    conv, norm = p.convs[0], p.norms[0]
    packed = conv_bn_act.pack_one(conv, norm, tuple(p.x.shape), torch.float32)
    p.x[0, 3, 4, 4] = NAN
    assert p.eager().isnan().any() and not conv_bn_act.conv(p.x, packed, relu=True).isnan().any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", ["auto", "onednn"])
def test_a_broken_pixel(op: str, dtype: torch.dtype, backend: str) -> None:
    for layout in LAYOUTS:
        for value in (NAN, INF, -INF):
            p = make(op, dtype=dtype, layout=layout, n=3)
            p.x[1, 2, 4, 5] = value
            out = assert_stock(p, "its input holds NaN or infinity", backend)
            assert out[0].isfinite().all() and out[2].isfinite().all()
            assert value < 0 or not out[1].isfinite().all()
            p.x[1, 2, 4, 5] = 0
            resnet_fast.reset_stats()
            p.run(backend)
            assert resnet_fast.stats() == {"calls": {f"{op}/onednn": 1}, "fallbacks": {}}


@pytest.mark.parametrize("op", ["conv_bn_act", "bottleneck", "basic_block"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_broken_residual(op: str, value: float) -> None:
    p = make(op, residual=True, layout="nhwc")
    assert p.residual is not None
    p.residual[1, 1, 2, 3] = value
    out = assert_stock(p, "its input holds NaN or infinity")
    assert out[0].isfinite().all() and (value < 0 or not out[1, 1, 2, 3].isfinite())


@pytest.mark.parametrize("op", OPS)
def test_a_whole_channel_and_a_whole_image(op: str) -> None:
    p = make(op, n=3)
    p.x[2] = NAN
    out = assert_stock(p, "NaN or infinity")
    assert out[:2].isfinite().all() and out[2].isnan().all()
    p = make(op)
    p.x[:, 1] = NAN
    assert_stock(p, "NaN or infinity")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_broken_parameters(op: str, value: float) -> None:
    """Covers every convolution and norm of the call; BatchNorm handles a negative or infinite variance."""
    for name in make(op, bias=True).tensors():
        if name in ("x", "residual"):
            continue
        p = make(op, bias=True)
        p.tensors()[name].view(-1)[1] = value
        if name.startswith("var") and value == INF:
            torch.testing.assert_close(p.run("onednn"), p.eager(), rtol=1e-4, atol=1e-4)  # a scale of 0
        else:
            assert_stock(p, "its weights or statistics hold NaN or infinity")
    p = make(op)
    p.tensors()["var0"][1] = -1.0
    assert assert_stock(p, "its weights or statistics hold NaN or infinity").isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_overflow_inside(op: str, dtype: torch.dtype) -> None:
    """Finite input and weights can have infinite products: inf - inf is NaN, and ReLU would turn it into 0."""
    p = make(op, dtype=dtype, ci=16, co=16)
    p.x.mul_(1e37)
    p.convs[0].weight.mul_(1e3)
    out = assert_stock(p, "may overflow")
    assert not out.isfinite().all()


@pytest.mark.parametrize("op", sorted(BLOCKS))
def test_overflow_in_an_inner_convolution(op: str) -> None:
    p = make(op, ci=16, co=16)
    for conv in p.convs[:2]:
        conv.weight.mul_(1e25)
    assert not assert_stock(p, "may overflow").isfinite().all()


def test_an_overflow_that_folding_would_hide() -> None:
    """The stock convolution overflows before BatchNorm scales it down; the folded weight is small and would not."""
    p = make("conv_bn_act", ci=16, co=16)
    p.convs[0].weight.mul_(1e38)
    p.norms[0].var.fill_(1e38)
    assert not assert_stock(p, "may overflow").isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_large_numbers_that_fit_run_fused(op: str) -> None:
    p = make(op, layout="nhwc")
    p.x.mul_(1e25)  # whose squares do not fit
    resnet_fast.reset_stats()
    with torch.no_grad():
        ours, exact = p.run("onednn"), p.to(torch.float64).eager()
    assert resnet_fast.stats() == {"calls": {f"{op}/onednn": 1}, "fallbacks": {}}
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e21)


@pytest.mark.parametrize("op", OPS)
def test_the_bounds_hold(op: str) -> None:
    """An adversarial input (the signs of a filter) comes close to a convolution's bound and never exceeds it."""
    p = make(op, h=6, w=6, projection=True if op in BLOCKS else None, bias=True)
    x = p.convs[0].weight[0].sign().repeat(2, 1, 3, 3)[:, :, :6, :6] * 7.0
    q = p.map(lambda k, t: x if k == "x" else t)
    state = _state(q)
    out = state.bounds.out
    assert float(q.eager().abs().max()) <= out.gain * 7.0 + out.offset
    assert state.bounds.peak.gain >= out.gain and state.reach > 1e20


def _state(p: Problem) -> Any:
    """Return the state that is kept for a call after it ran."""
    from resnet_fast import parameter_cache

    parameter_cache.clear()
    p.run("onednn")
    anchor = next(t for k, t in p.tensors().items() if k != "x")
    return parameter_cache.values_of(p.convs[0].weight if p.convs else anchor)[0].state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64, 8, 8), (2, 3, 5, 7), (1, 1, 1, 1)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("same_threads")
def test_within_is_exact(dtype: torch.dtype, shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    for sign in (0, 1, -1):  # both signs, none, only negative
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.rand(shape) + 0.5
            x = (x * (torch.randint(0, 2, shape) * 2 - 1 if sign == 0 else sign)).to(dtype)
            x = x.contiguous(memory_format=layout)
            top = x.abs().max().item()
            norm = float(torch.linalg.vector_norm(x.double()))
            assert bounds.within(x, max(norm, top) * 1.01) and bounds.within(x, top)
            assert not bounds.within(x, top * 0.99) and not bounds.within(x, -1.0)
            for value in (NAN, -NAN, INF, -INF):
                y = x.clone()
                y[0, -1, 0, 0] = value
                assert not bounds.within(y, bounds.LIMIT)
                assert bounds.within(y, INF)  # was measured before
    assert bounds.within(torch.empty(0, 3, 4, 4, dtype=dtype), 1.0)


def test_stretches_cover_every_part_and_leave_room() -> None:
    part = bounds.UNCHANGED.then(bounds.Bounds(bounds.Bound(1e6, 3.0), bounds.Bound(1e6, 3.0)))
    found = bounds.stretches([part] * 16)
    assert next(iter(found)) == 0 and all(reach >= bounds.COMFORT for reach in found.values()) and 4 <= len(found) <= 8
    wild = bounds.UNCHANGED.then(bounds.Bounds(bounds.Bound(1e30, 0.0), bounds.Bound(1e30, 0.0)))
    assert bounds.stretches([part, wild, wild, part]) == pytest.approx(
        {0: bounds.LIMIT / 1e6, 1: bounds.LIMIT / 1e30, 2: bounds.LIMIT / 1e30, 3: bounds.LIMIT / 1e6}, rel=1e-6
    )
    broken = bounds.UNCHANGED.then(bounds.Bounds(bounds.Bound(INF, 0.0), bounds.Bound(INF, 0.0)))
    zero = bounds.Bounds(bounds.Bound(0.0, 1.0), bounds.Bound(0.0, 1.0))
    assert bounds.stretches([part, broken, part])[1] < 0
    assert broken.then(zero).peak.reach() < 0 and broken.then(zero).out == bounds.Bound(0.0, 1.0)


def test_fp16_storage_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulates a CPU with fp16 arithmetic, which keeps inner tensors in fp16; few CPUs have it."""

    def conv(x: Tensor, p: Any, relu: bool) -> Tensor:
        y = real(x.float(), p, relu)
        return y.half()

    real = conv_bn_act.conv
    p = make("bottleneck", ci=16, co=16, layout="nhwc")
    state = _state(p)
    q = p.map(lambda k, t: t.half() if k == "x" else t)
    call_x = q.x
    monkeypatch.setattr(bottleneck, "compute_dtype", lambda dtype: torch.float16)
    monkeypatch.setattr(bottleneck, "conv", conv)
    monkeypatch.setattr(bottleneck, "conv_add", lambda x, p, other, relu, overwrite: F.relu(conv(x, p, False)))
    from resnet_fast.calls import Call
    from resnet_fast.ops.specs import spec_of

    call = Call("bottleneck", call_x, p.convs, p.norms, projection=p.projection)
    spec = spec_of(call._replace(x=p.x), grad=False)
    assert isinstance(bottleneck.run(call, spec, state), Tensor)
    assert bottleneck.run(call._replace(x=call_x.clamp(-3, 3) * 20000), spec, state) is bounds.OVERFLOW
