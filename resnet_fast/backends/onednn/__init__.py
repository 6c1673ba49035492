"""Run inference on oneDNN on the CPU: one fused primitive per convolution, with bias, residual add and ReLU.

BatchNorm is folded into the weight and bias in fp32 (:mod:`resnet_fast.folding`), and the weight is packed into the
blocked layout that oneDNN chooses for the input size. Both are derived tensors, kept until a parameter changes
(:mod:`resnet_fast.parameter_cache`). Activations are NHWC. The primitives are reached through ATen
(``torch.ops.mkldnn._convolution_pointwise``, what Inductor's freezing emits as well).

16-bit tensors: with AVX-512 or AVX-NE-CONVERT the primitives run in 16 bit. On an older CPU they run in fp32 and only
the op's input and output are 16-bit: faster by an order of magnitude than ATen's fallback there, and more accurate.

oneDNN's ReLU turns NaN into 0, ATen's keeps it. So each call first proves that no NaN can occur (:mod:`.bounds`). With
NaN or infinity in its input or weights, or values that may overflow, the stock layers run.
"""

from __future__ import annotations

import torch

from ...impl import Impl, Upkeep
from ...spec import YES, NetSpec, Spec, Verdict
from ..refusals import inference_only
from . import conv_bn_act, net, tiling


def available() -> Verdict:
    """Return whether oneDNN is built into this torch and switched on."""
    if not torch._C._has_mkldnn:
        return Verdict.no("a torch built with oneDNN", "one without", "install an x86-64 or AArch64 build of torch")
    if not torch._C._get_mkldnn_enabled():
        return Verdict.no("oneDNN switched on", "torch.backends.mkldnn.enabled = False", "set it to True")
    return YES


def _supports(spec: Spec | NetSpec) -> Verdict:
    inference = inference_only(spec, conv_bn_act.DTYPES)
    if not inference:
        return inference
    if spec.h * spec.w == 0:
        return Verdict.no("an image with pixels", f"{spec.h}x{spec.w}", "use a larger image")
    return YES


def _impl(op: str, upkeep: Upkeep) -> Impl:
    return Impl(
        op,
        "onednn",
        10,
        _supports,
        f"{__name__}.{op}",
        devices=("cpu",),
        prepares=True,
        upkeep=upkeep,
        nhwc=True,
        tile=tiling.tile,
        announces=True,
    )


_OF_CONVS = Upkeep(conv_bn_act.elements, conv_bn_act.nbytes)
IMPLS = (
    *[_impl(op, _OF_CONVS) for op in ("conv_bn_act", "stem", "bottleneck", "basic_block")],
    _impl("net", Upkeep(net.elements, net.nbytes)),
)
