"""oneDNN against fp64 and against the reference: every op, dtype, layout and geometry; arguments stay unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._prims_common import check_significant_strides

from resnet_fast import BackendError, parameter_cache
from resnet_fast.backends import onednn
from resnet_fast.backends.onednn.conv_bn_act import DTYPES
from resnet_fast.dispatch import select
from tests.support.op_cases import BLOCKS, LAYOUTS, OPS, assert_within_budget, lay_out, make

CPU = torch.device("cpu")

FLOATS = [getattr(torch, name) for name in DTYPES]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_and_layout(op: str, dtype: torch.dtype, layout: str) -> None:
    assert_within_budget(make(op, dtype=dtype, layout=layout, h=11, w=13))


@pytest.mark.parametrize("op", ["conv_bn_act", "bottleneck", "basic_block"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_given_residual(op: str, dtype: torch.dtype, layout: str) -> None:
    assert_within_budget(make(op, dtype=dtype, layout=layout, residual=True, stride=2))


CONVS: dict[str, dict[str, Any]] = {
    "1x1": {"k": 1},
    "1x1_stride2": {"k": 1, "stride": 2},
    "stride3": {"stride": 3},
    "no_padding": {"padding": 0},
    "wide_padding": {"padding": 4},
    "dilation2_stride2": {"dilation": 2, "stride": 2},
    "groups": {"ci": 12, "co": 8, "groups": 4},
    "groups_of_one": {"ci": 8, "co": 16, "groups": 8},
    "depthwise_stride2": {"groups": 8, "stride": 2},
    "7x7": {"k": 7, "ci": 3, "co": 17, "stride": 2},
    "even_filter": {"k": 4, "padding": 1},
    "bias": {"bias": True},
    "one_channel": {"ci": 1, "co": 1},
    "ragged_channels": {"ci": 5, "co": 19},
    "nhwc_weight": {"weight_layout": "nhwc"},
    "sliced_weight": {"weight_layout": "sliced"},
    "no_affine": {"affine": False},
    "affine_only": {"tracked": False},
    "no_norm": {"present": False},
    "no_norm_bias": {"present": False, "bias": True},
    "no_relu": {"relu": False},
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_conv_bn_act_of_every_geometry(name: str, dtype: torch.dtype) -> None:
    assert_within_budget(make("conv_bn_act", dtype=dtype, **CONVS[name]))
    assert_within_budget(make("conv_bn_act", dtype=dtype, layout="nhwc", residual=True, **CONVS[name]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_batch_sizes(op: str, n: int) -> None:
    assert_within_budget(make(op, n=n))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("h,w", [(1, 1), (1, 7), (6, 1), (2, 3)])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
def test_tiny_images(op: str, h: int, w: int, layout: str) -> None:
    assert_within_budget(make(op, h=h, w=w, layout=layout))
    if op != "stem":
        assert_within_budget(make(op, h=h, w=w, layout=layout, residual=True))


@pytest.mark.parametrize("op", sorted(BLOCKS))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [
        {"projection": True},
        {"stride": 2, "ci": 5},
        {"dilation": 2, "projection": True},
        {"groups": 4, "stride": 2},
        {"bias": True, "stride": 2},
        {"affine": False},
        {"present": False, "bias": True},
        {"ci": 16, "co": 16, "projection": False, "residual": True},
    ],
)
def test_blocks(op: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_within_budget(make(op, dtype=dtype, **options))


@pytest.mark.parametrize("op,ci,co", [("bottleneck", 16, 8), ("basic_block", 8, 8)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_identity_shortcuts(op: str, ci: int, co: int, dtype: torch.dtype, layout: str) -> None:
    p = make(op, ci=ci, co=co, dtype=dtype, layout=layout)
    assert not p.projection
    assert_within_budget(p)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_norms_under_16_bit(op: str, dtype: torch.dtype) -> None:
    p = make(op, dtype=dtype, norm_dtype=torch.float32, stride=2)
    with torch.no_grad():
        stock, exact = p.eager(), p.to(torch.float64).eager()
        error = (p.run("onednn").double() - exact).norm()
    assert error <= 2 * (stock.double() - exact).norm()


def test_the_same_tensor_as_input_and_residual() -> None:
    for layout in LAYOUTS:
        p = make("conv_bn_act", layout=layout)
        twice = type(p)(p.op, p.x, p.convs, p.norms, residual=p.x)
        before = p.x.clone()
        torch.testing.assert_close(twice.run("onednn"), twice.eager(), rtol=1e-4, atol=1e-5)
        assert torch.equal(p.x, before)


@pytest.mark.parametrize("op", ["conv_bn_act", "bottleneck", "basic_block"])
@pytest.mark.parametrize("layout", ["sliced", "sliced_nhwc"])
def test_nothing_is_written_around_a_sliced_residual(op: str, layout: str) -> None:
    p = make(op, stride=2, residual=True, layout=layout)
    storage = torch.empty(0).set_(p.residual.untyped_storage())
    nans = storage.isnan().sum()
    before = storage.clone()
    p.run("onednn")
    assert nans > 0 and torch.equal(storage.isnan().sum(), nans)
    assert torch.equal(storage.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("op", OPS)
def test_results_do_not_share_memory_between_calls(op: str) -> None:
    p = make(op, layout="nhwc")
    first = p.run("onednn")
    kept = first.clone()
    second = p.map(lambda k, t: t * 2 if k == "x" else t).run("onednn")
    assert torch.equal(first, kept) and first.data_ptr() != second.data_ptr()


def test_large_means_and_small_variances() -> None:
    p = make("conv_bn_act", ci=16, co=16)
    p = p.map(lambda k, t: t * 100 if k == "mean0" else t * 1e-4 if k == "var0" else t)
    assert_within_budget(p)


def test_infinite_pixels_come_out_as_in_eager() -> None:
    p = make("conv_bn_act", layout="nhwc")
    p.x[0, 0, 4, 4] = float("inf")
    ours, stock = p.run("onednn"), p.eager()
    assert torch.equal(ours.isinf(), stock.isinf()) and ours.isinf().any()


@pytest.mark.parametrize("op", OPS)
def test_what_it_does_not_take_is_a_sentence(op: str) -> None:
    cases = {
        "call without autograd": make(op).copy(grad=True),
        "running statistics, got BatchNorm with batch statistics": make(op, batch_stats=True),
        "float32, bfloat16, float16, got float64": make(op, dtype=torch.float64),
    }
    for fragment, p in cases.items():
        with pytest.raises(BackendError, match=r"expected .*, got .*; ") as caught:
            p.run("onednn")
        assert fragment in str(caught.value) and f"'onednn' cannot run {op}" in str(caught.value)


def test_availability_follows_the_switch() -> None:
    assert onednn.available()
    p = make("conv_bn_act")
    with torch.backends.mkldnn.flags(enabled=False):
        verdict = onednn.available()
        assert not verdict and "torch.backends.mkldnn.enabled" in verdict.reason
        with pytest.raises(BackendError, match="not available"):
            p.run("onednn")
        assert torch.equal(p.run(), p.run("reference"))
    assert p.run("onednn").shape == p.run().shape


def test_input_sizes_of_one_layout_share_one_packed_weight() -> None:
    parameter_cache.clear()
    p = make("conv_bn_act", n=2, ci=16, co=16)
    for n in (2, 3, 4):
        q = p.map(lambda k, t, n=n: torch.randn(n, *t.shape[1:]) if k == "x" else t)
        q.run("onednn")
    plans = parameter_cache.values_of(p.convs[0].weight)
    assert len(plans) == 3 and len({id(plan.state.convs[0].weight) for plan in plans}) < 3


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    op = draw(st.sampled_from(OPS))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    options: dict[str, Any] = {
        "n": draw(st.integers(1, 3)),
        "h": draw(st.integers(1, 12)),
        "w": draw(st.integers(1, 12)),
        "ci": groups * draw(st.integers(1, 4)) if op != "bottleneck" else draw(st.integers(1, 12)),
        "co": groups * draw(st.integers(1, 5)),
        "stride": draw(st.integers(1, 3)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "affine": draw(st.booleans()),
        "tracked": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "weight_layout": draw(st.sampled_from(["nchw", "nhwc"])),
        "dtype": draw(st.sampled_from(FLOATS)),
    }
    if op in ("conv_bn_act", "stem"):
        k = draw(st.integers(1, 4))
        options |= {"k": k, "padding": draw(st.integers(options["dilation"] * (k - 1) // 2, k + 1))}
        options["h"] += options["dilation"] * (k - 1)
        options["w"] += options["dilation"] * (k - 1)
    if op == "stem":
        options["pool"] = draw(st.sampled_from([(3, 2, 1), (2, 1, 1), (1, 1, 0)]))
    else:
        options |= {"relu": draw(st.booleans()) or op in BLOCKS, "residual": draw(st.booleans())}
    return op, options


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(), st.integers(0, 2**31))
def test_any_problem_is_within_budget_and_looks_like_the_reference(
    problem: tuple[str, dict[str, Any]], seed: int
) -> None:
    torch.manual_seed(seed)
    op, options = problem
    p = make(op, **options)
    assert_within_budget(p)
    with torch.no_grad():
        ours, reference = p.run("onednn"), p.run("reference")
        assert torch.equal(reference, p.eager())
    same, _ = check_significant_strides(ours, reference, only_cuda=False)
    assert same, (ours.stride(), reference.stride())


def test_the_net_level_hints() -> None:
    assert select.prefers_nhwc(CPU, "auto") and select.prefers_nhwc(CPU, "onednn")
    assert not select.prefers_nhwc(CPU, "reference")
    with torch.backends.mkldnn.flags(enabled=False):
        assert not select.prefers_nhwc(CPU, "auto")


def test_guard_zones_are_really_poisoned() -> None:
    t = lay_out(torch.zeros(1, 2, 3, 4), "sliced")
    assert torch.empty(0).set_(t.untyped_storage()).isnan().any() and not t.isnan().any()
