"""A warp-specialised pipeline of bulk copies, mbarriers and wgmma, written by hand: right, and with one fault each."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.pipelined_ptx import DESCRIPTOR, PIPELINE, STAGE, PipelinedProduct


@pytest.mark.parametrize(("rows", "depth"), [(50, 264), (64, 64), (7, 120)])
def test_the_pipeline_multiplies(rows: int, depth: int) -> None:
    product, bits = PipelinedProduct(rows, depth), set()
    for seed in range(4):
        product.c[:] = 7
        report = product.launch(seed=seed)
        bits.add(product.c.tobytes())
        # sums of `depth` products in fp32, of operands of about 1
        np.testing.assert_allclose(product.c, product.expected(), atol=depth * 2.0**-22, rtol=0)
    assert len(bits) == 1, "a result that depends on the schedule"
    steps = -(-depth // 64)
    assert report.counters["events"]["bulk_copies"] == 2 * steps


RESULT = "another result"
FAULTS = {
    "fewer bytes expected": (f"[%bar], {STAGE};", f"[%bar], {STAGE - 16};", "16 bytes more have come"),
    "bytes of one tile expected": (f"[%bar], {STAGE};", f"[%bar], {STAGE // 2};", "expected fewer bytes than come"),
    "no wait for the copies": ("@!%done bra full;", "", None),
    "no test of the copies": (
        "full:\nmbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], %phase;\n@!%done bra full;",
        "",
        "nobody has written|in flight",
    ),
    "wait for the other phase": ("mov.u32 %phase, 0;", "mov.u32 %phase, 1;", "nobody has written|in flight"),
    "the phase never turns": ("xor.b32 %phase, %phase, %stage; ", "", "in flight|still reads|no barrier orders"),
    "an empty stage is waited for that is not filled": (
        "mov.u32 %phase, 1;",
        "mov.u32 %phase, 0;",
        "no warp can go on",
    ),
    "no wait for an empty stage": (
        "empty:\nmbarrier.try_wait.parity.shared::cta.b64 %done, [%bar+16], %phase;\n@!%done bra empty;",
        "",
        "still reads|in flight|arrives at the mbarrier|bytes more have come",
    ),
    "a stage freed in flight": ("wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;", "still reads"),
    "this stage freed": (
        "xor.b32 %x, %stage, 1; shl.b32 %bar",
        "mov.b32 %x, %stage; shl.b32 %bar",
        "still reads|no warp can go on",
    ),
    "freed by three warps": ("[%bars+16], 4;", "[%bars+16], 3;", "still reads|arrives at the mbarrier"),
    "freed by every lane": (
        "setp.eq.u32 %frees, %lane, 0;",
        "setp.ge.u32 %frees, %lane, 0;",
        "arrives at the mbarrier|no warp can go on",
    ),
    "no fence before the products": ("wgmma.fence.sync.aligned;\n", "", "wgmma.fence"),
    "sums read in flight": ("wgmma.wait_group.sync.aligned 0;\n", "", "in flight still"),
    "not committed": ("wgmma.commit_group.sync.aligned;\n", "", "in flight|still reads"),
    "sums not zeroed": ("setp.ne.u32 %adds, %i, 0;", "setp.ne.u32 %adds, 1, 0;", "never written"),
    "sums zeroed at each step": ("setp.ne.u32 %adds, %i, 0;", "setp.ne.u32 %adds, 0, 0;", RESULT),
    "another stride": (str(DESCRIPTOR), str(DESCRIPTOR ^ 32 << 32), "groups 1536 bytes apart"),
    "another swizzle": (str(DESCRIPTOR), str(DESCRIPTOR ^ 3 << 62), "swizzle's pattern of 64 bytes"),
    "16 bytes further": ("add.s64 %da, %da, 2;", "add.s64 %da, %da, 3;", RESULT),
    "operands exchanged": (", %da, %db, %adds", ", %db, %da, %adds", RESULT),
    "one tile twice": ("[%b, {%k, 0}]", "[%a, {%k, 0}]", RESULT),
    "coordinates exchanged": ("[%b, {%k, 0}]", "[%b, {0, %k}]", RESULT),
    "both tiles in one place": ("add.s32 %place, %place, 8192;\n", "", "in flight|no barrier orders"),
    "a row too many": ("setp.lt.u32 %inside", "setp.le.u32 %inside", "outside of every allocation"),
    "a row too few": ("setp.lt.u32 %inside, %row, %rows", "setp.lt.u32 %inside, %row, 49", RESULT),
    "another lane's columns": ("and.b32 %x, %lane, 3;", "and.b32 %x, %lane, 1;", RESULT),
    "barriers used before their init": ("bar.sync 0;\n", "", "nobody has initialised|no barrier orders"),
    "copies by every lane": ("@!%one bra given;\n", "", "in flight|arrives at the mbarrier|aligned|bytes more"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_in_the_pipeline(what: str) -> None:
    from resnet_fast import _ptx

    old, new, report = FAULTS[what]
    assert old in PIPELINE
    text = PIPELINE.replace(old, new, 1)
    product = PipelinedProduct(50, 264)
    if report == RESULT:
        product.launch(text)
        assert not np.allclose(product.c, product.expected(), atol=1e-2)
    elif report is None:  # here a try_wait comes back when the phase is over
        product.launch(text)
        np.testing.assert_allclose(product.c, product.expected(), atol=264 * 2.0**-22, rtol=0)
    else:
        with pytest.raises(_ptx.Fault, match=report):
            product.launch(text)
