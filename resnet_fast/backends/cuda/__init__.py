"""Compiled CUDA kernels (csrc/): fp16 and bf16, NHWC, inference with BatchNorm folded.

    bottleneck.py    a whole bottleneck of stride 1 in one launch      conv_bn_act.py   any convolution without groups
    stem.py          7x7 + max-pool in one launch
    plan.py          which of them run a call, and the loop over them

They need no compiler on the user's machine, and no Triton. On a machine without a GPU they run in the emulator
(csrc/emulator/): start the process with ``RESNET_FAST_EMULATE=1``. They then accept CPU tensors when they are asked
for by name; ``auto`` never chooses the emulator.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...spec import Impl, NetSpec, Spec, Verdict
from ..layouts import in_layout
from ..refusals import inference_only, old_gpus
from .device import EMULATED

DTYPES = ("float16", "bfloat16")


@cache
def _gpu() -> Verdict:
    if not torch.cuda.is_available():
        return Verdict.no("a CUDA device, or RESNET_FAST_EMULATE=1 for the emulator", "neither", "use another backend")
    built = native.build_info()["cuda_toolkit"]
    if built == "none":
        return Verdict.no("CUDA kernels in the native library", "one built without", "build it where nvcc is")
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] != built.split(".")[0]:
        runs = f"CUDA {torch.version.cuda}" if torch.version.cuda else "an AMD GPU"
        return Verdict.no(f"a torch for CUDA {built}, which the kernels were built with", runs, "build them with it")
    return old_gpus()


def available() -> Verdict:
    """Is the native library there, and a GPU for it, or the emulator?"""
    found = native.status()
    if not found:
        return found
    return native.emulator_status() if EMULATED else _gpu()


def _supports(spec: Spec | NetSpec) -> Verdict:
    inference = inference_only(spec, DTYPES)
    return inference and _module("plan").verdict(spec)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def _impl(name: str, module: str, run: str, prepare: str = "prepare") -> Impl:
    """The module is imported at the first call."""

    def prepare_some(call: Any, spec: Any, earlier: list[Any]) -> Any:
        if not all(spec.out_shape()):
            return None
        return getattr(_module(module), prepare)(call, spec, [e for e in earlier if e is not None])

    def run_some(call: Any, spec: Any, state: Any) -> Tensor:
        if state is None:
            return in_layout(call.x.new_empty(spec.out_shape()), spec.layout)
        return in_layout(getattr(_module(module), run)(call, spec, state), spec.layout)

    # In the emulator below the reference: slower than anything, and only for those who ask for it by name.
    rank, devices = (-2, ("cuda", "cpu")) if EMULATED else (10, ("cuda",))
    note = "compiled CUDA kernels, BN folded"
    return Impl(name, "cuda", rank, _supports, run_some, prepare_some, devices, note)


IMPLS = (
    _impl("conv_bn_act", "plan", "run"),
    _impl("stem", "plan", "run"),
    _impl("bottleneck", "plan", "run"),
    _impl("basic_block", "plan", "run"),
    _impl("net", "plan", "run_net", "prepare_net"),
)
