"""Compiled Triton kernels in the PTX machine: results, and reports of what a GPU would not survive."""

from __future__ import annotations

import pytest
import torch

from resnet_fast import native
from resnet_fast.tools.ptx_machine import PtxFault, ptx_machine
from tests.support.toy_kernels import copy_kernel, scale_kernel, sum_kernel

FAR = 1 << 18
"""Elements of a tensor that malloc puts apart from small ones, so that these do not run into it."""

pytestmark = pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)


@pytest.mark.parametrize("arch", [80, 90])
def test_launches_compute(arch: int) -> None:
    x, y, total = torch.randn(1500), torch.empty(1500), torch.zeros(1)
    rows, scale, out = torch.randn(6, 40), torch.tensor([1.5]), torch.full((6, 40), 7.0)
    with ptx_machine(arch) as machine:
        copy_kernel[(2,)](x, y, 1500, BLOCK=1024)
        sum_kernel[(5,)](x, total, BLOCK=256)
        scale_kernel[(6,)](rows, scale, out, rows, 37, 40, BLOCK=64)
    assert torch.equal(y, x)
    torch.testing.assert_close(total[0], x[:1280].sum(), rtol=1e-5, atol=1e-5)
    fused = (rows.double() * 1.5 + rows.double()).float()  # one rounding, as by fma
    assert torch.equal(out[:, :37], fused[:, :37]) and bool((out[:, 37:] == 7).all())
    counted = machine.launches[0].report.counters["allocations"]
    moved = {name.partition(" ")[0]: (a["bytes_read"], a["bytes_written"]) for name, a in counted.items()}
    assert moved == {"x_ptr": (6000, 0), "y_ptr": (0, 6000)}


@pytest.mark.parametrize(
    ("sizes", "n", "what"),
    [
        ((FAR, 100), 1500, "writes .* outside of every allocation"),
        ((1500, FAR), 1600, "reads .* outside of every allocation"),
    ],
)
def test_a_tensor_too_small_for_the_grid_is_a_fault(sizes: tuple[int, int], n: int, what: str) -> None:
    x, y = (torch.zeros(size) for size in sizes)
    with ptx_machine(80) as machine, pytest.raises(PtxFault, match=what) as found:
        copy_kernel[(2,)](x, y, n, BLOCK=1024)
    assert found.value.kernel == "copy_kernel" and found.value.block == (1, 0, 0)
    assert "toy_kernels.py" in found.value.source and f"n={n}" in str(found.value)
    assert machine.launches == []


def test_memory_that_nobody_wrote_may_not_be_read() -> None:
    y = torch.empty(128)
    with ptx_machine(90) as machine, machine.one_pass():
        x = torch.empty(128)
        with pytest.raises(PtxFault, match=r"allocation 1 of the pass.*which nobody has written"):
            copy_kernel[(1,)](x, y, 128, BLOCK=128)
        copy_kernel[(1,)](torch.zeros(128), x, 128, BLOCK=128)
        copy_kernel[(1,)](x, y, 128, BLOCK=128)
    assert not y.any()


def test_a_kernel_that_never_ends_is_stopped() -> None:
    with ptx_machine(90, limit=50) as machine, pytest.raises(PtxFault, match="instructions"):
        copy_kernel[(1,)](torch.zeros(4096), torch.zeros(4096), 4096, BLOCK=4096)
    assert machine.launches == []
