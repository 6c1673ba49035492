"""Kernels broken on purpose: each kind of mistake must end in a report that names its line, or in a wrong result.

The edits are made to the sources of bottleneck_fwd.cu, or of its version for Hopper, compiled, and run. What the
emulator cannot know to be wrong (a shifted row, a swapped fragment) the comparison with fp64 shows.
"""

from __future__ import annotations

import re

import numpy
import pytest
import torch

from resnet_fast import native, numerics
from tests.emulator.test_bottleneck_fwd import block
from tests.support import emulation
from tests.support.emulation import B200, H100, KERNELS, Edit, Emulator

pytestmark = pytest.mark.slow  # a compilation each

FILE, TILE, HOPPER = "bottleneck_fwd.cu", "bottleneck_tile.h", "bottleneck_fwd_sm90a.cu"
RESIDENT, STREAMED = (256, 64, 256), (256, 128, 256)


def edit(old: str, new: str, count: int = 0, file: str = FILE) -> Edit:
    return Edit(file, old, new, count)


def lines_of(text: str) -> set[int]:
    source = (KERNELS / FILE).read_text().splitlines()
    return {n for n, line in enumerate(source, 1) if text in line}


def run(bug: Edit | None, channels=RESIDENT, image=(1, 9, 8), seed: int = 0, device=B200) -> None:
    """Run a block on the kernel with the bug, and compare: RuntimeError or AssertionError if anything is wrong.

    A B200 runs bottleneck_fwd.cu, an H100 the version for Hopper where ``channels`` are RESIDENT.
    """
    if not native.status():
        pytest.skip(native.status().reason)
    b = block(*image, *channels, torch.float16)
    with Emulator(emulation.build(edits=[bug] if bug else []), seed=seed, **device | {"sms": 1}):
        y = b.run()
    pre = b.eager(torch.float64, relu=False)
    numerics.assert_close(y, b.eager(torch.float64), b.eager(torch.float16), 9 * channels[1], pre)


def test_the_kernel_as_it_is_passes() -> None:
    run(None)
    run(None, STREAMED)
    run(None, device=H100)


# Number of the barrier in the file, and channels whose variant passes it.
BARRIERS = {
    "in the ring": (0, STREAMED),
    "between biases and accumulators": (1, STREAMED),
    "before conv1, where weights stay": (2, RESIDENT),
    "between t1 and conv2": (3, RESIDENT),
    "between the two halves of a sum": (4, RESIDENT),
    "before t2 takes the place of t1": (5, STREAMED),
    "between t2 and conv3": (6, RESIDENT),
}


@pytest.mark.parametrize("where", BARRIERS)
def test_missing_barrier_is_a_race(where: str) -> None:
    count, channels = BARRIERS[where]
    with pytest.raises(RuntimeError, match=r"no barrier orders the two|nobody has written|in flight") as error:
        run(edit("sync_block();", "", count), channels, image=(1, 17, 8))
    assert re.search(rf"({FILE}|{TILE}):\d+: (reads|writes) shared memory byte \d+", str(error.value))
    assert re.search(r"block 0 of 1, thread \d+ \(warp \d, lane \d+\)", str(error.value))


@pytest.mark.parametrize("seed", range(3))
def test_missing_barrier_shows_with_every_seed(seed: int) -> None:
    with pytest.raises(RuntimeError):
        run(edit("sync_block();", "", 6), seed=seed)


def test_missing_wait_reads_bytes_in_flight() -> None:
    with pytest.raises(
        RuntimeError, match=r"while a cp_async of thread \d+ .* is in flight: wait for it first"
    ) as error:
        run(edit("cp_async_wait<0>();", ""))
    line = int(re.match(rf".*?{FILE}:(\d+): ", str(error.value))[1])
    assert line in lines_of("ldmatrix_x4(") | {n + 1 for n in lines_of("ldmatrix_x4(")} | lines_of("load_shared<")


def test_wait_for_one_group_too_few() -> None:
    with pytest.raises(RuntimeError, match="in flight"):
        run(edit("cp_async_wait<V::kSlots - 2>();", "cp_async_wait<V::kSlots - 1>();"), STREAMED)


def test_copy_that_is_never_waited_for() -> None:
    leaking = edit("cp_async_wait<0>();\n", "cp_async_wait<0>();\n cp_async16(at.t2, p.x);\n")
    with pytest.raises(RuntimeError, match=r"in flight|never waited for"):
        run(leaking)


def test_off_by_one_row_of_the_input() -> None:
    with pytest.raises(AssertionError):
        run(edit("tile.h - 1 + pixel / kHalo", "tile.h + pixel / kHalo"))


def test_off_by_one_row_of_the_output() -> None:
    with pytest.raises(RuntimeError, match=r"wrote in the same launch|never written|outside of every tensor"):
        run(edit("tile.h + row / kTile", "tile.h + 1 + row / kTile", file=TILE))


def test_guard_of_the_output_forgotten() -> None:
    with pytest.raises(RuntimeError, match=r"outside of every tensor of this launch|wrote in the same launch"):
        run(edit("h < p.h && w < p.w;", "true;", file=TILE), image=(1, 7, 8))


def test_channel_beyond_the_tensor() -> None:
    with pytest.raises(RuntimeError, match=r"outside of every tensor of this launch; at byte \d+ of y, which has"):
        run(edit("channel + quad * 8, out", "channel + quad * 8 + 8, out"))


def test_wrong_fragment() -> None:
    with pytest.raises(AssertionError):
        run(edit("k * 2 + a_address_chunk(lane)", "k * 2 + a_address_chunk(lane ^ 16)"))


def test_halo_not_zeroed() -> None:
    with pytest.raises(AssertionError):
        run(edit("inside ? t : 0u", "t"))


def test_shared_memory_beyond_the_blocks() -> None:
    with pytest.raises(RuntimeError, match=r"shared memory bytes \d+ to \d+ of a block that has 229376"):
        run(edit("store_shared(to, inside ? t : 0u", "store_shared(to + 229376, inside ? t : 0u"))


def test_lanes_that_part() -> None:
    parted = edit("uint32_t a[kTall1][4];", "if (lane != 5) sync_warp(); uint32_t a[kTall1][4];")
    with pytest.raises(RuntimeError, match=r"lanes of a warp part: this one is at a \w+, others wait for a \w+ at"):
        run(parted)


def test_threads_that_part() -> None:
    with pytest.raises(RuntimeError, match=r"barrier|nobody has written"):
        run(edit("sync_block();", "if (warp != 3) sync_block();", 6))


def test_thread_that_leaves() -> None:
    leaving = edit("    // t1 = relu(x . w1", "    if (thread_index() == 40) return;\n    // t1 = relu(x . w1")
    with pytest.raises(RuntimeError, match=r"left|leaves|never reach"):
        run(leaving)


def test_write_to_an_input() -> None:
    with pytest.raises(RuntimeError, match="writes to the input x"):
        run(edit("static_cast<char*>(p.y)", "static_cast<char*>(const_cast<void*>(p.x))", file=TILE))


def test_unaligned_access() -> None:
    with pytest.raises(RuntimeError, match=r"are not aligned|is not aligned"):
        run(edit("kCo + channel) * 2", "kCo + channel) * 2 - 2", file=TILE))


# On Hopper: the edit (old, new, which occurrence) and the report, or none where only numbers are wrong.
ON_HOPPER = {
    "no barrier between t1 and conv2": (
        "    sync_block();\n    if",
        "    if",
        0,
        "no barrier orders the two|nobody has",
    ),
    "no barrier between t2 and conv3": (
        "    fence_async();\n    sync_block();",
        "    fence_async();",
        0,
        "no barrier|nobody has",
    ),
    "t2 not fenced": ("    fence_async();\n    sync_block();", "    sync_block();", 0, "without a fence_async"),
    "zeros and biases not fenced": ("  fence_async();\n  sync_block();", "  sync_block();", 0, "without a fence_async"),
    "x not waited for": ("      mbarrier_wait(V::kXReady, round % 2);\n", "", 0, "in flight|while bulk copies"),
    "parity of x": ("round % 2", "(round + 1) % 2", 0, "while bulk copies|waits for ever"),
    "weights not waited for": ("  mbarrier_wait(V::kWeightsReady, 0);\n", "", 0, "while bulk copies"),
    "x loaded while conv1 reads it": (
        "      wgmma_commit();\n",
        "      wgmma_commit();\n if (thread == 0 && index + block_count() < tiles) load_x<V>(all, tile);\n",
        0,
        r"copies to shared memory|no barrier orders|writes shared memory|operand",
    ),
    "fewer bytes expected": (
        "kHaloPixels * kRowBytes);",
        "kHaloPixels * kRowBytes - 16);",
        0,
        "expected|in which it was",
    ),
    "more bytes expected": ("kHaloPixels * kRowBytes);", "kHaloPixels * kRowBytes + 16);", 0, "waits for ever"),
    "registers read before the products are there": ("      wgmma_wait<0>(acc);\n", "", 2, "never waited for"),
    "operand a overwritten": ("wgmma_fence(acc);\n", "\n", 1, "wgmma_fence"),
    "descriptor in the middle of the pattern": ("kSecondRow = 40", "kSecondRow = 44", 0, "does not|do not start where"),
    "second rows not where they belong": (
        "kSecondRow * kRowBytes + k",
        "(kSecondRow + 8) * kRowBytes + k",
        0,
        "nobody has written",
    ),
    "halo not zeroed": ("inside ? t : 0u", "t", 0, None),
    "taps in the wrong order": ("(r * 3 + s) * kStepBytes", "(s * 3 + r) * kStepBytes", 0, None),
    "a row of the halo too low": (
        "2 * (warp_of_group + i) + row",
        "2 * (warp_of_group + i) + 1 + row",
        0,
        "nobody has written",
    ),
    "shortcut of the other half": ("(n + i) % 2 * 2 + half", "(n + i) % 2 * 2 + (1 - half)", 0, None),
    "x of the wrong place": ("tile.w - 1, tile.h - 1,", "tile.w, tile.h - 1,", 0, None),
    "a group that leaves out a wgmma": (
        "      wgmma_fence(acc);\n#pragma unroll\n      for (int k",
        "      wgmma_fence(acc);\n if (warp != 2)\n      for (int k",
        0,
        "warpgroup part|never reach|left",
    ),
}


@pytest.mark.parametrize("what", ON_HOPPER)
def test_mistake_on_hopper(what: str) -> None:
    old, new, count, report = ON_HOPPER[what]
    with pytest.raises(RuntimeError if report else AssertionError, match=report) as error:
        run(edit(old, new, count, HOPPER), image=(1, 17, 8), device=H100)
    if report:
        assert re.search(rf"{HOPPER}:\d+|kernel bottleneck_fwd_sm90a", str(error.value))


def test_poison_is_nan_in_every_format() -> None:
    """What fills shared memory and outputs before a launch."""
    word = numpy.full(4, 0xFF, numpy.uint8)
    assert numpy.isnan(word.view(numpy.float32)).all() and numpy.isnan(word.view(numpy.float16)).all()
    assert torch.isnan(torch.full((4,), 0xFF, dtype=torch.uint8).view(torch.bfloat16)).all()
