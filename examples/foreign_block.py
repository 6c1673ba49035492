"""Fuse a residual block of your own library: describe it once, by the paths of its layers.

python examples/foreign_block.py [--tiny]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

import resnet_fast


class Gate(nn.Module):
    """Squeeze-and-excitation: scale each channel by a function of all of them."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()


class GatedBlock(nn.Module):
    """A block that no library has: two convolutions, a gate, and a shortcut where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int = 1):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.gate = Gate(width)
        self.skip: nn.Module = nn.Identity()
        if (width_in, stride) != (width, 1):
            self.skip = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.gate(self.second(relu(self.first(x)))) + self.skip(x))


MAPPING = resnet_fast.BlockMapping(
    # A tuple is (convolution, norm, activation); a lone path is a module that runs by itself between the fused steps.
    main=[("first.0", "first.1", relu), ("second.0", "second.1"), "gate"],
    shortcut=("skip.0", "skip.1"),  # where skip is an Identity, the shortcut is x
    activation=relu,
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="narrow blocks at 16 pixels, for a quick try")
    width, side = (16, 16) if parser.parse_args(arguments).tiny else (64, 56)

    torch.manual_seed(0)
    stock = nn.Sequential(GatedBlock(width, width), GatedBlock(width, 2 * width, 2)).eval()
    resnet_fast.register_block(GatedBlock, MAPPING)
    # Compares the description with the block in float64, on random numbers: a wrong one raises UserError.
    model = resnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.rand(2, width, side, side)
    with torch.inference_mode():
        difference = (model(x) - stock(x)).abs().max()
    print(resnet_fast.report(model))
    print(f"largest difference from stock: {difference:.1e}")


if __name__ == "__main__":
    main()
