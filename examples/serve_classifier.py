"""Serve a classifier: requests of several sizes, answered by one frozen net.

python examples/serve_classifier.py             # ResNet-50 at 224 pixels, random weights
python examples/serve_classifier.py --weights DEFAULT   # torchvision's trained weights, downloaded
python examples/serve_classifier.py --tiny
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
import torchvision

import resnet_fast


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", help="torchvision's name of trained weights; random without it")
    parser.add_argument("--tiny", action="store_true", help="ResNet-18 at 64 pixels, for a quick try")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    net, side = ("resnet18", 64) if given.tiny else ("resnet50", 224)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stock = torchvision.models.get_model(net, weights=given.weights).eval().to(device)
    model = resnet_fast.accelerate(copy.deepcopy(stock))

    requests = [torch.rand(batch, 3, side, side) for batch in (1, 4, 2, 1)]
    with torch.inference_mode(), resnet_fast.freeze(model):  # nobody changes the net while it serves
        for images in requests:
            images = images.to(device)
            logits, expected = model(images), stock(images)
            difference = (logits - expected).abs().max() / expected.abs().max()
            print(f"{len(images)} images: classes {logits.argmax(dim=1).tolist()}, {difference:.1e} from stock")
        print(resnet_fast.explain(model, images))  # which kernel ran each layer, and why the others did not


if __name__ == "__main__":
    main()
