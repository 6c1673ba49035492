"""Accesses of two warps to the same bytes of global memory, which something must order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from resnet_fast import _ptx
from tests.support.ptx import kernel, launch

REGISTERS = ".reg .b32 %r<8>; .reg .b64 %a<8>; .reg .b16 %h<4>; .reg .pred %q<4>;"
OWN = "mul.wide.u32 %a0, %t, 4; add.s64 %a1, %a0, %p0; "
MIRRORED = "mov.u32 %r1, %tid.x; xor.b32 %r1, %r1, 63; mul.wide.u32 %a0, %r1, 4; add.s64 %a2, %a0, %p0; "


def run(body: str, arrays: list[np.ndarray], **options: Any) -> Any:
    """Launch under eight orders of warps and blocks: what races does so in each."""
    text = kernel(body, len(arrays), registers=REGISTERS)
    for seed in range(8):
        copies = [array.copy() for array in arrays]
        report = launch(text, copies, seed=seed, **options)
    return report, copies


def races(body: str, arrays: list[np.ndarray], match: str, **options: Any) -> None:
    text = kernel(body, len(arrays), registers=REGISTERS)
    for seed in range(8):
        with pytest.raises(_ptx.Fault, match=match):
            launch(text, [array.copy() for array in arrays], seed=seed, **options)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_warps_of_a_block_need_a_barrier(width: int) -> None:
    """Each thread stores an element, and loads the one of its mirror in the other warp."""
    data = np.zeros(64, f"u{width}")
    kind = f"u{8 * width}"
    store = f"mul.wide.u32 %a0, %t, {width}; add.s64 %a1, %a0, %p0; st.global.{kind} [%a1], %t; "
    load = f"xor.b32 %r1, %t, 63; mul.wide.u32 %a0, %r1, {width}; add.s64 %a2, %a0, %p0; ld.global.{kind} %r2, [%a2];"
    run(store + "bar.sync 0; " + load, [data], threads=64)
    races(
        store + load,
        [data],
        r"byte \d+ of 0, which warp [01] (wrote|read) at line \d+, and no barrier orders",
        threads=64,
    )


def test_neighbours_of_one_word_are_no_race() -> None:
    """Warps store every other byte, between those of the other warp, after both have read words of 16 bytes."""
    body = """ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%p0]; bar.sync 0;
    shl.b32 %r1, %l, 1; mov.u32 %r2, %tid.x; shr.u32 %r2, %r2, 5; add.s32 %r1, %r1, %r2; cvt.u64.u32 %a0, %r1;
    add.s64 %a1, %a0, %p0; st.global.u8 [%a1], %t;"""
    run(body, [np.zeros(64, np.uint8)], threads=64)


def test_a_value_that_a_race_changed_may_not_be_used() -> None:
    """Both warps load what one of them updates, as compilers do with copies of a value; the other one's is not used."""
    update = """mul.wide.u32 %a0, %l, 4; add.s64 %a1, %a0, %p0; add.s64 %a2, %a0, %p1; ld.global.u32 %r0, [%a1];
    add.s32 %r1, %r0, 1; setp.lt.u32 %q0, %t, 32; @%q0 st.global.u32 [%a1], %r1; """
    arrays = [np.zeros(32, np.uint32), np.zeros(32, np.uint32)]
    _, (moved, _) = run(update, arrays, threads=64)
    assert (moved == 1).all()
    guard = "setp.eq.u32 %q1, %r1, 1; @%q1 st.global.u32 [%a2], %l;"
    for use, says in (("@!%q0 st.global.u32 [%a2], %r1;", "stores a value"), (guard, "its guard, register %q1")):
        used = kernel(update + use, 2, registers=REGISTERS)
        found = []
        for seed in range(8):
            try:
                launch(used, [array.copy() for array in arrays], threads=64, seed=seed)
            except _ptx.Fault as fault:
                found.append(fault.what)
        assert any(says in what and "which warp 0 wrote at line" in what for what in found)


def test_equal_bytes_may_be_stored_twice() -> None:
    store = "mov.u32 %r0, {}; st.global.u32 [%p0], %r0;"
    run(store.format("7"), [np.zeros(1, np.uint32)], threads=64, blocks=3)
    races(
        store.format("%ctaid.x"), [np.zeros(1, np.uint32)], "which warp 0 of block .* no release and acquire", blocks=2
    )


def test_atomics_race_with_plain_accesses_alone() -> None:
    add = "mov.u32 %r0, 1; red.global.add.u32 [%p0], %r0; "
    _, (total,) = run(add, [np.zeros(1, np.uint32)], threads=64, blocks=4)
    assert total == 256
    first = "mov.u32 %r1, %tid.x; setp.eq.u32 %q0, %r1, 0; "
    run(first + "@%q0 st.global.u32 [%p0], 5; bar.sync 0; " + add, [np.zeros(1, np.uint32)], threads=64)
    races(first + "@%q0 st.global.u32 [%p0], 5; " + add, [np.zeros(1, np.uint32)], "no barrier", threads=64)
    races(add + "ld.global.u32 %r2, [%p0];", [np.zeros(1, np.uint32)], "no barrier", threads=64)
    poll = "ld.relaxed.gpu.global.u32 %r2, [%p0]; ld.volatile.global.u32 %r2, [%p0];"
    run(add + poll, [np.zeros(1, np.uint32)], threads=64, blocks=2)
    near = add.replace("red.global", "red.global.cta")
    run(near, [np.zeros(1, np.uint32)], threads=64)
    races(near, [np.zeros(1, np.uint32)], "no release and acquire", blocks=2)
    seen = "mov.u32 %r0, 1; atom.global.acq_rel.gpu.add.u32 %r1, [%p0+4], %r0; "
    seen = seen + near + seen
    races(seen, [np.zeros(2, np.uint32)], "updates .* no release and acquire", blocks=2)


# Each block of 64 threads stores 64 numbers; the one that comes last sums those of all blocks, mirrored.
LAST = """{store}
{before}
mov.u32 %r1, %tid.x; setp.eq.u32 %q0, %r1, 0; mov.u32 %r2, flag;
@%q0 atom.global{semantics}.add.u32 %r3, [%p1], 1;
{between}
@%q0 st.shared.u32 [%r2], %r3; bar.sync 0; ld.shared.u32 %r3, [%r2];
mov.u32 %r4, %nctaid.x; sub.s32 %r4, %r4, 1; setp.ne.u32 %q1, %r3, %r4; @%q1 ret;
{after}
mov.u32 %r5, 0; mov.u32 %r6, 0;
{mirrored}
L: {load} %r7, [%a2]; add.s32 %r5, %r5, %r7; add.s64 %a2, %a2, 256;
add.s32 %r6, %r6, 1; setp.le.u32 %q2, %r6, %r4; @%q2 bra L;
mul.wide.u32 %a0, %r1, 4; add.s64 %a3, %a0, %p2; st.global.u32 [%a3], %r5;
@%q0 st.global.u32 [%p1], 0;"""
ACQUIRE_RELEASE = {"before": "bar.sync 0;", "semantics": ".gpu.acq_rel", "between": "", "after": ""}
# As CUDA's __threadfence() before and after the update: by all threads, beside a barrier, or by the one that updates.
FENCES = {"before": "fence.acq_rel.gpu; bar.sync 0;", "semantics": "", "between": "", "after": "membar.gl;"}
ONE_FENCES = {
    "before": "bar.sync 0; @%q0 membar.gl;",
    "semantics": ".relaxed.gpu",
    "between": "@%q0 membar.gl;",
    "after": "",
}


def last_block(parts: dict[str, str], load: str = "ld.global.cg.u32") -> tuple[str, list[np.ndarray]]:
    body = ".shared .align 4 .b32 flag;\n" + LAST.format(
        store=OWN + "st.global.u32 [%a1], %t;", mirrored=MIRRORED, load=load, **parts
    )
    if "@%q0" in parts["before"]:
        body = body.replace("bar.sync 0; @%q0", "bar.sync 0; mov.u32 %r1, %tid.x; setp.eq.u32 %q0, %r1, 0; @%q0", 1)
    return body, [np.zeros(5 * 64, np.uint32), np.zeros(1, np.uint32), np.zeros(64, np.uint32)]


@pytest.mark.parametrize("parts", [ACQUIRE_RELEASE, FENCES, ONE_FENCES])
def test_the_last_block_may_read_what_others_stored(parts: dict[str, str]) -> None:
    body, arrays = last_block(parts)
    _, (_, counter, sums) = run(body, arrays, threads=64, blocks=5)
    assert counter == 0
    assert (sums == np.arange(320).reshape(5, 64).sum(0)).all()


@pytest.mark.parametrize(
    "parts",
    [
        ACQUIRE_RELEASE | {"before": ""},
        ACQUIRE_RELEASE | {"semantics": ".gpu.relaxed"},
        ACQUIRE_RELEASE | {"semantics": ".gpu.release"},
        ACQUIRE_RELEASE | {"semantics": ".gpu.acquire"},
        ACQUIRE_RELEASE | {"semantics": ".cta.acq_rel"},
        FENCES | {"before": "bar.sync 0;"},
        FENCES | {"before": "fence.acq_rel.cta; bar.sync 0;"},
        FENCES | {"after": ""},
        ONE_FENCES | {"between": ""},
    ],
)
def test_the_last_block_needs_release_and_acquire(parts: dict[str, str]) -> None:
    body, arrays = last_block(parts)
    races(body, arrays, r"which warp [01] (of block \(\d, 0, 0\) )?(wrote|read|updated) at line", threads=64, blocks=5)


def test_what_the_launch_writes_is_not_read_through_the_other_cache() -> None:
    body, arrays = last_block(ACQUIRE_RELEASE, load="ld.global.nc.u32")
    races(body, arrays, "by ld.global.nc, and this launch has written it", threads=64, blocks=5)


def test_a_block_hands_on_what_it_has_acquired() -> None:
    """Blocks pass a flag on, each by another word: block 2 knows of block 0 by block 1. They run in any order."""
    body = """mov.u32 %r0, %ctaid.x; mul.wide.u32 %a0, %r0, 4; add.s64 %a1, %p1, %a0;
    setp.eq.u32 %q0, %r0, 0; @%q0 bra FIRST; ld.acquire.gpu.global.u32 %r1, [%a1+-4];
    setp.eq.u32 %q1, %r1, 0; @%q1 ret; ld.global.u32 %r2, [%p0]; bra NEXT;
    FIRST: mov.u32 %r2, %tid.x; setp.eq.u32 %q1, %r2, 0; @%q1 st.global.u32 [%p0], 5;
    NEXT: st.release.gpu.global.u32 [%a1], 1;"""
    arrays = [np.zeros(1, np.uint32), np.zeros(3, np.uint32)]
    reached = [run_once(body, arrays, seed)[1][2] for seed in range(24)]
    assert any(reached)
    races_somewhere = 0
    for seed in range(24):
        try:
            run_once(body.replace("ld.acquire", "ld.relaxed"), arrays, seed)
        except _ptx.Fault as fault:
            races_somewhere += "no release and acquire" in fault.what
    assert races_somewhere


def run_once(body: str, arrays: list[np.ndarray], seed: int) -> list[np.ndarray]:
    copies = [array.copy() for array in arrays]
    launch(kernel(body, len(arrays), registers=REGISTERS), copies, blocks=3, seed=seed)
    return copies


def test_every_race_of_a_launch_that_is_not_strict() -> None:
    report = launch(
        kernel("st.global.u32 [%p0], %t; ld.global.u32 %n0, [%p0];", 1),
        [np.zeros(1, np.uint32)],
        threads=64,
        strict=False,
    )
    assert {finding["line"] for finding in report.findings}
    assert all("no barrier orders" in finding["what"] for finding in report.findings)
