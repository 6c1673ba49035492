"""Refuse problems, with the same words in every backend."""

from __future__ import annotations

from functools import cache

import torch

from ..spec import YES, NetSpec, Spec, Verdict


def dtype_among(spec: Spec | NetSpec, dtypes: tuple[str, ...]) -> Verdict:
    """Accept a call in one of ``dtypes``."""
    if spec.dtype in dtypes:
        return YES
    return Verdict.no(f"one of {', '.join(dtypes)}", spec.dtype, "convert the model and its input")


def inference_only(spec: Spec | NetSpec, dtypes: tuple[str, ...]) -> Verdict:
    """Accept a call without autograd, with running statistics, in one of ``dtypes``: BatchNorm can be folded."""
    if spec.grad:
        return Verdict.no(
            "a call without autograd", "one whose graph is needed", "wrap inference in torch.inference_mode()"
        )
    if spec.batch_stats:
        return Verdict.no("running statistics", "BatchNorm with batch statistics", "call model.eval() for inference")
    return dtype_among(spec, dtypes)


_OLDEST = (8, 0)
"""The first compute capability with the tensor-core instructions that the kernels use."""


def recent_gpus() -> Verdict:
    """Accept the machine if a visible GPU is recent enough. :func:`recent_gpu` judges the one that a call is on."""
    count = torch.cuda.device_count()
    if any(torch.cuda.get_device_capability(i) >= _OLDEST for i in range(count)):
        return YES
    return _too_old(", ".join(torch.cuda.get_device_name(i) for i in range(count)))


@cache
def recent_gpu(device: torch.device) -> Verdict:
    """Accept a device that is a CPU, or a GPU that is recent enough.

    Without any GPU, where a tracer's tensors may claim to be on one, ``available()`` has the reason.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= _OLDEST:
        return YES
    return _too_old(torch.cuda.get_device_name(device))


def _too_old(names: str) -> Verdict:
    major, minor = _OLDEST
    return Verdict.no(f"a GPU of compute capability {major}.{minor} or later", names, "use another device or backend")
