"""pack.py in the interpreter: the packed weights bit for bit, the constant against fp64, every layout and grouping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fast.backends.triton.training import vectors as v
from resnet_fast.backends.triton.training.pack import pack_dgrad, pack_forward
from resnet_fast.backends.triton.training.vectors import Act
from resnet_fast.spec import ConvSpec
from resnet_fast.tuning.routes import merged_groups
from tests.support.fwd_cases import case, guard
from tests.support.launch_cases import conv

pytestmark = pytest.mark.interpret

CONVS = {
    "1x1": conv(40, 17, 1),
    "3x3": conv(20, 5, 3),
    "long_rows": conv(130, 2, 3),  # 1,170 products: more than a program holds at once
    "7x7_three_channels": conv(3, 5, 7),
    "one_channel": conv(1, 1, 1),
    "unequal": conv(20, 5, 1).with_(s=3),
    "groups": conv(64, 32, 1, groups=2),
    "groups_merged": conv(32, 32, 3, groups=8),
    "groups_of_one": conv(32, 64, 1, groups=32),
    "groups_merged_into_one": conv(12, 8, 3, groups=4),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def dense(weight: Tensor, c: ConvSpec) -> Tensor:
    """Return (Co, merged Ci, R, S): every group's filters in their place in the merged group, zeros elsewhere."""
    wide = weight.new_zeros(c.co, c.ci // merged_groups(c), c.r, c.s)
    merge = c.groups // merged_groups(c)
    own_ci, own_co = c.ci // c.groups, c.co // c.groups
    for g in range(c.groups):
        first = g % merge * own_ci
        wide[g * own_co : (g + 1) * own_co, first : first + own_ci] = weight[g * own_co : (g + 1) * own_co]
    return wide


def per_group(row: Tensor, c: ConvSpec) -> Tensor:
    """A vector over all input channels as (Co, merged Ci, 1, 1): each output's own group."""
    groups = merged_groups(c)
    return row.view(groups, -1).repeat_interleave(c.co // groups, 0)[:, :, None, None]


def laid(weight: Tensor, layout: str) -> Tensor:
    """Return the same values, dense, channels last, or every other element of a larger tensor, surrounded by NaN."""
    if layout == "nhwc":
        return guard(weight.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    if layout == "sliced":
        co, ci, r, s = weight.shape
        return torch.full((co, 2 * ci, r, s + 1), float("nan"), dtype=weight.dtype)[:, ::2, :, 1:].copy_(weight)
    return guard(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONVS)
def test_forward_folds_and_gives_the_constant(name: str, dtype: torch.dtype, poisoned_outputs: None) -> None:
    c = case(CONVS[name].with_(dtype=str(dtype).removeprefix("torch.")), "packed")
    w, const = pack_forward(laid(c.weight, "nchw"), dtype, c.conv, c.x)
    assert c.x.vectors is not None and const is not None
    expected = dense(c.weight, c.conv) * per_group(c.x.vectors[v.FOLD], c.conv)
    assert torch.equal(w, expected.to(dtype).permute(0, 2, 3, 1)) and w.is_contiguous()
    terms = w.double().permute(0, 3, 1, 2) * per_group(c.x.vectors[v.THR], c.conv)
    error = (const.double() + terms.sum((1, 2, 3))).abs() / terms.abs().sum((1, 2, 3)).clamp(min=1e-30)
    assert const.dtype == torch.float32 and error.max() < 1e-6


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_casts_any_layout(given: torch.dtype, dtype: torch.dtype, layout: str, poisoned_outputs: None) -> None:
    for name in ("3x3", "groups_merged_into_one"):
        c = CONVS[name]
        weight = laid(torch.randn(c.co, c.ci // c.groups, c.r, c.s).to(given), layout)
        w, const = pack_forward(weight, dtype, c, None)
        assert const is None and w.dtype == dtype and w.is_contiguous()
        assert torch.equal(w, dense(weight, c).to(dtype).permute(0, 2, 3, 1))


def test_forward_without_a_clamp_is_a_cast() -> None:
    weight = torch.randn(5, 20, 3, 3)
    exact = Act(torch.empty(0), torch.full((10, 20), float("nan")))
    w, const = pack_forward(weight, torch.float16, CONVS["3x3"], exact)
    assert const is None and torch.equal(w, weight.half().permute(0, 2, 3, 1))


def test_a_weight_that_is_as_wanted_is_no_copy() -> None:
    weight = torch.randn(5, 20, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    w, _ = pack_forward(weight, torch.float32, CONVS["3x3"], None)
    assert w.data_ptr() == weight.data_ptr() and not w.requires_grad
    assert pack_forward(weight, torch.float16, CONVS["3x3"], None)[0].data_ptr() != weight.data_ptr()


def check_dgrad(c: ConvSpec, layout: str, given: torch.dtype, dtype: torch.dtype, a: Tensor | None) -> None:
    groups = merged_groups(c)
    weight = laid(torch.randn(c.co, c.ci // c.groups, c.r, c.s).to(given), layout)
    wt = pack_dgrad(weight, dtype, c, a)
    wide = dense(weight, c).float() * (a[:, None, None, None] if a is not None else 1)
    by_group = wide.view(groups, c.co // groups, c.ci // groups, c.r, c.s)
    expected = by_group.permute(0, 2, 3, 4, 1).reshape(c.ci, c.r, c.s, c.co // groups)
    assert torch.equal(wt, expected.to(dtype)) and wt.is_contiguous()


@pytest.mark.parametrize("name", CONVS)
def test_dgrad_is_transposed_and_scaled(name: str, poisoned_outputs: None) -> None:
    check_dgrad(CONVS[name], "nchw", torch.float32, torch.bfloat16, guard(torch.randn(CONVS[name].co)))


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dgrad_casts_any_layout(given: torch.dtype, dtype: torch.dtype, layout: str, poisoned_outputs: None) -> None:
    check_dgrad(CONVS["unequal"], layout, given, dtype, None)


def test_a_factor_that_is_not_finite_stays_in_its_channel() -> None:
    """Zeros between the members of a merged group stay zero, whatever the factor."""
    c = CONVS["groups_merged"]
    own = c.ci // c.groups
    weight = torch.randn(c.co, own, 3, 3)
    rows = torch.ones(10, c.ci)
    rows[v.FOLD, 0] = rows[v.THR, 0] = float("inf")
    act = Act(torch.empty(0), rows, torch.empty(0))
    w, const = pack_forward(weight, torch.float16, c, act)
    first = c.co // c.groups
    assert const is not None and w[first:].isfinite().all() and const[first:].isfinite().all()
    assert not w[:first, ..., 0].isfinite().any() and w[:first, ..., 1:].isfinite().all()
    a = torch.ones(c.co)
    a[0] = float("nan")
    assert pack_dgrad(weight, torch.float16, c, a)[own:].isfinite().all()


def test_two_runs_are_equal_bit_for_bit() -> None:
    c = case(CONVS["long_rows"], "packed")
    first, second = (pack_forward(c.weight, torch.float16, c.conv, c.x) for _ in range(2))
    assert first[1] is not None and second[1] is not None
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
