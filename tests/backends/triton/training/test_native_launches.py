"""Planned passes submitted natively have the grid and the argument bytes that Triton's own launcher would pass."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from resnet_fast import native


@pytest.mark.slow
def test_every_launch_is_that_of_tritons_launcher() -> None:
    assert not isinstance(native.submitter(), str)
    # a process of its own: the null GPU cannot be taken out again
    command = [sys.executable, "-m", "tests.support.native_launches"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    kernels = {
        "_conv_fwd_kernel",
        "_conv_dgrad_kernel",
        "_conv_wgrad_kernel",
        "_finalize_kernel",
        "_block_end_fwd_kernel",
    }
    kernels |= {"_fold_kernel", "_transpose_kernel", "_fold_gradient_kernel", "_pool_fwd_kernel", "_pool_bwd_kernel"}
    kernels |= {"_conv_bn_act_1x1_fwd_kernel", "_conv_bn_act_1x1_descriptor_fwd_kernel", "_conv_bn_act_3x3_fwd_kernel"}
    assert kernels <= set(found["compared"])
    assert found["ways"] == ["launches submitted in one native call"]
    assert found["variants"] == 2  # a forward and a backward pass, whatever the momentum of a step
