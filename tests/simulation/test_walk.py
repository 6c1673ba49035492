"""Walks of machine code count what the PTX machine counts of the same launches, and refuse what they cannot know."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from resnet_fast import native
from resnet_fast.benchmarks import compiled_cuda
from resnet_fast.benchmarks.tables import ptx_mutants
from resnet_fast.errors import UserError
from resnet_fast.simulation import Launch, MemoryRange, walk
from resnet_fast.simulation.instruction import Instruction
from resnet_fast.simulation.kernel import Kernel
from resnet_fast.tools.ptx_machine.observed import observed
from tests.support.toy_kernels import copy_kernel, descriptor_matmul_kernel, matmul_kernel, sum_kernel
from tests.support.walks import (
    LOADS,
    Accesses,
    Assemble,
    Pair,
    distinct_sectors,
    executed,
    pairs,
    products,
    ptx_accesses,
    ptx_distinct_sectors,
    walked_accesses,
)

pytestmark = [
    pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason),
    pytest.mark.skipif(not native.sass_status(), reason=native.sass_status().reason),
]


QUICK = ("inference: 1x1, bf16", "inference: bottleneck, fp16")
NONE = Accesses(0, 0, 0)


def toys(machine: Any) -> None:
    x, y, total = torch.randn(1500), torch.empty(1500), torch.zeros(1)
    a, b, c = torch.randn(200, 136).half(), torch.randn(136, 160).half(), torch.empty(200, 160).half()
    copy_kernel[(2,)](x, y, 1500, BLOCK=1024)
    sum_kernel[(5,)](x, total, BLOCK=256)
    matmul_kernel[(4, 3)](a, b, c, 200, 160, 136, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)


def descriptors(machine: Any) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    a, b, c = torch.randn(256, 192).half(), torch.randn(192, 128).half(), torch.empty(256, 128).half()
    maps = [TensorDescriptor.from_tensor(t, box) for t, box in ((a, [128, 64]), (b, [64, 128]), (c, [128, 128]))]
    descriptor_matmul_kernel[(2, 1)](*maps, 192, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64)


def case(name: str) -> Callable[[Any], None]:
    def run(machine: Any) -> None:
        torch.manual_seed(1)
        one = ptx_mutants.CASES[name]
        if one.cuda:
            with compiled_cuda.launched(machine, sms=2):
                one.run(one.sizes[0])
        else:
            one.run(one.sizes[0])

    return run


def assert_counts_agree(pair: Pair) -> None:
    """Everything that changes memory is executed as often, on the same sectors and banks. An assembler leaves out loads
    whose value a register has already, joins loads of shared memory, and changes nothing else."""
    title = str(pair.launch)
    ptx, walked = ptx_accesses(pair), walked_accesses(pair)
    boxes = walked.pop("box", NONE)
    events = pair.launch.report.counters["events"]
    assert boxes.instructions == events.get("bulk_copies", 0) + events.get("bulk_stores", 0), title
    for kind in {*ptx, *walked} - set(LOADS):
        assert walked.get(kind) == ptx.get(kind), (title, kind)
    for kind in LOADS:
        if kind in ptx or kind in walked:
            assert walked[kind].instructions <= ptx[kind].instructions, (title, kind)
            assert walked[kind].sectors <= ptx[kind].sectors and walked[kind].wavefronts <= ptx[kind].wavefronts, title
    for way, names in (("written", ("STG", "RED", "ATOMG", "UTMASTG")), ("read", ("LDG", "LDGSTS", "UTMALDG"))):
        mine, machine = distinct_sectors(pair, names), ptx_distinct_sectors(pair, way)
        assert mine.keys() == machine.keys() and all(machine[name] <= mine[name] for name in machine), (title, way)
    in_ptx, in_code = products(pair)
    assert in_code == in_ptx, title
    barriers = sum(n for k, n in pair.launch.report.counters["opcodes"].items() if k.startswith("bar.sync"))
    assert sum(n for k, n in executed(pair.walk).items() if k.startswith("BAR")) == barriers, title


@pytest.mark.parametrize("arch", [80, 90])
def test_toys(arch: int) -> None:
    found = pairs(arch, toys)
    assert [len(p.walk.blocks) for p in found] == [2, 5, 12]
    for pair in found:
        assert_counts_agree(pair)
    matmul = found[-1].walk
    assert len(matmul.paths) < sum(len(b.warps) for b in matmul.blocks), "equal paths are shared"


def test_copies_by_descriptor_and_their_mbarriers() -> None:
    (pair,) = pairs(90, descriptors)
    assert_counts_agree(pair)
    boxes = walked_accesses(pair)["box"]
    assert boxes.instructions > 0 and boxes.sectors * 32 >= 2 * (256 * 192 + 192 * 128 + 256 * 128)
    code = pair.walk.launch.kernel.code
    waits = set()
    for warp in pair.walk.blocks[0].warps:
        path = pair.walk.paths[warp.path]
        waits |= {
            (int(e["address"]), int(e["value"]))
            for e in warp.events
            if "PHASECHK" in code[path["instruction"][e["step"]]].opcode
        }
    assert {parity for _, parity in waits} <= {0, 1} and waits


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", QUICK)
def test_inference(arch: int, name: str) -> None:
    for pair in pairs(arch, case(name)):
        assert_counts_agree(pair)


REFUSED = {
    ("step: bottleneck, bf16", 90),
    ("step: strided block, fp16", 80),
    ("step: strided block, fp16", 90),
}
"""Steps of which ``_conv_fwd_kernel`` has a branch whose predicate the walk does not know: it says so, and stops."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", [n for n, c in ptx_mutants.CASES.items() if not (c.cuda or n in QUICK)])
def test_compiled_triton_kernels(arch: int, name: str, request: pytest.FixtureRequest) -> None:
    if (name, arch) in REFUSED:
        request.applymarker(pytest.mark.xfail(raises=UserError, strict=True, reason="refused: a branch is not known"))
    for pair in pairs(arch, case(name)):
        assert_counts_agree(pair)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("name", "arch"), [(n, a) for n, c in ptx_mutants.CASES.items() if c.cuda for a in c.archs])
def test_compiled_cuda_kernels(name: str, arch: int) -> None:
    if not native.status():
        pytest.skip("needs the native library")
    assemble: Assemble = compiled_cuda.assembled
    found = pairs(arch, case(name), assemble)
    assert found
    for pair in found:
        assert_counts_agree(pair)


def test_launches_that_are_only_observed() -> None:
    executed_ones = pairs(90, toys)
    with observed(90) as seen:
        toys(seen.machine)
    assert len(seen.launches) == len(executed_ones)
    for launch, pair in zip(seen.launches, executed_ones, strict=True):
        assert (launch.grid, launch.threads, launch.shared) == tuple(pair.recorded.given[:3])
        assert all(m.content is None for m in launch.memory)
        assert walk(launch).opcodes == pair.walk.opcodes


def test_only_sectors() -> None:
    pair = pairs(90, toys)[-1]
    brief = walk(pair.walk.launch, [3, 1], only_global=True)
    assert [b.index for b in brief.blocks] == [3, 1] and brief.paths == () and brief.sectors.size == 0
    whole = walk(pair.walk.launch, [3, 1])
    code = whole.launch.kernel.code
    for short, long in zip(brief.blocks, whole.blocks, strict=True):
        events = [
            (code[p].name, e)
            for w in long.warps
            for p, e in zip(whole.paths[w.path]["instruction"][w.events["step"]], w.events, strict=True)
        ]
        for names, found in ((("LDG", "LDGSTS"), short.reads), (("STG",), short.writes)):
            parts = [whole.sectors[e["first"] : e["first"] + e["sectors"]] for n, e in events if n in names]
            assert np.array_equal(np.unique(np.concatenate(parts)), found)


# ------------------------------------------------------------------------------------------------------------- errors


def code(*lines: str) -> Kernel:
    """Return a kernel of these instructions, with a pointer and a number as parameters."""
    out = []
    for n, line in enumerate((*lines, "EXIT")):
        guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        out.append(Instruction(16 * n, guard.lstrip("@"), opcode, operands, (1 << 32, 0)))
    return Kernel("k", 90, tuple(out), 32, 2048, 1, 0x210, ((0, 8), (8, 4)))


def run(*lines: str, content: bytes | None = bytes(range(128)), number: int = 7) -> Any:
    address = 1 << 20
    parameters = (address.to_bytes(8, "little"), number.to_bytes(4, "little"))
    launch = Launch(
        code(*lines), (1, 1, 1), (32, 1, 1), 0, parameters, (MemoryRange(address, 128, "x", content),)
    )  # fmt: skip
    return walk(launch, limit=10_000)


LOAD = ("LDC.64 R2, c[0x0][0x210]", "LDG.E R4, desc[UR4][R2.64]")


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (("@P0 BRA 0x0",), r"@P0 BRA 0x0 at 0x0 branches on a value that is not known.*executed 0 times"),
        (("LDS R1, [R2]",), "LDS .* has an address that is not known"),
        (("@P1 STS [RZ], RZ",), "has a guard that is not known"),
        ((*LOAD, "LDG.E R5, desc[UR4][R2.64+0x80]"), "outside of every tensor.*byte 128 of x, which has 128"),
        (("STS [RZ+0x10000], RZ",), "byte 65536 of shared memory, of which the block has 2048"),
        (("BRA 0x0",), "after 10000 instructions"),
        (("UBLKCP.S.G [UR4], [UR6], UR8",), "UBLKCP.S.G .* is not followed"),
        (("STS.FROB [RZ], RZ",), "STS.FROB .* is not followed"),
        (("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [RZ], RZ",), "an mbarrier that nobody has initialised"),
        (("BPT.TRAP 0x1",), "is a trap"),
    ],
)
def test_what_cannot_be_followed_is_an_error(lines: tuple[str, ...], what: str) -> None:
    with pytest.raises(UserError, match=what):
        run(*lines)


def test_a_wait_that_nothing_ends_is_an_error() -> None:
    begin = ("UMOV UR4, 0x1ffffe", "SYNCS.EXCH.64 URZ, [URZ+0x400], UR4")
    with pytest.raises(UserError, match="waits for ever"):
        run(*begin, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [URZ+0x400], RZ")


def test_parameters_of_other_sizes_are_an_error() -> None:
    with pytest.raises(UserError, match=r"parameters of \[8, 4\] bytes.*\[8\]"):
        walk(Launch(code(), (1, 1, 1), (32, 1, 1), 0, (bytes(8),), ()))
    with pytest.raises(UserError, match="blocks from 0 to 0"):
        walk(Launch(code(), (1, 1, 1), (32, 1, 1), 0, (bytes(8), bytes(4)), ()), [1])


def test_a_loaded_value_decides_a_branch_where_it_is_given() -> None:
    lines = (*LOAD, "ISETP.EQ.AND P0, PT, R4, 0x3020100, PT", "@P0 BRA 0x60", "NOP", "NOP")
    assert run(*lines).opcodes.get("NOP") is None
    with pytest.raises(UserError, match="branches on a value that is not known"):
        run(*lines, content=None)


# ------------------------------------------------------------------------------------------- instructions, one by one


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        # R6 is 0x80000005, R7 is 3, R8 is 0xffffffff
        (("IADD3 R4, P0, R6, R8, RZ", "IADD3.X R4, R7, RZ, RZ, P0, !PT"), 4),
        (("IADD3 R4, P0, R6, -R7, RZ", "IADD3.X R4, R7, ~R7, RZ, P0, !PT"), 0),
        (("IMAD R4, R6, R7, -R8",), 0x80000010),
        (("IMAD.WIDE R4, R8, R7, RZ", "MOV R4, R5"), 0xFFFFFFFF),
        (("IMAD.WIDE.U32 R4, R8, R7, RZ", "MOV R4, R5"), 2),
        (("MOV R5, R7", "MOV R4, RZ", "IMAD.HI.U32 R4, R8, R7, R4"), 5),
        (("LEA.HI R4, R6, R7, RZ, 0x1",), 4),
        (("LEA.HI.SX32 R4, R6, R7, 0x1f",), 0xC0000005),
        (("LOP3.LUT R4, R6, 0xff, R7, 0xf8, !PT",), 7 | 0x80000000),
        (("LOP3.LUT R4, R99, RZ, R7, 0xea, !PT",), 3),
        (
            (
                "LOP3.LUT R9, R99, 0xfffffffe, RZ, 0xc0, !PT",
                "LOP3.LUT P0, RZ, R9, 0x1, RZ, 0xc0, !PT",
                "SEL R4, R7, R8, P0",
            ),
            -1,
        ),
        (("LOP3.LUT R9, R99, 0x4, RZ, 0xfc, !PT", "MOV R10, R9", "LOP3.LUT R4, R10, 0x4, RZ, 0xc0, !PT"), 4),
        (("SHF.R.S32.HI R4, RZ, 0x1f, R6",), 0xFFFFFFFF),
        (("SHF.L.U64.HI R4, R6, 0x1, R7",), 7),
        (("SHF.R.U64 R4, R6, 0x4, R7",), 0x38000000),
        (("PRMT R4, R6, 0x5410, R7",), 0x30005),
        (("PRMT R4, R6, 0xb3, RZ",), 0x0505FF80),
        (("SGXT R4, R6, 0x3",), 0xFFFFFFFD),
        (("SGXT.U32 R4, R6, 0x3",), 5),
        (("VIADDMNMX R4, R6, 0x10, R7, !PT",), 3),
        (("IMNMX.U32 R4, R6, R7, PT",), 3),
        (("IABS R4, R8",), 1),
        (("FLO.U32 R4, R7",), 1),
        (("POPC R4, R8",), 32),
        (("ISETP.GT.AND P0, PT, R7, R6, PT", "SEL R4, R7, R8, P0"), 3),
        (("ISETP.GT.U32.AND P0, PT, R7, R6, PT", "SEL R4, R7, R8, P0"), 0xFFFFFFFF),
        (("ISETP.LT.U32.AND P0, PT, R6, R7, PT", "ISETP.LT.AND.EX P0, PT, R7, R7, PT, P0", "SEL R4, R7, R8, P0"), -1),
        (("PLOP3.LUT P0, P1, PT, !PT, PT, 0x20, 0x0", "P2R R4, PR, RZ, 0x3"), 1),
        (("R2P PR, R7, 0x7f", "P2R R4, PR, RZ, 0x7f"), 3),
        (("HFMA2.MMA R4, -RZ, RZ, 0, 5.9604644775390625e-08",), 0x1),
        (("S2R R5, SR_LANEID", "SHFL.BFLY PT, R4, R5, 0x1f, 0x1f"), 31),
        (("S2R R5, SR_TID.X", "ISETP.GE.AND P0, PT, R5, 0x1e, PT", "VOTE.ANY R4, PT, P0"), 3 << 30),
        (("S2R R5, SR_TID.X", "REDUX.MAX.S32 UR5, R5", "MOV R4, UR5"), 31),
        (("I2F.RP R4, R8",), 0xBF800000),
        (("I2F.U32.RP R4, R8",), 0x4F800000),
        (("I2F.U32.RP R4, R6", "MUFU.RCP R4, R4", "FMUL R4, R4, 2.147483648e+09", "F2I.TRUNC.NTZ R4, R4"), 0),
        (("LDC.64 R4, c[0x0][0x210]", "MOV R4, R5"), 0),
        (("MOV R9, 0x8", "LDC R4, c[0x0][R9+0x210]"), 7),
        (("LDC.64 R2, c[0x0][0x210]", "LDG.E.U16 R4, desc[UR4][R2.64+0x2]"), 0x302),
        (("STS [RZ+0x400], R7", "ATOMS.ADD R4, [RZ+0x400], R7", "LDS R4, [RZ+0x400]"), 99),
        (("STS.U8 [RZ+0x401], R8", "LDS R4, [RZ+0x400]"), None),  # three of its bytes are not known
        (("MUFU.RCP R4, R99",), None),
        (("LOP3.LUT R9, R99, 0x4, RZ, 0xfc, !PT", "LOP3.LUT R4, R9, 0xc, RZ, 0xc0, !PT"), None),
        (("F2FP.BF16.PACK_AB R4, R7, R8",), None),
        (("IMAD.FROB R4, R7, R8, RZ",), None),
    ],
)
def test_one_instruction(lines: tuple[str, ...], value: int | None) -> None:
    start = ("MOV R6, 0x80000005", "MOV R7, 0x3", "MOV R8, 0xffffffff", *lines)
    if value is None:
        with pytest.raises(UserError, match="branches on a value that is not known"):
            run(*start, "ISETP.EQ.AND P0, PT, R4, 0x5, PT", "@P0 BRA 0x0")
        return
    test = f"ISETP.EQ.AND P6, PT, R4, {value & 0xFFFFFFFF:#x}, PT"
    # the first lane decides for those that see all lanes
    equal = run(*start, "S2R R10, SR_LANEID", "ISETP.NE.AND P5, PT, R10, RZ, PT", "@P5 EXIT", test, "@!P6 BPT.TRAP 0x1")
    assert equal.instructions == len(start) + 6
