"""The paper's plain block and CIFAR net (:mod:`resnet_fast.paper_nets`), fused."""

import torch
from torch import Tensor

from .. import ops
from .. import paper_nets as stock
from ..calls import Call
from .fused import Fused, conv_record, counts, norm_record
from .stem import Net


class PlainBlock(Fused, stock.PlainBlock):
    """Two 3x3 convolutions without a shortcut, each one op ``conv_bn_act``."""

    stock_class = stock.PlainBlock
    op = "conv_bn_act"
    layers = (("conv1", "bn1"), ("conv2", "bn2"))

    def forward(self, x: Tensor) -> Tensor:
        return self.stock_forward(x) if torch.jit.is_scripting() else self.fused_forward(x)

    @torch.jit.unused
    def fused_forward(self, x: Tensor) -> Tensor:
        """The two ops, or the stock forward with the reason counted."""
        if self.runs_stock(x):
            return stock.PlainBlock.forward(self, x)
        for call in self.calls(x):
            x = ops.run(call._replace(x=x), self.backend)
        return x

    def parts(self, x: Tensor) -> tuple[Call, ...] | None:
        """The two calls, as parts of a :class:`~resnet_fast.calls.NetCall`; None if a norm counts batches."""
        return None if any([counts(getattr(self, norm)) for _, norm in self.layers]) else self.calls(x)

    def calls(self, x: Tensor) -> tuple[Call, ...]:
        """The two calls, both with the input ``x``."""
        pairs = [(conv_record(getattr(self, conv)), norm_record(getattr(self, norm))) for conv, norm in self.layers]
        return tuple([Call("conv_bn_act", x, (conv,), (norm,)) for conv, norm in pairs])


class CifarResNet(Net, stock.CifarResNet):
    """The CIFAR net around fused blocks; its first convolution is followed by no pooling."""

    stock_class = stock.CifarResNet
    op = "conv_bn_act"
    stages = ("layer1", "layer2", "layer3")
    per_image = Net.per_image | {stock.PadShortcut}
    pooled = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.stock_forward(x)
        return self.net_forward(x, self.layers_forward, self.head_forward)

    @torch.jit.unused
    def layers_forward(self, x: Tensor) -> Tensor:
        """conv1, layer1 … layer3, global average pooling, fc."""
        x = self.stem_forward(x)
        return self.head_forward(self.layer3(self.layer2(self.layer1(x))))

    @torch.jit.unused
    def head_forward(self, x: Tensor) -> Tensor:
        """Global average pooling and fc."""
        return self.fc(torch.flatten(self.avgpool(x), 1))
