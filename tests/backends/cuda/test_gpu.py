"""The CUDA kernels on a GPU: ops and nets against fp64. The ``smallest`` ones run under compute-sanitizer too."""

from __future__ import annotations

import copy

import pytest
import torch

import resnet_fast
from resnet_fast import accelerate, numerics
from tests.support.op_cases import Problem, make

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]


def check(p: Problem) -> None:
    p = p.map(lambda _, t: t.cuda())
    with torch.no_grad():
        pre = p.to(torch.float64).eager(relu=False) if p.op != "stem" and p.relu else None
        numerics.assert_close(p.run("cuda"), p.to(torch.float64).eager(), p.eager(), p.gemm_k(), pre)


@pytest.mark.parametrize("op", ["conv_bn_act", "stem", "basic_block", "bottleneck"])
def test_smallest(op: str) -> None:
    ci, co = (3, 64) if op == "stem" else (64, 64)
    check(make(op, n=1, h=9, w=9, ci=ci, co=co, dtype=torch.float16, layout="nhwc", k=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ci", [256, 64])
def test_smallest_whole_bottleneck(ci: int, dtype: torch.dtype) -> None:
    net = resnet_fast.resnet50().layer1[1 if ci == 256 else 0].eval().to("cuda", dtype)
    x = torch.randn(1, ci, 9, 17, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        double = copy.deepcopy(net).double()(x.double())
        with resnet_fast.use_backend("reference"):
            eager = net(x)
        resnet_fast.reset_stats()
        with resnet_fast.use_backend("cuda"):
            y = net(x)
    assert resnet_fast.stats()["calls"] == {"bottleneck/cuda": 1}
    numerics.assert_close(y, double, eager, 9 * 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_net(name: str, dtype: torch.dtype) -> None:
    net = getattr(resnet_fast, name)().eval().to("cuda", dtype).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 224, 224, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        double = copy.deepcopy(net).double()(x.double())
        with resnet_fast.use_backend("reference"):
            eager = net(x)
        y = accelerate(net, backend="cuda")(x)
    numerics.assert_close(y, double, eager, 9 * 512)
