"""``stem``: y = maxpool(relu(bn(conv(x)))), the first layers of an ImageNet ResNet (He et al. 2015, Table 1)."""

from __future__ import annotations

from typing import Any

from ..calls import Call, Pool
from ..errors import UserError
from ..spec import ConvSpec, Epilogue
from .check import LayerInput, check_conv, has_norm
from .conv_bn_act import CONV_SCHEMA, NORM_SCHEMA, bind_layer, flatten_layer, layer_flops
from .op import Op
from .register import register


def _bind(x: Any, *args: Any) -> Call:
    *layer, pool = args
    return Call("stem", x, *bind_layer(tuple(layer)), pool=Pool(*pool))


def _pool(call: Call) -> Pool:
    assert call.pool is not None
    return call.pool


def _flatten(call: Call) -> tuple[Any, ...]:
    return call.x, *flatten_layer(call), list(_pool(call))


def _check(call: Call, at: LayerInput, grad: bool) -> ConvSpec:
    kernel, stride, padding = _pool(call)
    if kernel < 1 or stride < 1 or padding < 0 or 2 * padding > kernel:
        raise UserError(
            "stem: a pooling kernel and stride >= 1 and padding <= kernel/2",
            repr((kernel, stride, padding)),
            "ResNet's is (3, 2, 1)",
        )
    epilogue = Epilogue(relu=True, norm=has_norm(call.norms[0]), pool=(kernel, stride, padding))
    spec = check_conv(at, call.convs[0], call.norms[0], epilogue, grad, "stem")
    if min(spec.out_hw()) < 1:
        raise UserError(
            f"stem: an image that {kernel}x{kernel} pooling fits", f"{spec.h}x{spec.w}", "use a larger image"
        )
    return spec


register(Op("stem", f"Tensor x, {CONV_SCHEMA}, {NORM_SCHEMA}, int[3] pool", _bind, _flatten, _check, layer_flops))
