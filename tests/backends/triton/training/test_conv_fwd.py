"""conv_fwd in the interpreter: every config, prologue and geometry against fp64, and its statistics against its output.

Every norm has both signs of gamma and channels of gamma 0 (fwd_cases.py); NaN surrounds inputs and parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from resnet_fast.backends.triton.training import vectors as v
from resnet_fast.backends.triton.training.conv_fwd import conv_fwd
from resnet_fast.backends.triton.training.pack import pack_forward
from resnet_fast.backends.triton.training.vectors import Act
from resnet_fast.benchmarks.tables.counting import count
from resnet_fast.tuning.configs import Config, for_dtype
from resnet_fast.tuning.training_configs import SHIPPED
from tests.support.fwd_cases import VARIANTS, Case, assert_moments, case, rectangle, with_clamp
from tests.support.grids import covering
from tests.support.launch_cases import conv

pytestmark = pytest.mark.interpret

TILE = Config("conv_fwd", 64, 32, 32)


# A config is a tile: what it breaks does not depend on dtype and prologue at once.
CONFIGS = covering((config, dtype, prologue) for config in SHIPPED["conv_fwd"] for dtype, prologue in VARIANTS)


@pytest.mark.parametrize("config,dtype,prologue", CONFIGS, ids=str)
def test_every_config(config: Config, dtype: str, prologue: str, poisoned_outputs: None) -> None:
    """132 pixels, 20 channels to 20: no tile divides any of them."""
    case(conv(20, 20, 3, n=1, h=12, w=11, dtype=dtype), prologue).check(for_dtype(config, dtype))


GEOMETRIES = {
    "1x1": conv(40, 33, 1),
    "1x1_stride2": conv(40, 48, 1, stride=2),
    "1x1_padded": conv(40, 16, 1, padding=1),
    "3x3_whole_blocks": conv(64, 16, 3, h=5, w=4),
    "3x3_stride2": conv(20, 24, 3, stride=2),
    "3x3_stride3_dilation2": conv(24, 16, 3, stride=3, dilation=2),
    "3x3_no_padding": conv(20, 24, 3, padding=0),
    "3x3_wide_padding": conv(16, 24, 3, padding=4),
    "5x5_dilation2": conv(20, 16, 5, dilation=2, n=1),
    "even_filter": conv(17, 16, 4, padding=1, n=1),
    "1x3_unequal": rectangle(18, 24, 1, 3, stride=(2, 1), padding=(0, 1)),
    "3x1_unequal": rectangle(18, 24, 3, 1, stride=(1, 3), padding=(2, 0), dilation=(2, 1)),
    "17_taps_in_windows": rectangle(16, 24, 1, 17, padding=(0, 8)),
    "7x7_three_channels": conv(3, 24, 7, stride=2),
    "3x3_eight_channels": conv(8, 24, 3),
    "one_channel": conv(1, 1, 3),
    "groups": conv(64, 32, 3, groups=2, h=5, w=4),
    "groups_merged": conv(32, 32, 3, groups=8, stride=2),
    "groups_in_windows": conv(12, 8, 3, groups=4),
    "depthwise": conv(40, 40, 3, groups=40, h=5, w=4),
    "one_pixel": conv(20, 24, 3, h=1, w=1),
    "one_column": conv(20, 24, 3, h=6, w=1, n=1),
}


RAW = ("1x1_stride2", "1x1_padded", "3x3_stride2", "7x7_three_channels", "groups_merged")


@pytest.mark.parametrize(
    "name,prologue", [(n, p) for n in GEOMETRIES for p in ("none", "exact", "packed") if p != "none" or n in RAW]
)
def test_geometry(name: str, prologue: str, poisoned_outputs: None) -> None:
    """Without a prologue only the loads differ; they are those of the exact prologue."""
    case(GEOMETRIES[name], prologue).check(TILE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_packed_prologue_where_every_channel_is_constant(dtype: str) -> None:
    """With gamma 0 each channel is relu(beta) inside the image and 0 in its padding, which a clamp cannot express."""
    c = case(conv(20, 24, 3, padding=2, dtype=dtype), "packed")
    rows = torch.zeros(10, 20)
    rows[v.SHIFT] = torch.randn(20)
    replace(c, x=with_clamp(c.x.y, rows)).check(TILE)


def test_a_scale_too_small_for_a_threshold() -> None:
    """With |shift| > 65504 |scale| a channel is constant, and so is its exact value within far less than a rounding."""
    c = case(conv(20, 24, 3), "packed")
    rows = torch.zeros(10, 20)
    rows[v.SCALE] = torch.randn(20).sign() * 1e-6
    rows[v.SHIFT] = torch.randn(20) + 0.2
    replace(c, x=with_clamp(c.x.y, rows)).check(TILE)


@pytest.mark.parametrize("prologue", ["exact", "packed"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_means_of_one_standard_deviation(dtype: str, prologue: str) -> None:
    """Packed prologues are meant for means up to this size; centring keeps a net's tensors well below."""
    case(conv(64, 24, 3, n=1, dtype=dtype), prologue, mean=1.0).check(TILE)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("prologue", ["none", "packed"])
def test_batch_sizes(n: int, prologue: str) -> None:
    c = case(conv(20, 24, 3, n=max(1, n), h=4, w=5), prologue)
    if n:
        c.check(TILE)
        return
    empty = replace(c.conv, n=0)
    y, partials = replace(c, conv=empty, x=c.x._replace(y=c.x.y[:0])).run(TILE)
    assert y.shape == empty.out_shape() and partials is not None and partials.shape == (2, 0, 24)


@pytest.mark.parametrize("prologue", ["none", "packed"])
def test_images_that_lie_apart(prologue: str) -> None:
    case(conv(20, 24, 3, n=3, h=5, w=4), prologue, images=2).check(TILE)


@pytest.mark.slow
@pytest.mark.parametrize("prologue", ["none", "exact", "packed"])
def test_images_that_lie_2_to_the_31_elements_apart(prologue: str) -> None:
    c = case(conv(16, 16, 3, h=5, w=4), prologue)
    step = 2**31 + 64
    field = torch.empty(step + 5 * 4 * 16, dtype=torch.float16)  # 4 GiB of addresses, of which little is touched
    apart = field.as_strided(c.x.y.shape, (step, 1, 4 * 16, 16))
    replace(c, x=c.x._replace(y=apart.copy_(c.x.y))).check(TILE)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-4), ("float16", 1e-4), ("bfloat16", 1e-4)])
def test_statistics_of_a_mean_of_a_hundred_deviations(dtype: str, tolerance: float) -> None:
    """Compares with the output as stored: bfloat16 stores it in steps of a deviation."""
    spec = conv(20, 24, 1, n=3, h=9, w=9, dtype=dtype)
    c = case(spec, "none", centre=False)
    w, _ = c.packs()
    y, partials = conv_fwd(c.launch, for_dtype(TILE, dtype), w, torch.full((24,), 200.0), c.x, None, True)
    assert partials is not None
    flat = y.double().transpose(0, 1).flatten(1)
    assert (flat.mean(1) / flat.std(1)).min() > 100
    assert_moments(y, partials, TILE.block_m, tolerance)


def test_statistics_are_optional() -> None:
    c = case(conv(20, 24, 3), "packed")
    y, partials = c.run(TILE, statistics=False)
    assert partials is None and torch.equal(y, c.run(TILE)[0])


@pytest.mark.parametrize("prologue", ["none", "exact", "packed"])
def test_two_runs_are_equal_bit_for_bit(prologue: str) -> None:
    c = case(conv(24, 40, 3, n=1, dtype="bfloat16"), prologue)
    first, second = c.run(TILE), c.run(TILE)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])  # type: ignore[arg-type]


def test_a_centre_that_is_not_finite_counts_as_zero() -> None:
    c = case(conv(20, 24, 1), "none")
    assert c.centre is not None
    c.centre[:5] = torch.tensor([float("nan"), float("inf"), float("-inf"), 7e4, -7e4])
    y = c.check(TILE)
    assert y.mismatched == 0 and c.run(TILE)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("prologue", ["none", "exact", "packed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ci", [20, 8])
def test_values_that_are_not_finite_reach_the_outputs_that_eager_gives_them(
    ci: int, value: float, prologue: str
) -> None:
    c = case(conv(ci, 24, 3, n=1), prologue)
    c.x.y[0, 5, 0, 3] = value
    y, eager = c.run(TILE)[0], c.eager()
    assert torch.equal(y.isnan(), eager.isnan())
    assert torch.equal(torch.where(y.isinf(), y, 0), torch.where(eager.isinf(), eager, 0))


def test_a_norm_of_nan_reaches_every_output() -> None:
    """A batch that contains NaN has NaN statistics."""
    for prologue in ("exact", "packed"):
        c = case(conv(20, 24, 3, n=1), prologue)
        assert c.x.vectors is not None
        rows = c.x.vectors.clone()
        rows[v.SCALE, 4] = rows[v.SHIFT, 4] = float("nan")
        assert replace(c, x=with_clamp(c.x.y, rows)).run(TILE)[0].isnan().all()


@pytest.mark.parametrize("prologue", ["none", "exact", "packed"])
def test_traffic(prologue: str) -> None:
    """Reads x, the weight and the rows of a norm once, writes y and the partial sums once, and nothing else."""
    c = case(conv(48, 40, 3, n=1, h=8, w=11), prologue)
    w, const = c.packs()
    x = c.x if prologue != "none" else Act(c.x.y)
    with count(inside_views=True) as counts:
        y, partials = conv_fwd(c.launch, replace(TILE, packed=c.packed), w, const, x, c.centre, True)
    run = counts.only
    assert partials is not None and x.y.numel() * 2 == run["x_ptr"].read_unique
    assert run["w_ptr"].read_unique == w.numel() * 2
    assert run["y_ptr"].written == run["y_ptr"].written_unique == y.numel() * 2 and run["y_ptr"].read == 0
    assert run["partials_ptr"].written == run["partials_ptr"].written_unique == partials.numel() * 4
    rows = {"none": 0, "exact": 2 * 48 * 4, "packed": 3 * 48 * 2}[prologue]
    small = rows + 40 * 4 * (1 + c.packed)
    assert run.unique == (x.y.numel() + w.numel() + y.numel()) * 2 + partials.numel() * 4 + small


def test_a_wrong_constant_is_found() -> None:
    """Check the check: one threshold is off by a hundredth."""
    c = case(conv(20, 24, 3), "packed")
    assert c.x.vectors is not None
    _, const = c.packs()
    rows = c.x.vectors.clone()
    rows[v.THR, 7] += 0.01
    _, wrong = pack_forward(c.weight, torch.float16, c.conv, c.x._replace(vectors=rows))
    assert const is not None and wrong is not None and not torch.equal(const, wrong)
    with pytest.raises(AssertionError, match="over the budget"):
        Wrong(**vars(c), const=wrong).check(TILE)


class Wrong(Case):
    """A case with a constant of its own."""

    def __init__(self, const: torch.Tensor, **fields: Any) -> None:
        super().__init__(**fields)
        self.const = const

    def packs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().packs()[0], self.const


def test_the_input_is_not_written() -> None:
    c = case(conv(20, 24, 3), "packed")
    before = [t.clone() for t in c.x if t is not None] + [c.weight.clone()]
    c.run(TILE)
    after = [t for t in c.x if t is not None] + [c.weight]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_an_input_off_16_bytes() -> None:
    """A packed prologue must not make the compiler assume alignment that its tensors lack; slower reads are fine."""
    c = case(conv(24, 16, 3), "packed")
    n, ci, h, w = c.x.y.shape
    field = torch.empty(c.x.y.numel() + 1, dtype=torch.float16)
    off = field[1:].view(n, h, w, ci).permute(0, 3, 1, 2).copy_(c.x.y)
    assert off.data_ptr() % 16 and torch.equal(replace(c, x=c.x._replace(y=off)).run(TILE)[0], c.run(TILE)[0])
