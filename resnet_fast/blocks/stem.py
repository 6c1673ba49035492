"""The first layers of a net as one op.

An ImageNet ResNet starts with conv 7x7/2, BN, ReLU and max-pool 3x3/2 (He et al. 2015, Table 1): the op ``stem``. A
CIFAR net has no pooling there: the op ``conv_bn_act``.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from .. import ops
from ..calls import Call, Pool
from .children import child, conv_record, counts, norm_record
from .fused import Fused
from .obstacles import is_altered, obstacle


class Stem(Fused):
    """A net whose first layers run as the op ``op``: ``stem`` if they are ``pooled``, else ``conv_bn_act``."""

    op = "stem"
    part = "conv1"
    layers = (("conv1", "bn1"),)
    pooled: ClassVar[bool] = True

    def stem_forward(self, x: Tensor) -> Tensor:
        """Return maxpool(relu(bn1(conv1(x)))) from one op call, or layer by layer with the reason counted."""
        if self.runs_stock(x):
            for name in ("conv1", "bn1", *self.acts, *(("maxpool",) if self.pooled else ())):
                x = getattr(self, name)(x)
            return x
        return ops.run(self.stem_call(x), self.backend)

    def stem_call(self, x: Tensor) -> Call:
        """Return the first layers as a call."""
        convs, norms = (conv_record(self.conv1),), (norm_record(self.bn1),)
        if not self.pooled:
            return Call("conv_bn_act", x, convs, norms)
        return Call("stem", x, convs, norms, pool=pool_record(self.maxpool))

    def own_modules(self) -> list[nn.Module]:
        return [m for name in ("conv1", "maxpool") if (m := self._modules.get(name)) is not None]

    def stem_parts(self, x: Tensor) -> tuple[Call, ...] | None:
        """Return the first layers as parts of a :class:`~resnet_fast.calls.NetCall`.

        None if a norm counts batches, or a layer of them is not fused.
        """
        return None if counts(self._modules["bn1"]) else (self.stem_call(x),)

    def unfusable(self) -> str:
        reason = super().unfusable()
        return reason if reason or not self.pooled else pool_obstacle(child(self, "maxpool"))


def pool_record(pool: Any) -> Pool:
    """Return a pooling that has no :func:`pool_obstacle`."""
    return Pool(side(pool.kernel_size), side(pool.stride), side(pool.padding))


def pool_obstacle(pool: Any) -> str:
    """Return why this pooling cannot be part of the op ``stem``; empty if it can."""
    if type(pool) is not nn.MaxPool2d or is_altered(pool):
        return obstacle("maxpool to be a plain square MaxPool2d", pool)
    kernel, stride, padding = side(pool.kernel_size), side(pool.stride), side(pool.padding)
    fits = min(kernel, stride) >= 1 and 0 <= 2 * padding <= kernel and side(pool.dilation) == 1
    if fits and not pool.ceil_mode and not pool.return_indices:
        return ""
    got = f"{pool}, ceil_mode={pool.ceil_mode}, return_indices={pool.return_indices}"
    return f"expected maxpool to be a plain square MaxPool2d, got {got}; it runs unfused"


def side(window: Any) -> int:
    """Return the side of a square window in pixels; -1 for a window that is not square."""
    if isinstance(window, int):
        return window
    return window[0] if isinstance(window, (tuple, list)) and len(set(window)) == 1 and len(window) <= 2 else -1
