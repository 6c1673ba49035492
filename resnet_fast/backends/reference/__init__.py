"""The reference: eager PyTorch on any device. It is the meaning of each op, the oracle of its tests and the fallback.

The same ATen operations in the same order as torchvision's modules, so results and gradients are equal bit for bit.
"""

from __future__ import annotations

from ...spec import YES, Impl, NetSpec, Spec, Verdict
from .basic_block import basic_block
from .bottleneck import bottleneck
from .conv_bn_act import conv_bn_act
from .net import net
from .stem import stem


def available() -> Verdict:
    """Always."""
    return YES


def _supports(spec: Spec | NetSpec) -> Verdict:
    if spec.sync:
        return Verdict.no("statistics of one process", "those of a process group", "run the stock SyncBatchNorm layers")
    return YES


IMPLS = tuple(
    Impl(name, "reference", 0, _supports, run, note="eager PyTorch")
    for name, run in (
        ("conv_bn_act", conv_bn_act),
        ("stem", stem),
        ("bottleneck", bottleneck),
        ("basic_block", basic_block),
        ("net", net),
    )
)
