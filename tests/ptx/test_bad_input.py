"""Text and launches that are refused: each by an error with kernel and line, before anything is written."""

from __future__ import annotations

import random
import re
import struct
from typing import Any

import numpy as np
import pytest

from resnet_fast import _ptx
from tests.support.ptx import HEAD, kernel, module

STORE = kernel("st.global.u32 [%p0], %t;", 1)
LINES = STORE.count("\n", 0, STORE.index("st.global")) + 1


def refusal(text: str) -> Any:
    """Return the error of a text that has no kernel, or one that cannot run."""
    with pytest.raises(_ptx.PtxError) as caught:
        module(text).check("k")
    return caught.value


@pytest.mark.parametrize(
    ("was", "now", "line", "what"),
    [
        (".version 8.8", ".version 5.0", 1, "expected PTX of version 6.0 to 9.9, got 5.0; compile with another"),
        (".target sm_90a", ".target sm_70", 2, "expected a .target from sm_80 on, got sm_70"),
        (".address_size 64", ".address_size 32", 3, "expected .address_size 64, got 32"),
        ("st.global.u32", "tcgen05.st.u32", LINES, "not understood: tcgen05.st.u32"),
        ("st.global.u32", "st.global.v2.u32", LINES, "expected 2 registers in an operand of st.global.v2.u32, got 1"),
        ("[%p0], %t", "[%p0], \u00e9", LINES, r"expected an operand, got '\xc3'"),
        ("[%p0], %t", "[%p0]", LINES, "expected more operands of st.global.u32"),
        ("[%p0], %t", "[%p0], %missing", LINES, "got %missing, which is not declared"),
        ("[%p0], %t", "[[[%p0]]], %t", LINES, "expected one register"),
        ("[%p0]", "{" * 100_000 + "[%p0]", LINES, "expected operands within at most 32 others"),
        (".reg .b64 %p<16>", ".reg .align 3 .b64 %p<16>", 6, "expected an alignment that is a power of two"),
        (".visible", ".shared .b8 s[99999999999999];\n.visible", 4, "expected at most 2147483648 bytes of variable s"),
        ("ret;\n}", "ret;\n}\n.section .debug", 1 << 30, "expected '{', got the end of the text"),
        ("ret;\n}", 'ret;\n}\n.pragma "nounroll"', 1 << 30, "expected ';', got the end of the text"),
        (".param .u64 P0", ".param .b8 P0[40000]", 4, "expected a parameter P0 of 1 to 32764 bytes"),
        ("ret;\n}", "ret;\n", 1 << 30, "expected '}', got the end of the text"),
    ],
)
def test_text_that_is_refused(was: str, now: str, line: int, what: str) -> None:
    text = STORE.replace(was, now, 1)
    assert text != STORE
    error = refusal(text)
    assert what in str(error)
    assert error.line == min(line, text.count("\n") + 1)


def test_text_with_a_large_local_variable_that_is_used() -> None:
    text = STORE.replace("st.global", "mov.u64 %p1, d; st.global").replace(
        ".reg .b64", ".local .b8 d[600000];\n.reg .b64", 1
    )
    error = refusal(text)
    assert "expected at most 524288 bytes of local memory, with d" in str(error) and error.kernel == "k"


@pytest.mark.parametrize(
    ("grid", "threads", "what"),
    [
        ((2**31 - 1, 1, 1), (32, 1, 1), "expected at most 4194304 blocks, got (2147483647, 1, 1)"),
        ((2**31 - 1, 65535, 65535), (32, 1, 1), "expected at most 4194304 blocks"),
        ((1, 65536, 1), (32, 1, 1), "expected at most (2147483647, 65535, 65535) blocks"),
        ((1, 1, 1), (2048, 1, 1), "expected at most (2147483647, 65535, 65535) blocks and (1024, 1024, 64) threads"),
    ],
)
def test_launches_that_are_refused(grid: tuple[int, int, int], threads: tuple[int, int, int], what: str) -> None:
    out, memory = np.full(1, 7, np.uint32), _ptx.Memory()
    memory.add(out.ctypes.data, 4, "out")
    with pytest.raises(_ptx.PtxError, match=re.escape(what)) as caught:
        module(STORE).launch("k", grid, threads, 0, [struct.pack("Q", out.ctypes.data)], memory)
    assert caught.value.kernel == "k" and out == 7


# A loop with a barrier, a shuffle, shared memory, vectors and a call: what a damaged text can be made of.
WHOLE = f"""{HEAD}.shared .align 16 .b8 s[512];
.func (.param .b32 r) twice(.param .b32 a) {{ .reg .b32 %r<3>; ld.param.b32 %r0, [a]; add.s32 %r1, %r0, %r0;
st.param.b32 [r], %r1; ret; }}
.visible .entry k(.param .u64 .ptr .global .align 16 P, .param .u32 N) .reqntid 64 {{
.reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %a<5>; .reg .b16 %h<3>;
.loc 1 7 3
ld.param.u64 %a0, [P]; ld.param.u32 %r0, [N]; mov.u32 %r1, %tid.x; mul.wide.u32 %a1, %r1, 16; add.s64 %a2, %a0, %a1;
$L1: shl.b32 %r2, %r1, 2; mov.b32 %r3, s; add.s32 %r3, %r3, %r2; st.shared.b32 [%r3+0], %r1; bar.sync 0;
ld.shared.b32 %r4, [%r3]; shfl.sync.bfly.b32 %r5|%p1, %r4, 1, 31, -1; mov.b32 {{%h0, %h1}}, %r5; bar.sync 0;
{{ .param .b32 x; .param .b32 y; st.param.b32 [x], %r5; call (y), twice, (x); ld.param.b32 %r6, [y]; }}
st.global.v4.b32 [%a2], {{%r4, %r5, %r6, 0f3F800000}}; sub.s32 %r0, %r0, 1; setp.gt.s32 %p0, %r0, 0; @%p0 bra $L1;
ret; }}
"""


def damaged(seed: int) -> str:
    """Return the text cut, with characters left out, changed or repeated, words exchanged, or other numbers."""
    draw = random.Random(seed)
    text, way = WHOLE, draw.randrange(8)
    for _ in range(draw.randrange(1, 4)):
        at, span = draw.randrange(len(text)), draw.randrange(1, 30)
        if way == 0:
            return text[:at]
        if way == 1:
            text = text[:at] + text[at + span :]
        elif way == 2:
            text = text[:at] + chr(draw.randrange(1, 127)) + text[at + 1 :]
        elif way == 3:
            text = text[:at] + text[at : at + span] * draw.choice([2, 300]) + text[at + span :]
        elif way > 4:
            numbers = list(re.finditer(r"\b\d+\b", text))
            number = draw.choice(numbers)
            text = text[: number.start()] + draw.choice(["0", "1", "3", "16", "4294967295"]) + text[number.end() :]
        else:
            words = re.findall(r"\S+|\s+", text)
            a, b = draw.randrange(len(words)), draw.randrange(len(words))
            words[a], words[b] = words[b], words[a]
            text = "".join(words)
    return text


def test_damaged_text_is_refused_or_runs() -> None:
    """Never a crash or a hang: an error of the text, a finding, or a launch that ends."""
    out, ends = np.zeros((64, 4), np.uint32), {"runs": 0, "refused": 0, "found": 0}
    for seed in range(2000):
        memory = _ptx.Memory()
        memory.add(out.ctypes.data, out.nbytes, "out")
        try:
            given = [struct.pack("Q", out.ctypes.data), struct.pack("I", 2)]
            module(damaged(seed)).launch("k", (2, 1, 1), (64, 1, 1), 0, given, memory, limit=5000)
            ends["runs"] += 1
        except _ptx.PtxError as error:
            assert error.line >= 0 and error.kernel
            ends["refused"] += 1
        except _ptx.Fault as fault:
            assert fault.line > 0 and fault.kernel == "k"
            ends["found"] += 1
    assert min(ends.values()) > 30, ends
