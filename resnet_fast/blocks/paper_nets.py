"""The paper's plain block and CIFAR net (:mod:`resnet_fast.paper_nets`), fused."""

import torch
from torch import Tensor

from .. import ops
from .. import paper_nets as stock
from ..calls import Call
from .children import conv_record, counts, norm_record
from .fused import Fused
from .net import Net


class PlainBlock(Fused, stock.PlainBlock):
    """Two 3x3 convolutions without a shortcut, each one op ``conv_bn_act``."""

    stock_class = stock.PlainBlock
    op = "conv_bn_act"
    layers = (("conv1", "bn1"), ("conv2", "bn2"))

    def forward(self, x: Tensor) -> Tensor:
        return self.stock_forward(x) if torch.jit.is_scripting() else self.fused_forward(x)

    def fused_forward(self, x: Tensor) -> Tensor:
        """Run the two ops, or the stock forward and count the reason."""
        if self.runs_stock(x):
            return stock.PlainBlock.forward(self, x)
        for call in self.calls(x):
            x = ops.run(call._replace(x=x), self.backend)
        return x

    def parts(self, x: Tensor) -> tuple[Call, ...] | None:
        """Return the two calls as parts of a :class:`~resnet_fast.calls.NetCall`; None if a norm counts batches."""
        return None if any([counts(getattr(self, norm)) for _, norm in self.layers]) else self.calls(x)

    def calls(self, x: Tensor) -> tuple[Call, ...]:
        """Return the two calls, both with the input ``x``."""
        pairs = [(conv_record(getattr(self, conv)), norm_record(getattr(self, norm))) for conv, norm in self.layers]
        return tuple([Call("conv_bn_act", x, (conv,), (norm,)) for conv, norm in pairs])


class CifarResNet(Net, stock.CifarResNet):
    """The CIFAR net around fused blocks; no pooling follows its first convolution."""

    stock_class = stock.CifarResNet
    op = "conv_bn_act"
    stages = ("layer1", "layer2", "layer3")
    per_image = Net.per_image | {stock.PadShortcut}
    pooled = False

    def forward(self, x: Tensor) -> Tensor:
        return self.stock_forward(x) if torch.jit.is_scripting() else self.net_forward(x)
