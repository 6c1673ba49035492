"""Launches reach the PTX machine as they reach a GPU: parameters, memory, both ways of submission, and refusals."""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fast import stand_in
from resnet_fast.backends.triton import submission
from resnet_fast.backends.triton.launch import submit
from resnet_fast.dispatch import catalog
from resnet_fast.errors import UserError
from resnet_fast.tools.ptx_machine import PtxFault, PtxLaunch, PtxMachine, ptx_machine
from resnet_fast.tools.ptx_machine import arguments as packing
from tests.support import recording_engine
from tests.support.toy_kernels import copy_kernel, descriptor_matmul_kernel, scale_kernel

EMPTY = bytes(8)


def recorder(arch: int = 90, **options: Any) -> PtxMachine:
    """Return a machine that records launches and executes nothing."""
    machine = ptx_machine(arch, **options)
    machine.engine = recording_engine
    return machine


def address(launch: PtxLaunch, t: Tensor) -> bytes:
    return struct.pack("<Q", launch.report.memory.device(t.data_ptr()))


def number(n: int) -> bytes:
    return struct.pack("<i", n)


@pytest.mark.parametrize("arch", [80, 90])
def test_parameters_are_the_arguments_that_were_not_compiled_in(arch: int) -> None:
    x, y = torch.zeros(100), torch.empty(100)
    with recorder(arch) as machine:
        copy_kernel[(2, 3)](x, y, 100, BLOCK=64)
        copy_kernel[(2,)](x, y, 1, BLOCK=64, num_warps=2)
        copy_kernel[(2,)](x, y, 100, BLOCK=64)
    many, one, again = machine.launches
    assert many.parameters == (address(many, x), address(many, y), number(100), EMPTY, EMPTY) == again.parameters
    assert one.parameters == (address(one, x), address(one, y), EMPTY, EMPTY), "1 is compiled in"
    assert (many.grid, many.threads, one.grid, one.threads) == ((2, 3, 1), 128, (2, 1, 1), 64)
    assert str(many) == "copy_kernel[2, 3, 1] of 128 threads (x_ptr=float32(100,), y_ptr=float32(100,), n=100)"
    assert [x.data_ptr(), y.data_ptr()] == many.report.memory.hosts


def test_pointers_are_specialised_by_sixteen() -> None:
    texts: list[str] = []

    def keep(name: str, text: str) -> str:
        texts.append(text)
        return text

    x, y = torch.zeros(1024), torch.empty(1024)
    with recorder(rewrite=keep) as machine:
        copy_kernel[(1,)](x, y, 512, BLOCK=512)
        copy_kernel[(1,)](x[1:], y, 512, BLOCK=512)
    assert ["ld.global.v4.b32" in text for text in texts] == [True, False]
    launch = machine.launches[1]
    start, nbytes, *_ = launch.report.memory.added[0]
    assert launch.parameters[0] == struct.pack("<Q", start + 4) and start % 512 == 0
    assert (launch.report.memory.hosts[0], nbytes) == (x.data_ptr(), 4096), "the whole storage"


@pytest.mark.parametrize("arch", [80, 90])
def test_descriptors_are_maps_where_the_kernel_reads_maps(arch: int) -> None:
    a, b, c = (torch.zeros(shape, dtype=torch.float16) for shape in ((48, 32), (32, 40), (48, 40)))
    sizes = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    boxes = [[32, 32]] * 3
    with recorder(arch) as machine:
        described = [TensorDescriptor.from_tensor(t, box) for t, box in zip((a, b, c), boxes, strict=True)]
        descriptor_matmul_kernel[(2, 2)](*described, 32, **sizes)
    (launch,) = machine.launches
    first = launch.parameters[0]
    shape = [number(48), number(32), struct.pack("<q", 32), struct.pack("<q", 1)]
    if arch == 90:
        about = (launch.report.memory.device(a.data_ptr()), "f16", [32, 48], [64], [32, 32], 64, "zero")
        assert first == recording_engine.tensor_map(*about) and list(launch.parameters[1:5]) == shape
        assert "a_desc=map of float16(48, 32) by (32, 32)" in launch.arguments
    else:
        wide = b"".join(struct.pack("<q", n) for n in (48, 32, 32, 1))
        assert first == address(launch, a) and b"".join(launch.parameters[1:5]) == wide
        flags = 1 + hasattr(described[0], "round_f32_to_tf32")  # padding, and rounding to TF32 since Triton 3.7
        assert list(launch.parameters[5 + flags : 9 + flags]) == shape
    assert [a.data_ptr(), b.data_ptr(), c.data_ptr()] == launch.report.memory.hosts


def two_launches(leaves: list[Any]) -> list[Tensor]:
    """Copy x into a temporary, and scale that into a result: a pass of two launches."""
    x, scale = leaves
    middle, y = torch.empty_like(x), torch.empty_like(x)
    submit(copy_kernel, (4,), x, middle, x.numel(), BLOCK=64)
    submit(scale_kernel, (8,), middle, scale, y, x, 32, 32, BLOCK=32)
    return [y]


@pytest.mark.parametrize("way", ["native", "python"])
def test_a_pass_reaches_the_machine_either_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("RESNET_FAST_SUBMIT", way)
    x, scale = torch.zeros(8, 32), torch.ones(1)
    with recorder() as machine:
        passes = submission.Passes()
        (y,) = passes.run("key", two_launches, [x, scale])
    assert passes.ways == (
        {submission.NATIVELY} if way == "native" else {"launched one by one, because RESNET_FAST_SUBMIT asks for it"}
    )
    copied, scaled = machine.launches
    assert copied.report.memory is scaled.report.memory, "one account of written bytes for the pass"
    state = {at: (size, written) for at, size, _, written in copied.report.memory.added}
    sizes = [state[copied.report.memory.device(t.data_ptr())] for t in (x, scale, y)]
    assert sizes == [(1024, True), (4, True), (1024, False)]
    assert scaled.parameters[0] == copied.parameters[1] and scaled.parameters[2] == address(scaled, y)
    assert state[struct.unpack("<Q", copied.parameters[1])[0]] == (1024, False), "a temporary has bounds of its own"
    assert y.isnan().all(), "memory that nobody wrote is NaN"
    assert copied.grid == (4, 1, 1) and "x_ptr=" in copied.arguments and f"n={x.numel()}" in copied.arguments


def test_what_pytorch_writes_between_kernels_counts_as_written() -> None:
    with recorder() as machine, machine.one_pass():
        y = torch.empty(4, 32)
        y[1].zero_()
        copy_kernel[(1,)](y, torch.empty(128), 128, BLOCK=128)
    memory = machine.launches[0].report.memory
    assert memory.wrote == [(memory.device(y.data_ptr()) + 128, 128)]


@pytest.mark.parametrize("way", ["native", "python"])
def test_a_fault_names_the_launch(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def fail(self: Any, *args: Any, **options: Any) -> None:
        fault = recording_engine.Fault("scale_kernel:12: lane 3 reads y")
        fault.kernel, fault.line, fault.source = "scale_kernel", 12, "toy_kernels.py:27"
        fault.block, fault.warp, fault.lane, fault.what = (1, 0, 0), 2, 3, "reads 4 bytes past the end"
        raise fault

    monkeypatch.setenv("RESNET_FAST_SUBMIT", way)
    with recorder() as machine, pytest.raises(PtxFault) as found:
        monkeypatch.setattr(recording_engine.Module, "launch", fail)
        submission.Passes().run("key", two_launches, [torch.zeros(8, 32), torch.ones(1)])
    assert machine.launches == []
    place = "scale_kernel, PTX line 12 (toy_kernels.py:27): block (1, 0, 0), warp 2, lane 3: reads 4 bytes past the end"
    assert str(found.value).startswith(f"{place}; launched as copy_kernel[4, 1, 1] of 128 threads (x_ptr=")
    assert (found.value.line, found.value.lane) == (12, 3)


def test_cpu_tensors_are_taken_inside_the_machine_only() -> None:
    def works() -> bool:
        return catalog.works("triton") and catalog.ranked("stem", torch.device("cpu"))[0].backend == "triton"

    assert not works()
    with recorder(80), pytest.raises(UserError, match="no machine inside another, got a PTX machine that is entered"):
        assert works()
        assert stand_in.present().gpu == "a100"
        with recorder():
            pass
    assert not works() and stand_in.present() is None


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch, todo in ((100, "tcgen05"), (86, "take 89"), (75, "choose one")):
        with pytest.raises(UserError, match=f"an architecture among 80, 89, 90, 120, got {arch}; .*{todo}"):
            ptx_machine(arch=arch)
    x = torch.zeros(64)
    with recorder() as machine:
        with pytest.raises(UserError, match="strided CPU tensor for x_ptr in the PTX machine, got one on meta"):
            copy_kernel[(1,)](x.to("meta"), x, 64, BLOCK=64)
        with pytest.raises(UserError, match=r"parameters of \[8, 8, 4, 8, 8\] bytes.*got \[8\]"):
            packing.check("k", [("p", "u64", n, n) for n in (8, 8, 4, 8, 8)], [EMPTY])
        assert machine.launches == []
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(UserError, match="got TRITON_INTERPRET=1; unset it"), recorder():
        pass
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(UserError, match="expected ptxas, the assembler"), recorder():
        pass
