"""The only argument check, and the step from a call to its Spec.

Everything below (``dispatch/``, backends, kernels) trusts what passes here. A refusal is a
:class:`~resnet_fast.errors.UserError`: expected, got, what to do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import flags
from ..calls import BlockCall, Call, Conv, ConvBnActCall, NetCall, Norm, StemCall
from ..errors import UserError
from ..spec import BlockSpec, ConvSpec, Epilogue, NetSpec, Spec

_KEEP = 4096
_specs: dict[Any, Spec | NetSpec] = {}


def spec_of(call: Call | NetCall, grad: bool) -> Spec | NetSpec:
    """Check a call and give its Spec. Calls of a shape that was seen before cost one dictionary look-up."""
    key = (_key(call), grad, flags.TF32.enabled())
    spec = _specs.get(key)
    if spec is None:
        spec = check(call, grad)
        if len(_specs) >= _KEEP:
            _specs.clear()
        _specs[key] = spec
    return spec


def _key(call: Call | NetCall) -> tuple[Any, ...]:
    """All that :func:`check` looks at: shapes, strides, dtypes, devices and the numbers of the call."""
    x = call.x
    parts: list[Any] = [type(call), x.shape, x.dtype, x.device, x.stride(), call.numbers()]
    for t in call.parameters():
        parts.append(None if t is None else (t.shape, t.dtype, t.device, t.stride() if t.dim() == 4 else None))
    return tuple(parts)


class At(NamedTuple):
    """Where a layer stands: what is known of its input. Inside a block or a net there is no tensor yet."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> At:
        return At(tuple(x.shape), layout_of(x) if x.dim() == 4 else "", x.dtype, x.device)

    def after(self, spec: ConvSpec | BlockSpec) -> At:
        """Behind a layer of that spec."""
        last = spec.main[-1] if isinstance(spec, BlockSpec) else spec
        return At((last.n, last.co, *last.out_hw()), spec.layout, self.dtype, self.device)


def check(call: Call | NetCall, grad: bool = False) -> Spec | NetSpec:
    """Raise UserError where the call makes no sense, else describe it."""
    at = At.of(call.x)
    _check_x(at, call.op)
    if isinstance(call, NetCall):
        specs: list[ConvSpec | BlockSpec] = []
        for part in call.parts:
            specs.append(_check_part(part, at, grad))
            at = at.after(specs[-1])
        return NetSpec(tuple(specs))
    return _check_part(call, at, grad)


def _check_part(call: ConvBnActCall | StemCall | BlockCall, at: At, grad: bool) -> ConvSpec | BlockSpec:
    if isinstance(call, BlockCall):
        return _check_block(call, at, grad)
    if isinstance(call, StemCall):
        return _check_stem(call, at, grad)
    epilogue = Epilogue(call.relu, call.residual is not None, _has_norm(call.norm))
    spec = _check_conv(at, call.conv, call.norm, epilogue, grad, "conv_bn_act")
    if call.residual is not None:
        _same(call.residual, (spec.n, spec.co, spec.ho, spec.wo), at, "conv_bn_act: residual")
    return spec


def _has_norm(norm: Norm) -> bool:
    return norm.batch_stats or any(t is not None for t in norm.tensors())


def _shape(t: Tensor | At) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _check_x(x: At, where: str) -> None:
    if len(x.shape) != 4:
        raise UserError(f"{where}: x with 4 dimensions (N, C, H, W)", _shape(x), "add the missing ones with unsqueeze")
    if not x.dtype.is_floating_point:
        raise UserError(
            f"{where}: a floating-point x", _shape(x), "convert and normalise it first, for example x.float() / 255"
        )


def _check_norm(norm: Norm, channels: int, x: At, where: str) -> None:
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


def _check_conv(at: At, conv: Conv, norm: Norm, epilogue: Epilogue, grad: bool, where: str) -> ConvSpec:
    """Check one convolution and its norm; the spec's layout is what the reference would return."""
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
    n, c, h, width = at.shape
    co, cig, r, s = w.shape
    if w.numel() == 0:
        raise UserError(f"{where}: a weight with elements", _shape(w), "use a Conv2d's weight")
    if conv.groups < 1 or co % conv.groups:
        raise UserError(
            f"{where}: groups of at least 1 that divide the {co} output channels",
            f"groups={conv.groups}",
            "check the convolution's attributes",
        )
    if c != cig * conv.groups:
        hint = (
            "x looks like NHWC: permute it to (N, C, H, W)"
            if width == cig * conv.groups
            else "match x to the first convolution"
        )
        raise UserError(
            f"{where}: x with {cig * conv.groups} channels in dimension 1 (groups={conv.groups}, Co={co})",
            f"x of shape {at.shape}",
            hint,
        )
    if conv.bias is not None and (conv.bias.shape != (co,) or conv.bias.device != at.device):
        raise UserError(
            f"{where}: a bias of shape ({co},) on {at.device}",
            _shape(conv.bias),
            f"match it to the weight, or call model.to({str(at.device)!r})",
        )
    _check_norm(norm, co, at, where)
    spec = ConvSpec(
        n, h, width, c, co, r, s, conv.stride, conv.padding, conv.dilation, conv.groups,
        str(at.dtype).removeprefix("torch."), "nhwc" if "nhwc" in (at.layout, layout_of(w)) else "nchw",
        epilogue, norm.batch_stats, grad, at.dtype == torch.float32 and flags.TF32.enabled(), bool(norm.sync),
    )  # fmt: skip
    if spec.ho < 1 or spec.wo < 1:
        raise UserError(
            f"{where}: an image of at least {conv.dilation[0] * (r - 1) + 1 - 2 * conv.padding[0]}"
            f"x{conv.dilation[1] * (s - 1) + 1 - 2 * conv.padding[1]} pixels for a {r}x{s} filter",
            f"{h}x{width}",
            "use a larger image",
        )
    values = n * spec.ho * spec.wo
    if norm.batch_stats and values == 1 and not norm.sync:
        raise UserError(
            f"{where}: more than one value per channel for batch statistics",
            f"an output of {(n, co, spec.ho, spec.wo)}",
            "use a larger batch or image, or model.eval()",
        )
    return spec


def _same(t: Tensor, shape: tuple[int, ...], x: At, what: str) -> None:
    if tuple(t.shape) != shape or t.dtype != x.dtype or t.device != x.device:
        raise UserError(
            f"{what} of shape {shape} {str(x.dtype).removeprefix('torch.')} on {x.device}",
            _shape(t),
            "the shortcut must match the output",
        )


def _check_stem(call: StemCall, at: At, grad: bool) -> ConvSpec:
    pool = call.pool
    if pool.kernel < 1 or pool.stride < 1 or pool.padding < 0 or 2 * pool.padding > pool.kernel:
        raise UserError(
            "stem: a pooling kernel and stride >= 1 and padding <= kernel/2", repr(tuple(pool)), "ResNet's is (3, 2, 1)"
        )
    epilogue = Epilogue(relu=True, norm=_has_norm(call.norm), pool=(pool.kernel, pool.stride, pool.padding))
    spec = _check_conv(at, call.conv, call.norm, epilogue, grad, "stem")
    if min(spec.out_hw()) < 1:
        raise UserError(
            f"stem: an image that {pool.kernel}x{pool.kernel} pooling fits", f"{spec.h}x{spec.w}", "use a larger image"
        )
    return spec


def _check_block(call: BlockCall, at: At, grad: bool) -> BlockSpec:
    op, main, behind = call.op, call.main(), at
    if call.projection and call.shortcut is not None:
        raise UserError(f"{op}: a projection or a given shortcut", "both", "drop one")
    convs = []
    for i, (conv, norm) in enumerate(main):
        epilogue = Epilogue(True, i == len(main) - 1, _has_norm(norm))
        convs.append(_check_conv(behind, conv, norm, epilogue, grad, f"{op}: conv{i + 1}"))
        behind = behind.after(convs[-1])
    kind = "identity"
    if call.projection:
        conv, norm = call.convs[-1], call.norms[-1]
        convs.append(_check_conv(at, conv, norm, Epilogue(norm=_has_norm(norm)), grad, f"{op}: projection"))
        got, kind = at.after(convs[-1]).shape, "projection"
        if got != behind.shape:
            raise UserError(
                f"{op}: a projection of shape {behind.shape}",
                str(got),
                "its stride and channels must match the block's",
            )
    elif call.shortcut is not None:
        _same(call.shortcut, behind.shape, at, f"{op}: shortcut")
        kind = "given"
    elif at.shape != behind.shape:
        raise UserError(
            f"{op}: an output of the input's shape {at.shape} to add it to",
            str(behind.shape),
            "give the block a projection",
        )
    return BlockSpec(op, tuple(convs), kind)


def layout_of(t: Tensor) -> str:
    """``nhwc`` or ``nchw``, as ATen's ``suggest_memory_format`` reads a 4-d tensor's strides.

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
