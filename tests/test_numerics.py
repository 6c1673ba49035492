"""Tests of the error reports themselves: correct results pass, and every planted error is caught and located."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.errors import UserError
from resnet_fast.numerics import assert_close, budget, compare, floor, relu_band

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K = 16 * 9


def _conv(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ours, ref64, eager) of one convolution: ours multiplies im2col columns, eager is torch's own."""
    torch.manual_seed(seed)
    x = torch.randn(2, 16, 13, 11).to(dtype)
    w = (torch.randn(24, 16, 3, 3) / 12).to(dtype)
    ref = F.conv2d(x.double(), w.double(), padding=1)
    columns = w.float().flatten(1) @ F.unfold(x.float(), 3, padding=1)
    return columns.view(ref.shape).to(dtype), ref, F.conv2d(x, w, padding=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_another_order_of_summation_passes(dtype: torch.dtype, seed: int) -> None:
    out, ref, eager = _conv(dtype, seed)
    report = assert_close(out, ref, eager, K)
    assert report.ratio is not None and report.ratio < 2
    assert_close(eager, ref, eager, K)


def test_report_is_the_definition() -> None:
    ref = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    out = torch.tensor([[3.0, 4.5], [0.25, 0.0]])
    report = compare(out, ref, eager=torch.tensor([[3.0, 4.0], [0.5, 0.0]]))
    assert report.rel == pytest.approx(math.hypot(0.5, 0.25) / 5)
    assert (report.max_abs, report.max_at, report.out_at, report.ref_at) == (0.5, (0, 1), 4.5, 4.0)
    assert (report.eager_rel, report.eager_max) == (0.1, 0.5)
    assert report.ratio == pytest.approx(math.hypot(0.5, 0.25) / 0.5)
    assert (report.rms, report.peak) == (2.5, 4.0)


def test_layout_does_not_matter() -> None:
    out, ref, eager = _conv(torch.float32)
    out[1, 7, 3, 2] += 1
    a, b = compare(out, ref, eager), compare(out.to(memory_format=torch.channels_last), ref, eager)
    assert a == b and a.max_at == (1, 7, 3, 2)


def test_ratio_at_the_edges() -> None:
    ref = torch.ones(3, dtype=torch.float64)
    assert compare(ref.float(), ref).ratio is None
    assert compare(ref.float(), ref, ref.float()).ratio == 1.0
    assert compare(ref.float() + 1, ref, ref.float()).ratio == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_floor_grows_with_k_and_stays_below_one_rounding_of_the_output(dtype: torch.dtype) -> None:
    u = torch.finfo(dtype).eps / 2
    assert floor(dtype, 4) < floor(dtype, 4096)
    assert floor(dtype, 9) <= u
    assert floor(torch.float64, 4096) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_eager_still_grants_the_floor_and_no_more(dtype: torch.dtype) -> None:
    ref = torch.ones(1000, dtype=torch.float64)
    exact = ref.to(dtype)
    granted = budget(compare(exact, ref, exact), dtype, K).rel
    assert granted == floor(dtype, K) > 0
    nudged = exact.clone()
    nudged[3] += torch.finfo(dtype).eps
    assert_close(nudged, ref, exact, K)
    with pytest.raises(AssertionError, match="relative error over the budget"):
        assert_close(exact * (1 + 4 * torch.finfo(dtype).eps), ref, exact, K)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_of_the_largest_element_is_always_granted(dtype: torch.dtype) -> None:
    ref = torch.zeros(1000, dtype=torch.float64)
    ref[7] = 1.75
    allowed = budget(compare(ref.to(dtype), ref, ref.to(dtype)), dtype, K)
    assert 1 <= allowed.max_abs / (torch.finfo(dtype).eps / 2 * 1.75) < 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "plant",
    ["scaled", "shifted", "one element", "one channel zero", "swapped rows", "sign of one", "missing tap", "noise"],
)
def test_planted_errors_are_caught(dtype: torch.dtype, plant: str) -> None:
    out, ref, eager = _conv(dtype)
    rms = ref.square().mean().sqrt().item()
    if plant == "scaled":
        out = (out.float() * 1.02).to(dtype)
    elif plant == "shifted":
        out = (out.float() + 0.02 * rms).to(dtype)
    elif plant == "one element":
        out[1, 3, 5, 7] += 0.3 * rms
    elif plant == "one channel zero":
        out[:, 5] = 0
    elif plant == "swapped rows":
        out = out[:, :, torch.tensor([1, 0, *range(2, 13)])]
    elif plant == "sign of one":
        largest = int(out.abs().argmax())
        out.view(-1)[largest] *= -1
    elif plant == "missing tap":
        out[0, 0, 0] -= 0.5 * out[0, 0, 1]
    else:
        out = (out.float() + 0.02 * rms * torch.randn(out.shape)).to(dtype)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_close(out, ref, eager, K)


def test_reduced_precision_products_in_float32_are_caught() -> None:
    out, ref, eager = _conv(torch.float32)
    rounded = (out.view(torch.int32) & ~0x1FFF).view(torch.float32)  # what 10 bits of mantissa leave
    with pytest.raises(AssertionError, match="over the budget"):
        assert_close(rounded, ref, eager, K)


def test_one_wrong_element_of_a_million_is_caught_by_the_maximum_alone() -> None:
    torch.manual_seed(0)
    ref = torch.randn(1_000_000, dtype=torch.float64)
    eager = ref.to(torch.bfloat16)
    out = eager.clone()
    out[654_321] = ref[654_321] + 0.5
    with pytest.raises(AssertionError) as caught:
        assert_close(out, ref, eager, K)
    assert "largest error over the budget" in str(caught.value)
    assert "relative error over the budget" not in str(caught.value)
    assert "(654321,)" in str(caught.value)


def test_message_prints_both_errors_and_where() -> None:
    out, ref, eager = _conv(torch.float32)
    out[1, 3, 5, 7] += 1
    with pytest.raises(AssertionError) as caught:
        assert_close(out, ref, eager, K)
    text = str(caught.value)
    for part in ("max 1.0", "at (1, 3, 5, 7)", "eager's own", "ratio", "budget of", "float32", f"gemm_k {K}"):
        assert part in text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_where_the_reference_is(value: float) -> None:
    out, ref, eager = _conv(torch.float32)
    out[0, 2, 4, 6] = value
    report = compare(out, ref, eager)
    assert (report.mismatched, report.mismatch_at) == (1, (0, 2, 4, 6))
    assert math.isfinite(report.rel)
    with pytest.raises(AssertionError, match=r"not finite where the reference is.*the first at \(0, 2, 4, 6\)"):
        assert_close(out, ref, eager, K)


def test_finite_where_the_reference_is_not() -> None:
    ref = torch.tensor([1.0, math.nan, math.inf, -math.inf], dtype=torch.float64)
    same = ref.float()
    assert assert_close(same, ref, same, 1).rel == 0
    for wrong in ([1.0, 0.0, math.inf, -math.inf], [1.0, math.nan, -math.inf, -math.inf]):
        with pytest.raises(AssertionError, match="1 elements NaN or infinite on one side"):
            assert_close(torch.tensor(wrong), ref, same, 1)


def test_all_nan_output_fails() -> None:
    _, ref, eager = _conv(torch.float32)
    with pytest.raises(AssertionError, match=f"{ref.numel()} elements NaN"):
        assert_close(torch.full_like(eager, math.nan), ref, eager, K)


def test_nonzero_where_the_truth_is_zero_fails() -> None:
    ref = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(torch.full((4,), 1e-3), ref, torch.zeros(4), 1)
    with pytest.raises(AssertionError, match="relative error"):  # even where eager is as wrong
        assert_close(torch.full((4,), 1e-3), ref, torch.full((4,), 1e-3), 1)
    assert_close(torch.zeros(4), ref, torch.zeros(4), 1)


def test_empty_batch_has_no_error() -> None:
    empty = torch.zeros(0, 3, 4, 4)
    assert assert_close(empty, empty.double(), empty, K).rel == 0


def test_wrong_shape_dtype_or_reference() -> None:
    out, ref, eager = _conv(torch.float32)
    with pytest.raises(UserError, match=r"an output of shape \(2, 24, 13, 11\), got \(24, 13, 11\)"):
        compare(out[0], ref)
    with pytest.raises(UserError, match=r"float64 reference, got torch.float32"):
        compare(out, ref.float())
    with pytest.raises(AssertionError, match="of shape"):
        assert_close(out[:1], ref, eager, K)
    with pytest.raises(AssertionError, match=r"dtype of eager, torch.float32, got torch.bfloat16"):
        assert_close(out.bfloat16(), ref, eager, K)
    with pytest.raises(UserError, match="eager's own error"):
        budget(compare(out, ref), torch.float32, K)


def test_broadcastable_output_is_not_the_right_shape() -> None:
    ref = torch.zeros(4, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="of shape"):
        assert_close(torch.zeros(4), ref, torch.zeros(4, 4), 1)


def test_relu_band_counts_flips_inside_and_outside() -> None:
    pre = torch.tensor([1.0, 1e-6, -1e-6, -1.0, -0.5], dtype=torch.float64)
    out = torch.tensor([1.0, 0.0, 1e-6, 0.0, 0.5])
    band = relu_band(out, pre, 1e-5)
    assert (band.inside, band.flips_inside, band.flips_outside, band.flip_at) == (2, 2, 1, (4,))
    assert "OUTSIDE" in str(band)
    good = relu_band(out[:4], pre[:4], 1e-5)
    assert (good.flips_outside, good.flip_at) == (0, None) and "OUTSIDE" not in str(good)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_outputs_pass_and_a_dead_pixel_fails(dtype: torch.dtype) -> None:
    out, pre, eager = _conv(dtype)
    out, ref, eager = out.relu(), pre.relu(), eager.relu()
    assert_close(out, ref, eager, K, pre64=pre)
    bad = out.clone()
    live = int(((pre > 0.2) & (pre < 0.4)).flatten().int().argmax())
    bad.view(-1)[live] = 0
    with pytest.raises(AssertionError, match="1 flipped OUTSIDE"):
        assert_close(bad, ref, eager, K, pre64=pre)
