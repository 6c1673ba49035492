"""conv_bn_act_1x1.cu and conv_bn_act.cu against fp64; their traffic, their bank conflicts, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import folding, numerics
from resnet_fast.backends.cuda import conv_bn_act
from resnet_fast.benchmarks.emulation import Emulator, conflicts
from resnet_fast.calls import Conv, Norm
from resnet_fast.spec import ConvSpec, Epilogue

native = torch.ops.resnet_fast_native
DTYPES = [torch.bfloat16, torch.float16]
NARROW, WIDE = 3 * (128 + 64) * 128, 3 * (128 + 128) * 128
"""Bytes of shared memory of the two sizes of tiles."""


@dataclass
class Problem:
    """A convolution with bias on random numbers, rounded to ``dtype``; ``channels`` in and out."""

    image: tuple[int, int, int]
    channels: tuple[int, int]
    filter: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    relu: bool = True
    add: bool = True
    dtype: torch.dtype = torch.bfloat16
    x: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    bias: Tensor = field(init=False)
    residual: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def image(*shape: int) -> Tensor:
            return random(*shape).to(self.dtype).contiguous(memory_format=torch.channels_last)

        (n, h, w), (ci, co) = self.image, self.channels
        self.x = image(n, ci, h, w)
        self.weight = (random(co, ci, *self.filter) / self.gemm_k**0.5).to(self.dtype)
        self.bias = random(co)
        self.residual = None
        if self.add:
            shape = (
                F.conv2d(self.x[:1].float(), self.weight.float(), None, *self.geometry).shape if n else (1, co, 1, 1)
            )
            self.residual = image(n, *shape[1:])

    @property
    def gemm_k(self) -> int:
        return self.channels[0] * self.filter[0] * self.filter[1]

    @property
    def geometry(self) -> Any:
        return self.stride, self.padding, self.dilation

    def run(self, **changed: Any) -> Tensor:
        a = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual} | changed
        if self.filter == (1, 1) and self.padding == (0, 0):
            weight = a["weight"].flatten(1)
            return native.conv_bn_act_1x1(a["x"], weight, a["bias"], a["residual"], *self.stride, self.relu)
        return self.general(**changed)

    def general(self, **changed: Any) -> Tensor:
        a = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual} | changed
        weight = a["weight"].permute(0, 2, 3, 1).contiguous()
        steps = (*self.stride, *self.padding, *self.dilation)
        return native.conv_bn_act(a["x"], weight, a["bias"], a["residual"], *steps, self.relu)

    def eager(self, dtype: torch.dtype, relu: bool | None = None) -> Tensor:
        y = F.conv2d(self.x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), *self.geometry)
        if self.residual is not None:
            y = y + self.residual.to(dtype)
        return torch.relu(y) if (self.relu if relu is None else relu) else y

    def check(self, y: Tensor) -> None:
        assert y.is_contiguous(memory_format=torch.channels_last)
        pre = self.eager(torch.float64, relu=False) if self.relu else None
        numerics.assert_close(y, self.eager(torch.float64), self.eager(self.dtype), self.gemm_k, pre)


PROBLEMS_1X1 = [
    Problem((1, 1, 1), (8, 8)),
    Problem((3, 7, 15), (24, 72)),
    Problem((3, 7, 7), (72, 136), relu=False),
    Problem((1, 14, 15), (200, 64), add=False),
    Problem((1, 15, 14), (64, 256), stride=(2, 2)),
    Problem((3, 8, 7), (128, 24), stride=(3, 2), add=False, relu=False),
    Problem((1, 28, 28), (64, 128)),
]
PROBLEMS = [
    Problem((1, 1, 1), (8, 8), (3, 3), padding=(1, 1)),
    Problem((3, 7, 15), (24, 72), (3, 3), padding=(1, 1)),
    Problem((1, 14, 15), (64, 64), (3, 3), (2, 2), (1, 1)),
    Problem((1, 14, 14), (128, 136), (3, 3), (1, 1), (2, 2), (2, 2), relu=False),
    Problem((3, 8, 7), (8, 24), (5, 5), (2, 1), (2, 0), add=False),
    Problem((1, 28, 15), (16, 64), (7, 7), (2, 2), (3, 3), add=False),
    Problem((1, 7, 8), (72, 8), (1, 3), (1, 2), (0, 1), (2, 1), add=False, relu=False),
    Problem((1, 7, 7), (64, 64), (1, 1), (2, 2), (1, 1)),
]


def as_dtype(p: Problem, dtype: torch.dtype) -> Problem:
    return Problem(p.image, p.channels, p.filter, *p.geometry, p.relu, p.add, dtype)


def name(p: Problem) -> str:
    sizes = "x".join(map(str, (*p.image, *p.channels, *p.filter)))
    return sizes + f"s{p.stride[0]}d{p.dilation[0]}" + "r" * p.relu + "a" * p.add


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS_1X1 + PROBLEMS, ids=name)
def test_error_is_within_eagers(problem: Problem, dtype: torch.dtype, emulator: Path) -> None:
    p = as_dtype(problem, dtype)
    with Emulator(emulator):
        p.check(p.run())


@pytest.mark.parametrize("problem", [PROBLEMS_1X1[2], PROBLEMS[3]], ids=name)
def test_order_of_threads_and_number_of_sms_change_no_bit(problem: Problem, emulator: Path) -> None:
    with Emulator(emulator) as e:
        first = problem.run()
        assert e.launches()[0]["shared"] == NARROW
    for seed, sms in [(1, 132), (2, 1)]:
        with Emulator(emulator, seed=seed, sms=sms) as e:
            assert torch.equal(problem.run(), first)
            assert e.launches()[0]["shared"] == (WIDE if sms == 1 else NARROW)


def test_the_two_kernels_agree_on_1x1(emulator: Path) -> None:
    p = PROBLEMS_1X1[4]
    with Emulator(emulator):
        assert torch.equal(p.run(), p.general())


@pytest.mark.parametrize("sms", [1, 132])
@pytest.mark.parametrize(
    "problem",
    [
        Problem((1, 14, 15), (64, 128)),
        Problem((1, 14, 15), (64, 128), (3, 3), padding=(1, 1)),
        Problem((1, 14, 15), (24, 128), (3, 3), padding=(1, 1)),
    ],
    ids=name,
)
def test_counts(problem: Problem, sms: int, emulator: Path) -> None:
    with Emulator(emulator, sms=sms) as e:
        problem.run()
        launch = e.launches()[0]
    assert conflicts(launch) == {}
    for name_, b in launch["buffers"].items():
        moved = b["unique_sectors_written" if name_ == "y" else "unique_sectors_read"] * 32
        assert b["size"] <= moved + 32 and moved <= 1.05 * b["size"] + 32, name_
        assert b["sectors_written"] == b["unique_sectors_written"]
    wide = {
        s["where"].split(":")[0] for s in launch["sites"] if s["kind"].startswith("global") and s["narrowest"] == 16
    }
    assert wide == {"epilogue.h", "conv_bn_act_1x1.cu" if problem.filter == (1, 1) else "conv_bn_act.cu"}
    narrow = [s for s in launch["sites"] if s["kind"].startswith("global") and s["narrowest"] < 16]
    assert len(narrow) == 1 and narrow[0]["narrowest"] == 8, "the bias alone"
    assert all(s["units"] == s["least"] for s in launch["sites"] if s["kind"] == "global write")


def test_a_stride_leaves_the_skipped_pixels_unread(emulator: Path) -> None:
    p = Problem((1, 14, 14), (64, 64), stride=(2, 2))
    with Emulator(emulator) as e:
        p.run()
        x = e.launches()[0]["buffers"]["x"]
    assert x["bytes_read"] == x["size"] // 4


@pytest.mark.parametrize("filter_", [(1, 1), (3, 3)])
def test_an_empty_batch_launches_nothing(filter_: tuple[int, int], emulator: Path) -> None:
    p = Problem((0, 7, 7), (64, 64), filter_)
    p.residual = None
    with Emulator(emulator) as e:
        assert p.run().shape[:2] == (0, 64)
        assert e.launches() == []


@pytest.mark.parametrize("filter_", [(1, 1), (3, 3)])
def test_nan_and_infinity_pass(filter_: tuple[int, int], emulator: Path) -> None:
    p = Problem((1, 7, 7), (64, 64), filter_, padding=(filter_[0] // 2,) * 2)
    p.x[0, 3, 0, 0], p.x[0, 3, 6, 6] = float("nan"), float("inf")
    with Emulator(emulator):
        p.check(p.run())


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"x": torch.zeros(1, 64, 7, 7).contiguous(memory_format=torch.channels_last)},
        "expected float16 or bfloat16, got",
    ),
    ({"x": torch.zeros(1, 64, 7, 7, dtype=torch.bfloat16)}, "expected x dense in NHWC, got strides"),
    ({"weight": torch.zeros(64, 56, 1, 1, dtype=torch.bfloat16)}, "expected contiguous weight"),
    ({"weight": torch.zeros(64, 64, 1, 1, dtype=torch.float16)}, "expected contiguous weight"),
    ({"bias": torch.zeros(64, dtype=torch.bfloat16)}, "expected contiguous bias"),
    ({"residual": torch.zeros(1, 8, 7, 7, dtype=torch.bfloat16)}, "expected residual"),
    ({"residual": torch.zeros(1, 64, 7, 7)}, "expected residual in the dtype of x"),
    (
        {"x": torch.zeros(1 * 64 * 7 * 7 + 4, dtype=torch.bfloat16)[4:].view(1, 7, 7, 64).permute(0, 3, 1, 2)},
        "expected x on a 16-byte boundary",
    ),
]


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize(("changed", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_bad_tensors_are_refused(general: bool, changed: dict[str, Any], sentence: str, emulator: Path) -> None:
    p = Problem((1, 7, 7), (64, 64))
    with Emulator(emulator), pytest.raises(RuntimeError, match=sentence):
        (p.general if general else p.run)(**changed)


@pytest.mark.parametrize("filter_", [(1, 1), (3, 3)])
@pytest.mark.parametrize("channels", [(12, 64), (64, 12)])
def test_channels_are_multiples_of_8(channels: tuple[int, int], filter_: tuple[int, int], emulator: Path) -> None:
    p = Problem((1, 7, 7), channels, filter_, add=False)
    with Emulator(emulator), pytest.raises(RuntimeError, match="expected input and output channels that are multiples"):
        p.run()


def test_a_filter_fits_into_the_image(emulator: Path) -> None:
    p = Problem((1, 7, 7), (64, 64), (3, 3), add=False)
    p.dilation = (4, 1)
    with Emulator(emulator), pytest.raises(RuntimeError, match="expected a filter that fits into the padded image"):
        p.run()


def spec_of(p: Problem) -> ConvSpec:
    epilogue = Epilogue(relu=p.relu, add=p.add)
    dtype = str(p.dtype).removeprefix("torch.")
    return ConvSpec(*p.image, *p.channels, *p.filter, *p.geometry, dtype=dtype, epilogue=epilogue)


@pytest.mark.parametrize("problem", [PROBLEMS_1X1[4], PROBLEMS[3], PROBLEMS[7]], ids=name)
def test_adapter_runs_a_folded_convolution(problem: Problem, emulator: Path) -> None:
    p, spec = problem, spec_of(problem)
    assert conv_bn_act.verdict(spec)
    co = p.channels[1]
    norm = Norm(torch.rand(co) + 0.5, torch.randn(co), torch.randn(co), torch.rand(co) + 0.5, eps=1e-5)
    conv = Conv(p.weight.float(), None, *p.geometry, 1)
    weight, bias = folding.fold(conv, norm)
    packed = conv_bn_act.pack(spec, weight, bias)
    assert p.residual is not None
    with Emulator(emulator):
        # in NCHW and between two 16-byte words: made ready
        shifted = torch.zeros(p.residual.numel() + 4, dtype=p.dtype)[4:].view(p.residual.permute(0, 2, 3, 1).shape)
        residual = shifted.permute(0, 3, 1, 2).copy_(p.residual)
        y = conv_bn_act.launch(spec, packed, p.x.contiguous(), residual)
    p.weight, p.bias = weight.to(p.dtype), bias
    p.check(y)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "float32"}, "expected one of bfloat16, float16, got float32"),
        ({"batch_stats": True}, "expected running statistics"),
        ({"groups": 2}, "expected a convolution without groups, got 2 groups"),
        ({"ci": 60}, "expected input and output channels that are multiples of 8, got 60 and 64"),
        ({"epilogue": Epilogue(relu=True, pool=(3, 2, 1))}, "expected a convolution without pooling"),
        ({"h": 0}, "expected an image that the filter fits into"),
        ({"r": 9, "s": 9, "padding": (0, 0)}, "expected an image that the filter fits into"),
        ({"n": 2**28}, "expected a problem that 32 bits count"),
        ({"n": 2**24}, "expected a problem that 32 bits count"),
    ],
)
def test_verdict(changes: dict[str, Any], sentence: str) -> None:
    spec = spec_of(Problem((1, 7, 7), (64, 64), (3, 3), padding=(1, 1)))
    assert conv_bn_act.verdict(spec)
    got = conv_bn_act.verdict(spec.with_(**changes))
    assert not got and got.reason.startswith(sentence)
