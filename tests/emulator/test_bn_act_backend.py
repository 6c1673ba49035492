"""``bn_act`` of backend cuda as the ops layer calls it, against autograd through stock PyTorch in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import numerics
from resnet_fast.backends.cuda import bn_act as backend
from resnet_fast.calls import BnActCall, Leaves, Norm
from resnet_fast.spec import Epilogue, PointwiseSpec
from tests.support.emulation import Emulator

MOMENTUM, EPS = 0.1, 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(dtype: torch.dtype, *, c: int, layout: str, residual: bool, relu: bool, batch: bool, **norm_fields):
    """(call, spec)."""
    generator = torch.Generator().manual_seed(c)

    def random(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator).to(dtype if len(shape) == 4 else torch.float32)
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 and layout == "nhwc" else t

    norm = Norm(random(c), random(c), random(c), random(c).abs() + 0.5, batch, MOMENTUM, EPS)._replace(**norm_fields)
    call = BnActCall(random(3, c, 7, 9), norm, random(3, c, 7, 9) if residual else None, relu)
    name = str(dtype).removeprefix("torch.")
    return call, PointwiseSpec(3, 7, 9, c, name, layout, Epilogue(relu, residual), batch, True)


def stock(call: BnActCall, leaves: Leaves) -> Tensor:
    """The sum before the ReLU, in the dtype of the leaves."""
    norm = call.norm
    statistics = (None, None) if norm.batch_stats else (norm.mean, norm.var)
    if leaves.x.dtype == torch.float64 and statistics[0] is not None:
        statistics = (statistics[0].double(), statistics[1].double())
    y = F.batch_norm(leaves.x, *statistics, leaves.gammas[0], leaves.betas[0], norm.batch_stats, 0.0, EPS)
    return y if leaves.given is None else y + leaves.given


def leaves_of(call: BnActCall, double: bool) -> Leaves:
    flat = [None if t is None else (t.double() if double else t).detach() for t in Leaves.of(call).flat()]
    return Leaves.of(call).like([None if t is None else t.clone().requires_grad_() for t in flat])


def grads_of(call: BnActCall, y: Tensor, dy: Tensor, double: bool) -> list[Tensor | None]:
    """Stock's gradients where the ReLU let pass what it did in ``y``."""
    leaves = leaves_of(call, double)
    g = torch.ops.aten.threshold_backward(dy, y, 0) if call.relu else dy
    flat = leaves.flat()
    found = torch.autograd.grad(stock(call, leaves), [t for t in flat if t is not None], g.double() if double else g)
    given = iter(found)
    return [None if t is None else next(given) for t in flat]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("batch", [True, False])
def test_training(batch, relu, residual, layout, dtype, emulator: Path) -> None:
    for c in (10, 64):
        call, spec = problem(dtype, c=c, layout=layout, residual=residual, relu=relu, batch=batch)
        dy = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        needs = Leaves.of(call).like([t is not None for t in Leaves.of(call).flat()])
        with Emulator(emulator):
            y, saved, plan = backend.forward(call, spec, "raw")
            found = backend.backward(call, spec, saved, y, dy, needs)
            statistics = backend.statistics(call, saved)[0]
        pre, eager = stock(call, leaves_of(call, True)), stock(call, leaves_of(call, False))
        want, eager = (pre.relu(), eager.relu()) if relu else (pre, eager)
        numerics.assert_close(y, want.detach(), eager.detach(), 3 * 7 * 9, pre.detach() if relu else None)
        form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        assert y.is_contiguous(memory_format=form) and str(plan)
        assert [(tuple(t.shape), t.dtype) for t in saved] == [s[:2] for s in backend.shapes(call, spec, "raw")]
        exact, eagers = grads_of(call, y, dy, True), grads_of(call, y, dy, False)
        for got, reference, own in zip(found.flat(), exact, eagers, strict=True):
            assert (got is None) == (reference is None)
            if got is not None:
                numerics.assert_close(got, reference, own, 3 * 7 * 9)
                assert got.dim() == 1 or got.is_contiguous(memory_format=form)
        assert (statistics is None) == (not batch)
        if statistics is not None:
            x = call.x.double()
            torch.testing.assert_close(statistics[0].double(), x.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(statistics[1].double(), x.var((0, 2, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_only_what_is_needed(relu, batch, emulator: Path) -> None:
    call, spec = problem(torch.bfloat16, c=16, layout="nhwc", residual=True, relu=relu, batch=batch)
    dy, leaves = torch.ones_like(call.x), Leaves.of(call)
    with Emulator(emulator) as e:
        y, saved, _ = backend.forward(call, spec, "raw")
        everything = backend.backward(call, spec, saved, y, dy, leaves.like([True] * 4)).flat()
        for only in range(4):
            e.launches()
            needs = leaves.like([i == only for i in range(4)])
            found = backend.backward(call, spec, saved, y, dy, needs).flat()
            kernels = [launch["kernel"].partition("<")[0] for launch in e.launches()]
            assert [t is not None for t in found] == [i == only for i in range(4)]
            assert torch.equal(found[only], everything[only])
            sums = ["bn_act_bwd_sums_kernel", "bn_act_bwd_merge_kernel"] if only > 1 or (only == 0 and batch) else []
            assert kernels == sums + (["bn_act_bwd_kernel"] if only == 0 or (only == 1 and relu) else [])


def test_an_absent_norm(emulator: Path) -> None:
    """No parameters and no statistics: add and ReLU alone."""
    absent = {"weight": None, "bias": None, "mean": None, "var": None}
    call, spec = problem(torch.float16, c=10, layout="nhwc", residual=True, relu=True, batch=False, **absent)
    dy = torch.ones_like(call.x)
    with Emulator(emulator):
        y, saved, _ = backend.forward(call, spec, "raw")
        needs = Leaves.of(call).like([True, True, False, False])
        dx, given, *rest = backend.backward(call, spec, saved, y, dy, needs).flat()
    assert torch.equal(y, (call.x + call.residual).relu())
    assert torch.equal(dx, given) and torch.equal(dx, (y > 0).half()) and rest == [None, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(dtype, emulator: Path) -> None:
    call, spec = problem(dtype, c=20, layout="nchw", residual=True, relu=True, batch=False)
    with Emulator(emulator):
        state = backend.prepare(call, spec, [])
        y = backend.bn_act(call, spec, state)
    pre, eager = stock(call, leaves_of(call, True)).detach(), stock(call, leaves_of(call, False)).detach()
    numerics.assert_close(y, pre.relu(), eager.relu(), 2, pre)
    assert backend.prepare(call, spec, [state]) is state


def test_parameters_between_two_boundaries(emulator: Path) -> None:
    """Views into a flat buffer of parameters, as optimisers and FSDP make them."""
    flat = torch.linspace(0.5, 1.5, 17)
    call, spec = problem(torch.float16, c=8, layout="nhwc", residual=False, relu=True, batch=True, weight=flat[1:9])
    packed, _ = problem(torch.float16, c=8, layout="nhwc", residual=False, relu=True, batch=True, weight=flat[1:9] + 0)
    with Emulator(emulator):
        assert torch.equal(backend.forward(call, spec, "raw")[0], backend.forward(packed, spec, "raw")[0])


def test_sync_is_refused() -> None:
    _, spec = problem(torch.float16, c=8, layout="nhwc", residual=False, relu=True, batch=True)
    assert (
        "expected statistics of this process alone, got SyncBatchNorm" in backend.verdict(spec.with_(sync=True)).reason
    )
