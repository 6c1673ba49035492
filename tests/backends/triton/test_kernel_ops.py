"""The Triton backend through the ops, in the interpreter: every op, dtype, layout and geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._prims_common import check_significant_strides

from resnet_fast import BackendError, numerics
from resnet_fast.backends.triton import DTYPES
from resnet_fast.backends.triton.launch import INTERPRETED
from tests.support.op_cases import BLOCKS, LAYOUTS, OPS, Problem, make

pytestmark = pytest.mark.interpret

FLOATS = [getattr(torch, name) for name in DTYPES]


def check(p: Problem) -> None:
    """Assert an error within the budget, and the reference's shape, dtype and strides."""
    with torch.no_grad():
        y = p.run("triton")
        eager, double = p.eager(), p.to(torch.float64)
        pre = double.eager(relu=False) if p.op != "stem" and p.relu else None
        numerics.assert_close(y, double.eager(), eager, p.gemm_k(), pre)
        assert check_significant_strides(y, p.run("reference"))[0]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout(op: str, dtype: torch.dtype, layout: str) -> None:
    check(make(op, dtype=dtype, layout=layout, ci=16, co=16))


@pytest.mark.parametrize("op", ["conv_bn_act", *BLOCKS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_given_residual(op: str, layout: str) -> None:
    check(make(op, dtype=torch.float16, layout=layout, residual=True, stride=2))


GEOMETRIES: dict[str, dict[str, Any]] = {
    "1x1": {"k": 1},
    "1x1_stride2": {"k": 1, "stride": 2, "ci": 40},
    "1x1_padded": {"k": 1, "padding": 1},
    "3x3": {"ci": 16},
    "3x3_stride3": {"stride": 3, "ci": 24},
    "3x3_no_padding": {"padding": 0, "ci": 20},
    "3x3_wide_padding": {"padding": 4, "ci": 16},
    "3x3_dilation2_stride2": {"dilation": 2, "stride": 2, "ci": 16},
    "3x3_groups": {"ci": 64, "co": 32, "groups": 2},
    "general_groups": {"ci": 12, "co": 8, "groups": 4},
    "general_groups_of_one": {"ci": 8, "co": 16, "groups": 8},
    "general_depthwise": {"ci": 40, "co": 40, "groups": 40, "stride": 2},
    "general_7x7": {"k": 7, "ci": 3, "co": 17, "stride": 2},
    "general_even_filter": {"k": 4, "padding": 1},
    "general_5x5_wide": {"k": 5, "ci": 20, "co": 33, "dilation": 2},
    "bias": {"bias": True},
    "one_channel": {"ci": 1, "co": 1},
    "ragged_channels": {"ci": 21, "co": 35},
    "nhwc_weight": {"weight_layout": "nhwc"},
    "sliced_weight": {"weight_layout": "sliced"},
    "no_affine": {"affine": False},
    "no_norm": {"present": False},
    "no_norm_bias": {"present": False, "bias": True},
    "no_relu": {"relu": False},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_bn_act_geometry(name: str) -> None:
    check(make("conv_bn_act", dtype=torch.float16, **GEOMETRIES[name]))
    check(make("conv_bn_act", dtype=torch.float32, layout="nhwc", residual=True, **GEOMETRIES[name]))


BLOCK_CASES: dict[str, dict[str, Any]] = {
    "identity": {"ci": 32, "co": 16},
    "projection": {"ci": 24, "co": 20},
    "projection_stride2": {"ci": 24, "co": 20, "stride": 2},
    "groups": {"ci": 32, "co": 16, "groups": 4, "projection": True},
    "dilation": {"ci": 32, "co": 32, "dilation": 2, "projection": True},
    # a tail of 144 channels, padded to 256; of few pixels, since one tile of them takes the longest of all
    "wide": {"ci": 48, "co": 144, "projection": True, "h": 5, "w": 3},
    "bias": {"bias": True, "projection": True},
}


@pytest.mark.parametrize("op", BLOCKS)
@pytest.mark.parametrize("name", BLOCK_CASES)
def test_tail_and_projection_of_blocks(op: str, name: str) -> None:
    for dtype in (torch.float16, torch.float32):
        check(make(op, dtype=dtype, layout="nhwc", **BLOCK_CASES[name]))


@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (33, 18), (64, 31)])
def test_stem_sizes_and_pools(pool: tuple[int, int, int], size: tuple[int, int]) -> None:
    if pool == (2, 2, 0) and min(size) < 3:
        return  # the pooled image would be empty, which ops/ refuses
    check(make("stem", k=7, stride=2, ci=3, co=20, pool=pool, h=size[0], w=size[1], dtype=torch.float16))


@pytest.mark.parametrize("option", [{"ci": 4, "k": 3, "stride": 1}, {"ci": 1, "k": 5, "stride": 3}, {"ci": 20, "k": 5}])
def test_stem_filters(option: dict[str, int]) -> None:
    check(make("stem", co=16, dtype=torch.float16, layout="nhwc", **option))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("h,w", [(1, 1), (1, 7), (6, 1), (2, 3)])
def test_tiny_images(op: str, h: int, w: int) -> None:
    check(make(op, h=h, w=w, dtype=torch.float16, ci=16, co=16))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_empty_batch(op: str, layout: str) -> None:
    p = make(op, n=0, layout=layout)
    y = p.run("triton")
    assert y.shape == p.eager().shape and y.dtype == p.x.dtype


def test_batch_of_4096() -> None:
    check(make("bottleneck", n=4096, h=1, w=1, ci=16, co=16, dtype=torch.float16, layout="nhwc"))


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_not_written_and_outputs_are_new(op: str) -> None:
    p = make(op, dtype=torch.float16, layout="nhwc", ci=16, co=16)
    before = {name: t.clone() for name, t in p.tensors().items()}
    with torch.no_grad():
        y = p.run("triton")
    assert all(torch.equal(t, before[name]) for name, t in p.tensors().items())
    assert not any(y.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in p.tensors().values())


@pytest.mark.parametrize("op", OPS)
def test_nan_reaches_the_output(op: str) -> None:
    p = make(op, dtype=torch.float16, layout="nhwc", ci=16, co=16)
    p.x[0, 3, 4, 4] = float("nan")
    with torch.no_grad():
        assert torch.equal(p.run("triton").isnan().flatten(1).any(1), p.eager().isnan().flatten(1).any(1))


def test_changed_weights_are_seen() -> None:
    p = make("conv_bn_act", dtype=torch.float16, ci=16)
    with torch.no_grad():
        before = p.run("triton")
        p.convs[0].weight.mul_(2)
        check(p)
        assert not torch.equal(before, p.run("triton"))


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"dtype": torch.float64}, "expected one of float32"),
        ({"n": 0, "batch_stats": True}, "expected at least one element to train on"),
    ],
)
def test_a_refusal_is_the_same_sentence_everywhere(change: dict[str, Any], sentence: str) -> None:
    from resnet_fast.dispatch import select
    from resnet_fast.ops.specs import spec_of

    p = make("conv_bn_act", **change)
    with torch.no_grad(), pytest.raises(BackendError, match=sentence):
        p.run("triton")
    from resnet_fast.ops.op import OPS

    choice = select.choose(spec_of(OPS["conv_bn_act"].bind(*p.args()), False), torch.device("cpu"), "auto")
    assert choice.impl.backend != "triton" and sentence in dict(choice.refused)["triton"]


def test_a_call_with_a_graph_has_the_gradients_of_eager() -> None:
    p = make("conv_bn_act", batch_stats=True)
    ours, stock, exact = p.copy(grad=True), p.copy(grad=True), p.to(torch.float64).copy(grad=True)
    ours.run("triton").square().sum().backward()
    stock.eager().square().sum().backward()
    exact.eager().square().sum().backward()
    for name, leaf in ours.leaves().items():
        assert leaf.grad is not None, name
        numerics.assert_close(leaf.grad, exact.leaves()[name].grad, stock.leaves()[name].grad, p.gemm_k())


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels are what auto chooses")
def test_auto_never_chooses_the_interpreter() -> None:
    from resnet_fast import explain, resnet18

    net = resnet18().eval()
    assert {row.backend for row in explain(net, torch.randn(1, 3, 32, 32)).rows} == {"onednn"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    n=st.integers(1, 3), h=st.integers(1, 11), w=st.integers(1, 11), ci=st.integers(1, 40), co=st.integers(8, 40),
    k=st.sampled_from([1, 2, 3, 5]), stride=st.integers(1, 3), dilation=st.integers(1, 2), residual=st.booleans(),
    relu=st.booleans(), dtype=st.sampled_from(FLOATS), layout=st.sampled_from(LAYOUTS),
)  # fmt: skip
def test_any_convolution(**options: Any) -> None:
    """Uses eight output channels or more, because a single number's rounding error says nothing."""
    reach = options["dilation"] * (options["k"] - 1)
    if min(options["h"], options["w"]) + 2 * options["dilation"] * (options["k"] // 2) <= reach:
        return  # the filter does not fit, which ops/ refuses
    check(make("conv_bn_act", **options))
