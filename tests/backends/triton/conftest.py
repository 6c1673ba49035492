"""Launches of one kernel, built from a LaunchSpec alone, for the tests of configs, traffic and offsets."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_kernel_*.py"]  # they import the kernels, in the mode that the process is in


@pytest.fixture
def poisoned_outputs():
    """Fill uninitialised tensors with NaN, so that elements a kernel does not write show."""
    import torch

    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
