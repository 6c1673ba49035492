"""A whole net around its fused blocks: the ways in which a call of it can run, and how the fastest is chosen."""

from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import resnet as stock
from torchvision.ops.misc import FrozenBatchNorm2d

from .. import invariance, ops
from ..calls import NetCall
from ..dispatch import record, select
from . import graph, head, held, unfused
from . import stage as fused_stage
from .children import child, counting_together
from .frozen import OF_ONE_NET, is_frozen, unfreeze
from .frozen_norms import is_frozen as is_frozen_norm
from .fused import Fused, runs_for_tracer
from .obstacles import is_altered, require_tensor, untraceable
from .stem import Stem, side

STAGES = (nn.Sequential, fused_stage.Sequential)


class Way(Enum):
    """A way in which a call of a whole net runs."""

    REPLAY = "from a CUDA graph, where the call allows it"
    STOCK = "the library's own forward"
    LAYERS = "stem, stages and head one after another, in the layout of the input"
    LAYERS_NHWC = "stem, stages and head one after another, in channels_last"
    WHOLE = "stem and stages in one call, in channels_last"


class Net(Stem):
    """A stock ResNet: fused stem, channels_last from end to end in eval, large CPU batches in cache-sized tiles.

    Attributes:
        stages: names of the Sequential children that hold the blocks.
        per_image: classes of layers that treat every image of a batch by itself.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3", "layer4")
    per_image: ClassVar[frozenset[type[nn.Module]]] = frozenset(
        {*STAGES, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, nn.Identity, nn.ReLU}
        | {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Linear, nn.Dropout, nn.Flatten}
    )

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles of the net get: everything but what is kept for this net alone."""
        return {name: value for name, value in self.__dict__.items() if name not in OF_ONE_NET}

    def train(self, mode: bool = True) -> Any:
        if mode:
            unfreeze(self, "train()")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        unfreeze(self, "to() or another conversion")
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        unfreeze(self, "load_state_dict()")
        super()._load_from_state_dict(*args, **kwargs)

    def net_forward(self, x: Tensor, replay: bool = True) -> Tensor:
        """Run the net by its :meth:`way`.

        Args:
            x: images (N, C, H, W).
            replay: whether the net may be replayed from a CUDA graph. Without it, the caller is that graph's recording.

        Returns:
            What the stock net returns.

        Raises:
            BackendError: in strict mode, a part of the net runs unfused; a requested backend cannot run a part.
        """
        way = self.way(x, replay)
        if way is Way.REPLAY:
            return graph.run(self, x, lambda net, x: net.net_forward(x, replay=False))
        if way is Way.STOCK:
            return getattr(self.stock_class, self.stock_methods[0])(self, x)
        if way is Way.LAYERS:
            return self.layers_forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        if x.is_cuda and way is Way.LAYERS_NHWC:
            ops.ready_to_train(self, x)
        if way is Way.LAYERS_NHWC or not ops.is_plain_inference(x):
            return self.layers_forward(x)
        parts, kept = (self.parts(x), None) if record.watched() else held.of(self, x)
        frozen = kept is not None and is_frozen(self)
        if invariance.is_on():
            if parts is None:
                return self.layers_forward(x)
            known = None if kept is None else kept.known(parts)
            return head.run(self, ops.infer_alike(NetCall(x, parts), self.backend, known, frozen))
        if parts is None:
            tile = self.independent_tile(x)
            return torch.cat([self.layers_forward(t) for t in x.split(tile)]) if tile else self.layers_forward(x)
        for segment, tile in self.segments(parts, x) if x.shape[0] > 1 else [(parts, 1)]:
            known = None if kept is None else kept.known(segment)
            tiles = list(ops.infer_tiles(NetCall(x, segment), tile, self.backend, known, frozen))
            x = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        return self.head_forward(x)

    def way(self, x: Tensor, replay: bool) -> Way:
        """Return how a call with this input runs. The first case that applies decides.

        Counts what runs its stock layers; in strict mode that raises BackendError.
        """
        compiling = torch.compiler.is_compiling()
        if replay and not compiling:
            others = unfused.of(self)
            if others and not untraceable(x):
                unfused.count(others)
            if self.__dict__.get(graph.FLAG):  # accelerate(model, cuda_graph=True)
                return Way.REPLAY
        if runs_for_tracer(x):
            return Way.STOCK
        reason = self.watched.changed()
        if reason:  # somebody replaced a function that the ops skip
            record.stock(self, self.op, reason)
            return Way.STOCK
        if compiling:  # the compiler traces every block as its op
            head.refuse_compiler()
            return Way.LAYERS
        if type(x) is not Tensor:
            require_tensor(x)
            if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                return Way.LAYERS  # a DTensor has no rule for some operations in channels_last
        if x.dim() != 4:  # an image without a batch; the layers report other shapes
            return Way.LAYERS
        if self.has_other_methods():  # a replaced method runs between the layers
            return Way.LAYERS
        device, backend = x.device, self.backend
        trains = torch.is_grad_enabled() or self.training
        if trains and select.trains_nhwc(device, x.dtype, backend):  # as the training kernels work
            return Way.LAYERS_NHWC
        if trains:  # autograd records every block; batch statistics need the whole batch
            return Way.LAYERS
        if not select.prefers_nhwc(device, backend):  # no fused backend would gain from one layout
            return Way.LAYERS
        return Way.WHOLE

    def layers_forward(self, x: Tensor) -> Tensor:
        """Run stem, stages and head one after another."""
        with counting_together():
            x = self.stem_forward(x)
            for name in self.stages:
                x = getattr(self, name)(x)
        return head.run(self, x)

    def head_forward(self, x: Tensor) -> Tensor:
        """Run what follows the last stage: global average pooling and fc."""
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def parts(self, x: Tensor) -> tuple[Any, ...] | None:
        """Return stem and blocks as the parts of one call.

        None unless all of them are plain, no hook observes them, and none depends on the batch.
        """
        children = self._modules
        if self.unfusable() or not fused_stage.is_own():
            return None
        stem = self.stem_parts(x)
        if stem is None:
            return None
        found: list[Any] = [*stem]
        for name in self.stages:
            stage = child(self, name)
            if type(stage) not in STAGES or is_altered(stage):
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

    def tile(self, n: int, elements: int, x: Tensor) -> int:
        """Return how many of ``n`` images to run at a time, given the elements of an image's largest activation."""
        return select.batch_tile(n, elements, x.dtype, x.device, self.backend)

    def segments(self, parts: tuple[Any, ...], x: Tensor) -> list[tuple[tuple[Any, ...], int]]:
        """Return consecutive runs of ``parts``, each with the number of images to run through it at a time.

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

    def independent_tile(self, x: Tensor) -> int:
        """Return how many images to run through the layers at a time; 0 to run the batch as it is."""
        n, _, h, w = x.shape
        if n <= 1 or self.unfusable() or not self.images_are_independent():
            return 0
        tile = self.tile(n, self.largest_activation(h, w), x)
        return tile if tile != n else 0

    def largest_activation(self, h: int, w: int) -> int:
        """Return the elements per image of the largest activation, in the stem or in the first stage."""
        conv: Any = self.conv1
        ho, wo = -(-h // conv.stride[0]), -(-w // conv.stride[1])
        shrink = side(self.maxpool.stride) ** 2 if self.pooled else 1
        first = next(getattr(self, self.stages[0]).children(), None)
        convs = [m for m in first.modules() if isinstance(m, nn.Conv2d)] if first else []
        widest = max((m.weight.shape[0] for m in convs), default=0)
        return ho * wo * max(conv.out_channels, widest // shrink)

    def images_are_independent(self) -> bool:
        """Return whether every layer is known to treat each image by itself, so that a batch may be split.

        A hook would see parts of the batch, a replaced layer might mix images, a norm in training does, and random
        numbers would be drawn in another order.
        """
        for m in self.modules():
            if m is not self and (
                m.training
                or is_altered(m)
                or not (isinstance(m, Fused) or type(m) in self.per_image or is_frozen_norm(m))
            ):
                return False
            if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is None:
                return False
        for name in self.stages:
            stage = child(self, name)
            if type(stage) not in STAGES:
                return False
            for block in stage:
                if not isinstance(block, Fused) or not block.is_own() or block.unfusable():
                    return False
        return True


class ResNet(Net, stock.ResNet):
    """torchvision's ResNet around fused blocks."""

    stock_class = stock.ResNet
    stock_methods = ("_forward_impl",)

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.stock_forward(x) if torch.jit.is_scripting() else self.net_forward(x)
