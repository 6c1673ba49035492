"""A torchvision detector with an accelerated backbone: same boxes, and a table of what ran where.

python examples/detector.py             # ResNet-50, 240 x 320
python examples/detector.py --tiny
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import resnet_fast


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="resize the image to 96 pixels, for a quick try")
    tiny = parser.parse_args(arguments).tiny

    torch.manual_seed(0)
    sizes = {"min_size": 96, "max_size": 128} if tiny else {}
    detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, **sizes).eval()
    image = torch.rand(3, 240, 320)
    with torch.inference_mode():
        (stock,) = detector([image])
        resnet_fast.accelerate(detector)  # finds the blocks wherever they are, here inside the FPN's backbone
        (ours,) = detector([image])
    print(f"{len(stock['boxes'])} boxes, {len(ours['boxes'])} accelerated")
    if len(stock["boxes"]) == len(ours["boxes"]):
        print(f"largest difference of a coordinate: {(stock['boxes'] - ours['boxes']).abs().max():.1e} pixels")
    print(resnet_fast.explain(detector.backbone, torch.rand(1, 3, 96, 128) if tiny else torch.rand(1, 3, 240, 320)))


if __name__ == "__main__":
    main()
