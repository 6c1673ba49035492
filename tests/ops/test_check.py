"""Bad input to every op gives one sentence of expected / got / what to do; an empty batch is valid input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resnet_fast.calls import Call, Conv, Norm
from resnet_fast.errors import UserError
from resnet_fast.ops.check import layout_of
from resnet_fast.ops.specs import check, spec_of
from tests.support.op_cases import BLOCKS, OPS, Problem, make

RESIDUAL_OPS = tuple(op for op in OPS if op != "stem")


def refused(p: Problem, *fragments: str, backend: str = "auto") -> None:
    for grad in (False, True):
        p.x.requires_grad_(grad)
        with torch.set_grad_enabled(grad), pytest.raises(UserError) as caught:
            p.run(backend)
        text = str(caught.value)
        assert text.startswith("expected ") and ", got " in text and "; " in text
        for fragment in (p.op, *fragments):
            assert fragment in text, text


def swap(p: Problem, name: str, fn: Callable[[torch.Tensor], torch.Tensor]) -> Problem:
    assert name in p.tensors()
    return p.map(lambda k, t: fn(t) if k == name else t)


def with_conv(p: Problem, **changes: Any) -> Problem:
    convs = (p.convs[0]._replace(**changes), *p.convs[1:])
    return Problem(p.op, p.x, convs, p.norms, p.relu, p.residual, p.pool, p.projection)


@pytest.mark.parametrize("op", OPS)
def test_input_must_have_four_dimensions(op: str) -> None:
    refused(swap(make(op), "x", lambda t: t[0]), "4 dimensions", "unsqueeze")
    refused(swap(make(op), "x", lambda t: t[None]), "4 dimensions")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64, torch.bool])
def test_input_must_be_floating_point(op: str, dtype: torch.dtype) -> None:
    p = swap(make(op), "x", lambda t: t.to(dtype))
    with pytest.raises(UserError, match=r"floating-point x, got .* on cpu; convert"):
        p.run()


@pytest.mark.parametrize("op", OPS)
def test_an_nhwc_shaped_input_is_recognised(op: str) -> None:
    refused(swap(make(op, ci=4, h=9, w=7), "x", lambda t: t.permute(0, 2, 3, 1)), "looks like NHWC", "permute")


@pytest.mark.parametrize("op", OPS)
def test_wrong_channels(op: str) -> None:
    refused(swap(make(op), "x", lambda t: t[:, :5]), "8 channels", "(2, 5, 9, 7)")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("x,w", [("float32", "float64"), ("bfloat16", "float16"), ("float32", "bfloat16")])
def test_dtypes_of_input_and_weight_must_agree(op: str, x: str, w: str) -> None:
    p = make(op, dtype=getattr(torch, w))
    refused(swap(p, "x", lambda t: t.to(getattr(torch, x))), x, w)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("name", ["gamma0", "mean0"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dtype_of_the_norm_must_fit_the_input(op: str, dtype: torch.dtype, name: str, backend: str) -> None:
    refused(swap(make(op), name, lambda t: t.to(dtype)), "BatchNorm", "float32", backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_half_of_the_norm_in_another_dtype(op: str) -> None:
    p = make(op, dtype=torch.bfloat16)
    refused(swap(p, "mean0", lambda t: t.float()), "BatchNorm", "one dtype")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["weight0", "bias0", "gamma0", "mean0"])
def test_devices_must_agree(op: str, name: str) -> None:
    refused(swap(make(op, bias=True), name, lambda t: t.to("meta")), "on cpu", "on meta", "model.to('cpu')")


@pytest.mark.parametrize("op", RESIDUAL_OPS)
def test_device_of_the_residual_must_agree(op: str) -> None:
    refused(swap(make(op, residual=True), "residual", lambda t: t.to("meta")), "on cpu", "on meta")


@pytest.mark.parametrize("op", OPS)
def test_everything_on_meta_gives_the_shape(op: str) -> None:
    p = make(op)
    y = p.map(lambda k, t: t.to("meta")).run()
    assert y.device.type == "meta" and y.shape == p.run().shape


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "name,value", [("stride", 0), ("stride", -2), ("padding", -1), ("dilation", 0), ("dilation", -1)]
)
def test_geometry_out_of_range(op: str, name: str, value: int) -> None:
    refused(with_conv(make(op), **{name: (value, 1)}), name, repr((value, 1)))
    refused(with_conv(make(op), **{name: (1, value)}), name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("groups", [0, -1, 3])
def test_groups_out_of_range(op: str, groups: int) -> None:
    refused(with_conv(make(op), groups=groups), "groups")


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("stride", [100, 2**31, 2**40])
def test_a_huge_stride_gives_one_pixel(backend: str, stride: int) -> None:
    p = with_conv(make("conv_bn_act"), stride=(stride, stride))
    y = p.run(backend)
    assert y.shape == (2, 8, 1, 1)
    torch.testing.assert_close(y, make("conv_bn_act").map(lambda k, t: p.tensors()[k]).eager()[:, :, :1, :1])


@pytest.mark.parametrize("op", OPS)
def test_a_filter_larger_than_the_image(op: str) -> None:
    p = make(op, h=2, w=9)
    refused(with_conv(p, weight=torch.randn(8, 8, 5, 5), padding=(0, 2)), "at least 5x1 pixels", "5x5 filter")


@pytest.mark.parametrize("op", OPS)
def test_a_filter_without_elements(op: str) -> None:
    p = make(op)
    refused(with_conv(p, weight=torch.randn(8, 8, 0, 3)), "weight")
    refused(with_conv(p, weight=torch.randn(0, 8, 3, 3)), "weight")


@pytest.mark.parametrize("op", OPS)
def test_weight_and_bias_of_the_wrong_shape(op: str) -> None:
    refused(swap(make(op), "weight0", lambda t: t[0]), "weight of 4 dimensions")
    refused(swap(make(op, bias=True), "bias0", lambda t: t[:-1]), "bias of shape (8,)")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["gamma0", "beta0", "mean0", "var0"])
def test_norm_of_the_wrong_length(op: str, name: str) -> None:
    refused(swap(make(op), name, lambda t: t[:-1]), "of shape (8,)", "(7,)")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("eps", [-1e-5, float("nan")])
def test_eps_must_not_be_negative(op: str, eps: float) -> None:
    p = make(op)
    norms = (p.norms[0]._replace(eps=eps), *p.norms[1:])
    refused(Problem(op, p.x, p.convs, norms, projection=p.projection), "eps >= 0")


@pytest.mark.parametrize("op", OPS)
def test_one_running_statistic_without_the_other(op: str) -> None:
    p = make(op)
    norms = (p.norms[0]._replace(var=None), *p.norms[1:])
    refused(Problem(op, p.x, p.convs, norms, projection=p.projection), "both or neither")


@pytest.mark.parametrize("op", RESIDUAL_OPS)
def test_residual_of_the_wrong_shape_or_dtype(op: str) -> None:
    p = make(op, residual=True)
    refused(swap(p, "residual", lambda t: t[:, :, :1]), "of shape")
    refused(swap(p, "residual", lambda t: t[:1]), "of shape")  # no broadcasting
    refused(swap(p, "residual", lambda t: t.double()), "float32", "float64")


@pytest.mark.parametrize("op", OPS)
def test_batch_statistics_of_one_value(op: str) -> None:
    p = make(op, n=1, h=1, w=1, batch_stats=True, pool=(1, 1, 0))
    before = {k: t.clone() for k, t in p.statistics().items()}
    refused(p, "more than one value per channel", "model.eval()")
    assert all(torch.equal(t, before[k]) for k, t in p.statistics().items())


@pytest.mark.parametrize("pool", [(0, 1, 0), (3, 0, 1), (3, 2, -1), (3, 2, 2)])
def test_pool_out_of_range(pool: tuple[int, int, int]) -> None:
    refused(make("stem", pool=pool), "pooling kernel")


def test_pool_larger_than_the_image() -> None:
    refused(make("stem", h=3, w=3, pool=(9, 2, 1)), "9x9 pooling", "3x3")


@pytest.mark.parametrize("op", sorted(BLOCKS))
def test_block_lists_of_the_wrong_length(op: str) -> None:
    args = list(make(op).args())
    for index, what in ((1, "convolutions"), (2, "bias"), (3, "norm tensors"), (4, "geometry"), (5, "batch_stats")):
        wrong = list(args)
        wrong[index] = args[index][:-1]
        with pytest.raises(UserError, match=f"{what}.*matching length"):
            getattr(torch.ops.resnet_fast, op)(*wrong)


@pytest.mark.parametrize("op", sorted(BLOCKS))
def test_block_shortcuts_that_do_not_fit(op: str) -> None:
    p = make(op, stride=2, ci=6)
    refused(Problem(op, p.x, p.convs[:-1], p.norms[:-1]), "a projection")
    refused(Problem(op, p.x, p.convs, p.norms, residual=p.run(), projection=True), "both")
    wrong = p.convs[-1]._replace(stride=(1, 1))
    refused(Problem(op, p.x, (*p.convs[:-1], wrong), p.norms, projection=True), "a projection of shape")


@pytest.mark.parametrize("op", sorted(BLOCKS))
def test_an_inner_convolution_is_named(op: str) -> None:
    p = make(op)
    refused(swap(p, "weight1", lambda t: t[:, :5]), f"{op}: conv2")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["auto", "reference", "onednn"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_an_empty_batch_gives_an_empty_result(op: str, backend: str, layout: str) -> None:
    p = make(op, stride=2, residual=op == "conv_bn_act", layout=layout, weight_layout=layout)
    full = p.run(backend)
    empty = p.map(lambda k, t: t[:0] if k in ("x", "residual") else t)
    for grad in (False, True) if backend != "onednn" else (False,):
        with torch.set_grad_enabled(grad):
            y = empty.copy(grad=grad).run(backend)
        assert y.shape == (0, *full.shape[1:]) and y.dtype == full.dtype and y.requires_grad == grad
        assert y.stride() == empty.eager().stride()


def test_a_spec_is_made_once_per_shape_and_again_for_another() -> None:
    p = make("conv_bn_act")
    call = Call("conv_bn_act", p.x, p.convs, p.norms)
    spec = spec_of(call, grad=False)
    assert spec_of(call._replace(x=p.x + 1), grad=False) is spec and spec == check(call)
    others = [
        call._replace(x=p.x[:1]),
        call._replace(x=p.x.contiguous(memory_format=torch.channels_last)),
        call._replace(relu=False),
        call._replace(convs=(p.convs[0]._replace(stride=(2, 1)),)),
        call._replace(convs=(p.convs[0]._replace(weight=p.convs[0].weight[..., :1]),)),
        call._replace(norms=(p.norms[0]._replace(batch_stats=True),)),
        call._replace(added=p.run()),
    ]
    specs = [spec_of(c, grad=False) for c in others] + [spec_of(call, grad=True)]
    assert len({spec, *specs}) == len(specs) + 1 and [check(c) for c in others] == specs[:-1]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (0, 3, 4, 5), (2, 3, 1, 5)])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced", "sliced_nhwc", "transposed"])
def test_layout_of_is_what_a_convolution_returns(shape: tuple[int, ...], layout: str) -> None:
    from torch._prims_common import suggest_memory_format

    from tests.support.op_cases import lay_out

    t = lay_out(torch.randn(shape), layout)
    expected = "nhwc" if suggest_memory_format(t) == torch.channels_last and t.numel() else "nchw"
    assert layout_of(t) == expected


def test_equal_specs_of_different_calls_are_one_object() -> None:
    """A frozen net and a trained one, weights in fp32 and in fp16: what is looked up by a spec compares identities."""
    x, weight = torch.randn(1, 16, 4, 4).half(), torch.randn(8, 16, 1, 1)
    convs = [Conv(w, None, (1, 1), (0, 0), (1, 1), 1) for w in (weight, weight.half())]
    found = [spec_of(Call("conv_bn_act", x, (conv,), (Norm(),)), grad=False) for conv in convs]
    assert found[0] is found[1]
