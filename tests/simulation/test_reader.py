"""Machine code is read as the disassembler prints it: control words, operands, registers, what a kernel needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resnet_fast import native
from resnet_fast.errors import UserError
from resnet_fast.simulation import read_kernel
from resnet_fast.simulation.instruction import Control, Instruction
from resnet_fast.simulation.listing import cuobjdump, parse
from resnet_fast.simulation.operands import Registers
from resnet_fast.tools.ptx_machine import ptx_machine
from tests.support.toy_kernels import matmul_kernel

LISTING = """
		Function : other
        /*0000*/                   EXIT ;                          /* 0x000000000000794d */
                                                                   /* 0x000fea0003800000 */
		Function : k
        /*0000*/              @!P2 LDG.E.128 R4, desc[UR4][R2.64+-0x10] ;   /* 0xfffff00402042981 */
                                                                   /* 0x002ea8000c1e1d00 */
        /*0010*/                   IADD3 R4, P1, R4.reuse, c[0x0][0x210], RZ ; /* 0x0000840004047a10 */
                                                                   /* 0x044fca0007f3e0ff */
        /*0020*/                   BRA 0x20 ;                      /* 0xfffffff000007947 */
                                                                   /* 0x000fc0000383ffff */
        /*0030*/                   NOP ;                           /* 0x0000000000007918 */
                                                                   /* 0x000fc00000000000 */
"""


def test_a_listing_has_code_and_control_words() -> None:
    load, add = parse(LISTING, "k")  # without the padding
    assert (load.predicate, load.opcode, load.address) == ("!P2", "LDG.E.128", 0)
    assert load.control == Control(stall=4, yields=False, write_barrier=2, read_barrier=None, wait=2, reuse=0)
    assert add.control == Control(stall=5, yields=True, write_barrier=None, read_barrier=None, wait=4, reuse=1)
    place = load.parsed[1]
    assert (place.kind, place.base, place.wide, place.number, place.descriptor) == ("memory", 2, True, -16, 4)
    assert [(one.kind, one.number) for one in add.parsed] == [
        ("R", 4),
        ("P", 1),
        ("R", 4),
        ("constant", 528),
        ("R", 255),
    ]
    assert add.parsed[2].reused


@pytest.mark.parametrize(
    ("opcode", "operands", "writes", "reads"),
    [
        ("LDG.E.128", "R4, desc[UR4][R2.64]", "R4-7", "R2-3 UR4-5"),
        ("STS.64", "[R3+UR6+0x10], R8", "", "R3 UR6 R8-9"),
        ("IMAD.WIDE", "R4, R2, c[0x0][0x160], R6", "R4-5", "R2 R6-7"),
        ("IMAD.WIDE", "R4, R2, R3, c[0x0][0x160]", "R4-5", "R2 R3"),
        ("IADD3.X", "R5, P1, R5, R7, RZ, P0, !PT", "R5 P1", "R5 R7 P0"),
        ("LOP3.LUT", "P0, RZ, R0, 0x3, RZ, 0xc0, !PT", "P0", "R0"),
        ("ISETP.GE.AND", "P0, PT, R2, UR4, !P3", "P0", "R2 UR4 P3"),
        ("HMMA.16816.F32", "R8, R4, R16, RZ", "R8-11", "R4-7 R16-17"),
        ("HMMA.1688.F32.TF32", "R8, R4, R16, R8", "R8-11", "R4-7 R16-17 R8-11"),
        ("HGMMA.64x128x16.F32", "R24, gdesc[UR4], R24, gsb0", "R24-87", "UR4-7 R24-87"),
        ("HGMMA.64x64x16.F32.BF16", "R24, R88, gdesc[UR4].tnspB, RZ, !UPT", "R24-55", "R88-91 UR4-5"),
        ("LDSM.16.MT88.4", "R8, [R1+0x20]", "R8-11", "R1"),
        ("UTMALDG.2D", "[UR8], [UR16]", "", "UR8-11 UR16-17"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "P1, [UR10+0x20000], R3", "P1", "UR10 R3"),
        ("F2F.F64.F32", "R2, R4", "R2-3", "R4"),
        ("VOTEU.ANY", "UR4, UPT, P0", "UR4", "P0"),
        ("P2R", "R3, PR, RZ, 0x1", "R3", "P0-6"),
        ("CS2R", "R2, SRZ", "R2-3", ""),
        ("RET.REL.NODEC", "R2 0x0", "", "R2"),
    ],
)
def test_registers_of_an_instruction(opcode: str, operands: str, writes: str, reads: str) -> None:
    one = Instruction(0, "", opcode, operands)

    def text(all_: tuple[Registers, ...]) -> str:
        return " ".join(f"{r.file}{r.first}" + (f"-{r.first + r.count - 1}" if r.count > 1 else "") for r in all_)

    assert (text(one.writes), text(one.reads)) == (writes, reads)


@pytest.mark.parametrize(
    ("opcode", "operands", "what"),
    [
        ("FROB.U32", "R1, R2", "opcode whose operands are understood.*FROB.U32 R1, R2"),
        ("HMMA.4444.F32", "R0, R4, R8, R0", "shapes 16816.*HMMA.4444"),
        ("IADD3", "R1, {R2}, R3, RZ", "known form.*{R2}"),
    ],
)
def test_what_is_not_understood_is_an_error(opcode: str, operands: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        _ = Instruction(0, "", opcode, operands).reads


@pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)
@pytest.mark.parametrize("arch", [80, 90])
def test_a_kernel_of_a_cubin(arch: int) -> None:
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.empty(64, 64, dtype=torch.half)
    with ptx_machine(arch) as machine:
        matmul_kernel[(1, 1)](a, b, c, 64, 64, 64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
    (launch,) = machine.launches
    kernel = read_kernel(launch.binary)
    assert (kernel.name, kernel.arch) == ("matmul_kernel", arch)
    assert kernel.parameter_base == {80: 0x160, 90: 0x210}[arch]
    assert [size for _, size in kernel.parameters] == [len(p) for p in launch.parameters]
    assert any(one.name == {80: "HMMA", 90: "HGMMA"}[arch] for one in kernel.code) and kernel.code[-1].words != (0, 0)
    assert all(0 <= r.first + r.count <= kernel.registers for one in kernel.code for r in one.writes if r.file == "R")
    with pytest.raises(UserError, match=r"one of the kernels matmul_kernel.*other"):
        read_kernel(launch.binary, "other")
    with pytest.raises(UserError, match="an ELF file"):
        read_kernel(launch.binary[4:])


@pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)
def test_requirements_are_those_that_the_toolkit_prints(tmp_path: Path) -> None:
    a = torch.randn(64, 64).half()
    with ptx_machine(90) as machine:
        matmul_kernel[(1, 1)](a, a, torch.empty(64, 64).half(), 64, 64, 64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
    path = tmp_path / "k.cubin"
    path.write_bytes(machine.launches[0].binary)
    printed = dict(re.findall(r"(REG|SHARED):(\d+)", cuobjdump("--dump-resource-usage", path)))
    kernel = read_kernel(path.read_bytes())
    assert (kernel.registers, kernel.shared) == (int(printed["REG"]), int(printed["SHARED"]))
