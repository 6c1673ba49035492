"""Machine code of the CUDA kernels against docs/tables/cuda-budgets.json: no spills, tensor cores, 16-byte accesses."""

from __future__ import annotations

import shutil

import pytest

from resnet_fast.benchmarks.tables import cuda_budgets
from resnet_fast.benchmarks.tables.cuda_budgets import COMMAND, JSON, KERNELS, LAYERS, PREDICTIONS
from resnet_fast.benchmarks.tables.machine_code import KernelBudget, read_table, worse
from resnet_fast.benchmarks.tables.sass import is_narrow

TABLE = read_table(JSON)
TENSOR = ("bottleneck_fwd", "conv_bn_act", "stem_fwd")


@pytest.fixture(scope="module", autouse=True)
def _nvcc(emulator) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")


@pytest.mark.slow
@pytest.mark.parametrize("arch", cuda_budgets.ARCHS)
def test_every_kernel_keeps_its_budget(arch: int) -> None:
    assert not worse(cuda_budgets.budgets((arch,)), TABLE, COMMAND)


def test_one_kernel_keeps_its_budget() -> None:
    assert not worse(cuda_budgets.budgets((90,), ("conv_bn_act_1x1.cu",)), TABLE, COMMAND)


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: f"{row.kernel} {row.config} sm_{row.arch}")
def test_hard_rules(row: KernelBudget) -> None:
    """Check rules that every row must meet, whatever the table says."""
    assert row.local_bytes == 0 and row.local_accesses == 0
    assert row.blocks_per_sm >= 1
    narrow = {access for loop in row.loops for access in loop.accesses if is_narrow(access)}
    assert not narrow, narrow
    if row.kernel.startswith(TENSOR):
        # but for Hopper's own, warp-level products everywhere
        assert {name.split(".")[0] for name in row.tensor} == {"HGMMA" if "_sm90a_" in row.kernel else "HMMA"}
        assert row.loops or row.kernel.startswith("stem")


def test_the_table_has_every_kernel() -> None:
    launched = {path.read_text().count("RF_LAUNCH") and path.stem for path in KERNELS.glob("*.cu")} - {0}
    named = {row.kernel for row in TABLE.values()}
    for stem in launched:
        assert any(name.startswith(stem) for name in named), stem


def test_predictions_cover_their_layers() -> None:
    page = PREDICTIONS.read_text()
    assert all(f"| {layer} |" in page for layer in LAYERS)
