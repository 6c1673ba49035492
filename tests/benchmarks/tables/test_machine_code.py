"""The static budgets read what the compiler made of two toy kernels, and the table notices what got worse."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_fast.benchmarks.tables import sass
from resnet_fast.benchmarks.tables.machine_code import (
    CompileJob,
    KernelBudget,
    compare,
    compile_many,
    occupancy,
    read_table,
    write_table,
)
from resnet_fast.simulation.listing import parse
from tests.support import ROOT
from tests.support.processes import run_python

TOY = "tests.support.toy_kernels"
POINTERS = {"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp16", "M": "i32", "N": "i32", "K": "i32"}
EVEN = {"M": 16, "N": 16, "K": 16}
DESCRIPTORS = {
    "a_desc": "tensordesc<fp16[128, 64]>", "b_desc": "tensordesc<fp16[64, 128]>",
    "c_desc": "tensordesc<fp16[128, 128]>", "K": "i32",
}  # fmt: skip
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
COPY = CompileJob(
    f"{TOY}:copy_kernel",
    {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"},
    {"BLOCK": 512},
    90,
    attrs={"n": 16},
)
TENSOR = {80: "HMMA.16816.F32", 90: "HGMMA.64x128x16.F32", 100: "UTCHMMA"}


def _jobs() -> list[CompileJob]:
    jobs = [
        CompileJob(f"{TOY}:matmul_kernel", POINTERS, BLOCKS, arch, warps, attrs=EVEN, config=f"w{warps}")
        for arch in (80, 90, 100)
        for warps in (4, 8)
    ]
    jobs += [CompileJob(f"{TOY}:descriptor_matmul_kernel", DESCRIPTORS, BLOCKS, a, config="w4") for a in (80, 90, 100)]
    jobs.append(CompileJob(f"{TOY}:matmul_kernel", POINTERS, BLOCKS, 90, config="unknown sizes"))
    floats = {k: v.replace("16", "32") for k, v in POINTERS.items()}
    jobs += [CompileJob(f"{TOY}:matmul_kernel", floats, BLOCKS, a, attrs=EVEN, config="tf32") for a in (90, 100)]
    return [*jobs, COPY]


@pytest.fixture(scope="module")
def budgets() -> dict[tuple[str, str, int], KernelBudget]:
    return {(b.kernel.partition(":")[2], b.config, b.arch): b for b in compile_many(_jobs())}


@pytest.fixture(scope="module")
def hopper(budgets: dict[tuple[str, str, int], KernelBudget]) -> KernelBudget:
    return budgets["matmul_kernel", "w4", 90]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("warps", [4, 8])
def test_pointer_matmul(budgets: dict[tuple[str, str, int], KernelBudget], arch: int, warps: int) -> None:
    b = budgets["matmul_kernel", f"w{warps}", arch]
    assert b.num_warps == warps and 64 < b.registers <= 255 and b.local_bytes == b.local_accesses == 0
    assert list(b.tensor) == [TENSOR[arch]] and 1 << 15 <= b.shared <= 3 << 15 | 1024
    (loop,) = b.loops
    assert loop.accesses == {"LDGSTS.16": 16 * 4 // warps}  # (128 + 128) x 64 fp16 in 16-byte pieces
    assert b.accesses["STG.16"] == 16 * 4 // warps and not any(sass.is_narrow(a) for a in b.accesses)
    assert loop.tensor_cycles == 128 * 128 * 64 / {80: 1024, 90: 2048, 100: 4096}[arch]
    assert loop.issue_slots == loop.instructions * warps / 4 and 100 < loop.instructions < 500
    assert b.blocks_per_sm >= 1 and b.warps_per_sm == b.blocks_per_sm * warps


@pytest.mark.parametrize("arch", [90, 100])
def test_descriptor_matmul_uses_the_copy_engine(budgets: dict[tuple[str, str, int], KernelBudget], arch: int) -> None:
    b = budgets["descriptor_matmul_kernel", "w4", arch]
    assert list(b.tensor) == [TENSOR[arch]] and b.loops[0].accesses == {"UTMALDG": 2}
    assert b.accesses["UTMASTG"] == 1 and b.loops[0].issue_slots < 150


def test_descriptors_are_scattered_loads_before_hopper(budgets: dict[tuple[str, str, int], KernelBudget]) -> None:
    """Their strides are arguments of unknown divisibility: the compiler proves no two elements neighbours."""
    assert budgets["descriptor_matmul_kernel", "w4", 80].loops[0].accesses == {"LDG.2": 128}


def test_unknown_divisibility_narrows_accesses(budgets: dict[tuple[str, str, int], KernelBudget]) -> None:
    b = budgets["matmul_kernel", "unknown sizes", 90]
    assert set(b.loops[0].accesses) == {"LDG.2"} and b.loops[0].pressure > 1


@pytest.mark.parametrize("arch", [90, 100])
def test_tf32_takes_the_tensor_cores_twice_as_long(
    budgets: dict[tuple[str, str, int], KernelBudget], arch: int
) -> None:
    b = budgets["matmul_kernel", "tf32", arch]
    assert b.loops[0].tensor_cycles == 2 * 128 * 128 * 64 / {90: 2048, 100: 4096}[arch]


def test_kernel_without_a_loop(budgets: dict[tuple[str, str, int], KernelBudget]) -> None:
    b = budgets["copy_kernel", "", 90]
    assert b.loops == () and b.tensor == {} and b.blocks_per_sm == 16 and b.accesses == {"LDG.16": 1, "STG.16": 1}
    assert b.row()[6:] == ("none", "LDG 16 B × 1, STG 16 B × 1", "no loop", "no loop")


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "columns", "blocks"),
    [
        (90, 4, 32, 0, 0, 16),  # by warps
        (90, 1, 32, 0, 0, 32),  # by blocks
        (90, 8, 168, 0, 0, 1),  # 65,536 / (168 x 256) = 1.5
        (90, 4, 168, 0, 0, 3),
        (90, 4, 97, 0, 0, 4),  # rounded to 104 registers: 19 warps fit, given out in fours: 16
        (90, 4, 64, 98304, 0, 2),
        (90, 4, 64, 116224, 0, 1),  # twice that and 2 KB more is over 228 KB
        (80, 4, 64, 98304, 0, 1),
        (80, 4, 64, 170000, 0, 0),  # over 163 KB: cannot be launched
        (100, 4, 64, 8192, 256, 2),  # by tensor memory
    ],
)
def test_occupancy(arch: int, warps: int, registers: int, shared: int, columns: int, blocks: int) -> None:
    assert occupancy(arch, warps, registers, shared, columns) == blocks


def test_main_loop_is_a_natural_loop_with_its_retries() -> None:
    lines = [
        "MOV R1, 1", "IADD3 R1, R1, R2, RZ", "HMMA.16816.F32 R4, R8, R12, R4", "@!P6 BRA 0x0070", "LDG.E.64 R2, [R4]",
        "@P0 BRA 0x0010", "EXIT", "SYNCS.TRYWAIT P6, [UR4], R3", "@!P6 BRA 0x0070", "BRA 0x0040", "BRA 0x00a0",
    ]  # fmt: skip
    text = "\n".join(f"        /*{16 * n:04x}*/   {line} ;  /* 0x0 */" for n, line in enumerate(lines))
    code = parse("\t\tFunction : other\n\t\tFunction : k\n" + text, "k")
    (loop,) = sass.main_loops(code)
    assert [i.address >> 4 for i in loop] == [1, 2, 3, 4, 5, 7, 8, 9]
    assert sass.accesses(loop) == {"LDG.8": 1} and sass.tensor_work(code, loop, 4) == (16 * 8 * 16 * 4, 8192.0)


def test_table_keeps_its_rows(tmp_path: Path, budgets: dict[tuple[str, str, int], KernelBudget]) -> None:
    write_table(tmp_path / "t.json", tmp_path / "t.md", list(budgets.values()), "Toys")
    table = read_table(tmp_path / "t.json")
    assert list(table.values()) == sorted(budgets.values(), key=lambda b: b.key)
    page = (tmp_path / "t.md").read_text()
    assert (
        page.startswith("# Toys\n") and "| matmul_kernel | w4 | sm_90 |" in page and "HGMMA.64x128x16.F32 × 8" in page
    )
    worse = {b.key for b in budgets.values() if compare(b, table[b.key])}
    assert worse == {b.key for b in budgets.values() if b.local_bytes}  # equal to the table, but spills are never right
    with pytest.raises(ValueError, match="two rows"):
        write_table(tmp_path / "t.json", tmp_path / "t.md", [*budgets.values()] * 2, "Toys")


def test_compare_names_what_got_worse(hopper: KernelBudget) -> None:
    loop = hopper.loops[0]
    assert compare(replace(hopper, registers=hopper.registers - 8), hopper) == []
    (text,) = compare(replace(hopper, registers=hopper.registers + 8), hopper)
    assert text == f"{hopper.registers + 8} registers, the table has {hopper.registers}"
    worse = replace(
        hopper, shared=hopper.shared + 4, blocks_per_sm=1, loops=(replace(loop, issue_slots=loop.issue_slots + 1),)
    )
    texts = compare(worse, hopper)
    for text, start in zip(
        texts, (f"{hopper.shared + 4:,} bytes of shared", "1 blocks per multi", "main loop 0: "), strict=True
    ):
        assert text.startswith(start) and "the table has" in text
    assert compare(replace(hopper, loops=()), hopper) == ["0 main loops, the table has 1"]


def test_compare_across_compilers_keeps_the_hard_rules(hopper: KernelBudget) -> None:
    other = replace(hopper, compiler="Triton 9.9.9", registers=255, blocks_per_sm=1)
    assert compare(other, hopper) == []
    spilled = replace(other, local_bytes=8, local_accesses=2)
    assert compare(spilled, hopper) == ["8 bytes of local memory and 2 accesses to it, must be none"]
    slow = replace(other, tensor={"HMMA.16816.F32": 64}, shared=240_000)
    assert compare(slow, hopper) == [
        "240,000 bytes of shared memory, sm_90 has 232,448 per block",
        "no HGMMA any more, but HMMA in its place",
    ]
    narrow = replace(other, loops=(replace(hopper.loops[0], accesses={"LDG.2": 128}),))
    assert compare(narrow, hopper) == ["128 global accesses under 16 bytes in the main loops, the table has none"]


def test_errors_name_the_job() -> None:
    with pytest.raises(RuntimeError, match=rf"{TOY}:copy_kernel c1 for sm_90: .*without a type or value: \['n'\]"):
        compile_many(
            [
                CompileJob(
                    f"{TOY}:copy_kernel",
                    {"x_ptr": "*fp32", "y_ptr": "*fp32"},
                    {"BLOCK": 32},
                    90,
                    config="c1",
                )
            ]
        )


def test_a_process_that_interprets_can_still_compile() -> None:
    code = """
from resnet_fast.benchmarks.tables import machine_code
from tests.benchmarks.tables.test_machine_code import COPY as job
from tests.support import toy_kernels
if __name__ == "__main__":
    print(machine_code.compile_many([job])[0].accesses)
    machine_code.compile_kernel(toy_kernels.copy_kernel, job.signature, job.constexprs, 90)
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = run_python(code, cwd=ROOT, env=env)
    assert done.stdout == "{'LDG.16': 1, 'STG.16': 1}\n", done.stderr
    assert "is TRITON_INTERPRET set?" in done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="captures launches of compiled kernels")
def test_captured_launch_is_the_job_that_triton_would_compile() -> None:
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    from resnet_fast.benchmarks.tables.capture import capture
    from tests.support import toy_kernels

    a, b = torch.empty(256, 128, dtype=torch.float16, device="meta"), torch.empty(128, 1, device="meta").half()
    with capture() as launches:
        toy_kernels.matmul_kernel[(2, 1)](a, b, a, 256, 1, 100, **BLOCKS, num_warps=8, num_stages=2)
        descriptors = [TensorDescriptor.from_tensor(a, s) for s in ([128, 64], [64, 128], [128, 128])]
        toy_kernels.descriptor_matmul_kernel[(2, 1)](*descriptors, 128, **BLOCKS)
    pointers, described = (launch.job(90, config="c") for launch in launches)
    assert pointers.kernel == f"{TOY}:matmul_kernel" and (
        pointers.num_warps,
        pointers.num_stages,
    ) == (8, 2)
    assert pointers.signature == {k: v for k, v in POINTERS.items() if k != "N"}
    assert pointers.constexprs == {"N": 1, **BLOCKS}
    assert {k: v for k, v in pointers.attrs.items() if v} == {"a_ptr": 16, "b_ptr": 16, "c_ptr": 16, "M": 16}
    assert described.signature == DESCRIPTORS and described.attrs == {"K": 16} and described.options == {}
    assert compile_many([described])[0].loops[0].accesses == {"UTMALDG": 2}
