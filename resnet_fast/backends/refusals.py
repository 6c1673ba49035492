"""What a backend refuses that folds BatchNorm into weights: it computes inference, in the dtypes that it has."""

from __future__ import annotations

from ...spec import YES, NetSpec, Spec, Verdict


def inference_only(spec: Spec | NetSpec, dtypes: tuple[str, ...]) -> Verdict:
    """Yes for a call without autograd, on running statistics, in one of ``dtypes``."""
    if spec.grad:
        return Verdict.no(
            "a call without autograd", "one whose graph is needed", "wrap inference in torch.inference_mode()"
        )
    if spec.batch_stats:
        return Verdict.no("running statistics", "BatchNorm with batch statistics", "call model.eval() for inference")
    if spec.dtype not in dtypes:
        return Verdict.no(f"one of {', '.join(dtypes)}", spec.dtype, "convert the model and its input")
    return YES
