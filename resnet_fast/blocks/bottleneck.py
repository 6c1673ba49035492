"""torchvision's Bottleneck with the op ``bottleneck`` as its forward."""

from torchvision.models import resnet as stock

from .residual import ResidualBlock


class Bottleneck(ResidualBlock, stock.Bottleneck):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)), He et al. 2015, figure 5 right."""

    stock_class = stock.Bottleneck
    op = "bottleneck"
    layers = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
