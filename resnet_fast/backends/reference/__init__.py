"""Run each op in eager PyTorch, on any device. This defines the op, and is the oracle of its tests and the fallback.

The ATen operations and their order are those of torchvision's modules, so results and gradients are bitwise equal.
"""

from __future__ import annotations

from ...impl import Impl
from ...spec import YES, NetSpec, Spec, Verdict


def available() -> Verdict:
    """Return yes: PyTorch is always there."""
    return YES


def _supports(spec: Spec | NetSpec) -> Verdict:
    if spec.sync:
        return Verdict.no("statistics of one process", "those of a process group", "run the stock SyncBatchNorm layers")
    return YES


IMPLS = tuple(
    Impl(op, "reference", 0, _supports, f"{__name__}.{op}")
    for op in ("conv_bn_act", "stem", "bottleneck", "basic_block", "net")
)
