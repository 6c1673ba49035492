"""What kernels do wrong, and text or launches that are not accepted: each names the kernel and the line."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.support.ptx import HEAD, kernel, launch, module

REGISTERS = ".reg .b32 %r<8>; .reg .b64 %a<8>; .reg .pred %q<4>; .shared .align 16 .b8 memory[1024];"
SLOT = "mov.b32 %r0, memory; mad.lo.s32 %r0, %t, 4, %r0; "  # this thread's word


def fault(body: str, what: str, *, at: str, lane: int | None = None, pointers: int = 1, **options: Any) -> Any:
    """Assert that the launch stops with ``what`` at the line that holds ``at``; return the fault."""
    from resnet_fast import _ptx

    text = kernel(body, pointers, registers=REGISTERS)
    arrays = [np.zeros(64, np.uint32) for _ in range(pointers)]
    with pytest.raises(_ptx.Fault, match=what) as caught:
        launch(text, arrays, **options)
    error = caught.value
    assert at in text.splitlines()[error.line - 1], (error.line, str(error))
    assert error.kernel == "k" and f"line {error.line}" in str(error)
    assert lane is None or error.lane == lane
    return error


def test_global_accesses_outside_and_misaligned() -> None:
    index = "mul.wide.u32 %a0, %t, 16; add.s64 %a0, %a0, %p0;\n"
    load = "ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%a0];"
    error = fault(index + load, "outside of every allocation; at byte 256 of 0", at="ld.global", lane=16)
    assert (error.warp, error.block, error.opcode) == (0, (0, 0, 0), "ld.global.v4.b32")
    fault("mov.b64 %a0, 1;\nst.global.b64 [%p0+4], %a0;", "not aligned", at="st.global", lane=0)
    fault("ld.global.b32 %r0, [0];", "outside of every allocation", at="ld.global")


def test_memory_that_nobody_wrote() -> None:
    fault("ld.global.b32 %r0, [%p0+8];", "byte 8 of 0, which nobody has written", at="ld.global", unwritten=[0])
    fault(
        SLOT + "\nld.shared.b32 %r1, [%r0];", "shared memory byte 0, which nobody has written", at="ld.shared", lane=0
    )


def test_memory_that_may_only_be_read() -> None:
    from resnet_fast import _ptx

    memory, array = _ptx.Memory(), np.zeros(4, np.uint32)
    memory.add(array.ctypes.data, 16, "weight", writable=False)
    text = kernel("st.global.b32 [%p0], 1;", 1)
    with pytest.raises(_ptx.Fault, match="of weight, which may only be read"):
        module(text).launch("k", (1, 1, 1), (32, 1, 1), 0, [struct.pack("Q", array.ctypes.data)], memory)
    with pytest.raises(ValueError, match="overlaps weight"):
        memory.add(array.ctypes.data + 8, 4, "other")


def test_shared_accesses_outside_and_misaligned() -> None:
    fault(
        SLOT + "\nst.shared.b32 [%r0+1000], 1;", r"bytes 1024 to 1028 of a block that has 1024", at="st.shared", lane=6
    )
    fault(SLOT + "\nst.shared.b32 [%r0+2], 1;", "not aligned to 4", at="st.shared")


def test_values_that_nothing_defined() -> None:
    """Where they matter: an address, a branch, a guard, global memory; not where they are only moved or not chosen."""
    fault("add.s64 %a1, %p0, %a0;\nst.global.b32 [%a1], 1;", "the address, register %a1", at="st.global")
    fault("setp.eq.b32 %q0, %r0, 0;\n@%q0 bra DONE;\nDONE:", "its guard, register %q0", at="bra")
    fault("@%q1 mov.b32 %r0, 1;", "its guard", at="mov")
    fault("mov.b32 %r1, %r0;\nst.global.b32 [%p0], %r1;", "never written", at="st.global")
    fault("div.s32 %r1, %l, 0;\nst.global.b32 [%p0], %r1;", "never written", at="st.global")
    fault(SLOT + "st.shared.b32 [%r0], %r1;\nld.shared.b32 %r2, [%r0];\nst.global.b32 [%p0], %r2;", "never written",
          at="st.global")  # fmt: skip
    fine = """setp.eq.b32 %q0, %l, %l; selp.b32 %r1, %l, %r0, %q0; not.pred %q2, %q0; and.pred %q3, %q1, %q2;
    @!%q3 st.global.b32 [%p0], 3; or.pred %q3, %q0, %q1; @%q3 st.global.b32 [%p0+4], 4;
    @%q2 mov.b32 %r1, %r7; shl.b32 %r2, %l, 2; cvt.u64.u32 %a0, %r2; add.s64 %a0, %a0, %p0;
    st.global.b32 [%a0+8], %r1;"""
    out = np.zeros(64, np.uint32)
    launch(kernel(fine, 1, registers=REGISTERS), [out])
    assert out[:2].tolist() == [3, 4] and out[2:34].tolist() == list(range(32))


PARTS = {
    "moved": ("mov.b32 %r2, %r1; mov.b64 %a0, {%r3, %r2}; mov.b64 {_, %r4}, %a0; mov.b32 {%h2, _}, %r4;", "{_, %h2}"),
    "narrowed": ("cvt.u16.u32 %h2, %r1;", ""),
    "permuted": ("prmt.b32 %r2, %r1, %r3, 0x1010; cvt.u16.u32 %h2, %r2;", ""),
    "added": ("add.s16x2 %r2, %r1, %r0; mov.b32 {%h2, _}, %r2;", "{_, %h2}"),
    "multiplied": ("fma.rn.bf16x2 %r2, %r1, %r0, %r0; mov.b32 {%h2, _}, %r2;", "{_, %h2}"),
    "selected": ("setp.eq.s32 %q0, %l, %l; selp.b32 %r2, %r1, %r3, %q0; mov.b32 {%h2, _}, %r2;", "{_, %h2}"),
    "stored": (SLOT + "st.shared.b32 [%r0], %r1; ld.shared.b32 %r2, [%r0]; mov.b32 {%h2, _}, %r2;", "{_, %h2}"),
    "in a vector": (
        "mov.b32 %r0, memory; mad.lo.s32 %r0, %t, 16, %r0; st.shared.v4.b32 [%r0], {%r3, %r4, %r1, %r5};"
        "ld.shared.v4.b32 {_, _, %r2, _}, [%r0]; mov.b32 {%h2, _}, %r2;",
        "{_, %h2}",
    ),
}


@pytest.mark.parametrize("way", PARTS)
def test_values_that_are_defined_in_part(way: str) -> None:
    """A packed register with one half undefined: each half is followed through moves, memory and selections."""
    from resnet_fast import _ptx

    registers, (text, other_half) = REGISTERS + ".reg .b16 %h<4>;", PARTS[way]
    pack, use = (
        "mov.b32 %r0, 0; cvt.u16.u32 %h0, %t; mov.b32 %r1, {%h0, %h1};\n",
        "cvt.u32.u16 %r7, %h2; st.global.b32 [%p0], %r7;",
    )
    out = np.ones(1, np.uint32)
    launch(kernel(pack + text + use, 1, registers=registers), [out], threads=1)
    assert out[0] == 0
    if other_half:
        with pytest.raises(_ptx.Fault, match="never written"):
            launch(kernel(pack + text.replace("{%h2, _}", other_half) + use, 1, registers=registers), [out], threads=1)


RACE = SLOT + "xor.b32 %r1, %r0, 128;\n"


@pytest.mark.parametrize("seed", range(4))
def test_accesses_of_two_warps_without_a_barrier(seed: int) -> None:
    """Found under every schedule, because clocks decide and not the order in which warps happened to run."""
    options: dict[str, Any] = {"threads": 64, "seed": seed}
    write = "st.shared.b32 [%r0], %t;\n"
    fault(RACE + write + "add.s32 %r1, %r1, 0;\nld.shared.b32 %r2, [%r1];", "nobody has written|no barrier orders",
          at="ld.shared", **options)  # fmt: skip
    fault(RACE + write + "bar.sync 0;\nld.shared.b32 %r2, [%r1];\nst.shared.b32 [%r0], 1;", "no barrier orders",
          at=".shared.b32 ", **options)  # fmt: skip
    fault("mov.b32 %r0, memory;\nst.shared.b32 [%r0], %t;", "no barrier orders|another lane", at="st.shared", **options)


def test_writes_of_the_same_value_need_no_barrier() -> None:
    """As in Triton's reductions, where every warp that holds the result stores it."""
    out = np.zeros(64, np.uint32)
    body = (
        "mov.b32 %r0, memory; st.shared.b32 [%r0], 7; bar.sync 0; ld.shared.b32 %r1, [%r0]; st.global.b32 [%p0], %r1;"
    )
    launch(kernel(body, 1, registers=REGISTERS), [out], threads=64)
    assert out[0] == 7


@pytest.mark.parametrize("seed", range(4))
def test_narrow_accesses_after_wide_ones_keep_their_past(seed: int) -> None:
    """16 bytes that are written and read as a whole have one history; each part of them inherits all of it."""
    wide = """mov.b32 %r0, memory; mad.lo.s32 %r0, %l, 16, %r0; setp.lt.u32 %q0, %t, 32; setp.lt.u32 %q1, %t, 64;
    @%q0 st.shared.v4.b32 [%r0], {%l, %l, %l, %l}; bar.sync 0;
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r0];
    """
    narrow = "@!%q1 st.shared.b32 [%r0+8], %t;"
    launch(kernel(wide + "bar.sync 0;\n" + narrow, 0, registers=REGISTERS), [], threads=96, seed=seed)
    fault(wide + narrow, "no barrier orders the two", at=".shared.", threads=96, seed=seed)


def test_accesses_of_lanes_of_a_warp_without_a_barrier() -> None:
    other = SLOT + "xor.b32 %r1, %r0, 4;\nst.shared.b32 [%r0], %t;\n"
    fault(
        other + "ld.shared.b32 %r2, [%r1];",
        "another lane of this warp wrote at line .* no bar.warp.sync",
        at="ld.shared",
    )
    out = np.zeros(64, np.uint32)
    body = other + "bar.warp.sync -1;\nld.shared.b32 %r2, [%r1];\nmul.wide.u32 %a0, %t, 4; add.s64 %a0, %a0, %p0;"
    launch(kernel(body + "st.global.b32 [%a0], %r2;", 1, registers=REGISTERS), [out])
    assert out[:32].tolist() == [lane ^ 1 for lane in range(32)]


def test_lanes_that_part_where_they_must_not() -> None:
    low = "setp.lt.u32 %q0, %l, 16; @!%q0 bra DONE;\n"
    fault(low + "bar.sync 0;\nDONE:", "all lanes of a warp must execute", at="bar.sync", lane=16)
    fault(low + "shfl.sync.bfly.b32 %r0, %l, 1, 31, -1;\nDONE:", "lanes part", at="shfl", lane=16)
    fault(low + "bar.warp.sync 0x00ff;\nDONE:", "without being in its mask", at="bar.warp", lane=8)


def test_barriers_that_do_not_match() -> None:
    warp = "setp.lt.u32 %q0, %t, 32; @!%q0 bra REST;\n"
    fault(warp + "bar.sync 1, 64; bra DONE;\nREST: bar.sync 2, 64;\nDONE:", "no warp can go on: .*a barrier at line",
          at="bar.sync", threads=64)  # fmt: skip
    fault(
        warp + "bar.sync 0; bra DONE;\nREST: bar.sync 0;\nDONE:",
        "wait at different barriers",
        at="bar.sync",
        threads=64,
    )
    other_count = "bar.sync 1, 64; bra DONE;\nREST: bar.sync 1, 32;\nDONE:"
    fault(warp + other_count, "disagree on how many threads", at="bar.sync", threads=64)
    fault("bar.sync 1, 48;", "not a multiple of 32", at="bar.sync", threads=64)
    fault("bar.sync 17;", "barrier 17 of 16", at="bar.sync", threads=64)


def test_a_kernel_that_does_not_end() -> None:
    fault("AGAIN: add.s32 %r0, %l, 1;\nbra AGAIN;", "executed 5000 instructions of warps, its limit", at="", limit=5000)
    fault("trap;", "traps", at="trap")


def test_findings_can_be_collected() -> None:
    body = "mov.b32 %r1, %r0;\nst.global.b32 [%p0], %r1;\nst.global.b32 [%p0+4], %r2;\nst.global.b32 [%p0+512], 1;"
    report = launch(kernel(body, 1, registers=REGISTERS), [np.zeros(64, np.uint32)], strict=False, threads=1)
    assert [re.split(r"[,;] ", found["what"])[0][:12] for found in report.findings] == ["stores a val"] * 2 + [
        "writes 4 byt"
    ]
    assert report.stopped


def test_source_lines_of_the_compiler_are_reported() -> None:
    text = kernel(".loc 1 17 4, function_name $L1, inlined_at 2 8 9\nld.global.b32 %r0, [0];", 0, registers=REGISTERS)
    text = text.replace(HEAD, HEAD + '.file 1 "/a/tiles.py"\n.file 2 "/a/conv.py"\n')
    from resnet_fast import _ptx

    with pytest.raises(_ptx.Fault) as caught:
        launch(text, [])
    assert caught.value.source == "tiles.py:17, inlined at conv.py:8"


# ---- text and launches ----


def refused(text: str, what: str, line: int | None = None, kernel: str = "k") -> None:
    from resnet_fast import _ptx

    with pytest.raises(_ptx.PtxError, match=what) as caught:
        _ptx.Module(text, "m").check(kernel)
    assert line is None or caught.value.line == line


def test_text_that_is_not_understood() -> None:
    refused(
        kernel("add.s32 %r0, %l, 1;\nfrobnicate.s32 %r0, %r0;", 0, registers=REGISTERS),
        "not understood: frobnicate.s32",
    )
    refused(
        kernel("add.rn.sometimes.f32 %r0, %r0, %r0;", 0, registers=REGISTERS), "not understood: add.rn.sometimes.f32"
    )
    refused(kernel("add.b32 %r0, %r0, %r0;", 0, registers=REGISTERS), "not understood: add.b32")
    refused(kernel("add.s32 %r0, %r0;", 0, registers=REGISTERS), "expected more operands")
    refused(kernel("add.s32 %r0, %r0, %a0;", 0, registers=REGISTERS), "operand %a0 .* another size")
    refused(kernel("add.s32 %r0, %r0, %z;", 0, registers=REGISTERS), "got %z, which is not declared")
    refused(kernel("add.s32 %r0, %r0, %r8;", 0, registers=REGISTERS), "got %r8, which is not declared")
    refused(kernel("bra NOWHERE;", 0), "expected a label, got NOWHERE")
    refused(kernel("call vprintf, ();", 0), "call of vprintf, which the text does not define")
    refused(kernel("", 0), "expected one of the kernels k, got other", kernel="other")


@pytest.mark.parametrize(("head", "what"), [
    (".version 4.0\n.target sm_90", "expected PTX of version 6.0 to 9.9, got 4.0"),
    (".version 8.0\n.target sm_70", "expected a .target from sm_80 on, got sm_70"),
    (".version 8.0\n.target sm_90\n.address_size 32", "expected .address_size 64, got 32"),
    ("// nothing", "expected .version, got none"),
    (".version 8.0\n.address_size 64", "expected a .target from sm_80 on, got none"),
    (".version 8.0\n.target sm_90\n.entry k() { add.s32 %r1, ", "got ''|end of the text"),
    (".version 8.0\n.target sm_90\nint main() {}", "expected a directive of PTX, got 'int'"),
])  # fmt: skip
def test_modules_that_are_not_accepted(head: str, what: str) -> None:
    refused(head, what)


def start(text: str, parameters: Sequence[bytes], what: str, **launched: Any) -> None:
    from resnet_fast import _ptx

    grid, block = launched.pop("grid", (1, 1, 1)), launched.pop("block", (32, 1, 1))
    with pytest.raises(_ptx.PtxError, match=what):
        module(text).launch("k", grid, block, launched.pop("shared", 0), parameters, _ptx.Memory(), **launched)


def test_launches_that_do_not_fit_the_kernel() -> None:
    text = kernel("", 1, 1)
    good = [bytes(8), bytes(4)]
    start(text, good[:1], "expected 2 parameters, got 1")
    start(text, [bytes(8), bytes(8)], "expected 4 bytes of parameter N0, got 8")
    start(text, good, "at most 1024 threads", block=(1024, 2, 1))
    start(text, good, "grid and a block of at least 1", grid=(0, 1, 1))
    start(text, good, "at most 232448 bytes of shared memory, got 300000", shared=300000)
    start(text, good, "clusters of more than one block", cluster=(2, 1, 1))
    start(text.replace(")\n{", ")\n.reqntid 128\n{"), good, r"expected \(128, 1, 1\) threads, as .reqntid says")
    start(text.replace(")\n{", ")\n.maxntid 16, 1, 1\n{"), good, "as .maxntid says")
