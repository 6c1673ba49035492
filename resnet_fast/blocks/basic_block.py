"""torchvision's BasicBlock with the op ``basic_block`` as its forward."""

from torchvision.models import resnet as stock

from .residual import ResidualBlock


class BasicBlock(ResidualBlock, stock.BasicBlock):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), He et al. 2015, figure 5 left."""

    stock_class = stock.BasicBlock
    op = "basic_block"
    layers = (("conv1", "bn1"), ("conv2", "bn2"))
