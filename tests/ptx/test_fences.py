"""The fence between asynchronous copies and wgmma: kernels as Triton before 3.7.1 compiles them, and mended."""

from __future__ import annotations

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from resnet_fast import native
from resnet_fast.backends.triton.fences import MISSING, fenced, with_fences
from resnet_fast.tools.ptx_machine import PtxFault, ptx_machine
from tests.support import op_cases

pytestmark = pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)

FENCE = "fence.proxy.async.shared::cta;"


def as_older_triton(name: str, text: str) -> str:
    assert FENCE in text and "cp.async.ca" in text
    return text.replace(FENCE, "")


def test_a_product_of_copies_without_a_fence_is_a_fault_and_is_mended() -> None:
    p = op_cases.make("conv_bn_act", n=2, h=5, w=3, ci=16, co=8)
    p = p.map(lambda name, t: op_cases.lay_out(t, "nhwc") if name in ("x", "residual") else t).to(torch.float16)
    with ptx_machine(90) as machine:
        y = p.run("triton")
    (launch,) = machine.launches
    with ptx_machine(90, rewrite=as_older_triton), pytest.raises(PtxFault, match=r"no fence\.proxy\.async follows"):
        p.run("triton")
    with ptx_machine(90, rewrite=lambda name, text: fenced(as_older_triton(name, text))) as machine:
        assert p.run("triton").equal(y)
    assert machine.launches[0].report.counters["opcodes"] == launch.report.counters["opcodes"]


@pytest.mark.skipif(not MISSING, reason="this Triton emits the fence itself")
def test_a_kernel_that_was_stored_without_the_fence_is_not_taken() -> None:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    assert with_fences(backend.hash)() != backend.hash()


def test_kernels_without_asynchronous_copies_are_left_alone() -> None:
    text = f"st.shared.b32 [%r1], %r2;\nbar.sync 0;\n{FENCE}\nwgmma.fence.sync.aligned;"
    assert fenced(text) == text
