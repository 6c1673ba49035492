"""Hopper's vocabulary against NumPy, and its probes broken on purpose: hopper_probes.cpp."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from resnet_fast.benchmarks import emulation
from resnet_fast.benchmarks.emulation import EMULATOR, Edit
from tests.support.planted import Planted

FILE = "hopper_probes.cpp"
edit = partial(Edit, FILE)


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
        """Unfold x (n, h, w, c) to (n * ho * wo, c) with PyTorch, which orders sides h, w."""
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
    """Check rows of im2col's matrix from ``begin`` on; rows after the last are zeros."""
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
    expected[: len(there), : there.shape[1]] = there  # zeros after the last channel, too
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
    """Covers every tap; runs cross rows and images, and some end after the last."""
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


BUGS = {
    "copy not waited for": Planted(
        edit("  mbarrier_wait(barrier, 0);\n", ""), "while bulk copies of the mbarrier", check_wgmma
    ),
    "copy read by threads": Planted(
        edit("  mbarrier_wait(barrier, 0);\n", "", count=1), "are in flight: wait for it first", check_box
    ),
    "copy that nobody waits for": Planted(
        edit("  mbarrier_wait(barrier, 0);\n", "  if (p.bytes) return;\n", count=1),
        "leaves block 0 with a bulk copy issued at",
        check_box,
    ),
    "first pixel outside of the windows": Planted(
        edit("c[0], c[1], c[2], c[3], tap[0]", "c[0], c[1] + 4, c[2], c[3], tap[0]"),
        "im2col begins at w = 8, where the filter is not put down: from -1 to 5",
        check_windows,
    ),
    "tap before the window": Planted(
        edit("c[3], tap[0], tap[1]", "c[3], tap[0] - 3, tap[1]"),
        "im2col's offset of w is -1, not in 0 to 255",
        check_windows,
    ),
    "sides of a tap exchanged": Planted(
        edit("tap[0], tap[1], barrier", "tap[1], tap[0], barrier"), None, check_windows
    ),
    "map of windows as a box": Planted(
        edit("if (!kIm2col)", "if (kIm2col)"), "a tensor_load with the map of", check_windows
    ),
    "map of a box as windows": Planted(
        edit("if (kIm2col)", "if (!kIm2col)"), "an im2col_load with the map of", check_box
    ),
    "wrong parity": Planted(
        edit("mbarrier_wait(barrier, 0)", "mbarrier_wait(barrier, 1)"), "while bulk copies of", check_wgmma
    ),
    "wrong parity in a ring": Planted(
        edit("(round + 1) % 2", "round % 2"),
        (
            r"waits for ever for the end of phase 0 \(parity 0\) of the mbarrier at byte \d+, at which \d+ of \d+ "
            r"arrivals and \d+ expected bytes are missing"
        ),
        check_ring,
    ),
    "place not given back": Planted(
        edit("    mbarrier_arrive(empty(place));\n", ""), "1 of 1 arrivals and 0 expected bytes", check_ring
    ),
    "reads not fenced before the place is given back": Planted(
        edit("    fence_async();\n    mbarrier_arrive(empty", "    mbarrier_arrive(empty"),
        r"copies to shared memory byte \d+ that .* read without a fence_async after it",
        check_ring,
    ),
    "reads of the first of two warps not fenced": Planted(
        edit(
            "    store_global(static_cast<char*>(p.out) + i, load_shared<Vec16>(at + i));\n",
            """    store_global(static_cast<char*>(p.out) + i, load_shared<Vec16>(at + i));
  fence_async();
  for (int warp = 0; warp < 2; ++warp) {
    sync_block();
    if (warp_index() == warp) load_shared<Vec16>(at + lane_index() * 16);
    if (warp_index() == 1) fence_async();
  }
  sync_block();
  if (thread_index() == 64) {
    mbarrier_expect(barrier, p.bytes);
    tensor_load(at, p.map, 0, 0, 0, 0, barrier);
  }
  mbarrier_wait(barrier, 1);
""",
        ),
        r"copies to shared memory byte \d+ that thread \d+ \(warp 0, lane \d+\) read without a fence_async after it",
        check_box,
    ),
    "place given back too early": Planted(
        edit("    const uint32_t word", "    mbarrier_arrive(empty(place));\n    const uint32_t word"),
        r"no barrier orders|in flight|arrives at the mbarrier|waits for ever|read without",
        check_ring,
    ),
    "too few arrivals asked for": Planted(
        edit("Ring::kTakers * kWarp);", "kWarp);"),
        r"no barrier orders|in flight|arrives at the mbarrier|waits for ever|read without",
        check_ring,
    ),
    "too few bytes expected": Planted(
        edit("kColumns * kRowBytes);", "kColumns * kRowBytes - 16);"),
        r"16 bytes more have come to the mbarrier at byte 0 than phase 0 expected",
        check_wgmma,
    ),
    "too many bytes expected": Planted(
        edit("kColumns * kRowBytes);", "kColumns * kRowBytes + 16);"),
        r"waits for ever .* 0 of 1 arrivals and 16 expected bytes are missing",
        check_wgmma,
    ),
    "arrival too many": Planted(
        edit("    tensor_load(b_at", "    mbarrier_arrive(barrier);\n    tensor_load(b_at"),
        "where all 1 of phase 0 have arrived",
        check_wgmma,
    ),
    "barrier not initialised": Planted(
        edit("    mbarrier_init(barrier, 1);\n", ""), "which nobody initialised", check_wgmma
    ),
    "barrier overwritten": Planted(
        edit("  fence_async();\n", "  fence_async();\n  if (thread == 0) store_shared(barrier, 7);\n"),
        "which thread 0 .* has overwritten",
        check_wgmma,
    ),
    "init not fenced": Planted(edit("    mbarrier_init_fence();\n", ""), "has no mbarrier_init_fence", check_wgmma),
    "init not synchronised": Planted(
        edit("  sync_block();\n", "", count=1), "nobody initialised|no barrier orders the two", check_box
    ),
    "written and not fenced": Planted(
        edit("  fence_async();\n", ""),
        r"multiplies shared memory byte \d+ that thread \d+ .* wrote at .* without a fence_async after it",
        check_wgmma,
    ),
    "fenced before the copies have landed": Planted(
        edit(
            """store_shared(a_at + swizzled128(row, chunk), load_global<Vec16>(static_cast<const char*>(p.a) + i * 16));
  }
""",
            """cp_async16(a_at + swizzled128(row, chunk), static_cast<const char*>(p.a) + i * 16);
  }
  cp_async_commit();
  fence_async();
  cp_async_wait<0>();
  if (thread < 0)
""",
        ),
        r"multiplies shared memory byte \d+ that thread \d+ .* wrote at .* without a fence_async after it",
        check_wgmma,
    ),
    "written and not synchronised": Planted(
        edit("  sync_block();\n", ""), "nobody has written|no barrier orders the two|nobody initialised", check_wgmma
    ),
    "wrong swizzle": Planted(edit("swizzled128(row, chunk)", "swizzled(row, chunk)"), None, check_wgmma),
    "no swizzle": Planted(edit("swizzled128(row, chunk)", "row * kRowBytes + chunk * 16"), None, check_wgmma),
    "operand between the swizzle's rows": Planted(
        edit("wgmma_operand(a_at + k * 32)", "wgmma_operand(a_at + 128 + k * 32)"),
        "do not start where the swizzle's pattern does",
        check_wgmma,
    ),
    "box between the swizzle's rows": Planted(
        edit("at = kSwizzleBytes;", "at = kSwizzleBytes - 128;"), "is not a multiple of 1024", check_box
    ),
    "product not waited for": Planted(
        edit("  wgmma_wait<0>(d);\n", ""), "a wgmma that it never waited for", check_wgmma
    ),
    "product not committed": Planted(edit("  wgmma_commit();\n", ""), "a wgmma that it never waited for", check_wgmma),
    "accumulators not fenced": Planted(
        edit("    wgmma_fence(d);\n", ""), "no wgmma_fence since the last wgmma_wait", check_wgmma
    ),
    "operand a not fenced": Planted(
        edit("    wgmma_fence(d);\n", "", count=1), "no wgmma_fence after the last ldmatrix", check_wgmma
    ),
    "registers of operand a loaded again": Planted(
        edit("  wgmma_commit();\n", "  wgmma_commit();\n  if (thread >= kWarpgroup) ldmatrix_x4(a[0], a_at);\n"),
        "ldmatrix writes registers of operand a of a wgmma that is in flight",
        check_wgmma,
    ),
    "registers of operand a written": Planted(
        edit("  wgmma_commit();\n", "  wgmma_commit();\n  a[0][0] = 0;\n"),
        "the registers of operand a of this wgmma were written before it was waited for",
        check_wgmma,
    ),
    "registers of operand a written between two products": Planted(
        edit("wgmma<T>(d, a[k],", "a[0][0] += 1, wgmma<T>(d, a[0],"),
        "a register of operand a was written before the wgmma that reads it was waited for",
        check_wgmma,
    ),
    "registers of operand a read": Planted(
        edit(
            "  wgmma_commit();\n  wgmma_wait<0>(d);\n",
            """  wgmma_commit();
  const uint32_t early = a[0][0];
  wgmma_wait<0>(d);
  if (thread >= kWarpgroup) d[0][0] += number::widened<T>(early & 0xffff) - number::widened<T>(a[0][0] & 0xffff);
""",
        ),
        None,
        check_wgmma,
    ),
    "operand overwritten": Planted(
        edit("  wgmma_commit();\n", "  wgmma_commit();\n  store_shared(b_at + thread * 4, 0);\n"),
        "writes shared memory byte .* an operand of a wgmma that is in flight",
        check_wgmma,
    ),
    "warps that part": Planted(
        edit("    wgmma_fence(d);\n", "    wgmma_fence(d);\n    if (warp_index() == 2) wgmma<T>(d, 0, 0, false);\n"),
        "threads of a warpgroup part",
        check_wgmma,
    ),
    "different operands": Planted(
        edit("wgmma_operand(a_at + k * 32)", "wgmma_operand(a_at + (warp_index() == 2 ? 0 : k * 32))"),
        "name different operands",
        check_wgmma,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BUGS)
def test_bug(what: str, emulator: Path) -> None:
    bug = BUGS[what]
    module = emulation.load(emulation.build(edits=[bug.edit]))
    with bug.found() as error:
        bug.run(module)
    if bug.report is not None and "leaves block" not in bug.report:
        assert re.match(rf"{FILE}:\d+: ", str(error.value))
        assert re.search(r"block 0 of 1, thread \d+ \(warp \d, lane \d+\)", str(error.value))


@pytest.mark.slow
def test_products_in_flight_share_registers_of_operand_a(emulator: Path) -> None:
    twice = edit(
        "for (int k = 0; k < kSteps; ++k) wgmma<T>(d, a[k], wgmma_operand(b_at + k * 32), true);",
        """for (int i = -1; i < kSteps; ++i) {
      const int k = i < 0 ? 0 : i;
      wgmma<T>(d, a[k], wgmma_operand(b_at + k * 32), i > 0);
    }""",
    )
    check_wgmma(emulation.load(emulation.build(edits=[twice])))


def test_the_report_of_a_wait_names_its_line(emulator: Path) -> None:
    source = (EMULATOR / FILE).read_text()
    line = source[: source.index("    mbarrier_wait(full(place), round % 2);")].count("\n") + 1
    bug = Edit(FILE, "      bulk_load(data", "      if (i < 2) bulk_load(data")
    with pytest.raises(RuntimeError, match=rf"{FILE}:{line}: waits for ever for .* 0 of 1 arrivals and 512 expected"):
        check_ring(emulation.load(emulation.build(edits=[bug])))
