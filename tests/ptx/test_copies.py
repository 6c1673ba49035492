"""cp.async and mbarriers between warps against NumPy, and mistakes with them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from tests.support.ptx import HEAD, module


def run(text: str, arrays: list[np.ndarray], *, threads: int = 128, seed: int = 0, unwritten: int = -1) -> Any:
    from resnet_fast import _ptx

    memory = _ptx.Memory()
    for i, array in enumerate(arrays):
        memory.add(array.ctypes.data, array.nbytes, str(i), written=i != unwritten)
    packed = [struct.pack("Q", array.ctypes.data) for array in arrays]
    return module(text).launch("k", (1, 1, 1), (threads, 1, 1), 0, packed, memory, seed=seed, limit=1_000_000)


def expect_fault(report: str, *arguments: Any, **options: Any) -> None:
    from resnet_fast import _ptx

    with pytest.raises(_ptx.Fault, match=report):
        run(*arguments, **options)


# ---- cp.async ----


def copies(bytes_: int, level: str = "ca") -> str:
    """Thread t copies elements t and t + 128 of P0, in two groups, P1[t] bytes of each; and stores them to P2."""
    registers = {4: "%x0", 8: "{%x0, %x1}", 16: "{%x0, %x1, %x2, %x3}"}[bytes_]
    kind = {4: "b32", 8: "v2.b32", 16: "v4.b32"}[bytes_]
    copy = f"cp.async.{level}.shared.global [%s+{{0}}], [%p0+{{0}}], {bytes_}, %n;\ncp.async.commit_group;\n"
    text = f"""{HEAD}.visible .entry k(.param .u64 P0, .param .u64 P1, .param .u64 P2)
{{
.reg .b64 %p<3>, %o;
.reg .b32 %t, %s, %n, %x<4>, %i;
.reg .pred %q;
.shared .align 128 .b8 memory[{256 * bytes_}];
ld.param.u64 %p0, [P0]; ld.param.u64 %p1, [P1]; ld.param.u64 %p2, [P2];
mov.u32 %t, %tid.x;
mul.wide.u32 %o, %t, 4; add.s64 %p1, %p1, %o;
mul.wide.u32 %o, %t, {bytes_}; add.s64 %p0, %p0, %o; add.s64 %p2, %p2, %o;
mov.u32 %s, memory; mad.lo.s32 %s, %t, {bytes_}, %s;
ld.global.b32 %n, [%p1];
"""
    text += copy.format(0) + copy.format(128 * bytes_)
    text += f"cp.async.wait_group 1;\nld.shared.{kind} {registers}, [%s];\nst.global.{kind} [%p2], {registers};\n"
    text += "cp.async.wait_group 0;\nbar.sync 0;\n"
    text += f"xor.b32 %s, %s, {bytes_};\n" + "xor.b32 %i, %t, 1;\nsub.s32 %i, %i, %t;\n"
    text += (
        f"ld.shared.{kind} {registers}, [%s+{128 * bytes_}];\nmul.wide.s32 %o, %i, {bytes_};\nadd.s64 %p2, %p2, %o;\n"
    )
    text += f"st.global.{kind} [%p2+{128 * bytes_}], {registers};\n"
    return text + "ret;\n}\n"


@pytest.mark.parametrize(("bytes_", "level"), [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")])
def test_copies_of_a_thread(bytes_: int, level: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (256, bytes_), dtype=np.uint8)
    sizes = np.resize(np.array([0, bytes_, bytes_ // 4], np.uint32), 128)
    out = np.zeros_like(x)
    report = run(copies(bytes_, level), [x, sizes, out])
    expected = np.where(np.arange(bytes_) < np.tile(sizes, 2)[:, None], x, 0)
    np.testing.assert_array_equal(out, expected)
    assert report.counters["events"]["cp_async"] == 2 * 4
    assert report.counters["allocations"]["0"]["bytes_read"] == 2 * sizes.sum()


@pytest.mark.parametrize("size", [3, 16])
def test_bytes_that_nobody_wrote_are_not_copied(size: int) -> None:
    x = np.zeros((256, 16), np.uint8)
    arrays = [x, np.full(128, size, np.uint32), np.zeros_like(x)]
    expect_fault("bytes .*of 0, which nobody has written", copies(16), arrays, unwritten=0)


COPY_MISTAKES = {
    "no wait": ("cp.async.wait_group 1;\n", "", "reads shared memory byte .* which a copy in flight will write"),
    "a group too few": ("wait_group 1", "wait_group 2", "which a copy in flight will write"),
    "read of another thread's": ("bar.sync 0;\n", "", "another lane of this warp wrote|no barrier orders the two"),
    "never waited for": ("cp.async.wait_group 0;\nbar.sync 0;\n", "ret;\n", "block ends while a cp.async of warp"),
    "written while in flight": (
        "cp.async.wait_group 1;\n",
        "st.shared.b32 [%s], %t;\ncp.async.wait_group 1;\n",
        "writes shared memory byte .* which a copy in flight will write",
    ),
    "twice to one place": ("[%s+2048]", "[%s+0]", "which a copy in flight will write"),
    "not aligned": ("[%p0+2048]", "[%p0+2056]", "aligned"),
    "outside of the tensor": ("[%p0+2048]", "[%p0+4096]", "outside"),
    "more bytes than the copy has": ("ld.global.b32 %n, [%p1];", "mov.u32 %n, 17;", "takes 17 bytes for a copy of 16"),
    "commit by some lanes": (
        "cp.async.commit_group;\ncp.async.wait",
        "setp.ne.u32 %q, %t, 5;\n@%q cp.async.commit_group;\ncp.async.wait",
        "reads shared memory byte 80, which a copy in flight will write",
    ),
}


@pytest.mark.parametrize("what", COPY_MISTAKES)
def test_mistake_with_copies(what: str) -> None:
    old, new, report = COPY_MISTAKES[what]
    text = copies(16)
    assert old in text
    x = np.zeros((256, 16), np.uint8)
    expect_fault(report, text.replace(old, new, 1), [x, np.full(128, 16, np.uint32), np.zeros_like(x)])


# Lanes of the two halves of a warp part: one copies twice, and commits and waits between, the other once.
PARTED = f"""{HEAD}.visible .entry k(.param .u64 P0, .param .u64 P1)
{{
.reg .b64 %p<2>, %o; .reg .b32 %t, %s, %x; .reg .pred %q;
.shared .align 16 .b8 memory[256];
ld.param.u64 %p0, [P0]; ld.param.u64 %p1, [P1]; mov.u32 %t, %tid.x;
mul.wide.u32 %o, %t, 4; add.s64 %p0, %p0, %o; add.s64 %p1, %p1, %o; mov.u32 %s, memory; mad.lo.s32 %s, %t, 4, %s;
setp.lt.u32 %q, %t, 16;
@!%q bra OTHERS;
cp.async.ca.shared.global [%s], [%p0], 4; cp.async.commit_group;
cp.async.ca.shared.global [%s+128], [%p0+128], 4; cp.async.commit_group;
cp.async.wait_group 1; ld.shared.b32 %x, [%s]; st.global.b32 [%p1], %x;
bra MEET;
OTHERS: cp.async.ca.shared.global [%s], [%p0], 4; cp.async.commit_group;
MEET: cp.async.wait_group 0;
ld.shared.b32 %x, [%s]; st.global.b32 [%p1], %x;
@!%q ret;
ld.shared.b32 %x, [%s+128]; st.global.b32 [%p1+128], %x;
ret;
}}
"""


def test_lanes_that_parted_wait_for_their_own_copies() -> None:
    x = np.arange(1, 65, dtype=np.uint32)
    for seed in range(4):
        out = np.zeros(64, np.uint32)
        run(PARTED, [x, out], threads=32, seed=seed)
        assert (out[:48] == x[:48]).all() and not out[48:].any()
    in_flight = "which a copy in flight will write"
    for old, new in [
        ("cp.async.wait_group 1; ", "cp.async.wait_group 2; "),
        ("MEET: cp.async.wait_group 0;", "MEET: cp.async.wait_group 1;"),
        ("MEET: cp.async.wait_group 0;", "MEET: @%q cp.async.wait_group 0;"),
    ]:
        expect_fault(in_flight, PARTED.replace(old, new), [x, np.zeros(64, np.uint32)], threads=32)


def test_bytes_that_a_copy_does_not_take_may_be_anywhere() -> None:
    text = copies(16).replace("[%p0+2048]", "[%p0+4096]")
    x = np.zeros((256, 16), np.uint8)
    run(text, [x, np.zeros(128, np.uint32), np.full_like(x, 7)])


# ---- mbarriers between warps ----

RING = f"""{HEAD}.visible .entry k(.param .u64 X, .param .u64 Y, .param .u64 UNUSED)
{{
.reg .b64 %p<2>, %o, %state;
.reg .b32 %t, %i, %s, %v, %par, %full, %empty;
.reg .pred %q, %one, %done, %more;
.shared .align 16 .b8 memory[128];
.shared .align 8 .b64 bars[2];
ld.param.u64 %p0, [X]; ld.param.u64 %p1, [Y];
mov.u32 %t, %tid.x; mov.u32 %full, bars; add.s32 %empty, %full, 8;
setp.eq.u32 %one, %t, 0;
@%one mbarrier.init.shared.b64 [%full], 32;
@%one mbarrier.init.shared.b64 [%empty], 32;
bar.sync 0;
and.b32 %v, %t, 31; shl.b32 %v, %v, 2; mov.u32 %s, memory; add.s32 %s, %s, %v;
mul.wide.u32 %o, %v, 1; add.s64 %p0, %p0, %o; add.s64 %p1, %p1, %o;
mov.u32 %i, 0; mov.u32 %par, 0;
setp.gt.u32 %q, %t, 31;
@%q bra take;
give:
setp.eq.u32 %q, %i, 0;
@%q bra first;
xor.b32 %v, %par, 1;
free:
mbarrier.try_wait.parity.shared.b64 %done, [%empty], %v;
@!%done bra free;
first:
ld.global.b32 %v, [%p0]; st.shared.b32 [%s], %v;
mbarrier.arrive.shared.b64 %state, [%full];
add.s64 %p0, %p0, 128; add.s32 %i, %i, 1; xor.b32 %par, %par, 1;
setp.lt.u32 %more, %i, 6;
@%more bra give;
ret;
take:
ready:
mbarrier.try_wait.parity.shared.b64 %done, [%full], %par;
@!%done bra ready;
ld.shared.b32 %v, [%s]; add.s32 %v, %v, %v; st.global.b32 [%p1], %v;
mbarrier.arrive.release.cta.shared::cta.b64 _, [%empty], 1;
add.s64 %p1, %p1, 128; add.s32 %i, %i, 1; xor.b32 %par, %par, 1;
setp.lt.u32 %more, %i, 6;
@%more bra take;
ret;
}}
"""


@pytest.mark.parametrize("seed", range(4))
def test_a_place_goes_round_between_warps(seed: int) -> None:
    x = np.arange(6 * 32, dtype=np.uint32)
    y = np.zeros_like(x)
    run(RING, [x, y, np.zeros(1, np.uint32)], threads=64, seed=seed)
    np.testing.assert_array_equal(y, 2 * x)


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        ("xor.b32 %v, %par, 1;", "mov.u32 %v, %par;", "no warp can go on|no barrier orders|arrives at the mbarrier"),
        ("mbarrier.arrive.release.cta.shared::cta.b64 _, [%empty], 1;\n", "", "no warp can go on"),
        ("@!%done bra free;\n", "", None),
        (
            "free:\nmbarrier.try_wait.parity.shared.b64 %done, [%empty], %v;\n@!%done bra free;\n",
            "",
            "no barrier orders|no warp can go on",
        ),
        (
            "ready:\nmbarrier.try_wait.parity.shared.b64 %done, [%full], %par;\n@!%done bra ready;\n",
            "",
            "nobody has written|no barrier orders",
        ),
        ("[%full], 32;", "[%full], 16;", "no barrier orders|arrives at the mbarrier|no warp can go on"),
    ],
)
def test_mistakes_with_mbarriers(old: str, new: str, report: str | None) -> None:
    assert old in RING
    x = np.arange(6 * 32, dtype=np.uint32)
    arguments = (RING.replace(old, new, 1), [x, np.zeros_like(x), np.zeros(1, np.uint32)])
    if report is None:  # here a try_wait comes back when the phase is over
        run(*arguments, threads=64)
    else:
        expect_fault(report, *arguments, threads=64)
