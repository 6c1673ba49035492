"""A torchvision detector with an accelerated backbone: same boxes, and a table of what ran where.

python examples/detector.py
"""

from __future__ import annotations

import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import resnet_fast


def main() -> None:
    torch.manual_seed(0)
    detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    image = torch.rand(3, 240, 320)
    with torch.inference_mode():
        (stock,) = detector([image])
        resnet_fast.accelerate(detector)  # finds the blocks wherever they are, here inside the FPN's backbone
        (ours,) = detector([image])
    print(f"{len(stock['boxes'])} boxes, {len(ours['boxes'])} accelerated")
    if len(stock["boxes"]) == len(ours["boxes"]):
        print(f"largest difference of a coordinate: {(stock['boxes'] - ours['boxes']).abs().max():.1e} pixels")
    print(resnet_fast.explain(detector.backbone, torch.rand(1, 3, 240, 320)))


if __name__ == "__main__":
    main()
