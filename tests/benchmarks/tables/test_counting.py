"""The counting interpreter counts exactly, and sees every access outside."""

from __future__ import annotations

import os

import pytest
import torch

from resnet_fast.backends.triton.interpreter import repair
from resnet_fast.benchmarks.tables.counting import OutOfBounds, count
from tests.support import ROOT
from tests.support import toy_kernels as toy
from tests.support.processes import run_python

pytestmark = pytest.mark.interpret


@pytest.fixture(autouse=True)
def _repaired_interpreter() -> None:
    repair()


def _matmul(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, block: tuple[int, int, int]) -> None:
    (m, k), n = a.shape, b.shape[1]
    grid = (-(-m // block[0]), -(-n // block[1]))
    toy.matmul_kernel[grid](a, b, c, m, n, k, BLOCK_M=block[0], BLOCK_N=block[1], BLOCK_K=block[2])


def test_masked_copy_counts_its_true_lanes() -> None:
    x, y = torch.randn(100), torch.full((128,), torch.nan)
    with count() as counts:
        toy.copy_kernel[(4,)](x, y, 90, BLOCK=32)
    launch = counts.only
    assert launch.kernel == "copy_kernel" and launch.grid == (4, 1, 1)
    assert (launch["x_ptr"].read, launch["x_ptr"].read_unique, launch["x_ptr"].written) == (360, 360, 0)
    assert launch["x_ptr"].read_sectors == 12  # 360 / 32 = 11.25
    assert (launch["y_ptr"].read, launch["y_ptr"].written, launch["y_ptr"].written_unique) == (0, 360, 360)
    assert launch.unique == 720 and launch.flops == 0
    assert torch.equal(y[:90], x[:90]) and y[90:].isnan().all()  # results come back from the mapping


def test_sectors_of_strided_reads_are_whole() -> None:
    x, y = torch.randn(32, 24, dtype=torch.float16), torch.zeros(32, 24, dtype=torch.float16)
    with count() as counts:
        toy.scale_kernel[(32,)](x, torch.ones(1), y, y, 5, 24, BLOCK=8)
    launch = counts.only
    assert launch["x_ptr"].read == launch["x_ptr"].read_unique == 32 * 5 * 2 and launch["x_ptr"].storage == 32 * 48
    assert launch["x_ptr"].read_sectors == 32  # rows start at bytes 0, 48, 96 ...: 10 bytes of each lie in one sector
    assert launch["y_ptr"].read == launch["y_ptr"].written == 320 and launch.sectors == 32 + 1 + 2 * 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_matmul_counts_reuse_and_flops(dtype: torch.dtype) -> None:
    m, n, k, block = 40, 24, 48, (16, 16, 32)
    a, b, c = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
    with count() as counts:
        _matmul(a, b, c, block)
    launch, size = counts.only, a.element_size()
    assert launch["a_ptr"].read == 2 * m * k * size and launch["a_ptr"].read_unique == m * k * size
    assert launch["b_ptr"].read == 3 * n * k * size and launch["b_ptr"].read_unique == n * k * size
    assert launch["c_ptr"].written == launch["c_ptr"].written_unique == m * n * size
    assert launch.flops == 2 * 48 * 32 * 64 and launch.dots == 12  # padded to whole blocks
    torch.testing.assert_close(c, a @ b, rtol=1e-2, atol=1e-2)


def test_descriptor_matmul_counts_what_lies_inside_its_shapes() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    m, n, k, block = 40, 24, 48, (16, 16, 32)
    a, b = torch.randn(m, k, dtype=torch.float16), torch.randn(k, n, dtype=torch.float16)
    c = torch.full((m, n), torch.nan, dtype=torch.float16)
    blocks = [(block[0], block[2]), (block[2], block[1]), block[:2]]
    descs = [TensorDescriptor.from_tensor(t, list(s)) for t, s in zip((a, b, c), blocks, strict=True)]
    with count() as counts:
        toy.descriptor_matmul_kernel[(3, 2)](*descs, k, BLOCK_M=block[0], BLOCK_N=block[1], BLOCK_K=block[2])
    launch = counts.only
    assert launch["a_desc"].read == 2 * m * k * 2 and launch["a_desc"].read_unique == m * k * 2
    assert launch["b_desc"].read == 3 * n * k * 2 and launch["b_desc"].read_unique == n * k * 2
    assert launch["c_desc"].written == m * n * 2 and launch["c_desc"].written_sectors == m * n * 2 // 32
    assert launch.flops == 2 * 48 * 32 * 64
    torch.testing.assert_close(c, a @ b, rtol=1e-2, atol=1e-2)


def test_arguments_of_one_storage_share_an_entry() -> None:
    x, y = torch.randn(4, 8), torch.empty(4, 8)
    with count() as counts:
        toy.scale_kernel[(4,)](x, torch.ones(1), y, x, 8, 8, BLOCK=8)
    launch = counts.only
    assert [t.name for t in launch.tensors] == ["x_ptr=res_ptr", "s_ptr", "y_ptr"]
    assert launch["x_ptr"] is launch["res_ptr"]
    assert (launch["x_ptr"].read, launch["x_ptr"].read_unique) == (256, 128)
    assert (launch["s_ptr"].read, launch["s_ptr"].read_unique, launch["s_ptr"].read_sectors) == (16, 4, 1)


def test_atomics_read_and_write() -> None:
    x, total = torch.ones(64), torch.zeros(1)
    with count() as counts:
        toy.sum_kernel[(4,)](x, total, BLOCK=16)
    assert total.item() == 64
    assert (counts.only["sum_ptr"].read, counts.only["sum_ptr"].written, counts.only["sum_ptr"].unique) == (16, 16, 8)


@pytest.mark.parametrize(("shift", "lanes", "offset"), [(1, 1, 128), (-1, 1, -4), (8, 8, 128), (1 << 20, 32, 1 << 22)])
def test_access_outside_of_the_storage_raises_with_name_and_offset(shift: int, lanes: int, offset: int) -> None:
    x, y = torch.randn(32), torch.zeros(32)
    with count() as counts, pytest.raises(OutOfBounds) as error:
        toy.shift_kernel[(1,)](x, y, shift, BLOCK=32)
    assert f"reads 4 bytes of argument 'x_ptr' (float32 [32], storage of 128 bytes) at byte offset {offset}" in str(
        error.value
    )
    assert f"{lanes} lane(s)" in str(error.value)
    assert counts.launches == [] and not y.any()


def test_access_outside_of_a_view_is_seen_when_asked() -> None:
    x, y = torch.randn(64), torch.zeros(32)
    with count():
        toy.shift_kernel[(1,)](x[16:48], y, 8, BLOCK=32)
    with count(inside_views=True):
        toy.shift_kernel[(1,)](x[16:48], y, 0, BLOCK=32)
    with count(inside_views=True), pytest.raises(OutOfBounds, match="outside of the tensor; 8 lane"):
        toy.shift_kernel[(1,)](x[16:48], y, 8, BLOCK=32)


def test_device_function_error_keeps_its_type() -> None:
    a, b, c = torch.randn(16, 16), torch.randn(16, 8), torch.empty(16, 16)
    with count(), pytest.raises(OutOfBounds, match="b_ptr"):
        toy.matmul_kernel[(1, 1)](a, b, c, 16, 16, 16, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)


def test_launches_are_in_order_and_reported() -> None:
    x, y = torch.randn(32), torch.empty(32)
    with count() as counts:
        toy.copy_kernel[(1,)](x, y, 32, BLOCK=32)
        _matmul(x.view(2, 16), y.view(16, 2), torch.empty(2, 2), (16, 16, 16))
    assert [launch.kernel for launch in counts.launches] == ["copy_kernel", "matmul_kernel"]
    assert counts.flops == 8192 and counts.unique == sum(launch.unique for launch in counts.launches)
    lines = counts.report().splitlines()
    assert len(lines) == 2 + 3 + 4 and "| copy_kernel | x_ptr float32 32 | 128 | 128 | 4 | 0 | 0 | 0 |  |" in lines
    with pytest.raises(ValueError, match="expected one launch"):
        _ = counts.only
    with pytest.raises(KeyError, match="no tensor argument 'z_ptr'"):
        counts.launches[0]["z_ptr"]


def test_interpreter_is_as_before_afterwards() -> None:
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = dict(vars(InterpreterBuilder)), dict(vars(GridExecutor))
    with count(), pytest.raises(RuntimeError, match="already open"), count():
        pass
    assert (dict(vars(InterpreterBuilder)), dict(vars(GridExecutor))) == before


def test_without_the_interpreter_it_says_what_to_set() -> None:
    code = "from resnet_fast.benchmarks.tables.counting import count\nwith count(): pass"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = run_python(code, cwd=ROOT, env=env)
    assert done.returncode and "set TRITON_INTERPRET=1 before triton's import" in done.stderr
