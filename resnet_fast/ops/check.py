"""Check the arguments of a call, with the checks that the ops share.

Everything below (``dispatch/``, backends, kernels) relies on them. A refusal is a
:class:`~resnet_fast.errors.UserError`: expected, got, what to do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import float32, invariance
from ..calls import Conv, Norm
from ..errors import UserError
from ..spec import ConvSpec, Epilogue, Spec


class LayerInput(NamedTuple):
    """What is known of a layer's input. Inside a block or a net there is no tensor yet."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> LayerInput:
        """A tensor as an input."""
        return LayerInput(tuple(x.shape), layout_of(x) if x.dim() == 4 else "", x.dtype, x.device)

    def after(self, spec: Spec) -> LayerInput:
        """The output of a layer or block as the next one's input."""
        return LayerInput(spec.out_shape(), spec.layout, self.dtype, self.device)


def has_norm(norm: Norm) -> bool:
    """Return whether the norm does anything."""
    return norm.batch_stats or any(t is not None for t in norm.tensors())


def _shape(t: Tensor | LayerInput) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def check_x(x: LayerInput, where: str) -> None:
    """Check that the input of an op is a batch of floating-point images."""
    if len(x.shape) != 4:
        raise UserError(f"{where}: x with 4 dimensions (N, C, H, W)", _shape(x), "add the missing ones with unsqueeze")
    if not x.dtype.is_floating_point:
        raise UserError(
            f"{where}: a floating-point x", _shape(x), "convert and normalise it first, for example x.float() / 255"
        )


def _check_norm(norm: Norm, channels: int, x: LayerInput, where: str) -> None:
    for name, t in zip(("weight", "bias", "running_mean", "running_var"), norm.tensors(), strict=True):
        if t is None:
            continue
        if t.shape != (channels,):
            raise UserError(f"{where}: BatchNorm {name} of shape ({channels},)", _shape(t), "match it to the channels")
        if t.device != x.device:
            raise UserError(
                f"{where}: BatchNorm {name} on {x.device}, where x is", _shape(t), f"call model.to({str(x.device)!r})"
            )
    dtypes = {t.dtype for t in norm.tensors() if t is not None}
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    if len(dtypes) > 1 or not dtypes <= ({x.dtype, torch.float32} if narrow else {x.dtype}):
        raise UserError(
            f"{where}: BatchNorm tensors of one dtype, x's (or float32 under a 16-bit x)",
            f"{', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))} under x {_shape(x)}",
            f"call model.to({x.dtype})",
        )
    if (norm.mean is None) != (norm.var is None):
        raise UserError(f"{where}: running_mean and running_var, both or neither", "one of them", "give both")
    if not norm.eps >= 0:  # NaN too
        raise UserError(f"{where}: eps >= 0", repr(norm.eps), "BatchNorm's usual value is 1e-5")


def check_conv(at: LayerInput, conv: Conv, norm: Norm, epilogue: Epilogue, grad: bool, where: str) -> ConvSpec:
    """Check one convolution and its norm, and return its spec, in the layout that the reference would return.

    Args:
        at: its input.
        epilogue: what follows it.
        grad: whether autograd needs the graph of the call.
        where: the op, and the place in it, for error messages.
    """
    _check_weight(at, conv, where)
    _check_channels(at, conv, where)
    n, c, h, w = at.shape
    co, _, r, s = conv.weight.shape
    _check_norm(norm, co, at, where)
    spec = ConvSpec(
        n, h, w, c, co, r, s, conv.stride, conv.padding, conv.dilation, conv.groups,
        str(at.dtype).removeprefix("torch."), "nhwc" if "nhwc" in (at.layout, layout_of(conv.weight)) else "nchw",
        epilogue, norm.batch_stats, grad, float32.rounds(at.device, at.dtype), bool(norm.sync), invariance.is_on(),
    )  # fmt: skip
    _check_invariant(spec, where)
    _check_output(spec, where)
    return spec


def _check_invariant(spec: ConvSpec, where: str) -> None:
    """Check that a call in batch-invariant mode is inference: training sums over the batch."""
    if spec.invariant and (spec.batch_stats or spec.grad):
        got = "statistics of the batch" if spec.batch_stats else "a call that autograd records"
        raise UserError(
            f"{where}: inference in batch-invariant mode", got,
            f"call model.eval() and use torch.inference_mode(); to train, {invariance.TODO}",
        )  # fmt: skip


def _check_weight(at: LayerInput, conv: Conv, where: str) -> None:
    """Check the weight, and the numbers of the convolution."""
    w = conv.weight
    if w.dim() != 4:
        raise UserError(f"{where}: a weight of 4 dimensions (Co, Ci/groups, R, S)", _shape(w), "use a Conv2d's weight")
    if w.device != at.device:
        raise UserError(f"{where}: weight on {at.device}, where x is", _shape(w), f"call model.to({str(at.device)!r})")
    if w.dtype != at.dtype and not (w.dtype == torch.float32 and at.dtype in (torch.float16, torch.bfloat16)):
        raise UserError(
            f"{where}: x and weight of one dtype (or a float32 weight under a 16-bit x)",
            f"x {_shape(at)} and weight {_shape(w)}",
            f"call x.to({w.dtype}) or model.to({at.dtype})",
        )
    for name, value, low in (("stride", conv.stride, 1), ("padding", conv.padding, 0), ("dilation", conv.dilation, 1)):
        if any(v < low for v in value):
            raise UserError(
                f"{where}: {name} of at least {low}", repr(tuple(value)), "check the convolution's attributes"
            )
    if w.numel() == 0:
        raise UserError(f"{where}: a weight with elements", _shape(w), "use a Conv2d's weight")


def _check_channels(at: LayerInput, conv: Conv, where: str) -> None:
    """Check that groups, input channels and bias match the weight."""
    co, cig = conv.weight.shape[:2]
    if conv.groups < 1 or co % conv.groups:
        raise UserError(
            f"{where}: groups of at least 1 that divide the {co} output channels",
            f"groups={conv.groups}",
            "check the convolution's attributes",
        )
    ci = cig * conv.groups
    if at.shape[1] != ci:
        nhwc = at.shape[3] == ci
        raise UserError(
            f"{where}: x with {ci} channels in dimension 1 (groups={conv.groups}, Co={co})",
            f"x of shape {at.shape}",
            "x looks like NHWC: permute it to (N, C, H, W)" if nhwc else "match x to the first convolution",
        )
    if conv.bias is not None and (conv.bias.shape != (co,) or conv.bias.device != at.device):
        raise UserError(
            f"{where}: a bias of shape ({co},) on {at.device}",
            _shape(conv.bias),
            f"match it to the weight, or call model.to({str(at.device)!r})",
        )


def _check_output(spec: ConvSpec, where: str) -> None:
    """Check that the output has pixels, and enough of them for batch statistics."""
    if spec.ho < 1 or spec.wo < 1:
        raise UserError(
            f"{where}: an image of at least {spec.dilation[0] * (spec.r - 1) + 1 - 2 * spec.padding[0]}"
            f"x{spec.dilation[1] * (spec.s - 1) + 1 - 2 * spec.padding[1]} pixels for a {spec.r}x{spec.s} filter",
            f"{spec.h}x{spec.w}",
            "use a larger image",
        )
    if spec.batch_stats and spec.gemm_m == 1 and not spec.sync:
        raise UserError(
            f"{where}: more than one value per channel for batch statistics",
            f"an output of {(spec.n, spec.co, spec.ho, spec.wo)}",
            "use a larger batch or image, or model.eval()",
        )


def check_same(t: Tensor, shape: tuple[int, ...], x: LayerInput, what: str) -> None:
    """Check that a tensor to add has the output's shape, and the dtype and device of ``x``."""
    if tuple(t.shape) != shape or t.dtype != x.dtype or t.device != x.device:
        raise UserError(
            f"{what} of shape {shape} {str(x.dtype).removeprefix('torch.')} on {x.device}",
            _shape(t),
            "the shortcut must match the output",
        )


def layout_of(t: Tensor) -> str:
    """Return ``nhwc`` or ``nchw``, as ATen's ``suggest_memory_format`` reads a 4-d tensor's strides.

    Convolutions return channels_last when their input or weight is; a tensor with one channel or one pixel satisfies
    both formats, and its strides decide.
    """
    if t.is_contiguous() and t.shape[1] != 1 and t.shape[2] * t.shape[3] != 1:
        return "nchw"
    smallest = 0
    for d in (1, 3, 2, 0):
        size, stride = t.shape[d], t.stride(d)
        if size == 0 or stride < smallest or (d == 0 and smallest == t.stride(1)):
            return "nchw"
        smallest = stride * size if size > 1 else stride
    return "nhwc"
