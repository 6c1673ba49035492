"""The whole-block kernel of Hopper as nvcc compiles it, and with each of its fences, waits and barriers left out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest
import torch

from resnet_fast import native, numerics
from resnet_fast.benchmarks import compiled_cuda
from resnet_fast.tools.ptx_machine import PtxFault, ptx_machine
from tests.support.bottleneck_cases import block

pytestmark = pytest.mark.skipif(
    not native.status() or shutil.which("nvcc") is None, reason="needs the native library and nvcc"
)


def run(
    channels: int, dtype: torch.dtype, seed: int = 0, rewrite: Callable[[str, str], str] | None = None
) -> tuple[torch.Tensor, dict[str, int]]:
    """Return y of a block with a ragged image, compared with fp64, and what was counted."""
    made = block(1, 9, 17, channels, 64, 256, dtype)
    with ptx_machine(arch=90, seed=seed, rewrite=rewrite) as machine, compiled_cuda.launched(machine, sms=2):
        y = made.run()
    pre = made.eager(torch.float64, relu=False)
    numerics.assert_close(y, made.eager(torch.float64), made.eager(dtype), 9 * 64, pre)
    return y, machine.launches[-1].report.counters["events"]


@pytest.mark.parametrize(
    ("channels", "dtype"), [pytest.param(256, torch.bfloat16, marks=pytest.mark.slow), (64, torch.float16)]
)
def test_computes_the_block_with_every_schedule(channels: int, dtype: torch.dtype) -> None:
    results = [run(channels, dtype, seed) for seed in (0, 1)]
    assert torch.equal(results[0][0], results[1][0])
    # Of six tiles: the centres of conv1, two groups' shares of conv2 and conv3, and the projection.
    products = 6 * (2 * channels // 16 + 2 * 36 + 2 * 4 + (0 if channels == 256 else 2 * 4))
    assert results[0][1]["wgmma"] == products
    assert results[0][1]["barriers"] == 2 * 1 + 6 * 2


LEFT_OUT = {
    "mbarrier.init": (r"mbarrier\.init", 0, "which nobody has initialised"),
    "the expected bytes": (r"mbarrier\.arrive", 0, "no warp can go on"),
    "the first fence of the weights": (
        r"fence\.proxy\.async",
        1,
        "multiplies shared memory .* no fence.proxy.async follows",
    ),
    "the fence before the next x": (
        r"fence\.proxy\.async",
        2,
        "copies to shared memory .* read .* no fence.proxy.async",
    ),
    "the fence of t2": (r"fence\.proxy\.async", 3, "multiplies shared memory .* no fence.proxy.async follows"),
    "the barrier after t1": (r"bar\.sync", 1, "nobody has written|no bar.* orders"),
    "the barrier after t2": (r"bar\.sync", 2, "nobody has written|no bar.* orders"),
    "the fence of conv1's registers": (r"wgmma\.fence", 0, "no wgmma.fence came before"),
    "the fence of conv2's registers": (r"wgmma\.fence", 1, "which was written after the last wgmma.fence"),
    "a commit": (r"wgmma\.commit_group", 0, "which a product in flight still reads or writes"),
    "the wait of conv1": (r"wgmma\.wait_group\S* 0", 0, "which a product in flight still reads or writes"),
    "the last wait of conv2": (r"wgmma\.wait_group\S* 0", 1, "which a product in flight still reads or writes"),
    "the wait of conv3": (r"wgmma\.wait_group\S* 0", 2, "which a product in flight still reads or writes"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LEFT_OUT)
def test_an_instruction_that_is_left_out(what: str) -> None:
    """The n-th of its kind. Registers of PTX are virtual, so the waits for one group of conv2 may go."""
    pattern, number, report = LEFT_OUT[what]

    def without(kernel: str, text: str) -> str:
        start = text.index(f".entry {kernel}")
        found = list(re.finditer(rf"^[ \t]*(@\S+ )?{pattern}[^\n]*;", text[start:], re.MULTILINE))[number]
        return text[: start + found.start()] + text[start + found.end() :]

    with pytest.raises(PtxFault, match=report):
        run(256, torch.float16, rewrite=without)
