"""The CUDA ops reach the PTX machine with the parameters that their launchers fill on a GPU."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from resnet_fast import native, numerics
from resnet_fast.benchmarks import compiled_cuda
from resnet_fast.errors import UserError
from resnet_fast.tools.ptx_machine import PtxFault, PtxMachine, ptx_machine
from tests.support import recording_engine
from tests.support.bottleneck_cases import block


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[PtxMachine]:
    """Return an entered machine that records launches; its architecture is the test's parameter."""
    if not native.status() or shutil.which("nvcc") is None:
        pytest.skip("needs the native library and nvcc")
    found = ptx_machine(arch=request.param)
    found.engine = recording_engine
    with found:
        yield found


def address(t: torch.Tensor) -> bytes:
    return struct.pack("<Q", t.data_ptr())


@pytest.mark.parametrize("machine", [90], indirect=True)
def test_a_bottleneck_on_hopper_reads_maps(machine: PtxMachine) -> None:
    made = block(1, 5, 7, 256, 64, 256, torch.float16)
    weights = made.packed()
    with compiled_cuda.launched(machine, sms=2):
        y = torch.ops.resnet_fast_native.bottleneck_fwd(made.x, weights, *made.biases, False)
    (launch,) = machine.launches
    assert launch.kernel == "bottleneck_fwd_sm90a_kernel<Variant<Half, 256> >"
    (parameter,) = launch.parameters
    assert parameter.startswith(address(made.x)) and address(y) in parameter
    image = (made.x.data_ptr(), "u16", [256, 7, 5, 1], [512, 512 * 7, 512 * 35], [64, 10, 10, 1], 128, "zero")
    assert recording_engine.tensor_map(*image) in parameter
    added = {start: (nbytes, written) for start, nbytes, _, written in launch.report.memory.added}
    assert added[made.x.data_ptr()] == (2 * made.x.numel(), True) and added[y.data_ptr()] == (2 * y.numel(), False)
    assert y.isnan().all(), "memory that nobody wrote is NaN"


@pytest.mark.parametrize("machine", [80], indirect=True)
def test_a_fault_replaces_the_error_of_the_op(machine: PtxMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, kernel: str, *args: Any, **options: Any) -> None:
        fault = recording_engine.Fault("reads y")
        fault.kernel, fault.line = kernel, 7
        raise fault

    x = torch.zeros(1, 64, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    arguments = (x, torch.zeros(64, 64, dtype=x.dtype), torch.zeros(64))
    monkeypatch.setattr(recording_engine.Module, "launch", fail)
    found = r"conv_bn_act_1x1_kernel.*PTX line 7: reads y; launched as conv_bn_act_1x1"
    with pytest.raises(PtxFault, match=found), compiled_cuda.launched(machine):
        torch.ops.resnet_fast_native.conv_bn_act_1x1(*arguments, None, 1, 1, True)
    with pytest.raises(UserError, match="the name of a CUDA kernel, got 'unknown_kernel'"):
        compiled_cuda.kernel_named("unknown_kernel", 80)


@pytest.mark.slow
@pytest.mark.skipif(not native.ptx_status() or shutil.which("nvcc") is None, reason="needs the PTX machine and nvcc")
@pytest.mark.parametrize(("arch", "product"), [(80, "mma"), (90, "wgmma")])
def test_a_bottleneck_as_compiled_is_within_the_budget(arch: int, product: str) -> None:
    made = block(1, 5, 7, 256, 64, 256, torch.bfloat16)
    found = []
    for seed in (1, 2):
        with ptx_machine(arch, seed=seed) as machine, compiled_cuda.launched(machine, sms=1):
            found.append(made.run())
    assert torch.equal(*found)
    assert machine.launches[0].report.counters["events"][product]
    exact, before_relu = made.eager(torch.float64), made.eager(torch.float64, relu=False)
    numerics.assert_close(found[0], exact, made.eager(torch.bfloat16), 64 * 9, before_relu)
