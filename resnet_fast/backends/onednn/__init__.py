"""oneDNN on the CPU, eval only: one fused primitive per convolution (bias, residual add and ReLU as its post-ops).

BatchNorm is folded into the weight and bias in fp32 (:mod:`resnet_fast.folding`) and the weight is packed into the
blocked layout that oneDNN wants for the input size at hand; both are derived tensors, kept until a parameter changes
(:mod:`resnet_fast.parameter_cache`). Activations are NHWC. The primitives are reached through ATen
(``torch.ops.mkldnn._convolution_pointwise``, what Inductor's freezing emits as well).

16-bit tensors: with AVX-512 or AVX-NE-CONVERT the primitives run in 16 bit. On an older CPU they run in fp32 and only
the op's input and output are 16-bit: faster by an order of magnitude than ATen's fallback there, and more accurate.

oneDNN's ReLU turns NaN into 0, where ATen's keeps it. So each call first makes sure that it holds none and computes
none (:mod:`.bounds`); with NaN or infinity in its input or weights, or values that may overflow, the stock layers run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...spec import YES, Impl, NetSpec, Spec, Upkeep, Verdict
from ..refusals import inference_only
from .basic_block import basic_block
from .bottleneck import bottleneck
from .conv_bn_act import DTYPES, conv_bn_act, elements, nbytes, prepare
from .net import elements as elements_of_net
from .net import nbytes as nbytes_of_net
from .net import net
from .net import prepare as prepare_net
from .profiling import is_running, profiled
from .stem import stem


def available() -> Verdict:
    """Is oneDNN built into this torch and switched on?"""
    if not torch._C._has_mkldnn:
        return Verdict.no("a torch built with oneDNN", "one without", "install an x86-64 or AArch64 build of torch")
    if not torch._C._get_mkldnn_enabled():
        return Verdict.no("oneDNN switched on", "torch.backends.mkldnn.enabled = False", "set it to True")
    return YES


def _supports(spec: Spec | NetSpec) -> Verdict:
    inference = inference_only(spec, DTYPES)
    if not inference:
        return inference
    if spec.h * spec.w == 0:
        return Verdict.no("an image with pixels", f"{spec.h}x{spec.w}", "use a larger image")
    return Verdict.yes()


def _impl(
    name: str,
    run: Callable[[Any, Any, Any], Tensor | Verdict],
    prepare: Callable[[Any, Any, list[Any]], Any],
    upkeep: Upkeep,
) -> Impl:
    """An output without elements (an empty batch) has no primitive: there is nothing to prepare and nothing to run."""

    def prepare_some(call: Any, spec: Any, earlier: list[Any]) -> Any:
        return prepare(call, spec, _some(earlier)) if all(spec.out_shape()) else None

    def run_some(call: Any, spec: Any, state: Any) -> Tensor | Verdict:
        if state is None:
            return call.x.new_empty(spec.out_shape())
        return profiled(spec, lambda: run(call, spec, state)) if is_running() else run(call, spec, state)

    kept = Upkeep(
        lambda call, spec, earlier: upkeep.elements(call, spec, _some(earlier)) if all(spec.out_shape()) else 0,
        lambda states: upkeep.nbytes(_some(states)),
    )
    note = "BN folded, fused, packed weights"
    return Impl(name, "onednn", 10, _supports, run_some, prepare_some, ("cpu",), note, upkeep=kept)


def _some(states: list[Any]) -> list[Any]:
    return [state for state in states if state is not None]


_PACKED = Upkeep(elements, nbytes)
IMPLS = (
    _impl("conv_bn_act", conv_bn_act, prepare, _PACKED),
    _impl("stem", stem, prepare, _PACKED),
    _impl("bottleneck", bottleneck, prepare, _PACKED),
    _impl("basic_block", basic_block, prepare, _PACKED),
    _impl("net", net, prepare_net, Upkeep(elements_of_net, nbytes_of_net)),
)
