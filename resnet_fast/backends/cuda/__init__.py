"""Compiled CUDA kernels (csrc/): fp16 and bf16, NHWC, inference with BatchNorm folded.

    bottleneck.py    a whole bottleneck of stride 1 in one launch      conv_bn_act.py   any convolution without groups
    stem.py          7x7 + max-pool in one launch
    plan.py          which of them run a call, and the loop over them      net.py    a whole net

They need no compiler on the user's machine, and no Triton. On a machine without a GPU they run in the emulator
(csrc/emulator/): start the process with ``RESNET_FAST_EMULATE=1``. They then accept CPU tensors when they are asked
for by name; ``auto`` never chooses the emulator.
"""

from __future__ import annotations

from functools import cache

import torch

from ... import native
from ...impl import Impl
from ...locks import load
from ...spec import NetSpec, Spec, Verdict
from ..refusals import inference_only, recent_gpu, recent_gpus
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
    return recent_gpus()


def available() -> Verdict:
    """Return whether the native library is there, and a GPU for it or the emulator."""
    found = native.status()
    if not found:
        return found
    return native.emulator_status() if EMULATED else _gpu()


def _supports(spec: Spec | NetSpec) -> Verdict:
    inference = inference_only(spec, DTYPES)
    if not inference:
        return inference
    found: Verdict = load(f"{__name__}.plan").verdict(spec)
    return found


def _impl(op: str, module: str) -> Impl:
    # In the emulator below the reference: slower than anything, and only for those who ask for it by name.
    rank, devices = (-2, ("cuda", "cpu")) if EMULATED else (10, ("cuda",))
    return Impl(
        op,
        "cuda",
        rank,
        _supports,
        f"{__name__}.{module}",
        devices,
        recent_gpu,
        prepares=True,
        nhwc=True,
        batch_invariant=True,
    )


IMPLS = (
    *[_impl(op, "plan") for op in ("conv_bn_act", "stem", "bottleneck", "basic_block")],
    _impl("net", "net"),
)
