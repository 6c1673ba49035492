"""Refuse problems, with the same words in every backend."""

from __future__ import annotations

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


def old_gpus() -> Verdict:
    """Accept the machine if every visible GPU has the tensor-core instructions that the kernels use."""
    count = torch.cuda.device_count()
    old = [torch.cuda.get_device_name(i) for i in range(count) if torch.cuda.get_device_capability(i) < (8, 0)]
    if old:
        return Verdict.no("GPUs of compute capability 8.0 or later", ", ".join(old), "hide it by CUDA_VISIBLE_DEVICES")
    return YES
