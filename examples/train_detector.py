"""Train a detector whose backbone has frozen norms (FrozenBatchNorm2d), as detectors are fine-tuned.

    python examples/train_detector.py             # ResNet-50 FPN; on a GPU if there is one
    python examples/train_detector.py --weights DEFAULT   # from torchvision's trained backbone, downloaded
    python examples/train_detector.py --tiny

A GPU trains the blocks with folded norms. On a CPU, training runs the stock layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast


def sample(side: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return an image (3, side, side) with one bright square, and its box and label."""
    left, top = torch.randint(0, side // 2, (2,)).tolist()
    image = 0.2 * torch.rand(3, side, side)
    image[:, top : top + side // 2, left : left + side // 2] += 0.8
    box = torch.tensor([[left, top, left + side // 2, top + side // 2]], dtype=torch.float32)
    return image, {"boxes": box, "labels": torch.tensor([1])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", help="torchvision's name of a trained backbone; random without it")
    parser.add_argument("--tiny", action="store_true", help="a few steps of ResNet-18 at 64 pixels, for a quick try")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    net, side, batch, steps = ("resnet18", 64, 2, 4) if given.tiny else ("resnet50", 320, 4, 20)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = resnet_fpn_backbone(
        backbone_name=net, weights=given.weights, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    detector = FasterRCNN(backbone, num_classes=2, min_size=side, max_size=side).to(device)
    resnet_fast.accelerate(detector).train()
    print(resnet_fast.report(detector))  # which convolutions are fused, and why the others are not

    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for step in range(steps):
        images, targets = zip(*(sample(side) for _ in range(batch)), strict=True)
        images = [image.to(device) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        losses = detector(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
