"""conv_dgrad in the interpreter: every config, prologue, epilogue and geometry against fp64, and autograd of the whole
chain of BatchNorm, convolution, BatchNorm.

gamma of the following norm has both signs and a 0; inputs and parameters are surrounded by NaN (dgrad_cases.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import numerics
from resnet_fast.backends.triton.training import conv_dgrad as module
from resnet_fast.backends.triton.training import vectors as v
from resnet_fast.backends.triton.training.conv_dgrad import conv_dgrad
from resnet_fast.benchmarks.tables.counting import count
from resnet_fast.spec import ConvSpec, LaunchSpec
from resnet_fast.tuning.configs import Config, for_dtype
from resnet_fast.tuning.training_configs import SHIPPED
from tests.support.dgrad_cases import EPILOGUES, EPS, GEOMETRIES, Case, assert_sums, case, over, packed_weight
from tests.support.fwd_cases import VARIANTS
from tests.support.grids import covering
from tests.support.launch_cases import conv

pytestmark = pytest.mark.interpret

TILE = Config("conv_dgrad", 64, 32, 32)


@pytest.fixture
def promised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect what the launcher tells the compiler about addresses, launch by launch."""
    real, told = module.alignment, []
    monkeypatch.setattr(module, "alignment", lambda *starts: told.append(real(*starts)) or told[-1])
    return told


# A config is a tile: what it breaks does not depend on dtype and prologue at once.
CONFIGS = covering((config, dtype, prologue) for config in SHIPPED["conv_dgrad"] for dtype, prologue in VARIANTS)


@pytest.mark.parametrize("config,dtype,prologue", CONFIGS, ids=str)
def test_every_config(config: Config, dtype: str, prologue: str, poisoned_outputs: None) -> None:
    """35 pixels, 20 channels to 20: no tile divides any of them."""
    case(conv(20, 20, 3, n=1, h=7, w=5, dtype=dtype), prologue).check(for_dtype(config, dtype))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype,prologue", [("float32", "exact"), ("float16", "packed"), ("bfloat16", "packed")])
def test_epilogue(dtype: str, prologue: str, epilogue: str, poisoned_outputs: None) -> None:
    case(conv(24, 16, 1, h=5, w=7, dtype=dtype), prologue, epilogue).check(for_dtype(TILE, dtype))
    case(conv(20, 16, 1, h=5, w=4, stride=2, dtype=dtype), prologue, epilogue).check(for_dtype(TILE, dtype))


@pytest.mark.parametrize("prologue", ["exact", "packed"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name: str, prologue: str, poisoned_outputs: None) -> None:
    case(GEOMETRIES[name], prologue).check(TILE)


@pytest.mark.parametrize("name", ["1x1_stride2", "3x3_stride2", "groups_merged"])
def test_geometry_without_batch_statistics(name: str, poisoned_outputs: None) -> None:
    """dy = A*g; y holds NaN and is not read."""
    case(GEOMETRIES[name], "none").check(TILE)
    case(GEOMETRIES[name].with_(dtype="float32"), "none").check(TILE)


@pytest.mark.parametrize("prologue", ["none", "exact", "packed"])
def test_compact_is_the_gradient_of_the_pixels_that_were_read(prologue: str, poisoned_outputs: None) -> None:
    c = case(conv(24, 20, 1, n=3, h=5, w=6, stride=2), prologue, "plain")
    compact, partials = c.run(TILE, compact=True)
    whole = c.run(TILE)[0]
    assert partials is None and compact.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(compact, whole[:, :, ::2, ::2])
    assert not whole[:, :, 1::2].any() and not whole[..., 1::2].any()


@pytest.mark.parametrize("prologue", ["exact", "packed"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mean", [1.0, 3.0])
def test_large_means(mean: float, dtype: str, prologue: str) -> None:
    """GAMMA is large here, and must still be 0 outside the image."""
    case(conv(24, 32, 3, n=1, dtype=dtype), prologue, mean=mean).check(TILE)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_batch_sizes(n: int, stride: int) -> None:
    c = case(conv(24, 20, 3, n=max(1, n), h=4, w=5, stride=stride), "packed")
    if n:
        c.check(TILE)
        return
    assert c.below is not None
    below = c.below._replace(y=c.below.y[:0])
    none = replace(c, conv=replace(c.conv, n=0), g=c.g[:0], y=c.y[:0], below=below)
    dx, partials = none.run(TILE)
    assert dx.shape == (0, 24, 4, 5) and partials is not None and partials.shape == (2, 0, 24)


CHAINS = [
    conv(18, 20, 1, n=3, h=5, w=4),
    conv(18, 20, 3, n=2, h=5, w=6),
    conv(18, 20, 3, n=3, h=6, w=5, stride=2),
    conv(32, 32, 3, n=3, h=4, w=3, groups=4),
]


@pytest.mark.parametrize(
    "spec,dtype,prologue",
    covering((s, dtype, prologue) for s in CHAINS for dtype, prologue in VARIANTS if prologue != "none"),
    ids=str,
)
def test_autograd_of_norm_relu_conv_norm(spec: ConvSpec, dtype: str, prologue: str) -> None:
    """Compare with autograd in fp64 the gradient of relu(norm(x)) that goes through a norm on the statistics of y, and
    the two sums that the preceding norm needs, from the tensors as stored."""
    c = case(spec.with_(dtype=dtype), prologue, "below")
    assert c.below is not None and c.below.vectors is not None
    scale, shift = c.below.vectors[v.SCALE].double(), c.below.vectors[v.SHIFT].double()

    def chain(cast: torch.dtype) -> torch.Tensor:
        """d/d(norm(x)): the gradient before the norm below."""
        normed = (c.below.y.double() * over(scale) + over(shift)).to(cast).requires_grad_()  # type: ignore[union-attr]
        y = c.y.to(cast, copy=True).requires_grad_()  # y is given, as stored: not the convolution of act
        wide = torch.float64 if cast == torch.float64 else torch.float32
        out = F.batch_norm(y.to(wide), None, None, c.gamma.to(wide), None, True, 0.0, EPS).to(cast)
        (dy,) = torch.autograd.grad(out, y, c.g.to(cast))
        conv_of = F.conv2d(torch.relu(normed), c.weight.to(cast), None, *c.conv.geometry())
        return torch.autograd.grad(conv_of, normed, dy)[0]

    dx, partials = c.run(for_dtype(TILE, dtype))
    truth = chain(torch.float64)
    same = (c.passes() == (truth != 0)) | (truth == 0)
    assert same.double().mean() > 0.995  # at the kink rounding decides
    wanted = torch.where(same, truth, 0.0)
    numerics.assert_close(torch.where(same, dx, 0), wanted, torch.where(same, chain(c.g.dtype), 0), 9 * c.conv.co)
    assert partials is not None
    assert_sums(dx, partials, c.below)


@pytest.mark.parametrize("dtype,prologue", [("float32", "exact"), ("bfloat16", "exact"), ("bfloat16", "packed")])
def test_two_runs_are_equal_bit_for_bit(dtype: str, prologue: str) -> None:
    c = case(conv(40, 24, 3, n=1, h=6, w=5, stride=2, dtype=dtype), prologue, "all")
    first, second = c.run(for_dtype(TILE, dtype)), c.run(for_dtype(TILE, dtype))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("prologue", ["none", "exact", "packed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stride", [1, 2])
def test_values_that_are_not_finite_reach_the_pixels_that_eager_gives_them(
    stride: int, value: float, prologue: str
) -> None:
    """The norm keeps the coefficients of the finite tensors, as if a single pixel were wrong."""
    c = case(conv(24, 20, 3, n=1, h=6, w=7, stride=stride), prologue)
    rows, grad = c.coefficients(), c.grad()
    g = c.g.clone()
    g[0, 5, 2, 3] = value
    wt = packed_weight(c.weight, c.conv, g.dtype, grad.coefficients[v.A] if c.packed else None)
    launch, config = LaunchSpec("conv_dgrad", (c.conv,), prologue=True), replace(TILE, packed=c.packed)
    dx, partials = conv_dgrad(launch, config, wt, grad._replace(g=g), c.below, True, None, None)

    class Frozen(Case):
        def coefficients(self) -> torch.Tensor:
            return rows

    eager = Frozen(**{**vars(c), "g": g}).eager()
    assert torch.equal(dx.isnan(), eager.isnan())
    assert torch.equal(torch.where(dx.isinf(), dx, 0), torch.where(eager.isinf(), eager, 0))
    assert partials is not None and not partials.sum(1).isfinite().all()


def test_nan_below_passes_as_in_eager() -> None:
    for epilogue in ("below", "below exact"):
        c = case(conv(24, 20, 1, n=1, h=4, w=5), "packed", epilogue)
        assert c.below is not None
        plain = replace(c, below=None).run(TILE)[0]
        c.below.y[0, 7, 2, 1] = float("nan")
        dx, partials = c.run(TILE)
        assert dx[0, 7, 2, 1] == plain[0, 7, 2, 1] != 0
        assert partials is not None and partials[1, :, 7].isnan().any() and partials[0].isfinite().all()


def test_coefficients_of_nan_reach_every_pixel() -> None:
    """A batch that contains NaN has NaN statistics."""
    for prologue in ("exact", "packed"):
        c = case(conv(24, 20, 3, n=1, h=4, w=4), prologue, "plain")
        c.g[0, 4, 1, 2] = float("nan")
        assert c.run(TILE)[0].isnan().all()


def test_far_apart_images_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the 64-bit distances within a tile that images of 2^31 elements need."""
    c = case(conv(24, 20, 3, n=3, h=3, w=4, stride=2), "packed")
    near = c.run(TILE)[0]
    assert not module._wide(c.conv, TILE)
    monkeypatch.setattr(module, "_wide", lambda conv, config: True)
    assert torch.equal(c.run(TILE)[0], near)


def test_which_images_are_far_apart() -> None:
    small, large = conv(64, 64, 1, n=4096, h=7, w=7), conv(2048, 2048, 1, n=64, h=1024, w=1024)
    assert not module._wide(small, TILE) and module._wide(large, TILE)
    assert not module._wide(large.with_(n=1, h=512), TILE)


def test_tensors_off_16_bytes(promised: list[int]) -> None:
    """The compiler must not assume alignment that the tensors lack; slower reads are fine."""
    c = case(conv(24, 16, 3), "packed")
    n, co, h, w = c.g.shape
    field = torch.empty(c.g.numel() + 1, dtype=torch.float16)
    off = field[1:].view(n, h, w, co).permute(0, 3, 1, 2).copy_(c.g)
    assert torch.equal(replace(c, g=off).run(TILE)[0], c.run(TILE)[0])
    assert promised == [2, 16]


@pytest.mark.parametrize("stride", [1, 2])
def test_phases_multiply_nothing_in_vain(stride: int) -> None:
    """A stride of 2 spreads 9 taps over four phases; with whole tiles every product counts."""
    c = case(conv(32, 32, 3, n=1, h=16, w=16, stride=stride), "packed")
    with count() as counts:
        c.run(TILE)
    assert counts.flops == 2 * c.conv.n * 16 * 16 // stride**2 * 9 * 32 * 32


@pytest.mark.parametrize("prologue", ["none", "exact", "packed"])
def test_traffic(prologue: str) -> None:
    """Reads g, y, the weight and the input once, writes dx and the partial sums once, and nothing else."""
    c = case(conv(40, 48, 3, n=1, h=8, w=11), prologue)
    with count(inside_views=True) as counts:
        dx, partials = c.run(TILE)
    run = counts.only
    assert partials is not None and c.below is not None
    assert run["g_ptr"].read_unique == c.g.numel() * 2
    assert run["wt_ptr"].read_unique == c.weight.numel() * 2
    assert run["below_ptr"].read_unique == run["below_ptr"].read == dx.numel() * 2
    assert run["dx_ptr"].written == run["dx_ptr"].written_unique == dx.numel() * 2 and run["dx_ptr"].read == 0
    assert run["partials_ptr"].written == run["partials_ptr"].written_unique == partials.numel() * 4
    if c.batch:
        assert run["y_ptr"].read_unique == c.y.numel() * 2
    rows = {"none": 0, "exact": 3 * 48 * 4, "packed": 4 * 48 * 2}[prologue] + 3 * 40 * 2 + 40 * 4
    big = c.g.numel() * (1 + c.batch) + c.weight.numel() + 2 * dx.numel()
    assert run.unique == big * 2 + partials.numel() * 4 + rows


def test_inputs_are_not_written() -> None:
    c = case(conv(24, 20, 3, n=1, stride=2), "packed", "all")
    assert c.below is not None and c.add is not None and c.add_strided is not None
    inputs = [c.g, c.y, c.weight, c.add, c.add_strided[0], *(t for t in c.below if t is not None)]
    before = [t.clone() for t in inputs]
    c.run(TILE)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_a_wrong_coefficient_is_found() -> None:
    """Check the check: one channel's GAMMA is off by a tenth."""

    class Wrong(Case):
        def grad(self) -> Any:
            grad = super().grad()
            grad.packed[v.GAMMA, 7] += 0.1
            return grad

    c = case(conv(24, 20, 3, n=1), "packed", "plain")
    c.check(TILE)
    with pytest.raises(AssertionError, match="over the budget"):
        Wrong(**vars(c)).check(TILE)
