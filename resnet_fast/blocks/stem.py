"""The first layers of a net as one op, and how a whole net runs around its fused blocks.

An ImageNet ResNet starts with conv 7x7/2, BN, ReLU and max-pool 3x3/2 (He et al. 2015, Table 1): the op ``stem``. A
CIFAR net has no pooling there: the op ``conv_bn_act``.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import resnet as stock
from torchvision.ops.misc import FrozenBatchNorm2d

from .. import ops
from ..calls import Call, NetCall, Pool
from ..dispatch import record, select
from . import graph, unfused
from . import stage as fused_stage
from .fused import Fused, child, conv_record, counts, is_altered, norm_record, obstacle, untraceable

STAGES = (nn.Sequential, fused_stage.Sequential)


class Net(Fused):
    """A stock ResNet: fused stem, NHWC kept from end to end in eval, large CPU batches in cache-sized tiles."""

    op = "stem"
    part = "conv1"
    layers = (("conv1", "bn1"),)
    stages: tuple[str, ...] = ("layer1", "layer2", "layer3", "layer4")
    pooled = True
    inner_methods: ClassVar[frozenset[str]] = frozenset()  # of the net, which a call of all layers at once passes by
    per_image: ClassVar[frozenset[type[nn.Module]]] = frozenset(
        {*STAGES, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, nn.Identity, nn.ReLU}
        | {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Linear, nn.Dropout, nn.Flatten}
    )

    @torch.jit.unused
    def stock_net(self, x: Tensor) -> Tensor:
        """The stock net's forward, around whatever its blocks then do."""
        return getattr(self.stock_class, self.stock_methods[0])(self, x)

    def stem_forward(self, x: Tensor) -> Tensor:
        """maxpool(relu(bn1(conv1(x)))) as one op call, or layer by layer with the reason counted."""
        if self.runs_stock(x):
            for name in ("conv1", "bn1", *self.acts, *(("maxpool",) if self.pooled else ())):
                x = getattr(self, name)(x)
            return x
        return ops.run(self.stem_call(x), self.backend)

    def stem_call(self, x: Tensor) -> Call:
        """The first layers as a call."""
        convs, norms = (conv_record(self.conv1),), (norm_record(self.bn1),)
        if not self.pooled:
            return Call("conv_bn_act", x, convs, norms)
        pool: Any = self.maxpool
        return Call("stem", x, convs, norms, pool=Pool(_int(pool.kernel_size), _int(pool.stride), _int(pool.padding)))

    def unfusable(self) -> str:
        reason = super().unfusable()
        if reason or not self.pooled:
            return reason
        pool: Any = child(self, "maxpool")
        if type(pool) is not nn.MaxPool2d or is_altered(pool):
            return obstacle("maxpool to be a plain square MaxPool2d", pool)
        kernel, stride, padding, dilation = map(_int, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
        fits = min(kernel, stride) >= 1 and 0 <= 2 * padding <= kernel and dilation == 1
        if not fits or pool.ceil_mode or pool.return_indices:
            got = f"{pool}, ceil_mode={pool.ceil_mode}, return_indices={pool.return_indices}"
            return f"expected maxpool to be a plain square MaxPool2d, got {got}; it runs unfused"
        return ""

    def net_forward(self, x: Tensor, forward: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]) -> Tensor:
        """``forward(x)`` the fast way: a replay (:mod:`.graph`) where ``accelerate(…, cuda_graph=True)`` asked for it.

        ``head``: what follows the last stage.
        """
        if not torch.compiler.is_compiling():
            others = unfused.of(self)
            if others and not untraceable(x):
                unfused.count(others)
            if self.__dict__.get(graph.FLAG):
                return graph.run(self, x, lambda x: self.eager_forward(x, forward, head))
        return self.eager_forward(x, forward, head)

    def eager_forward(self, x: Tensor, forward: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]) -> Tensor:
        """``forward(x)``; in plain eval with ``x`` in NHWC, in tiles of the batch, all up to ``head`` in one call."""
        if untraceable(x):
            return self.stock_net(x)
        reason = self.watched.changed()
        if reason:
            record.stock(self, self.op, reason)
            return self.stock_net(x)
        if torch.compiler.is_compiling() or x.dim() != 4 or self.has_other_methods():
            return forward(x)
        if (torch.is_grad_enabled() or self.training) and select.trains_nhwc(x.device.type, x.dtype, self.backend):
            return forward(x.contiguous(memory_format=torch.channels_last))
        if torch.is_grad_enabled():
            return forward(x)
        if self.training or not select.prefers_nhwc(x.device.type, self.backend):
            return forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        if not ops.is_plain_inference(x):
            return forward(x)
        parts = self.parts(x)
        n, _, h, w = x.shape
        if parts is None:
            tile = n
            if n > 1 and not self.unfusable() and self.images_are_independent():
                tile = self.tile(n, self.largest_activation(h, w), x)
            return forward(x) if tile == n else torch.cat([forward(part) for part in x.split(tile)])
        for segment, tile in self.segments(parts, x) if n > 1 else [(parts, 1)]:
            tiles = list(ops.infer_tiles(NetCall(x, segment), tile, self.backend))
            x = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        return head(x)

    def has_other_methods(self) -> bool:
        """Was a method replaced, on this net or its class, that a call of all layers at once would pass by?"""
        return bool(self.inner_methods) and not (self.is_own() and self.inner_methods.isdisjoint(self.__dict__))

    def tile(self, n: int, elements: int, x: Tensor) -> int:
        return select.batch_tile(n, elements, x.dtype, x.device.type, self.backend)

    def segments(self, parts: tuple[Any, ...], x: Tensor) -> list[tuple[tuple[Any, ...], int]]:
        """Runs of parts, each with the number of images to send through it at a time.

        Later parts have smaller activations and larger weights: more images at a time read the weights less often.
        """
        n, c, h, w = x.shape
        tiles = []
        for part in parts:
            largest = c * h * w
            for conv, _ in part.main():
                c, h, w = conv.weight.shape[0], -(-h // conv.stride[0]), -(-w // conv.stride[1])
                largest = max(largest, c * h * w)
            if part.pool is not None:
                h, w = -(-h // part.pool.stride), -(-w // part.pool.stride)
            tiles.append(self.tile(n, largest, x))
        found: list[tuple[tuple[Any, ...], int]] = []
        start = 0
        for i in range(1, len(parts) + 1):
            if i == len(parts) or min(tiles[i:]) > min(tiles[start:]):
                found.append((parts[start:i], min(tiles[start:])))
                start = i
        return found

    def parts(self, x: Tensor) -> tuple[Any, ...] | None:
        """Stem and blocks as the parts of one call; None unless all are plain, unwatched and treat images apart."""
        children = self._modules
        if self.unfusable() or counts(children["bn1"]):
            return None
        found: list[Any] = [self.stem_call(x)]
        for name in self.stages:
            stage = child(self, name)
            if type(stage) not in STAGES or is_altered(stage) or not fused_stage.is_own():
                return None
            for block in stage._modules.values():
                if not isinstance(block, Fused) or is_altered(block) or not block.is_own() or block.unfusable():
                    return None
                parts = block.parts(x)
                if parts is None:
                    return None
                found += parts
        if any([part.batch_stats for part in found]):
            return None
        inner = {"conv1", "bn1", *self.acts, "maxpool", *self.stages}
        head = [m for name, part in children.items() if name not in inner and part is not None for m in part.modules()]
        if not all([type(m) in self.per_image and not m.training and not is_altered(m) for m in head]):
            return None
        return tuple(found)

    def largest_activation(self, h: int, w: int) -> int:
        """Elements per image of the largest tensor between two layers: after the stem's convolution or in stage 1."""
        conv: Any = self.conv1
        ho, wo = -(-h // conv.stride[0]), -(-w // conv.stride[1])
        shrink = _int(self.maxpool.stride) ** 2 if self.pooled else 1
        first = next(getattr(self, self.stages[0]).children(), None)
        widest = (
            max((m.weight.shape[0] for m in first.modules() if isinstance(m, nn.Conv2d)), default=0) if first else 0
        )
        return ho * wo * max(conv.out_channels, widest // shrink)

    def images_are_independent(self) -> bool:
        """Is the net nothing but layers that are known to treat every image by itself, so that a batch may be split?

        A hook would see parts of the batch, a replaced layer might mix images, a norm in training does, and random
        numbers would be drawn in another order.
        """
        for m in self.modules():
            if m is not self and (
                m.training or is_altered(m) or not (isinstance(m, Fused) or type(m) in self.per_image)
            ):
                return False
            if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is None:
                return False
        stages: list[Any] = [child(self, s) for s in self.stages]
        return all(
            type(s) in STAGES and all(isinstance(b, Fused) and b.is_own() and not b.unfusable() for b in s)
            for s in stages
        )


def _int(value: Any) -> int:
    """A square window's side; -1 for a window that is not square."""
    if isinstance(value, int):
        return value
    return value[0] if isinstance(value, (tuple, list)) and len(set(value)) == 1 and len(value) <= 2 else -1


class ResNet(Net, stock.ResNet):
    """torchvision's ResNet around fused blocks."""

    stock_class = stock.ResNet
    stock_methods = ("_forward_impl",)

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.stock_forward(x)
        return self.net_forward(x, self.layers_forward, self.head_forward)

    @torch.jit.unused
    def layers_forward(self, x: Tensor) -> Tensor:
        """conv1 … layer4, global average pooling, fc."""
        x = self.stem_forward(x)
        return self.head_forward(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    @torch.jit.unused
    def head_forward(self, x: Tensor) -> Tensor:
        """Global average pooling and fc."""
        return self.fc(torch.flatten(self.avgpool(x), 1))
