"""Hopper's vocabulary against NumPy, and its probes broken on purpose: hopper_probes.cpp."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.support import emulation
from tests.support.emulation import EMULATOR, Edit

FILE = "hopper_probes.cpp"


def numbers(*shape: int, bfloat16: bool = False, seed: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Random numbers: their bits, and in fp64."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = values.to(torch.bfloat16 if bfloat16 else torch.float16)
    return values.view(torch.int16).numpy().view(numpy.uint16), values.double().numpy()


def check_wgmma(module: Any, columns: int = 64, bfloat16: bool = False) -> None:
    a, wide_a = numbers(64, 64, bfloat16=bfloat16)
    b, wide_b = numbers(columns, 64, bfloat16=bfloat16, seed=1)
    for d in module.probe_wgmma(a, b, bfloat16):
        numpy.testing.assert_allclose(d, wide_a @ wide_b.T, rtol=1e-5, atol=1e-4)


def check_ring(module: Any, pieces: int = 8) -> None:
    x = numpy.arange(pieces * 128, dtype=numpy.uint32)
    numpy.testing.assert_array_equal(module.probe_ring(x), 2 * x)


def rows_of(shared: numpy.ndarray, swizzle: bool) -> numpy.ndarray:
    """A box's rows of 64 numbers, which are swizzled in shared memory."""
    rows = shared.reshape(-1, 8, 8)
    if swizzle:
        rows = numpy.stack([row[numpy.arange(8) ^ number % 8] for number, row in enumerate(rows)])
    return rows.reshape(-1, 64)


def check_box(module: Any, corner=(0, -1, -1, 0), swizzle: bool = True, c: int = 64) -> None:
    """Three rows of four pixels and 64 channels."""
    n, h, w = 2, 5, 6
    x = numpy.random.default_rng(0).integers(1, 1 << 16, (n, h, w, c), dtype=numpy.uint16)
    got = rows_of(module.probe_tensor_load(x, corner, (64, 4, 3, 1), swizzle), swizzle)
    padded = numpy.zeros((n + 8, h + 16, w + 16, c + 128), numpy.uint16)
    padded[4 : 4 + n, 8 : 8 + h, 8 : 8 + w, 64 : 64 + c] = x
    c0, w0, h0, n0 = (at + margin for at, margin in zip(corner, (64, 8, 8, 4), strict=True))
    expected = padded[n0, h0 : h0 + 3, w0 : w0 + 4, c0 : c0 + 64]
    numpy.testing.assert_array_equal(got.reshape(3, 4, 64), expected)


@dataclass(frozen=True)
class Windows:
    """A convolution on an image of 6 x 7 pixels and 128 channels; sides in the order w, h."""

    filter: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def unfolded(self, x: numpy.ndarray, tap: tuple[int, int]) -> numpy.ndarray:
        """x (n, h, w, c) -> (n * ho * wo, c) by PyTorch's unfold, whose sides are h, w."""
        n, _, _, c = x.shape
        image = torch.from_numpy(x.astype(numpy.float64)).permute(0, 3, 1, 2)
        turned = (side[::-1] for side in (self.filter, self.dilation, self.padding, self.stride))
        columns = torch.nn.functional.unfold(image, *turned).reshape(n, c, self.filter[1], self.filter[0], -1)
        return columns[:, :, tap[1], tap[0]].permute(0, 2, 1).reshape(-1, c).numpy()


def check_windows(
    module: Any,
    windows: Windows = Windows((3, 3), padding=(1, 1)),
    tap: tuple[int, int] = (2, 0),
    begin: int = 5,
    pixels: int = 40,
    swizzle: bool = True,
    channel: int = 0,
) -> None:
    """Rows of im2col's matrix from `begin` on; those behind the last are zeros."""
    n, h, w, c = 2, 6, 7, 128
    x = numpy.random.default_rng(0).integers(1, 1 << 16, (n, h, w, c), dtype=numpy.uint16)
    rows = windows.unfolded(x, tap)
    each_row = 1 + (w + 2 * windows.padding[0] - windows.dilation[0] * (windows.filter[0] - 1) - 1) // windows.stride[0]
    each_image = len(rows) // n
    image, rest = divmod(begin, each_image)
    first = (
        channel,
        rest % each_row * windows.stride[0] - windows.padding[0],
        rest // each_row * windows.stride[1] - windows.padding[1],
        image,
    )
    conv = (windows.filter, windows.stride, windows.padding, windows.dilation)
    got = rows_of(module.probe_im2col_load(x, first, (64, pixels), tap, *conv, swizzle), swizzle)
    expected = numpy.zeros((pixels, 64))
    there = rows[begin : begin + pixels, channel : channel + 64]
    expected[: len(there), : there.shape[1]] = there  # zeros behind the last channel, too
    numpy.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("columns", [32, 64, 128, 256])
def test_wgmma(columns: int, bfloat16: bool, emulator: Path) -> None:
    check_wgmma(emulation.load(emulator), columns, bfloat16)


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize(
    "corner", [(0, 0, 0, 0), (0, -1, -1, 1), (64, 4, 3, 1), (32, 2, -2, 0), (-64, 0, 0, 0), (0, 1, 1, 2)]
)
def test_tensor_load(corner: tuple[int, ...], swizzle: bool, emulator: Path) -> None:
    check_box(emulation.load(emulator), corner, swizzle, c=128)


@pytest.mark.parametrize("begin", [0, 5, 30])
@pytest.mark.parametrize(
    "windows",
    [
        Windows((1, 1)),
        Windows((1, 1), stride=(2, 2)),
        Windows((3, 3), padding=(1, 1)),
        Windows((3, 3), stride=(2, 2), padding=(1, 1)),
        Windows((3, 3), padding=(2, 2), dilation=(2, 2)),
        Windows((3, 1), stride=(1, 2), padding=(1, 0)),
        Windows((3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1)),
        Windows((7, 7), padding=(3, 3)),
    ],
    ids=str,
)
def test_im2col_load(windows: Windows, begin: int, emulator: Path) -> None:
    """Every tap; runs cross rows and images, and some end behind the last."""
    module = emulation.load(emulator)
    places = len(windows.unfolded(numpy.zeros((2, 6, 7, 1)), (0, 0)))
    for r in range(windows.filter[1]):
        for s in range(windows.filter[0]):
            check_windows(module, windows, (s, r), min(begin, places - 1))


@pytest.mark.parametrize(("swizzle", "pixels", "channel"), [(False, 40, 64), (True, 100, 64), (True, 300, 96)])
def test_im2col_box(swizzle: bool, pixels: int, channel: int, emulator: Path) -> None:
    check_windows(emulation.load(emulator), pixels=pixels, swizzle=swizzle, channel=channel)


def test_what_im2col_fills_with_zeros_is_not_read(emulator: Path) -> None:
    """The first tap of a 3x3 with padding 1 misses the first row and column of either image."""
    module = emulation.load(emulator)
    module.take_counters()
    check_windows(module, tap=(0, 0), begin=0, pixels=84)
    (launch,) = module.take_counters()
    assert launch["buffers"]["x"]["bytes_read"] == 2 * 5 * 6 * 128
    assert launch["bulk_bytes"] == 84 * 128


@pytest.mark.parametrize(
    ("windows", "box", "reason"),
    [
        (Windows((3, 3), padding=(129, 1)), (64, 8), "a corner of im2col is not in -128 to 127"),
        (Windows((3, 3), stride=(9, 1)), (64, 8), "a step of im2col is none or above 8"),
        (Windows((3, 3), stride=(0, 1)), (64, 8), "a step of im2col is none or above 8"),
        (Windows((9, 1)), (64, 8), "a filter of im2col fits nowhere"),
        (Windows((1, 1)), (64, 1025), "a box's dimension is none or too large"),
        (Windows((1, 1)), (32, 8), "a swizzled box's rows are not of 128 bytes"),
    ],
    ids=str,
)
def test_windows_that_the_driver_would_refuse(windows: Windows, box, reason: str, emulator: Path) -> None:
    x = numpy.zeros((2, 6, 7, 128), numpy.uint16)
    conv = (windows.filter, windows.stride, windows.padding, windows.dilation)
    with pytest.raises(RuntimeError, match=reason):
        emulation.load(emulator).probe_im2col_load(x, (0, 0, 0, 0), box, (0, 0), *conv, True)


@pytest.mark.parametrize("seed", range(5))
def test_ring(seed: int, emulator: Path) -> None:
    module = emulation.load(emulator)
    module.configure(seed=seed)
    check_ring(module)
    module.configure()


def test_counts(emulator: Path) -> None:
    module = emulation.load(emulator)
    module.take_counters()
    check_wgmma(module, 128)
    (launch,) = module.take_counters()
    assert launch["wgmma"] == 2 * 4
    assert launch["wgmma_multiply_adds"] == 2 * 64 * 64 * 128
    assert (launch["bulk_copies"], launch["bulk_bytes"]) == (1, 128 * 128)
    assert launch["buffers"]["b"]["sectors_read"] == launch["buffers"]["b"]["unique_sectors_read"] == 128 * 128 // 32
    # 16 rows of a for each of four warps, where it is in shared memory, and b once: 128 bytes a wavefront.
    assert sorted(s["units"] for s in launch["sites"] if s["kind"] == "wgmma") == [4 * 32, 4 * (16 + 32)]


def test_zeros_of_a_box_are_not_read(emulator: Path) -> None:
    module = emulation.load(emulator)
    module.take_counters()
    check_box(module, (0, -1, -1, 0))
    (launch,) = module.take_counters()
    assert launch["buffers"]["x"]["bytes_read"] == 2 * 3 * 128
    assert launch["bulk_bytes"] == 12 * 128


# what is broken: the check that shows it, the edit (old, new, which occurrence), and the report
BUGS = {
    "copy not waited for": (check_wgmma, "  mbarrier_wait(barrier, 0);\n", "", 0, "while bulk copies of the mbarrier"),
    "copy read by threads": (check_box, "  mbarrier_wait(barrier, 0);\n", "", 1, "are in flight: wait for it first"),
    "copy that nobody waits for": (
        check_box,
        "  mbarrier_wait(barrier, 0);\n",
        "  if (p.bytes) return;\n",
        1,
        "leaves block 0 with a bulk copy issued at",
    ),
    "first pixel outside of the windows": (
        check_windows,
        "c[0], c[1], c[2], c[3], tap[0]",
        "c[0], c[1] + 4, c[2], c[3], tap[0]",
        0,
        "im2col begins at w = 8, where the filter is not put down: from -1 to 5",
    ),
    "tap before the window": (
        check_windows,
        "c[3], tap[0], tap[1]",
        "c[3], tap[0] - 3, tap[1]",
        0,
        "im2col's offset of w is -1, not in 0 to 255",
    ),
    "sides of a tap exchanged": (check_windows, "tap[0], tap[1], barrier", "tap[1], tap[0], barrier", 0, None),
    "map of windows as a box": (check_windows, "if (!kIm2col)", "if (kIm2col)", 0, "a tensor_load with the map of"),
    "map of a box as windows": (check_box, "if (kIm2col)", "if (!kIm2col)", 0, "an im2col_load with the map of"),
    "wrong parity": (check_wgmma, "mbarrier_wait(barrier, 0)", "mbarrier_wait(barrier, 1)", 0, "while bulk copies of"),
    "wrong parity in a ring": (
        check_ring,
        "(round + 1) % 2",
        "round % 2",
        0,
        r"waits for ever for the end of phase 0 \(parity 0\) of the mbarrier at byte \d+, at which \d+ of \d+ arrivals "
        r"and \d+ expected bytes are missing",
    ),
    "place not given back": (
        check_ring,
        "    mbarrier_arrive(empty(place));\n",
        "",
        0,
        "1 of 1 arrivals and 0 expected bytes",
    ),
    "place given back too early": (
        check_ring,
        "    const uint32_t word",
        "    mbarrier_arrive(empty(place));\n    const uint32_t word",
        0,
        r"no barrier orders|in flight|arrives at the mbarrier|waits for ever",
    ),
    "too few arrivals asked for": (
        check_ring,
        "Ring::kTakers * kWarp);",
        "kWarp);",
        0,
        r"no barrier orders|in flight|arrives at the mbarrier|waits for ever",
    ),
    "too few bytes expected": (
        check_wgmma,
        "kColumns * kRowBytes);",
        "kColumns * kRowBytes - 16);",
        0,
        r"16 bytes more have come to the mbarrier at byte 0 than phase 0 expected",
    ),
    "too many bytes expected": (
        check_wgmma,
        "kColumns * kRowBytes);",
        "kColumns * kRowBytes + 16);",
        0,
        r"waits for ever .* 0 of 1 arrivals and 16 expected bytes are missing",
    ),
    "arrival too many": (
        check_wgmma,
        "    tensor_load(b_at",
        "    mbarrier_arrive(barrier);\n    tensor_load(b_at",
        0,
        "where all 1 of phase 0 have arrived",
    ),
    "barrier not initialised": (check_wgmma, "    mbarrier_init(barrier, 1);\n", "", 0, "which nobody initialised"),
    "barrier overwritten": (
        check_wgmma,
        "  fence_async();\n",
        "  fence_async();\n  if (thread == 0) store_shared(barrier, 7);\n",
        0,
        "which thread 0 .* has overwritten",
    ),
    "init not fenced": (check_wgmma, "    mbarrier_init_fence();\n", "", 0, "has no mbarrier_init_fence"),
    "init not synchronised": (check_box, "  sync_block();\n", "", 1, "nobody initialised|no barrier orders the two"),
    "written and not fenced": (
        check_wgmma,
        "  fence_async();\n",
        "",
        0,
        r"multiplies shared memory byte \d+ that thread \d+ .* wrote at .* without a fence_async after it",
    ),
    "written and not synchronised": (
        check_wgmma,
        "  sync_block();\n",
        "",
        0,
        "nobody has written|no barrier orders the two|nobody initialised",
    ),
    "wrong swizzle": (check_wgmma, "swizzled128(row, chunk)", "swizzled(row, chunk)", 0, None),
    "no swizzle": (check_wgmma, "swizzled128(row, chunk)", "row * kRowBytes + chunk * 16", 0, None),
    "operand between the swizzle's rows": (
        check_wgmma,
        "wgmma_operand(a_at + k * 32)",
        "wgmma_operand(a_at + 128 + k * 32)",
        0,
        "do not start where the swizzle's pattern does",
    ),
    "box between the swizzle's rows": (
        check_box,
        "at = kSwizzleBytes;",
        "at = kSwizzleBytes - 128;",
        0,
        "is not a multiple of 1024",
    ),
    "product not waited for": (check_wgmma, "  wgmma_wait<0>(d);\n", "", 0, "a wgmma that it never waited for"),
    "product not committed": (check_wgmma, "  wgmma_commit();\n", "", 0, "a wgmma that it never waited for"),
    "accumulators not fenced": (
        check_wgmma,
        "    wgmma_fence(d);\n",
        "",
        0,
        "no wgmma_fence since the last wgmma_wait",
    ),
    "operand a not fenced": (check_wgmma, "    wgmma_fence(d);\n", "", 1, "no wgmma_fence after the last ldmatrix"),
    "operand overwritten": (
        check_wgmma,
        "  wgmma_commit();\n",
        "  wgmma_commit();\n  store_shared(b_at + thread * 4, 0);\n",
        0,
        "writes shared memory byte .* an operand of a wgmma that is in flight",
    ),
    "warps that part": (
        check_wgmma,
        "    wgmma_fence(d);\n",
        "    wgmma_fence(d);\n    if (warp_index() == 2) wgmma<T>(d, 0, 0, false);\n",
        0,
        "threads of a warpgroup part",
    ),
    "different operands": (
        check_wgmma,
        "wgmma_operand(a_at + k * 32)",
        "wgmma_operand(a_at + (warp_index() == 2 ? 0 : k * 32))",
        0,
        "name different operands",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BUGS)
def test_bug(what: str, emulator: Path) -> None:
    check, old, new, count, report = BUGS[what]
    module = emulation.load(emulation.build(edits=[Edit(FILE, old, new, count)]))
    with pytest.raises(AssertionError if report is None else RuntimeError, match=report) as error:
        check(module)
    if report is not None and "leaves block" not in report:
        assert re.match(rf"{FILE}:\d+: ", str(error.value))
        assert re.search(r"block 0 of 1, thread \d+ \(warp \d, lane \d+\)", str(error.value))


def test_the_report_of_a_wait_names_its_line(emulator: Path) -> None:
    source = (EMULATOR / FILE).read_text()
    line = source[: source.index("    mbarrier_wait(full(place), round % 2);")].count("\n") + 1
    bug = Edit(FILE, "      bulk_load(data", "      if (i < 2) bulk_load(data")
    with pytest.raises(RuntimeError, match=rf"{FILE}:{line}: waits for ever for .* 0 of 1 arrivals and 512 expected"):
        check_ring(emulation.load(emulation.build(edits=[bug])))
