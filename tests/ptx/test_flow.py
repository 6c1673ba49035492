"""Lanes that part and meet again, calls, and instructions in which lanes see each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.support.ptx import HEAD, evaluate, kernel, launch

N = 128
A = np.random.default_rng(0).integers(0, 12, N).astype(np.int32)


def run(text: str, expected: Callable[[int], int], a: np.ndarray = A) -> None:
    """Compare register d with a Python function of register a, lane by lane, under three schedules."""
    got = evaluate(text, {"d": np.int32}, {"a": a})["d"]
    assert got.tolist() == [expected(int(x)) for x in a]


def test_nested_conditions() -> None:
    text = """.reg .pred %q<3>;
    setp.lt.s32 %q0, a, 6; setp.lt.s32 %q1, a, 3; setp.lt.s32 %q2, a, 9;
    mov.b32 d, 0; @%q0 bra LOW; @%q2 bra MIDDLE; add.s32 d, d, 1; bra HIGH;
    MIDDLE: add.s32 d, d, 10;
    HIGH: add.s32 d, d, 100; bra DONE;
    LOW: @!%q1 bra UPPER; add.s32 d, d, 1000; bra LOWER;
    UPPER: add.s32 d, d, 2000;
    LOWER: add.s32 d, d, 4;
    DONE: add.s32 d, d, a;"""

    def expected(a: int) -> int:
        if a < 6:
            return (1000 if a < 3 else 2000) + 4 + a
        return (10 if a < 9 else 1) + 100 + a

    run(text, expected)


def test_loops_of_different_lengths() -> None:
    """Nested: each lane runs the inner loop as often as it has rounds left, and all meet after both."""
    text = """.reg .pred %q; .reg .b32 %x, %y;
    mov.b32 d, 0; mov.b32 %x, a;
    OUTER: setp.le.s32 %q, %x, 0; @%q bra DONE;
    mov.b32 %y, %x;
    INNER: add.s32 d, d, %y; sub.s32 %y, %y, 1; setp.gt.s32 %q, %y, 0; @%q bra INNER;
    sub.s32 %x, %x, 2; bra.uni OUTER;
    DONE: bar.warp.sync -1; add.s32 d, d, 5;"""
    run(text, lambda a: sum(x * (x + 1) // 2 for x in range(a, 0, -2)) + 5)


def test_break_and_continue() -> None:
    text = """.reg .pred %q; .reg .b32 %x, %y;
    mov.b32 d, 0; mov.b32 %x, 0;
    NEXT: add.s32 %x, %x, 1; setp.gt.s32 %q, %x, 20; @%q bra DONE;
    and.b32 %y, %x, 1; setp.eq.s32 %q, %y, 0; @%q bra NEXT;
    setp.ge.s32 %q, %x, a; @%q bra DONE;
    add.s32 d, d, %x; bra NEXT;
    DONE: bar.warp.sync -1;"""
    run(text, lambda a: sum(x for x in range(1, 21, 2) if all(y < a for y in range(1, x + 1, 2))))


@pytest.mark.parametrize("seed", range(4))
def test_lanes_that_leave_early(seed: int) -> None:
    """Those that stay are all that the barrier waits for, whichever side of a branch the schedule runs first."""
    out = np.zeros(64, np.int32)
    body = """setp.lt.u32 %q, %l, 5; @%q ret;
    setp.lt.u32 %q, %l, 9; @!%q bra REST; exit;
    REST: mul.wide.u32 %a, %t, 4; add.s64 %a, %a, %p0; st.global.b32 [%a], 7; bar.sync 0;"""
    launch(kernel(body, 1, registers=".reg .pred %q; .reg .b64 %a;"), [out], threads=64, seed=seed)
    assert out.tolist() == ([0] * 9 + [7] * 23) * 2


def test_labels_and_registers_of_inner_scopes() -> None:
    """As inline assembly makes them: two scopes with the same names."""
    part = """{ .reg .pred %q; .reg .b32 %x; mov.b32 %x, 0;
    again: add.s32 d, d, a; add.s32 %x, %x, 1; setp.lt.s32 %q, %x, %s; @%q bra again; }"""
    run("mov.b32 d, 0;\n" + part.replace("%s", "2") + part.replace("%s", "3"), lambda a: 5 * a)


def test_a_table_of_branches() -> None:
    text = """.reg .b32 %x; rem.s32 %x, a, 3; mov.b32 d, 0;
    list: .branchtargets ZERO, ONE, TWO;
    brx.idx %x, list;
    ZERO: mov.b32 d, 10; bra DONE;
    ONE: mov.b32 d, 11; bra DONE;
    TWO: mov.b32 d, 12;
    DONE: bar.warp.sync -1; add.s32 d, d, a;"""
    run(text, lambda a: a % 3 + 10 + a)


def test_calls_are_executed_with_their_own_registers() -> None:
    """A function that calls another, for some of the lanes, with results and early returns."""
    function = """.func (.param .b32 result) twice(.param .b32 x)
    { .reg .b32 %r1; ld.param.b32 %r1, [x]; add.s32 %r1, %r1, %r1; st.param.b32 [result], %r1; ret; }
    .func (.param .b32 result) f(.param .b32 x, .param .b64 y)
    { .reg .b32 %r<4>; .reg .b64 %rd1; .reg .pred %p1;
      ld.param.b32 %r1, [x]; ld.param.b64 %rd1, [y]; st.param.b32 [result+0], 1;
      setp.lt.s32 %p1, %r1, 4; @%p1 ret;
      { .param .b32 a0; st.param.b32 [a0+0], %r1; .param .b32 r0;
        call.uni (r0), twice, (a0); ld.param.b32 %r2, [r0+0]; }
      cvt.u32.u64 %r3, %rd1; add.s32 %r2, %r2, %r3; st.param.b32 [result+0], %r2; ret; }
    """
    body = """mul.wide.u32 %a, %t, 4; add.s64 %b, %a, %p0; ld.global.b32 %r1, [%b]; mov.b32 %r2, -1;
    setp.gt.s32 %q, %r1, 1; mov.b64 %c, 100;
    { .param .b32 a0; st.param.b32 [a0], %r1; .param .b64 a1; st.param.b64 [a1], %c; .param .b32 r0;
      st.param.b32 [r0], -1; @%q call (r0), f, (a0, a1); ld.param.b32 %r2, [r0]; }
    add.s64 %b, %a, %p1; st.global.b32 [%b], %r2;"""
    text = kernel(body, 2, registers=".reg .b32 %r<4>; .reg .b64 %a, %b, %c; .reg .pred %q;")
    out = np.zeros(N, np.int32)
    launch(text.replace(HEAD, HEAD + function), [A, out], threads=N)
    assert out.tolist() == [-1 if a <= 1 else 1 if a < 4 else 2 * a + 100 for a in A.tolist()]


# ---- lanes that see each other ----


def warps(a: np.ndarray) -> list[list[int]]:
    return a.reshape(-1, 32).tolist()


def test_shuffles() -> None:
    """The pseudocode of the PTX ISA, for segments of every size."""
    rng = np.random.default_rng(1)
    by = rng.integers(0, 40, N).astype(np.int32)
    for mode in ("up", "down", "bfly", "idx"):
        for segment in (32, 16, 8, 4):
            c = (32 - segment) << 8 | (0 if mode == "up" else 31)
            text = f"shfl.sync.{mode}.b32 d|e, a, b, {c}, -1;"
            got = evaluate(text, {"d": np.int32, "e": np.bool_}, {"a": np.arange(N, dtype=np.int32), "b": by})
            for thread in range(N):
                lane, step = thread % 32, int(by[thread]) & 31
                first = lane // segment * segment
                source = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": first | step % segment}[
                    mode
                ]
                inside = source >= first if mode == "up" else source <= first + segment - 1
                assert got["e"][thread] == inside
                assert got["d"][thread] == (thread - lane + source if inside else thread), (mode, segment, thread)


def test_votes_matches_and_reductions() -> None:
    a = np.random.default_rng(2).integers(-3, 3, N).astype(np.int32)
    a[:32], p = 5, A < 6
    p[32:64], p[64:96] = True, False
    text = """vote.sync.all.pred v, p, -1; vote.sync.any.pred w, p, -1; vote.sync.uni.pred x, p, -1;
    vote.sync.ballot.b32 d, !p, -1; match.any.sync.b32 e, a, -1; match.all.sync.b32 f|y, a, -1;
    redux.sync.add.s32 g, a, -1; redux.sync.max.s32 h, a, -1; redux.sync.min.u32 i, a, -1;
    redux.sync.and.b32 j, a, -1; redux.sync.xor.b32 k, a, -1; elect.sync _|z, -1;"""
    results = dict.fromkeys("defghijk", np.uint32) | dict.fromkeys("vwxyz", np.bool_)
    got = evaluate(text, results, {"a": a, "p": p})
    for warp in range(N // 32):
        part = slice(32 * warp, 32 * warp + 32)
        values, bits = a[part].tolist(), p[part]
        mine = {name: array[part] for name, array in got.items()}
        assert (mine["v"] == bits.all()).all() and (mine["w"] == bits.any()).all()
        assert (mine["x"] == (bits.all() or not bits.any())).all()
        assert (mine["d"] == sum(1 << lane for lane in range(32) if not bits[lane])).all()
        assert mine["e"].tolist() == [sum(1 << other for other in range(32) if values[other] == v) for v in values]
        same = len(set(values)) == 1
        assert (mine["f"] == (0xFFFFFFFF if same else 0)).all() and (mine["y"] == same).all()
        unsigned = [v & 0xFFFFFFFF for v in values]
        assert (mine["g"] == sum(values) & 0xFFFFFFFF).all() and (mine["h"] == max(values) & 0xFFFFFFFF).all()
        assert (mine["i"] == min(unsigned)).all()
        assert (mine["j"] == np.bitwise_and.reduce(unsigned)).all()
        assert (mine["k"] == np.bitwise_xor.reduce(unsigned)).all()
        assert mine["z"].tolist() == [True] + [False] * 31


def test_lanes_that_parted_vote_among_themselves() -> None:
    text = """.reg .pred %q, %o; .reg .b32 %m; and.b32 d, a, 1; setp.eq.s32 %q, d, 0; mov.b32 d, 0;
    vote.sync.ballot.b32 %m, %q, -1;
    @!%q bra DONE; activemask.b32 d; vote.sync.ballot.b32 d, %q, %m;
    DONE: bar.warp.sync -1;"""
    got = evaluate(text, {"d": np.uint32}, {"a": A})["d"]
    for warp, values in enumerate(warps(A)):
        even = sum(1 << lane for lane, a in enumerate(values) if a % 2 == 0)
        assert got[32 * warp : 32 * warp + 32].tolist() == [even if a % 2 == 0 else 0 for a in values]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_barriers_exchange_values_between_warps(seed: int) -> None:
    """Named barriers too: a warp that arrives and goes on, one that waits; and a barrier that counts."""
    out = np.zeros(64, np.uint32)
    body = """mov.b32 %s, memory; mad.lo.s32 %s, %t, 4, %s; setp.lt.u32 %q, %t, 32;
    st.shared.b32 [%s], %t;
    @%q bar.arrive 3, 64;
    @!%q bar.sync 3, 64;
    @!%q ld.shared.b32 %x, [%s+-128];
    bar.sync 0;
    @%q ld.shared.b32 %x, [%s+128];
    and.b32 %y, %t, 3; setp.eq.s32 %q, %y, 0;
    barrier.cta.red.popc.aligned.u32 %y, 1, %q;
    mad.lo.s32 %x, %y, 1000, %x;
    mul.wide.u32 %a, %t, 4; add.s64 %a, %a, %p0; st.global.b32 [%a], %x;"""
    registers = ".reg .b32 %s, %x, %y; .reg .pred %q; .reg .b64 %a; .shared .align 4 .b8 memory[256];"
    report = launch(kernel(body, 1, registers=registers), [out], threads=64, seed=seed)
    assert out.tolist() == [16000 + (t + 32) % 64 for t in range(64)]
    assert report.counters["events"]["barriers"] == 3
