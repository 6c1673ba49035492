"""stem_fwd.cu, packed by backends/cuda/stem.py, against fp64; its traffic, bank conflicts and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import numerics
from resnet_fast.backends.cuda import stem
from resnet_fast.benchmarks.emulation import Emulator, conflicts
from resnet_fast.spec import ConvSpec, Epilogue, Verdict

DTYPES = [torch.bfloat16, torch.float16]


class Stem:
    """A folded stem on random numbers, rounded to ``dtype``."""

    def __init__(self, n: int, h: int, w: int, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        name = str(dtype).removeprefix("torch.")
        epilogue = Epilogue(relu=True, pool=(3, 2, 1))
        self.spec = ConvSpec(n, h, w, 3, 64, 7, 7, (2, 2), (3, 3), dtype=name, epilogue=epilogue)
        self.dtype = dtype
        self.x = torch.randn((n, 3, h, w), generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        self.weight = (torch.randn((64, 3, 7, 7), generator=generator) / 147**0.5).to(dtype)
        self.bias = torch.randn(64, generator=generator)

    def run(self) -> Tensor:
        return stem.launch(self.spec, stem.pack(self.spec, self.weight.float(), self.bias), self.x)

    def eager(self, dtype: torch.dtype) -> Tensor:
        y = F.conv2d(self.x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), 2, 3)
        return F.max_pool2d(torch.relu(y), 3, 2, 1)

    def check(self, y: Tensor) -> None:
        assert y.is_contiguous(memory_format=torch.channels_last)
        numerics.assert_close(y, self.eager(torch.float64), self.eager(self.dtype), 147)


IMAGES = [
    (1, 1, 1),
    (3, 7, 7),
    (1, 8, 14),
    (1, 15, 28),
    (1, 28, 15),
    (1, 32, 32),
    (2, 33, 66),
    (1, 61, 72),
    (1, 12, 232),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_error_is_within_eagers(image: tuple[int, int, int], dtype: torch.dtype, emulator: Path) -> None:
    s = Stem(*image, dtype)
    with Emulator(emulator):
        s.check(s.run())


@pytest.mark.parametrize("image", [(2, 61, 72), (3, 33, 71)], ids=str)
def test_order_of_threads_and_number_of_sms_change_no_bit(image: tuple[int, int, int], emulator: Path) -> None:
    s = Stem(*image)
    with Emulator(emulator):
        first = s.run()
    for seed, sms in [(1, 132), (2, 1), (3, 2)]:
        with Emulator(emulator, seed=seed, sms=sms) as e:
            assert torch.equal(s.run(), first)
            assert e.launches()[0]["blocks"] <= 3 * sms


@pytest.mark.parametrize(("width", "narrowest"), [(72, 16), (76, 8), (74, 4), (75, 2)])
def test_counts(width: int, narrowest: int, emulator: Path) -> None:
    s = Stem(2, 60, width)
    with Emulator(emulator) as e:
        s.run()
        launch = e.launches()[0]
    assert conflicts(launch) == {}
    for name, b in launch["buffers"].items():
        moved = b["unique_sectors_written" if name == "y" else "unique_sectors_read"] * 32
        assert b["size"] <= moved + 32 and moved <= 1.05 * b["size"] + 32, name
        assert b["sectors_written"] == b["unique_sectors_written"]
    # the patch of x: 35 rows of 200 numbers for 28 rows of 168, and what lies outside of the image is not read
    x = launch["buffers"]["x"]
    assert x["bytes_read"] < 35 * 200 / (28 * 168) * x["size"]
    # the bias, the weights, y, and the patch at the width that the image's rows allow
    widths = sorted(s["narrowest"] for s in launch["sites"] if s["kind"].startswith("global"))
    assert widths == sorted([8, 16, 16, narrowest])
    # 44 products of 16 x 16 x 8 for 16 columns of a row of c and half of the channels
    strips, rows = launch["blocks"] * 2, 2 * 7 + 1
    assert launch["mma"] <= strips * rows * 2 * 44


@pytest.mark.parametrize("column", [0, 20, 21, 22, 23, 31])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_nan_and_infinity_reach_no_other_window(channel: int, column: int, emulator: Path) -> None:
    s = Stem(1, 12, 32)
    s.x[0, channel, 0, column], s.x[0, channel, 11, column] = float("nan"), float("inf")
    with Emulator(emulator):
        s.check(s.run())


def test_an_output_that_is_negative_everywhere_is_zero(emulator: Path) -> None:
    s = Stem(1, 9, 9)
    s.bias -= 100
    with Emulator(emulator):
        assert torch.equal(s.run(), torch.zeros_like(s.run()))


def test_an_empty_batch_launches_nothing(emulator: Path) -> None:
    with Emulator(emulator) as e:
        assert Stem(0, 32, 32).run().shape == (0, 64, 8, 8)
        assert e.launches() == []


def operands() -> dict[str, Tensor]:
    s = Stem(1, 16, 16)
    packed = stem.pack(s.spec, s.weight.float(), s.bias)
    return {"x": s.x, "weights": packed.weight, "bias": packed.bias}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)}, "expected float16 or bfloat16"),
    ({"x": torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)}, "expected x dense in NHWC, got strides"),
    ({"x": torch.zeros(1, 1, 16, 16, dtype=torch.bfloat16)}, "expected images of 3 channels"),
    (
        {"x": torch.zeros(1, 3, 0, 16, dtype=torch.bfloat16)},
        "expected images with pixels",
    ),
    (
        {"x": torch.zeros(3 * 256 + 4, dtype=torch.bfloat16)[4:].view(1, 16, 16, 3).permute(0, 3, 1, 2)},
        "expected x on a 16-byte boundary",
    ),
    ({"weights": torch.zeros(64, 7, 32, dtype=torch.bfloat16)}, "expected contiguous weights"),
    ({"weights": torch.zeros(2, 22, 32, 8, dtype=torch.float16)}, "expected contiguous weights"),
    ({"bias": torch.zeros(32)}, "expected contiguous bias"),
]


@pytest.mark.parametrize(("changed", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_bad_tensors_are_refused(changed: dict[str, Any], sentence: str, emulator: Path) -> None:
    with Emulator(emulator), pytest.raises(RuntimeError, match=sentence):
        torch.ops.resnet_fast_native.stem_fwd(**operands() | changed)


def test_launch_makes_x_ready(emulator: Path) -> None:
    s = Stem(1, 16, 16)
    with Emulator(emulator):
        first = s.run()
        s.x = s.x.contiguous()
        assert torch.equal(s.run(), first)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "float32"}, "expected one of bfloat16, float16, got float32"),
        ({"grad": True}, "expected a call without autograd"),
        ({"ci": 4}, "expected a 7x7 stride 2 padding 3 convolution of 3 to 64 channels"),
        ({"r": 3, "s": 3}, "expected a 7x7 stride 2 padding 3 convolution of 3 to 64 channels"),
        ({"epilogue": Epilogue(relu=True)}, "expected ReLU and a 3x3 stride 2 padding 1 max-pool"),
        ({"h": 0}, "expected an image with pixels"),
        ({"n": 2**20}, "expected a problem that 32 bits count"),
    ],
)
def test_verdict(changes: dict[str, Any], sentence: str) -> None:
    spec = Stem(1, 224, 224).spec
    assert stem.verdict(spec)
    got: Verdict = stem.verdict(spec.with_(**changes))
    assert not got and got.reason.startswith(sentence)
