"""Folding: scale and shift in fp32, rounded once from fp64, and the convolution that equals conv + BatchNorm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnet_fast.calls import Conv, Norm
from resnet_fast.folding import fold, scale_shift

CPU = torch.device("cpu")


def random_norm(c: int, dtype: torch.dtype = torch.float32) -> Norm:
    tensors = (torch.rand(c) + 0.5, torch.randn(c), torch.randn(c), torch.rand(c) + 0.5)
    return Norm(*(t.to(dtype) for t in tensors), eps=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scale_and_shift_are_rounded_once(dtype: torch.dtype) -> None:
    n = random_norm(33, dtype)
    gamma, beta, mean, var = (t.double() for t in n.tensors())
    scale, shift = scale_shift(n, 33, CPU)
    exact = gamma / torch.sqrt(var + n.eps)
    assert scale.dtype == shift.dtype == torch.float32
    torch.testing.assert_close(scale.double(), exact, rtol=2**-24, atol=0)
    torch.testing.assert_close(shift.double(), beta - mean * exact, rtol=2**-24, atol=1e-14)


def test_eps_is_inside_the_root() -> None:
    scale, _ = scale_shift(Norm(None, None, torch.zeros(2), torch.tensor([0.0, 3.0]), eps=1.0), 2, CPU)
    assert scale.tolist() == [1.0, 0.5]


def test_parts_may_be_absent() -> None:
    gamma, beta = torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0])
    for n, scale, shift in (
        (Norm(), [1.0, 1.0], [0.0, 0.0]),
        (Norm(gamma), [2.0, 3.0], [0.0, 0.0]),
        (Norm(gamma, beta), [2.0, 3.0], [4.0, 5.0]),
        (Norm(None, beta, torch.ones(2), torch.full((2,), 4.0)), [0.5, 0.5], [3.5, 4.5]),
    ):
        assert [t.tolist() for t in scale_shift(n, 2, CPU)] == [scale, shift]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_folded_convolution_equals_conv_and_batch_norm(groups: int, bias: bool) -> None:
    n = random_norm(8)
    conv = Conv(torch.randn(8, 4 // groups, 3, 3), torch.randn(8) if bias else None, (2, 1), (1, 1), (1, 1), groups)
    weight, shift = fold(conv, n)
    assert weight.shape == conv.weight.shape and weight.dtype == shift.dtype == torch.float32
    x = torch.randn(2, 4, 7, 6)
    y = F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, groups)
    z = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, groups)
    z = F.batch_norm(z, n.mean, n.var, n.weight, n.bias, False, 0.0, n.eps)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)


def test_results_are_new_tensors_without_a_graph() -> None:
    conv = Conv(torch.randn(2, 2, 1, 1, requires_grad=True), None, (1, 1), (0, 0), (1, 1), 1)
    beta = torch.randn(2, requires_grad=True)
    weight, shift = fold(conv, Norm(bias=beta))
    assert not weight.requires_grad and not shift.requires_grad
    weight.zero_()
    shift.zero_()
    assert conv.weight.abs().sum() > 0 and beta.abs().sum() > 0
