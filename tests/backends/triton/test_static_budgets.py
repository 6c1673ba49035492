"""Machine code of the shipped configs against docs/tables/static-budgets.json: no spills, tensor cores, wide accesses.

Kernels are compiled here, without a GPU, in separate processes.
"""

from __future__ import annotations

import pytest

from resnet_fast.benchmarks.tables import static_budgets as budgets
from resnet_fast.benchmarks.tables.machine_code import ARCHS, KernelBudget, compile_many, read_table, worse
from resnet_fast.benchmarks.tables.sass import is_narrow
from resnet_fast.tuning import configs

TABLE = read_table(budgets.JSON)


def test_one_config_per_launch_keeps_its_budget() -> None:
    assert not worse(compile_many(budgets.jobs(every=False)), TABLE, budgets.COMMAND)


@pytest.mark.slow
def test_every_shipped_config_keeps_its_budget() -> None:
    assert not worse(compile_many(budgets.jobs()), TABLE, budgets.COMMAND)


@pytest.mark.slow
def test_no_config_spills_in_tf32() -> None:
    """float32 takes TF32 by default, as in stock PyTorch."""
    compiled = compile_many(budgets.tf32_jobs())
    assert compiled and not [b.config for b in compiled if b.local_bytes]


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: f"{row.config} sm_{row.arch}".replace(" ", "-"))
def test_hard_rules(row: KernelBudget) -> None:
    """Check rules that every row must meet, whatever the table says."""
    assert row.local_bytes == 0 and row.local_accesses == 0
    assert row.blocks_per_sm >= 1
    if ", fp32" in row.config:
        return  # no tensor cores: the products are scalar
    tile = row.config.split(", ")[1]
    # a warp group's instruction takes 64 rows: tiles of 32 use the one of sm_80 everywhere
    wanted = "HMMA" if tile.startswith("32x") else ARCHS[row.arch].tensor
    assert wanted in {name.split(".")[0] for name in row.tensor}
    narrow = {a for loop in row.loops for a in loop.accesses if is_narrow(a)}
    if row.config.startswith("stem"):
        assert narrow <= {"LDG.4" if "tf32" in row.config else "LDG.2"}, narrow  # three channels, one per load
    elif row.config.startswith("tail"):
        assert narrow <= {"LDG.8", "LDGSTS.4"}, narrow  # the fp32 bias of each tile of y, in the loop over them
    elif "x16x" in tile:
        assert narrow <= {"LDGSTS.4", "LDGSTS.8"}, narrow  # a weight tile of 16 rows is less than 16 bytes a thread
    else:
        assert not narrow, narrow


def test_the_table_covers_every_shipped_config() -> None:
    covered = {key[1].split(", ")[1] for key in TABLE}
    shipped = {str(c) for kernel in configs.SHIPPED.values() for c in kernel}
    assert shipped <= covered, shipped - covered
