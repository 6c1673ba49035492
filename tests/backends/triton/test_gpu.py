"""The Triton backend on a GPU: ops and nets against fp64, the choice of dispatch, tuning. Imports nothing optional."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import resnet_fast
from resnet_fast import accelerate, explain, numerics
from tests.support.op_cases import BLOCKS, OPS, Problem, make

pytestmark = pytest.mark.gpu

FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def on_gpu(p: Problem) -> Problem:
    return p.map(lambda _, t: t.cuda())


def check(p: Problem) -> None:
    p = on_gpu(p)
    with torch.no_grad():
        pre = p.to(torch.float64).eager(relu=False) if p.op != "stem" and p.relu else None
        numerics.assert_close(p.run("triton"), p.to(torch.float64).eager(), p.eager(), p.gemm_k(), pre)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_op(op: str, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(make(op, n=3, h=29, w=31, ci=32, co=48, dtype=dtype, layout=layout, k=3))


@pytest.mark.parametrize("op", ["conv_bn_act", *BLOCKS])
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_as_exact_as_stock_under_its_switch(op: str, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    check(make(op, n=8, h=28, w=28, ci=128, co=128, dtype=torch.float32, layout="nhwc", k=3))


@pytest.mark.parametrize("op", ["conv_bn_act", *BLOCKS])
@pytest.mark.parametrize("option", [{"residual": True}, {"stride": 2}, {"groups": 8}, {"dilation": 2}])
def test_epilogues_and_geometries(op: str, option: dict[str, int]) -> None:
    check(make(op, n=2, h=30, w=27, ci=64, co=64, dtype=torch.float16, layout="nhwc", **option))


def test_imagenet_stem() -> None:
    check(make("stem", n=2, h=224, w=224, ci=3, co=64, k=7, stride=2, dtype=torch.bfloat16, layout="nhwc"))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_net_by_auto(name: str, dtype: torch.dtype) -> None:
    net = getattr(resnet_fast, name)().eval().to("cuda", dtype).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 224, 224, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        eager, reference = net(x), copy.deepcopy(net).double()(x.double())
    with torch.no_grad():
        numerics.assert_close(net(x), reference, eager, 4608)
        assert {row.backend for row in explain(net, x).rows} == {"triton"}


def test_offsets_beyond_32_bits() -> None:
    """A batch whose input and output have more than 2^31 elements."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB")
    p = on_gpu(make("conv_bn_act", n=2, h=8, w=8, ci=64, co=64, k=3, dtype=torch.float16, layout="nhwc"))
    n = 2**31 // (64 * 112 * 112) + 2
    x = torch.zeros(n, 64, 112, 112, device="cuda", dtype=torch.float16, memory_format=torch.channels_last)
    x[-1].normal_()
    with torch.no_grad():
        whole = Problem("conv_bn_act", x, p.convs, p.norms).run("triton")
        last = Problem("conv_bn_act", x[-1:].clone(), p.convs, p.norms).run("triton")
    assert torch.equal(whole[-1:], last)


def test_tuned_is_no_slower_than_stock(tmp_path: Path) -> None:
    net = accelerate(resnet_fast.resnet18().eval().half().cuda())
    x = torch.randn(8, 3, 64, 64, device="cuda", dtype=torch.float16)
    tuned = resnet_fast.tune(net, x, budget_s=120, path=tmp_path / "table.json")
    for times in tuned.table.entries.values():
        measured = {name: t for name, t in times.items() if t is not None}
        assert measured and min(measured.values()) <= min(
            (t for name, t in measured.items() if name.startswith("cudnn")), default=float("inf")
        )
