"""Machine code of the training kernels against docs/tables/training-budgets.json: no spills, and in the compute-bound
main loops fewer issue slots than tensor cycles.

Kernels are compiled here, without a GPU, in separate processes.
"""

from __future__ import annotations

import pytest

from resnet_fast import devices
from resnet_fast.backends.triton.training import vectors
from resnet_fast.benchmarks.tables import training_budgets as budgets
from resnet_fast.benchmarks.tables.machine_code import ARCHS, KernelBudget, compile_many, read_table, worse
from resnet_fast.tuning import heuristic, training_configs

TABLE = read_table(budgets.JSON)
SAMPLE = ("conv_fwd 3x3", "conv_dgrad 1x1 behind", "conv_wgrad 3x3")
PER_CHANNEL = ("finalize", "constant", "coefficients")
"""Kernels of a few vectors, one element per thread; those on tensors store 16 bytes at once."""
ENDS = {"block_end_backward": 1, "block_end_backward projection": 2, "pool_end_backward": 1}
"""Those that also store the coefficients of one or two norms, each row of them in 16 bit by an instruction."""
PACKED_ROWS = (vectors.BETA_HI, vectors.BETA_LO, vectors.GAMMA, vectors.NEG_GAMMA)
COMPUTE_BOUND = ("1x1", "1x1 first", "1x1 behind", "1x1/2", "3x3", "3x3/2")
"""Layers with 256 channels or more on both sides."""


def test_a_sample_keeps_its_budget() -> None:
    """Compile the first config of one launch per kernel, and two of the passes."""
    passes = ("block_end_backward projection", "pool_end_backward")
    names = tuple(f"{name}," for name in SAMPLE)
    sample = [j for j in budgets.jobs(every=False) if j.config.startswith(names) or j.config in passes]
    assert not worse(compile_many(sample), TABLE, budgets.COMMAND)


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
    kernel, _, rest = row.config.partition(" ")
    if kernel not in training_configs.KERNELS or not rest:
        if not row.config.startswith(PER_CHANNEL):
            assert row.accesses.get("STG.2", 0) == ENDS.get(row.config, 0) * len(PACKED_ROWS), row.accesses
        return
    if row.config.endswith(", fp32"):
        return  # no tensor cores: the products are scalar
    tile = rest.split(", ")[1].split()[0]
    # a warp group's instruction takes 64 rows: smaller tiles use the one of sm_80 everywhere
    wanted = "HMMA" if tile.startswith(("16x", "32x")) else ARCHS[row.arch].tensor
    assert wanted in {name.split(".")[0] for name in row.tensor}


def test_main_loops_issue_in_time() -> None:
    """Every config that may run a compute-bound convolution on an H100 keeps the tensor cores busy through a
    packed prologue; the model chooses among these."""
    h100, rows, slow = devices.gpu("h100"), 0, []
    assert h100.gpu is not None
    for name, one in budgets.launches().items():
        if name.partition(" ")[2] not in COMPUTE_BOUND:
            continue
        assert not training_configs.is_memory_bound(one)
        legal = training_configs.candidates(one, h100.gpu, packed=True)
        assert next(c for c, _ in heuristic.rank_training(one, h100, True, frozenset())) in legal
        for label in (budgets.label_of(name, config) for config in legal):
            found = [row for (_, config, arch), row in TABLE.items() if config == label and arch == 90]
            if not found:
                assert name.partition(" ")[2] in budgets.ONE_CONFIG, label
                continue
            assert found[0].loops, label
            rows += 1
            slow += [f"{label}: {loop.pressure:.2f}" for loop in found[0].loops if loop.pressure > 1.0]
    assert not slow
    assert rows >= 3 * len(COMPUTE_BOUND)


def test_the_table_covers_every_shipped_config() -> None:
    covered = {
        (key[1].split(" ")[0], key[1].split(", ")[1].removesuffix(" packed"), key[2]) for key in TABLE if "," in key[1]
    }
    shipped = {
        (k, str(c), arch) for k, found in training_configs.SHIPPED.items() for c in found for arch in budgets.GPUS
    }
    assert shipped <= covered, shipped - covered
