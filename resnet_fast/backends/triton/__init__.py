"""Triton kernels. Inference: one launch per convolution or less, with bias, residual or projection, and ReLU inside.

    conv_bn_act_1x1.py   matrix product                       conv_bn_act.py   any other convolution, groups
    conv_bn_act_3x3.py   implicit GEMM over nine taps         stem.py          7x7 + max-pool in one launch
    bottleneck.py        conv2 -> conv3, conv2's output on chip
    tiles.py             what they share

A bottleneck is conv_bn_act_1x1 and then the tail, or three launches; a basic block is two launches of
conv_bn_act_3x3, the shortcut in the second one's epilogue. tuning/launch_plan.py decides per problem; plan.py runs it.
BatchNorm is folded in fp32, activations are NHWC. Training, with batch statistics or a graph, has kernels of its own:
training/, where chain.py is the loop, or frozen_chain.py if no norm uses batch statistics.

On a machine without a GPU the kernels run in Triton's interpreter: start the process with ``TRITON_INTERPRET=1``. They
then accept CPU tensors when they are asked for by name; ``auto`` never chooses the interpreter. As compiled for a GPU
they run on CPU tensors where a stand-in is present (:mod:`resnet_fast.stand_in`).
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from ... import stand_in
from ...impl import Impl
from ...spec import YES, NetSpec, Spec, Verdict
from ..refusals import dtype_among, recent_gpu, recent_gpus

DTYPES = ("float32", "bfloat16", "float16")
INDEX_LIMIT = 2**31 - 1024
"""Rows of a GEMM, and elements of one image, are counted in 32 bits, past the last row to the end of its tile; elements
of a whole tensor in 64."""


@cache
def _triton() -> Verdict:
    if importlib.util.find_spec("triton") is None:
        return Verdict.no("Triton", "none installed", "pip install triton (Linux only), or use another backend")
    return YES


@cache
def _interpreted() -> bool:
    """Return what Triton itself decides from the environment at the start of the process."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes", "y")


@cache
def _gpu() -> Verdict:
    if not torch.cuda.is_available():
        return Verdict.no(
            "a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", "neither", "use another backend"
        )
    if torch.version.hip is not None:
        return Verdict.no("an NVIDIA GPU", "an AMD one", "use another backend")
    return recent_gpus()


def available() -> Verdict:
    """Return whether Triton is installed, with a GPU that it compiles for or its interpreter."""
    found = _triton()
    if not found:
        return found
    if _interpreted():
        return Verdict.yes("in Triton's interpreter, on CPU tensors")
    machine = stand_in.present()
    return _gpu() if machine is None else Verdict.yes(f"compiled for {machine.gpu}, on CPU tensors")


def _accepts(device: torch.device) -> Verdict:
    """Accept a recent GPU, and a CPU where the interpreter or a stand-in runs the kernels."""
    if device.type == "cpu" and not _interpreted() and stand_in.present() is None:
        return Verdict.no("a tensor on cuda", "one on cpu", "move the model and its input")
    return recent_gpu(device)


def _supports(spec: Spec | NetSpec) -> Verdict:
    known = dtype_among(spec, DTYPES)
    if not known:
        return known
    training = spec.grad or spec.batch_stats
    if training and spec.op == "net":
        return Verdict.no("inference", "a whole net in training", "call its parts one by one")
    for part in spec.parts:
        if training and not all(part.out_shape()):
            return Verdict.no("at least one element to train on", str(part), "drop empty batches")
        if max(max(c.gemm_m, c.h * c.w * c.ci) for c in part.convs) >= INDEX_LIMIT:
            return Verdict.no("fewer than 2^31 output pixels, and elements per image", str(part), "split the batch")
    return YES


def _impl(op: str, module: str, training: str = "") -> Impl:
    # In the interpreter below the reference: slower than anything, and only for those who ask for it by name.
    rank = -1 if _interpreted() else 20
    return Impl(
        op,
        "triton",
        rank,
        _supports,
        f"{__name__}.{module}",
        ("cuda", "cpu"),
        _accepts,
        prepares=True,
        training=training,
        trains=DTYPES if training else (),
        nhwc=True,
        batch_invariant=True,
        ahead="" if _interpreted() else f"{__name__}.ahead",
    )


IMPLS = (
    *[_impl(op, "plan", f"{__name__}.training.step") for op in ("conv_bn_act", "stem", "bottleneck", "basic_block")],
    _impl("net", "net"),
)
