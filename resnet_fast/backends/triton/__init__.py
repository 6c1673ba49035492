"""Triton kernels. Inference: one launch per convolution or less, with bias, residual or projection, and ReLU inside.

    conv_bn_act_1x1.py   matrix product                       conv_bn_act.py   any other convolution, groups
    conv_bn_act_3x3.py   implicit GEMM over nine taps         stem.py          7x7 + max-pool in one launch
    bottleneck.py        conv2 -> conv3, conv2's output on chip
    tiles.py             what they share

A bottleneck is conv_bn_act_1x1 and then the tail, or three launches; a basic block is two launches of
conv_bn_act_3x3, the shortcut in the second one's epilogue. tuning/launch_plan.py decides per problem; plan.py runs it.
BatchNorm is folded in fp32, activations are NHWC. Training, with batch statistics or a graph, has kernels of its own:
training/, where chain.py is the loop.

On a machine without a GPU the kernels run in Triton's interpreter: start the process with ``TRITON_INTERPRET=1``. They
then accept CPU tensors when they are asked for by name; ``auto`` never chooses the interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...spec import BlockSpec, ConvSpec, Impl, NetSpec, Spec, Training, Verdict
from ..layouts import in_layout
from ..refusals import dtype_among, old_gpus

DTYPES = ("float32", "bfloat16", "float16")
INDEX_LIMIT = 2**31 - 1024
"""Rows of a GEMM, and elements of one image, are counted in 32 bits, past the last row to the end of its tile; elements
of a whole tensor in 64."""


@cache
def _triton() -> Verdict:
    if importlib.util.find_spec("triton") is None:
        return Verdict.no("Triton", "none installed", "pip install triton (Linux only), or use another backend")
    return Verdict.yes()


@cache
def _interpreted() -> bool:
    """As Triton itself decides it, from the environment at the start of the process."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes", "y")


@cache
def _gpu() -> Verdict:
    if not torch.cuda.is_available():
        return Verdict.no(
            "a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", "neither", "use another backend"
        )
    if torch.version.hip is not None:
        return Verdict.no("an NVIDIA GPU", "an AMD one", "use another backend")
    return old_gpus()


def available() -> Verdict:
    """Is Triton installed, and is there a GPU that it compiles for, or its interpreter?"""
    found = _triton()
    if not found:
        return found
    return Verdict.yes("in Triton's interpreter, on CPU tensors") if _interpreted() else _gpu()


def _supports(spec: Spec | NetSpec) -> Verdict:
    known = dtype_among(spec, DTYPES)
    if not known:
        return known
    if isinstance(spec, NetSpec):
        if spec.grad or spec.batch_stats:
            return Verdict.no("inference", "a whole net in training", "call its parts one by one")
        return next((v for v in map(_supports, spec.parts) if not v), Verdict.yes())
    if (spec.grad or spec.batch_stats) and not all(spec.out_shape()):
        return Verdict.no("at least one element to train on", str(spec), "drop empty batches")
    counted = [n for conv in _convs(spec) for n in (conv.gemm_m, conv.h * conv.w * conv.ci)]
    if max(counted) >= INDEX_LIMIT:
        return Verdict.no("fewer than 2^31 output pixels, and elements per image", str(spec), "split the batch")
    return Verdict.yes()


def _convs(spec: ConvSpec | BlockSpec) -> tuple[ConvSpec, ...]:
    return spec.convs if isinstance(spec, BlockSpec) else (spec,)


def _impl(name: str, module: str, run: str) -> Impl:
    """The module is imported at the first call. An output without elements needs no launch."""

    def load() -> Any:
        return importlib.import_module(f"{__name__}.{module}")

    def prepare_some(call: Any, spec: Any, earlier: list[Any]) -> Any:
        if not all(spec.out_shape()):
            return None
        return load().prepare(call, spec, [e for e in earlier if e is not None])

    def run_some(call: Any, spec: Any, state: Any) -> Tensor:
        if state is None:
            return in_layout(call.x.new_empty(spec.out_shape()), spec.layout)
        runner: Callable[..., Tensor] = getattr(load(), run)
        return in_layout(runner(call, spec, state), spec.layout)

    # In the interpreter below the reference: slower than anything, and only for those who ask for it by name.
    rank, devices = (-1, ("cuda", "cpu")) if _interpreted() else (20, ("cuda",))
    training = None if name == "net" else TRAINING
    note = "fused Triton kernels, BN folded or in prologues and epilogues"
    return Impl(name, "triton", rank, _supports, run_some, prepare_some, devices, note, training)


def _from_chain(name: str) -> Callable[..., Any]:
    """A function of training/chain.py, which is imported at the first call."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.training.chain"), name)(*args)

    return call


TRAINING = Training(*map(_from_chain, ("forward", "backward", "statistics", "shapes")))


IMPLS = (
    _impl("conv_bn_act", "plan", "run"),
    _impl("stem", "plan", "run"),
    _impl("bottleneck", "plan", "run"),
    _impl("basic_block", "plan", "run"),
    _impl("net", "net", "net"),
)
