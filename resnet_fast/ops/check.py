"""The only argument check, and the step from a call to its Spec.

Everything below (``dispatch/``, backends, kernels) trusts what passes here. A refusal is a
:class:`~resnet_fast.errors.UserError`: expected, got, what to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calls import BlockCall, BnActCall, Call, Conv, ConvBnActCall, Norm, StemCall
from ..errors import UserError
from ..spec import BlockSpec, ConvSpec, Epilogue, PointwiseSpec, Spec

_KEEP = 4096
_specs: dict[Any, Spec] = {}


def spec_of(call: Call, grad: bool) -> Spec:
    """Check a call and give its Spec. Calls of a shape that was seen before cost one dictionary look-up."""
    key = (_key(call), grad)
    spec = _specs.get(key)
    if spec is None:
        spec = check(call, grad)
        if len(_specs) >= _KEEP:
            _specs.clear()
        _specs[key] = spec
    return spec


def _key(call: Call) -> tuple[Any, ...]:
    """All that :func:`check` looks at: shapes, strides, dtypes, devices and the numbers of the call."""
    x = call.x
    parts: list[Any] = [type(call), x.shape, x.dtype, x.device, x.stride()]
    if isinstance(call, BlockCall):
        for conv in call.convs:
            _add_conv(conv, parts)
        for norm in call.norms:
            _add_norm(norm, parts)
        parts.append(call.projection)
        _add(call.shortcut, parts)
    elif isinstance(call, StemCall):
        _add_conv(call.conv, parts)
        _add_norm(call.norm, parts)
        parts.append(call.pool)
    else:
        if isinstance(call, ConvBnActCall):
            _add_conv(call.conv, parts)
        _add_norm(call.norm, parts)
        _add(call.residual, parts)
        parts.append(call.relu)
    return tuple(parts)


def _add(t: Tensor | None, parts: list[Any]) -> None:
    parts.append(None if t is None else (t.shape, t.dtype, t.device))


def _add_conv(conv: Conv, parts: list[Any]) -> None:
    w, bias = conv.weight, conv.bias
    parts += (w.shape, w.stride(), w.dtype, w.device, conv[2:])
    if bias is not None:
        _add(bias, parts)


def _add_norm(norm: Norm, parts: list[Any]) -> None:
    parts.append(norm[4:])
    for t in norm[:4]:
        parts.append(None if t is None else (t.shape, t.dtype, t.device))


def check(call: Call, grad: bool = False) -> Spec:
    """Raise UserError where the call makes no sense, else describe it."""
    if isinstance(call, BnActCall):
        return _check_bn_act(call, grad)
    if isinstance(call, ConvBnActCall):
        epilogue = Epilogue(call.relu, call.residual is not None, _has_norm(call.norm))
        spec = _check_conv(call.x, call.conv, call.norm, epilogue, grad, "conv_bn_act")
        if call.residual is not None:
            _same(call.residual, (spec.n, spec.co, spec.ho, spec.wo), call.x, "conv_bn_act: residual")
        return spec
    if isinstance(call, StemCall):
        return _check_stem(call, grad)
    return _check_block(call, grad)


def _has_norm(norm: Norm) -> bool:
    return norm.batch_stats or any(t is not None for t in norm.tensors())


def _shape(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _check_x(x: Tensor, where: str) -> None:
    if x.dim() != 4:
        raise UserError(f"{where}: x with 4 dimensions (N, C, H, W)", _shape(x), "add the missing ones with unsqueeze")
    if not x.dtype.is_floating_point:
        raise UserError(
            f"{where}: a floating-point x", _shape(x), "convert and normalise it first, for example x.float() / 255"
        )


def _check_norm(norm: Norm, channels: int, x: Tensor, where: str) -> None:
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


def _check_conv(x: Tensor, conv: Conv, norm: Norm, epilogue: Epilogue, grad: bool, where: str) -> ConvSpec:
    """Check one convolution and its norm on input ``x``; the spec's layout is what the reference would return."""
    _check_x(x, where)
    return _check_conv_at(tuple(x.shape), layout_of(x), x, conv, norm, epilogue, grad, where)


def _check_conv_at(
    shape: tuple[int, ...],
    layout: str,
    like: Tensor,
    conv: Conv,
    norm: Norm,
    epilogue: Epilogue,
    grad: bool,
    where: str,
) -> ConvSpec:
    """As :func:`_check_conv` for an input known by its shape and layout (inside a block nothing exists yet)."""
    w = conv.weight
    if w.dim() != 4:
        raise UserError(f"{where}: a weight of 4 dimensions (Co, Ci/groups, R, S)", _shape(w), "use a Conv2d's weight")
    if w.device != like.device:
        raise UserError(
            f"{where}: weight on {like.device}, where x is", _shape(w), f"call model.to({str(like.device)!r})"
        )
    if w.dtype != like.dtype and not (w.dtype == torch.float32 and like.dtype in (torch.float16, torch.bfloat16)):
        raise UserError(
            f"{where}: x and weight of one dtype (or a float32 weight under a 16-bit x)",
            f"x {_shape(like)} and weight {_shape(w)}",
            f"call x.to({w.dtype}) or model.to({like.dtype})",
        )
    for name, value, low in (("stride", conv.stride, 1), ("padding", conv.padding, 0), ("dilation", conv.dilation, 1)):
        if any(v < low for v in value):
            raise UserError(
                f"{where}: {name} of at least {low}", repr(tuple(value)), "check the convolution's attributes"
            )
    n, c, h, width = shape
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
            f"x of shape {tuple(shape)}",
            hint,
        )
    if conv.bias is not None and (conv.bias.shape != (co,) or conv.bias.device != like.device):
        raise UserError(
            f"{where}: a bias of shape ({co},) on {like.device}",
            _shape(conv.bias),
            f"match it to the weight, or call model.to({str(like.device)!r})",
        )
    _check_norm(norm, co, like, where)
    spec = ConvSpec(
        n, h, width, c, co, r, s, conv.stride, conv.padding, conv.dilation, conv.groups,
        str(like.dtype).removeprefix("torch."), "nhwc" if "nhwc" in (layout, layout_of(w)) else "nchw",
        epilogue, norm.batch_stats, grad,
    )  # fmt: skip
    if spec.ho < 1 or spec.wo < 1:
        raise UserError(
            f"{where}: an image of at least {conv.dilation[0] * (r - 1) + 1 - 2 * conv.padding[0]}"
            f"x{conv.dilation[1] * (s - 1) + 1 - 2 * conv.padding[1]} pixels for a {r}x{s} filter",
            f"{h}x{width}",
            "use a larger image",
        )
    values = n * spec.ho * spec.wo
    if norm.batch_stats and values == 1:
        raise UserError(
            f"{where}: more than one value per channel for batch statistics",
            f"an output of {(n, co, spec.ho, spec.wo)}",
            "use a larger batch or image, or model.eval()",
        )
    return spec


def _same(t: Tensor, shape: tuple[int, ...], x: Tensor, what: str) -> None:
    if tuple(t.shape) != shape or t.dtype != x.dtype or t.device != x.device:
        raise UserError(
            f"{what} of shape {shape} {str(x.dtype).removeprefix('torch.')} on {x.device}",
            _shape(t),
            "the shortcut must match the output",
        )


def _check_bn_act(call: BnActCall, grad: bool) -> PointwiseSpec:
    x = call.x
    _check_x(x, "bn_act")
    n, c, h, w = x.shape
    _check_norm(call.norm, c, x, "bn_act")
    if call.residual is not None:
        _same(call.residual, (n, c, h, w), x, "bn_act: residual")
    if call.norm.batch_stats and n * h * w == 1:
        raise UserError("bn_act: more than one value per channel", _shape(x), "use a larger batch, or model.eval()")
    epilogue = Epilogue(call.relu, call.residual is not None, _has_norm(call.norm))
    dtype = str(x.dtype).removeprefix("torch.")
    return PointwiseSpec(n, h, w, c, dtype, layout_of(x), epilogue, call.norm.batch_stats, grad)


def _check_stem(call: StemCall, grad: bool) -> ConvSpec:
    pool = call.pool
    if pool.kernel < 1 or pool.stride < 1 or pool.padding < 0 or 2 * pool.padding > pool.kernel:
        raise UserError(
            "stem: a pooling kernel and stride >= 1 and padding <= kernel/2", repr(tuple(pool)), "ResNet's is (3, 2, 1)"
        )
    epilogue = Epilogue(relu=True, norm=_has_norm(call.norm), pool=(pool.kernel, pool.stride, pool.padding))
    spec = _check_conv(call.x, call.conv, call.norm, epilogue, grad, "stem")
    if min(spec.out_hw()) < 1:
        raise UserError(
            f"stem: an image that {pool.kernel}x{pool.kernel} pooling fits", f"{spec.h}x{spec.w}", "use a larger image"
        )
    return spec


def _check_block(call: BlockCall, grad: bool) -> BlockSpec:
    x, main = call.x, call.main()
    op = {2: "basic_block", 3: "bottleneck"}[len(main)]
    if call.projection and call.shortcut is not None:
        raise UserError(f"{op}: a projection or a given shortcut", "both", "drop one")
    _check_x(x, op)
    shape, layout = tuple(x.shape), layout_of(x)
    convs = []
    for i, (conv, norm) in enumerate(main):
        epilogue = Epilogue(True, i == len(main) - 1, _has_norm(norm))
        spec = _check_conv_at(shape, layout, x, conv, norm, epilogue, grad, f"{op}: conv{i + 1}")
        shape, layout = (spec.n, spec.co, spec.ho, spec.wo), spec.layout
        convs.append(spec)
    kind = "identity"
    if call.projection:
        conv, norm = call.convs[-1], call.norms[-1]
        epilogue = Epilogue(norm=_has_norm(norm))
        convs.append(_check_conv_at(tuple(x.shape), layout_of(x), x, conv, norm, epilogue, grad, f"{op}: projection"))
        got, kind = (convs[-1].n, convs[-1].co, convs[-1].ho, convs[-1].wo), "projection"
        if got != shape:
            raise UserError(
                f"{op}: a projection of shape {shape}", str(got), "its stride and channels must match the block's"
            )
    elif call.shortcut is not None:
        _same(call.shortcut, shape, x, f"{op}: shortcut")
        kind = "given"
    elif tuple(x.shape) != shape:
        raise UserError(
            f"{op}: an output of the input's shape {tuple(x.shape)} to add it to",
            str(shape),
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
