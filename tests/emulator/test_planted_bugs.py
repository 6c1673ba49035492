"""Kernels broken on purpose: each kind of mistake must end in a report that names its line, or in a wrong result.

The edits are made to the sources of bottleneck_fwd.cu, or of its version for Hopper, compiled, and run. What the
emulator cannot know to be wrong (a shifted row, a swapped fragment) the comparison with fp64 shows.
"""

from __future__ import annotations

import re
from functools import partial

import numpy
import pytest
import torch

from resnet_fast import native, numerics
from resnet_fast.benchmarks import emulation
from resnet_fast.benchmarks.emulation import B200, H100, KERNELS, Edit, Emulator
from tests.support.bottleneck_cases import block
from tests.support.planted import Planted

pytestmark = pytest.mark.slow  # a compilation each

FILE, TILE, HOPPER = "bottleneck_fwd.cu", "bottleneck_tile.h", "bottleneck_fwd_sm90a.cu"
edit, tile, hopper = (partial(Edit, file) for file in (FILE, TILE, HOPPER))
RESIDENT, STREAMED = (256, 64, 256), (256, 128, 256)


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
    "between the two halves of a sum": (1, RESIDENT),
    "before t2 takes the place of t1": (2, STREAMED),
    "between biases and accumulators": (3, STREAMED),
    "before conv1, where weights stay": (4, RESIDENT),
    "between t1 and conv2": (5, RESIDENT),
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


MISTAKES = {
    "wait for one group too few": Planted(
        edit("cp_async_wait<V::kSlots - 2>();", "cp_async_wait<V::kSlots - 1>();"), "in flight", {"channels": STREAMED}
    ),
    "copy that is never waited for": Planted(
        edit("cp_async_wait<0>();\n", "cp_async_wait<0>();\n cp_async16(at.t2, p.x);\n"), r"in flight|never waited for"
    ),
    "off by one row of the input": Planted(edit("tile.h - 1 + pixel / kHalo", "tile.h + pixel / kHalo")),
    "off by one row of the output": Planted(
        tile("tile.h + row / kTile", "tile.h + 1 + row / kTile"),
        r"wrote in the same launch|never written|outside of every tensor",
    ),
    "guard of the output forgotten": Planted(
        tile("h < p.h && w < p.w;", "true;"),
        r"outside of every tensor of this launch|wrote in the same launch",
        {"image": (1, 7, 8)},
    ),
    "channel beyond the tensor": Planted(
        edit("channel + quad * 8, out", "channel + quad * 8 + 8, out"),
        r"outside of every tensor of this launch; at byte \d+ of y, which has",
    ),
    "wrong fragment": Planted(edit("k * 2 + a_address_chunk(lane)", "k * 2 + a_address_chunk(lane ^ 16)")),
    "halo not zeroed": Planted(edit("inside ? t : 0u", "t")),
    "shared memory beyond the blocks": Planted(
        edit("store_shared(to, inside ? t : 0u", "store_shared(to + 229376, inside ? t : 0u"),
        r"shared memory bytes \d+ to \d+ of a block that has 229376",
    ),
    "lanes that part": Planted(
        edit("uint32_t a[kTall1][4];", "if (lane != 5) sync_warp(); uint32_t a[kTall1][4];"),
        r"lanes of a warp part: this one is at a \w+, others wait for a \w+ at",
    ),
    "threads that part": Planted(
        edit("sync_block();", "if (warp != 3) sync_block();", 6), r"barrier|nobody has written"
    ),
    "thread that leaves": Planted(
        edit("    conv1<V>(", "    if (thread_index() == 40) return;\n    conv1<V>("),
        r"left|leaves|never reach",
    ),
    "write to an input": Planted(
        tile("static_cast<char*>(p.y)", "static_cast<char*>(const_cast<void*>(p.x))"), "writes to the input x"
    ),
    "unaligned access": Planted(
        tile("kCo + channel) * 2", "kCo + channel) * 2 - 2"), r"are not aligned|is not aligned"
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistake(what: str) -> None:
    bug = MISTAKES[what]
    with bug.found():
        run(bug.edit, **bug.run or {})


ON_HOPPER = {
    "no barrier between t1 and conv2": Planted(
        hopper("    sync_block();\n    if", "    if"), "no barrier orders the two|nobody has"
    ),
    "reads of x not fenced": Planted(
        hopper("    fence_async();  // orders", "    // orders"), "copies to .* read without a fence_async"
    ),
    "no barrier between t2 and conv3": Planted(
        hopper("    fence_async();\n    sync_block();", "    fence_async();"), "no barrier|nobody has"
    ),
    "t2 not fenced": Planted(
        hopper("    fence_async();\n    sync_block();", "    sync_block();"), "without a fence_async"
    ),
    "zeros and biases not fenced": Planted(
        hopper("  fence_async();\n  sync_block();", "  sync_block();"), "without a fence_async"
    ),
    "x not waited for": Planted(hopper("  mbarrier_wait(V::kXReady, round % 2);\n", ""), "in flight|while bulk copies"),
    "parity of x": Planted(hopper("round % 2", "(round + 1) % 2"), "while bulk copies|waits for ever"),
    "weights not waited for": Planted(hopper("  mbarrier_wait(V::kWeightsReady, 0);\n", ""), "while bulk copies"),
    "x loaded while conv1 reads it": Planted(
        hopper(
            "  wgmma_commit();\n",
            "  wgmma_commit();\n if (at.group + at.thread == 0) load_x<V>(all, tile);\n",
        ),
        r"copies to shared memory|no barrier orders|writes shared memory|operand",
    ),
    "fewer bytes expected": Planted(
        hopper("kHaloPixels * kRowBytes);", "kHaloPixels * kRowBytes - 16);"), "expected|in which it was"
    ),
    "more bytes expected": Planted(
        hopper("kHaloPixels * kRowBytes);", "kHaloPixels * kRowBytes + 16);"), "waits for ever"
    ),
    "registers read before the products are there": Planted(hopper("  wgmma_wait<0>(acc);\n", "", 2), "waited for"),
    "operand a loaded while products read it": Planted(
        hopper("      wgmma_wait<1>();  // the products that read the registers loaded next\n", ""),
        "ldmatrix writes registers of operand a of a wgmma that is in flight",
    ),
    "operand a overwritten": Planted(hopper("wgmma_fence(acc);\n", "\n", 1), "wgmma_fence"),
    "descriptor in the middle of the pattern": Planted(
        hopper("kSecondRow = 40", "kSecondRow = 44"), "does not|do not start where"
    ),
    "second rows not where they belong": Planted(
        hopper("kSecondRow * kRowBytes + k", "(kSecondRow + 8) * kRowBytes + k"), "nobody has written"
    ),
    "halo not zeroed": Planted(hopper("inside ? t : 0u", "t")),
    "taps in the wrong order": Planted(hopper("(r * 3 + s) * kStepBytes", "(s * 3 + r) * kStepBytes")),
    "a row of the halo too low": Planted(
        hopper("2 * (at.warp + i) + row", "2 * (at.warp + i) + 1 + row"), "nobody has written"
    ),
    "shortcut of the other half": Planted(hopper("(n + i) % 2 * 2 + half", "(n + i) % 2 * 2 + (1 - half)")),
    "x of the wrong place": Planted(hopper("tile.w - 1, tile.h - 1,", "tile.w, tile.h - 1,")),
    "a group that leaves out a wgmma": Planted(
        hopper(
            "  wgmma_fence(acc);\n#pragma unroll\n  for (int k",
            "  wgmma_fence(acc);\n if (at.warp != 2)\n  for (int k",
        ),
        "warpgroup part|never reach|left",
    ),
}


@pytest.mark.parametrize("what", ON_HOPPER)
def test_mistake_on_hopper(what: str) -> None:
    bug = ON_HOPPER[what]
    with bug.found() as error:
        run(bug.edit, image=(1, 17, 8), device=H100)
    if bug.report:
        assert re.search(rf"{HOPPER}:\d+|kernel bottleneck_fwd_sm90a", str(error.value))


def test_poison_is_nan_in_every_format() -> None:
    """The poison fills shared memory and outputs before a launch."""
    word = numpy.full(4, 0xFF, numpy.uint8)
    assert numpy.isnan(word.view(numpy.float32)).all() and numpy.isnan(word.view(numpy.float16)).all()
    assert torch.isnan(torch.full((4,), 0xFF, dtype=torch.uint8).view(torch.bfloat16)).all()
