"""conv_wgrad in the interpreter: every config, prologue and geometry against fp64; how pixels are split; traffic.

gamma of both norms has both signs and zeros; NaN surrounds inputs and parameters (wgrad_cases.py).
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from resnet_fast.backends.triton.training import conv_wgrad as module
from resnet_fast.backends.triton.training import vectors as v
from resnet_fast.benchmarks.tables.counting import count
from resnet_fast.spec import LaunchSpec
from resnet_fast.tuning.configs import Config, for_dtype
from resnet_fast.tuning.training_configs import FEW_VALUES, SHIPPED
from tests.support import dgrad_cases
from tests.support.dgrad_cases import GEOMETRIES
from tests.support.fwd_cases import VARIANTS
from tests.support.grids import covering
from tests.support.launch_cases import conv
from tests.support.wgrad_cases import SMS, Case, case

pytestmark = pytest.mark.interpret

TILE = Config("conv_wgrad", 32, 32, 64)
RAW = (True, False)


# A config is a tile: what it breaks does not depend on dtype, prologue and input at once.
CONFIGS = covering(
    (config, dtype, prologue, raw) for config in SHIPPED["conv_wgrad"] for dtype, prologue in VARIANTS for raw in RAW
)


@pytest.mark.parametrize("config,dtype,prologue,raw", CONFIGS, ids=str)
def test_every_config(config: Config, dtype: str, prologue: str, raw: bool, poisoned_outputs: None) -> None:
    """No tile divides 20 channels or 5 images of 35 pixels, and no stream is as long as the next."""
    case(conv(20, 20, 3, n=5, h=7, w=5, dtype=dtype), prologue, raw).check(for_dtype(config, dtype))


@pytest.mark.parametrize(
    "name,prologue,raw",
    covering((name, prologue, raw) for name in GEOMETRIES for prologue in ("exact", "packed") for raw in RAW),
)
def test_geometry(name: str, prologue: str, raw: bool, poisoned_outputs: None) -> None:
    case(GEOMETRIES[name], prologue, raw).check(TILE)


@pytest.mark.parametrize("name", ["1x1_stride2", "3x3_stride2", "7x7_three_channels", "groups_merged"])
def test_geometry_without_batch_statistics(name: str, poisoned_outputs: None) -> None:
    """dy = A*g; y holds NaN and is not read."""
    case(GEOMETRIES[name], "none").check(TILE)
    case(GEOMETRIES[name].with_(dtype="float32"), "none").check(TILE)


PARAMETERS = covering(
    product(
        ["1x1", "3x3", "7x7_three_channels", "groups_merged"],
        ["nchw", "nhwc"],
        [torch.float32, torch.float16, torch.bfloat16],
    )
)


@pytest.mark.parametrize("name,layout,dtype", PARAMETERS)
def test_any_parameter(name: str, layout: str, dtype: torch.dtype, poisoned_outputs: None) -> None:
    """The same sums, rounded to the parameter's dtype, in its strides."""
    spec = GEOMETRIES.get(name, conv(20, 24, 1 if name == "1x1" else 3, n=2))
    c = case(spec, "packed")
    want = c.run(TILE)
    c.layout, c.parameter = layout, dtype
    dw, weight = c.run(TILE), c.weight()
    assert dw.stride() == weight.stride() and torch.equal(dw, want.to(dtype))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7, 9, 13])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (1, 40)], ids=str)
def test_batches_and_images_of_every_length(size: tuple[int, int], n: int, poisoned_outputs: None) -> None:
    """Covers one, two and four streams, streams that end early or are empty, and steps over rows and images.

    Exact where a channel has few values: tuning/training_configs.py sends no such launch to a packed prologue. A
    single value has no statistics.
    """
    h, w = size
    for spec in (conv(24, 20, 3, n=n, h=h, w=w), conv(24, 20, 1, n=n, h=h, w=w, stride=2)):
        values = spec.gemm_m
        prologue = "packed" if values >= FEW_VALUES else "exact" if values > 1 else "none"
        case(spec, prologue, raw=n * h * w > 1).check(TILE)


@pytest.mark.parametrize("prologue", ["exact", "packed"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("sms", [1, 7, 1000])
def test_splits_cover_every_pixel_once(sms: int, k: int, prologue: str, poisoned_outputs: None) -> None:
    """6 images in 4 streams; with 1,000 multiprocessors 3 splits, which begin inside an image."""
    c = case(conv(24, 20, k, n=6, h=9, w=11), prologue)
    launch = LaunchSpec("conv_wgrad", (c.conv,), prologue=True)
    splits, per_split = module.splits_of(launch, TILE, sms)
    streams, images = module.streams_of(c.conv)
    assert (splits - 1) * per_split < images * 9 * 11 <= splits * per_split
    assert per_split % (TILE.block_k // streams) == 0
    assert splits == 3 if sms == 1000 else splits < 3 or k == 1
    c.check(TILE, sms)


def test_splits_of_a_large_launch() -> None:
    """Every split has four steps or more; distances inside a split stay below 2^31 elements."""
    small, huge = conv(64, 64, 1, n=256, h=56, w=56), conv(64, 64, 3, n=4096, h=112, w=112)
    splits, per_split = module.splits_of(LaunchSpec("conv_wgrad", (small,)), TILE, 132)
    assert 66 <= splits <= 132 and per_split >= 4 * 16
    splits, per_split = module.splits_of(LaunchSpec("conv_wgrad", (huge,)), TILE, 1)
    assert (per_split + 2 * 112 * 112) * 64 < 1 << 31 and splits * per_split >= 1024 * 112 * 112


@pytest.mark.parametrize("co,ci,k,size,splits", [(256, 256, 3, 14, 7), (1024, 256, 1, 14, 16), (512, 512, 3, 7, 2)])
def test_splits_fill_whole_rounds(co: int, ci: int, k: int, size: int, splits: int) -> None:
    """36, 16 and 144 whole tiles: 252 and 256 programs take two rounds of 132; no number near 264 does for the last."""
    whole = Config("conv_wgrad", 128, 128, 64, num_warps=8)
    launch = LaunchSpec("conv_wgrad", (conv(ci, co, k, n=256, h=size, w=size),))
    assert module.splits_of(launch, whole, 132)[0] == splits


def test_streams_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """64-bit distances between streams change no bit; they are taken where a batch spans 2^31 elements."""
    c = case(conv(24, 20, 3, n=5), "packed")
    near = c.run(TILE)
    assert not module._wide(c.conv, 9 * 7 * 24)
    assert module._wide(conv(64, 64, 3, n=4096, h=112, w=112), 112 * 112 * 64)
    monkeypatch.setattr(module, "_wide", lambda conv, x_stride_n: True)
    assert torch.equal(c.run(TILE), near)


@pytest.mark.parametrize("prologue", ["exact", "packed"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mean", [1.0, 3.0])
def test_large_means(mean: float, dtype: str, prologue: str) -> None:
    """The common part of the packed gradient's rounding is multiplied with the mean of an activation."""
    case(conv(24, 32, 3, n=4, h=9, w=8, dtype=dtype), prologue, mean=mean).check(TILE)


def test_every_other_image_of_a_batch() -> None:
    """Runs a 1x1 on images that are not adjacent, so that its pixels are not those of dy."""
    case(conv(24, 20, 1, n=5), "packed", images=2).check(TILE)


def test_tensors_off_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler must not assume alignment that the tensors lack; slower reads are fine."""
    real, told = module.alignment, []
    monkeypatch.setattr(module, "alignment", lambda *starts: told.append(real(*starts)) or told[-1])
    dw = [case(conv(24, 16, 3), "packed", gap=gap).run(TILE) for gap in (0, 1)]
    assert torch.equal(*dw)
    assert told == [16, 2]


@pytest.mark.parametrize("dtype,prologue", [("float32", "exact"), ("bfloat16", "exact"), ("bfloat16", "packed")])
def test_two_runs_are_equal_bit_for_bit(dtype: str, prologue: str) -> None:
    c = case(conv(24, 20, 3, n=5, dtype=dtype), prologue)
    assert torch.equal(c.run(for_dtype(TILE, dtype)), c.run(for_dtype(TILE, dtype)))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("prologue", ["none", "exact", "packed"])
def test_a_nan_stays_in_its_channel(prologue: str) -> None:
    """The other channels are right where fp64 is not NaN."""
    c = case(conv(24, 20, 3, n=2), prologue)
    clean = c.run(TILE)
    grad = c.output_grad.grad()
    g = grad.g.clone()
    g[1, 5, 2, 3] = float("nan")
    c.output_grad.grad = lambda: grad._replace(g=g)  # type: ignore[method-assign]
    dw = c.run(TILE)
    assert dw[5].isnan().all()
    assert torch.equal(torch.cat([dw[:5], dw[6:]]), torch.cat([clean[:5], clean[6:]]))


@pytest.mark.parametrize("prologue", ["none", "exact", "packed"])
def test_traffic(prologue: str) -> None:
    """Reads g, y and the raw input once, writes every split's tile, and touches nothing else."""
    c = case(conv(40, 48, 1, n=5, h=8, w=11), prologue)
    launch = LaunchSpec("conv_wgrad", (c.conv,), prologue=True)
    splits, _ = module.splits_of(launch, TILE, SMS)
    assert splits > 1
    with count(inside_views=True) as counts:
        dw = c.run(TILE)
    run, reduced = counts.launches
    assert run["g_ptr"].read_unique == c.output_grad.g.numel() * 2
    assert run["x_ptr"].read_unique == c.x.y.numel() * 2
    assert run["p_ptr"].written == run["p_ptr"].written_unique == splits * dw.numel() * 4
    if c.output_grad.batch:
        assert run["y_ptr"].read_unique == c.output_grad.y.numel() * 2
    assert reduced["p_ptr"].read == splits * dw.numel() * 4
    assert reduced["dw_ptr"].written == reduced["dw_ptr"].written_unique == dw.numel() * 4


def test_inputs_are_not_written() -> None:
    c = case(conv(24, 20, 3, n=2, stride=2), "packed")
    inputs = [c.output_grad.g, c.output_grad.y, *(t for t in c.x if t is not None)]
    before = [t.clone() for t in inputs]
    c.run(TILE)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_a_wrong_coefficient_is_found() -> None:
    """Check the check: one channel's BETA is off by a hundredth."""

    class Wrong(dgrad_cases.Case):
        def grad(self) -> Any:
            grad = super().grad()
            grad.packed[v.BETA_HI, 7] += 0.01
            return grad

    c = case(conv(24, 20, 3, n=4), "packed")
    c.check(TILE)
    with pytest.raises(AssertionError, match="over the budget"):
        Case(Wrong(**vars(c.output_grad)), c.x, True).check(TILE)
