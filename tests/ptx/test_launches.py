"""Compiled Triton kernels in the PTX machine: results, and reports of what a GPU would not survive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton

from resnet_fast import native
from resnet_fast.backends.triton import submission
from resnet_fast.backends.triton.launch import submit
from resnet_fast.errors import UserError
from resnet_fast.tools.ptx_machine import PtxFault, ptx_machine
from tests.support.toy_kernels import bounded_copy_kernel, copy_kernel, scale_kernel, sum_kernel

pytestmark = pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)


@pytest.mark.parametrize("arch", [80, 89, 90, 120])
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
    ("was", "now", "what"),
    [
        (".target sm_80", ".target sm_90a", "PTX of copy_kernel that a GPU of sm_80 loads, got .target sm_90a; enter"),
        (".target sm_80", ".target sm_89", "got .target sm_89"),
        ("entry copy_kernel", "entry other", "expected one of the kernels other, got copy_kernel"),
        ("ret;", "frobnicate.u32 1;", "copy_kernel, line [0-9]+: not understood: frobnicate.u32"),
        ("", None, "PTX of copy_kernel from the rewrite, got NoneType; return the text"),
    ],
)
def test_ptx_that_is_refused_leaves_tensors_and_machine_as_they_were(was: str, now: str | None, what: str) -> None:
    x, y, texts = torch.randn(64), torch.zeros(64), []

    def once(name: str, text: str) -> Any:
        texts.append(text)
        assert was in text
        return text if len(texts) > 1 else now and text.replace(was, now)

    with ptx_machine(80, rewrite=once) as machine:
        with pytest.raises((UserError, machine.engine.PtxError), match=what):
            copy_kernel[(1,)](x, y, 64, BLOCK=64)
        assert not y.any() and machine.launches == []
        copy_kernel[(1,)](x, y, 64, BLOCK=64)
    assert torch.equal(x, y) and len(texts) == 2


@pytest.mark.parametrize("grid", [(2**31,), (8.0,)])
def test_a_grid_that_is_no_grid_is_refused(grid: Any) -> None:
    with ptx_machine(80), pytest.raises(UserError, match=r"a grid of copy_kernel of whole numbers below 2\*\*31, got"):
        copy_kernel[grid](torch.zeros(64), torch.zeros(64), 64, BLOCK=64)


@pytest.mark.parametrize("arch", [80, 90])
def test_an_assertion_that_fails_is_a_fault_of_its_lane(arch: int) -> None:
    x, y = torch.arange(128.0), torch.zeros(128)
    with ptx_machine(arch):
        bounded_copy_kernel[(1,)](x, y, 127.0, BLOCK=128)
        assert torch.equal(x, y)
        with pytest.raises(PtxFault, match="fails an assertion") as found:
            bounded_copy_kernel[(1,)](x, y.zero_(), 126.5, BLOCK=128)
    assert (found.value.warp, found.value.lane) == (3, 31) and "toy_kernels.py" in found.value.source
    assert not y.any()


def test_times_are_refused() -> None:
    x, config = torch.zeros(64), triton.Config({"BLOCK": 64})
    with ptx_machine(80):
        with pytest.raises(UserError, match=r"got a benchmark; give triton\.autotune one config here"):
            triton.testing.do_bench(lambda: copy_kernel[(1,)](x, x, 64, BLOCK=64))
        two = triton.autotune([config, triton.Config({"BLOCK": 128})], key=["n"])(copy_kernel)
        with pytest.raises(UserError, match=r"got a benchmark; give triton\.autotune one config here"):
            two[(1,)](x, x, 64)
        triton.autotune([config], key=["n"])(copy_kernel)[(1,)](x, x, 64)


def test_a_limit_belongs_to_no_lane() -> None:
    with ptx_machine(80, limit=10), pytest.raises(PtxFault, match=r"warp \d: the launch has executed 10") as found:
        copy_kernel[(1,)](torch.zeros(64), torch.zeros(64), 64, BLOCK=64)
    assert found.value.lane is None


@pytest.mark.parametrize(
    ("sizes", "n", "what"),
    [
        (
            (1500, 1400),
            1500,
            r"writes \d+ bytes .* outside of every allocation; at byte 5\d+ of y_ptr \([^;]*\), which has",
        ),
        (
            (1500, 1600),
            1600,
            r"reads \d+ bytes .* outside of every allocation; at byte 6\d+ of x_ptr \([^;]*\), which has",
        ),
    ],
)
def test_a_tensor_too_small_for_the_grid_is_a_fault(sizes: tuple[int, int], n: int, what: str) -> None:
    both = torch.zeros(sum(sizes))  # one behind the other here, and far apart on the GPU
    x, y = (torch.from_numpy(part) for part in np.split(both.numpy(), [sizes[0]]))
    with ptx_machine(80) as machine, pytest.raises(PtxFault, match=what) as found:
        copy_kernel[(2,)](x, y, n, BLOCK=1024)
    assert found.value.kernel == "copy_kernel" and found.value.block == (1, 0, 0)
    assert "toy_kernels.py" in found.value.source and f"n={n}" in str(found.value)
    assert machine.launches == []


def small_temporary(leaves: list[Any]) -> list[torch.Tensor]:
    """Copy x into a temporary that has 100 of the 128 elements, in a pass of two launches."""
    x, y = leaves[0], torch.empty_like(leaves[0])
    middle = torch.empty(100, device=x.device)
    submit(copy_kernel, (1,), x, middle, 128, BLOCK=128)
    submit(copy_kernel, (1,), middle, y, 100, BLOCK=128)
    return [y]


@pytest.mark.parametrize("way", ["native", "python"])
def test_a_temporary_has_bounds_of_its_own(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Also in a pass that is submitted in one call, where its memory begins and ends at multiples of 256 bytes."""
    monkeypatch.setenv("RESNET_FAST_SUBMIT", way)
    with (
        ptx_machine(90),
        pytest.raises(PtxFault, match=r"outside of every allocation; at byte 400 of .* which has 400"),
    ):
        submission.Passes().run("key", small_temporary, [torch.zeros(128)])


def test_memory_that_pytorch_did_not_align() -> None:
    """A kernel that was compiled for a pointer divisible by 16 finds it so."""
    x, y = (torch.from_numpy(np.zeros(2 * 1024 + 1, np.float64)[1:].view(np.float32)) for _ in range(2))
    x.fill_(3)
    with ptx_machine(90):
        copy_kernel[(4,)](x, y, 4096, BLOCK=1024)
        copy_kernel[(1,)](x[2:], y[2:], 1024, BLOCK=1024)
    assert y.eq(3).all()


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
