"""``conv_bn_act``: y = act(bn(conv(x, weight) + bias) + residual).

x (N, Ci, H, W)   weight (Co, Ci/groups, R, S)   residual, y (N, Co, Ho, Wo)
"""

from __future__ import annotations

from typing import Any

from ..calls import Call, Conv, Norm
from ..spec import ConvSpec, Epilogue, conv_out
from .check import LayerInput, check_conv, check_same, has_norm
from .op import Op
from .register import register

NORM_SCHEMA = (
    "Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, Tensor? running_var, "
    "bool batch_stats, float momentum, float eps"
)
CONV_SCHEMA = "Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups"


def bind_layer(args: tuple[Any, ...]) -> tuple[tuple[Conv], tuple[Norm]]:
    """Return the arguments of CONV_SCHEMA and NORM_SCHEMA as the ``convs`` and ``norms`` of a call."""
    weight, bias, stride, padding, dilation, groups, *norm = args
    return (Conv(weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups),), (Norm(*norm),)


def flatten_layer(call: Call) -> tuple[Any, ...]:
    """Return the arguments of CONV_SCHEMA and NORM_SCHEMA."""
    return *call.convs[0], *call.norms[0][:7]


def _bind(x: Any, *args: Any) -> Call:
    *layer, relu, residual = args
    return Call("conv_bn_act", x, *bind_layer(tuple(layer)), residual, relu)


def _flatten(call: Call) -> tuple[Any, ...]:
    return call.x, *flatten_layer(call), call.relu, call.added


def _check(call: Call, at: LayerInput, grad: bool) -> ConvSpec:
    (conv,), (norm,), residual = call.convs, call.norms, call.added
    epilogue = Epilogue(call.relu, residual is not None, has_norm(norm))
    spec = check_conv(at, conv, norm, epilogue, grad, "conv_bn_act")
    if residual is not None:
        check_same(residual, spec.out_shape(), at, "conv_bn_act: residual")
    return spec


def conv_flops(x: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, tuple[int, int, int, int]]:
    """Return FLOPs and output shape of one convolution from shapes, which may be symbolic."""
    n, _, h, w = x
    co, cig, r, s = weight
    ho = conv_out(h, r, stride[0], padding[0], dilation[0])
    wo = conv_out(w, s, stride[1], padding[1], dilation[1])
    return 2 * n * ho * wo * co * cig * r * s, (n, co, ho, wo)


def layer_flops(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of an op of one convolution from shapes."""
    return conv_flops(x, weight, stride, padding, dilation)[0]


SCHEMA = f"Tensor x, {CONV_SCHEMA}, {NORM_SCHEMA}, bool relu, Tensor? residual=None"
register(Op("conv_bn_act", SCHEMA, _bind, _flatten, _check, layer_flops))
