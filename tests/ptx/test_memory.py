"""Loads, stores and updates in every state space, and what they count."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from resnet_fast import _ptx
from tests.support.ptx import HEAD, kernel, launch, module

REGISTERS = ".reg .b32 %r<8>; .reg .b64 %a<8>; .reg .b16 %h<8>; .reg .pred %q<4>;"


def test_vectors_widths_and_signs() -> None:
    source = np.random.default_rng(0).integers(0, 256, 32 * 16).astype(np.uint8)
    out = np.zeros(32 * 16, np.uint8)
    signs = np.zeros(32 * 4, np.int32)
    body = """mul.wide.u32 %a0, %t, 16; add.s64 %a1, %a0, %p0; add.s64 %a2, %a0, %p1; add.s64 %a3, %a0, %p2;
    ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%a1]; st.global.v2.b32 [%a2], {%r0, %r1};
    ld.global.v4.b16 {%h0, %h1, %h2, %h3}, [%a1+8]; st.global.v4.b16 [%a2+8], {%h0, %h1, %h2, %h3};
    ld.global.s8 %r4, [%a1+3]; st.global.b32 [%a3], %r4;
    ld.global.nc.L1::evict_last.u8 %r4, [%a1+3]; st.global.b32 [%a3+4], %r4;
    ld.global.s16 %r4, [%a1+6]; ld.global.u16 %r5, [%a1+6]; st.global.v2.b32 [%a3+8], {%r4, %r5};"""
    launch(kernel(body, 3, registers=REGISTERS), [source, out, signs])
    assert (out == source).all()
    rows, halves = source.reshape(32, 16), source.view(np.int16).reshape(32, 8)
    assert (signs.reshape(32, 4)[:, 0] == rows[:, 3].astype(np.int8)).all()
    assert (signs.reshape(32, 4)[:, 1] == rows[:, 3]).all()
    assert (signs.reshape(32, 4)[:, 2] == halves[:, 3]).all()
    assert (signs.reshape(32, 4)[:, 3] == halves[:, 3].astype(np.uint16)).all()


def test_allocations_can_lie_apart_from_the_host() -> None:
    """So an access past the end of one cannot land in its neighbour."""
    both = np.arange(64, dtype=np.int32)
    memory, far = _ptx.Memory(), 1 << 40
    for half in range(2):
        memory.add(far * (half + 1), 128, f"half {half}", host=both.ctypes.data + 128 * half)
    reverse = """mul.wide.u32 %a0, %t, 4; add.s64 %a1, %p1, 124; sub.s64 %a1, %a1, %a0; add.s64 %a0, %a0, %p0;
    ld.global.b32 %r0, [%a0]; st.global.b32 [%a1], %r0;"""
    text = kernel(reverse, 2, registers=REGISTERS)
    parameters = [struct.pack("Q", far), struct.pack("Q", 2 * far)]
    module(text).launch("k", (1, 1, 1), (32, 1, 1), 0, parameters, memory)
    assert both.tolist() == [*range(32), *range(31, -1, -1)]
    with pytest.raises(_ptx.Fault, match="at byte 128 of half 0, which has 128"):
        module(text).launch("k", (1, 1, 1), (64, 1, 1), 0, parameters, memory)


def test_packed_registers() -> None:
    source = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    out = np.zeros(64, np.uint32)
    body = """mul.wide.u32 %a0, %t, 8; add.s64 %a1, %a0, %p0; add.s64 %a2, %a0, %p1;
    ld.global.b64 %a3, [%a1]; mov.b64 {%r0, %r1}, %a3; mov.b32 {%h0, %h1}, %r0; mov.b32 {_, %h2}, %r1;
    mov.b32 %r2, {%h1, %h0}; mov.b32 %r3, {%h2, 5}; mov.b64 %a3, {%r2, %r3}; st.global.b64 [%a2], %a3;"""
    launch(kernel(body, 2, registers=REGISTERS), [source, out])
    first, second = source[::2], source[1::2]
    assert (out[::2] == (first >> 16 | first << 16)).all()
    assert (out[1::2] == (second >> 16 | 5 << 16)).all()


def test_generic_addresses_lead_to_every_space() -> None:
    """Shared, local, constant, variables of the module, parameters: each through its own and a generic address."""
    out = np.zeros(32 * 6, np.uint32)
    variables = """.const .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 0, 0, 0};
    .global .align 4 .u32 word = 40;
    .extern .shared .align 16 .b8 dynamic[];
    .shared .align 4 .b32 fixed[32];
    """
    body = """.local .align 8 .b8 depot[16];
    mul.lo.u32 %r0, %t, 4; mov.b32 %r1, fixed; add.s32 %r1, %r1, %r0; mov.b32 %r2, dynamic; add.s32 %r2, %r2, %r0;
    st.shared.b32 [%r1], %t; cvt.u64.u32 %a0, %r1; cvta.shared.u64 %a0, %a0; ld.b32 %r3, [%a0];
    add.s32 %r4, %t, 100; st.shared.b32 [%r2], %r4; ld.shared.b32 %r4, [%r2];
    mov.u64 %a1, depot; cvta.local.u64 %a2, %a1; add.s32 %r5, %t, 200; st.b32 [%a2+8], %r5; ld.local.b32 %r5, [%a1+8];
    mov.u64 %a3, table; ld.const.b32 %r6, [%a3+4]; cvta.const.u64 %a3, %a3; ld.b32 %r7, [%a3]; add.s32 %r6, %r6, %r7;
    mul.wide.u32 %a4, %t, 24; add.s64 %a4, %a4, %p0;
    isspacep.shared %q0, %a0; isspacep.global %q1, %a0; isspacep.global %q2, %a4; isspacep.local %q3, %a2;
    selp.b32 %r7, 1, 0, %q0; @%q1 add.s32 %r7, %r7, 2; @%q2 add.s32 %r7, %r7, 4; @%q3 add.s32 %r7, %r7, 8;
    st.global.v2.b32 [%a4], {%r3, %r4}; st.global.v2.b32 [%a4+8], {%r5, %r6};
    atom.global.add.u32 %r6, [word], 1; ld.global.b32 %r6, [word]; st.global.v2.b32 [%a4+16], {%r6, %r7};"""
    text = kernel(body, 1, registers=REGISTERS).replace(HEAD, HEAD + variables)
    launch(text, [out], shared=128)
    lanes = np.arange(32)
    expected = [lanes, lanes + 100, lanes + 200, np.full(32, 3), np.full(32, 72), np.full(32, 13)]
    assert (out.reshape(32, 6) == np.stack(expected, 1)).all()


@pytest.mark.parametrize("address", ["mov.b64 %a2, s;", "mov.b32 %r0, s; cvt.u64.u32 %a2, %r0;"])
def test_parameters_are_laid_out_by_alignment(address: str) -> None:
    text = f""".visible .entry k(.param .u8 a, .param .align 16 .b8 s[24], .param .u16 b, .param .u64 p)
    {{ .reg .b16 %h<3>; .reg .b32 %r<4>; .reg .b64 %a<4>; .reg .pred %q;
      mov.u32 %r0, %tid.x; setp.ne.u32 %q, %r0, 0; @%q ret;
      ld.param.u8 %h1, [a]; ld.param.v2.u32 {{%r1, %r2}}, [s+8]; ld.param.u16 %h2, [b]; ld.param.u64 %a1, [p];
      {address} cvta.param.u64 %a2, %a2; ld.u64 %a3, [%a2+16];
      cvt.u32.u16 %r3, %h1; st.global.b32 [%a1], %r3; st.global.v2.b32 [%a1+8], {{%r1, %r2}};
      st.global.b16 [%a1+4], %h2; st.global.b64 [%a1+16], %a3; ret; }}"""
    out = np.zeros(6, np.uint32)
    memory = _ptx.Memory()
    memory.add(out.ctypes.data, out.nbytes, "out")
    loaded = module(text)
    assert [p[1:] for p in loaded.kernels["k"]["params"]] == [
        ("u8", 1, 1),
        ("b8", 24, 16),
        ("u16", 2, 2),
        ("u64", 8, 8),
    ]
    parameters = [b"\x07", struct.pack("<6I", *range(6)), struct.pack("<H", 9), struct.pack("<Q", out.ctypes.data)]
    loaded.launch("k", (1, 1, 1), (32, 1, 1), 0, parameters, memory)
    assert out.tolist() == [7, 9, 2, 3, 4, 5]


@pytest.mark.parametrize("seed", [0, 1])
def test_updates_of_global_and_shared_memory(seed: int) -> None:
    total, seen, floats = np.zeros(8, np.uint32), np.zeros(64, np.uint32), np.zeros(4, np.float32)
    total[3] = 0xFFFFFFFF
    body = """setp.eq.u32 %q0, %t, 0; mov.b32 %r0, word; @%q0 st.shared.b32 [%r0], 0; bar.sync 0;
    atom.global.gpu.acq_rel.add.u32 %r1, [%p0], 1; mul.wide.u32 %a0, %r1, 4; add.s64 %a0, %a0, %p1;
    st.global.b32 [%a0], 1;
    red.global.max.s32 [%p0+4], %t; red.global.or.b32 [%p0+8], 5; red.global.min.u32 [%p0+12], %t;
    atom.global.inc.u32 %r2, [%p0+16], 9; atom.global.exch.b32 %r2, [%p0+20], %t;
    atom.global.cas.b32 %r2, [%p0+24], 0, 77;
    atom.shared.add.u32 %r3, [%r0], 2; bar.sync 0; ld.shared.b32 %r3, [%r0]; @%q0 st.global.b32 [%p0+28], %r3;
    atom.global.add.f32 %r4, [%p2], 0f3F800000; red.global.add.noftz.bf16x2 [%p2+4], %r5;"""
    text = kernel("mov.b32 %r5, 0x3f804000;\n" + body, 3, registers=REGISTERS + ".shared .align 4 .b8 word[4];")
    launch(text, [total, seen, floats], threads=64, seed=seed)
    assert total.tolist()[:5] == [64, 63, 5, 0, 4]
    assert total[5] < 64 and total[6] == 77 and total[7] == 128
    assert seen.all(), "each thread got another old value"
    assert floats[0] == 64
    assert (floats[1:2].view(np.uint32)[0] << np.uint32(16)).view(np.float32) == 128
    assert (floats[1:2].view(np.uint32)[0] & np.uint32(0xFFFF0000)).view(np.float32) == 64


def test_sectors_and_bank_conflicts_are_counted_by_line() -> None:
    """32 lanes that read words 4 bytes apart touch 4 sectors, 128 bytes apart 32; 64 bytes apart in shared memory
    they need 16 rounds."""
    source, out = np.arange(1024, dtype=np.int32), np.zeros(64, np.int32)
    body = """mov.b32 %r0, memory; mad.lo.s32 %r0, %t, 64, %r0;
    mul.wide.u32 %a0, %t, 128; add.s64 %a0, %a0, %p0; mul.wide.u32 %a1, %t, 4; add.s64 %a1, %a1, %p1;
    ld.global.b32 %r1, [%a0];
    st.shared.b32 [%r0], %r1;
    ld.shared.b32 %r2, [%r0];
    st.global.b32 [%a1], %r2;"""
    text = kernel(body, 2, registers=REGISTERS + ".shared .align 16 .b8 memory[2048];")
    report = launch(text, [source, out])
    assert out[:32].tolist() == list(range(0, 1024, 32))
    lines = {text.splitlines()[line - 1].split()[0]: count for line, count in report.counters["lines"].items()}
    assert lines["ld.global.b32"]["sectors"] == 32
    assert lines["st.global.b32"]["sectors"] in (4, 5)  # 5 if NumPy's buffer starts within a sector
    assert lines["st.shared.b32"]["wavefronts"] == 16 and lines["ld.shared.b32"]["conflicts"] == 15
    read, written = (report.counters["allocations"][name] for name in "01")
    assert (read["bytes_read"], read["unique_sectors_read"], written["bytes_written"]) == (128, 32, 128)


@pytest.mark.parametrize(
    ("value", "race"),
    [("7", False), ("%l", True), ("%undefined", False), ("selp.b32", True)],
    ids=["equal", "different", "undefined in all", "undefined in one"],
)
def test_writes_of_one_place_that_nothing_orders(value: str, race: bool) -> None:
    """Compilers let all threads that hold the same value store it, also one that is undefined."""
    chosen = f"mov.b32 %v, {value};"
    if value == "selp.b32":
        chosen = "setp.lt.u32 %q, %t, 32;\nmov.b32 %v, 0;\n@%q mov.b32 %v, %undefined;"
    registers = ".reg .b32 %v, %undefined;\n.reg .pred %q;\n.shared .align 4 .b8 place[4];"
    text = kernel(f"{chosen}\nst.shared.b32 [place], %v;", 0, registers=registers)
    if not race:
        launch(text, [], threads=64)
        return
    with pytest.raises(_ptx.Fault, match=r"and no bar.* orders the two"):
        launch(text, [], threads=64)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("v2.f32", np.float32), ("v4.f32", np.float32), ("noftz.v8.f16", np.float16), ("noftz.v4.f16x2", np.float16)],
)
def test_vectors_are_updated(kind: str, dtype: Any) -> None:
    """Each thread adds a vector to one of four, twice, and keeps what was there the second time."""
    elements = int(kind.partition("v")[2][0])
    bits, name = ("b16", "%h") if kind.endswith("f16") else ("b32", "%r")
    count = elements * (2 if kind.endswith("x2") else 1)
    size = count * np.dtype(dtype).itemsize
    added = np.random.default_rng(0).integers(1, 8, (64, count)).astype(dtype)
    total, before = np.ones((5, count), dtype), np.zeros((64, count), dtype)
    vector = "{" + ", ".join(f"{name}{i}" for i in range(elements)) + "}"
    places = [(f"+{i * size // elements}]", f"{name}{i}") for i in range(elements)]
    load = " ".join(f"ld.global.{bits} {one}, [%a1{place};" for place, one in places)
    store = " ".join(f"st.global.{bits} [%a3{place}, {one};" for place, one in places)
    body = f"""mul.wide.u32 %a0, %t, {size}; add.s64 %a1, %a0, %p0; add.s64 %a3, %a0, %p2; and.b32 %n0, %t, 3;
    mul.wide.u32 %a2, %n0, {size}; add.s64 %a2, %a2, %p1; {load}
    red.relaxed.gpu.global.add.{kind} [%a2], {vector}; atom.global.add.{kind} {vector}, [%a2], {vector}; {store}"""
    text = kernel(body, 3, registers=REGISTERS)
    launch(text, [added, total, before], threads=64)
    assert (total[:4] == 1 + 2 * added.reshape(16, 4, count).sum(0)).all()
    assert (before > added).all()
    with pytest.raises(_ptx.Fault, match="which is not aligned"):
        launch(text.replace("[%a2], {", "[%a2+4], {"), [added, total, before], threads=64)


def test_vectors_that_no_gpu_updates() -> None:
    for opcode in ("red.global.add.v2.u32", "red.shared.add.v2.f32", "red.global.min.v2.f32", "red.global.add.v8.f32"):
        assert not _ptx.understands(opcode)
