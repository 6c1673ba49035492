"""Train the image encoder of a robot policy: ResNet-18 with frozen norms, small batches, two cameras.

    python examples/robot_policy.py             # batch 8, 120 x 160; on a GPU if there is one
    python examples/robot_policy.py --tiny

Policies such as ACT build their encoder in this way. Everything but the line with accelerate() is plain PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast

CAMERAS, JOINTS, CHUNK = 2, 6, 10


class Policy(nn.Module):
    """Predict the next ``CHUNK`` positions of ``JOINTS`` joints from the images and the positions now."""

    def __init__(self, width: int = 64):
        super().__init__()
        net = resnet_fast.accelerate(resnet18(weights=None, norm_layer=FrozenBatchNorm2d))
        self.backbone = IntermediateLayerGetter(net, return_layers={"layer4": "features"})
        self.project = nn.Conv2d(512, width, 1)
        self.state = nn.Linear(JOINTS, width)
        self.mix = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, batch_first=True)
        self.head = nn.Linear(width, CHUNK * JOINTS)

    def forward(self, images: Tensor, joints: Tensor) -> Tensor:
        """Take ``images`` (B, CAMERAS, 3, H, W) and ``joints`` (B, JOINTS); return positions (B, CHUNK, JOINTS)."""
        features = self.project(self.backbone(images.flatten(0, 1))["features"])
        pixels = features.flatten(2).transpose(1, 2).reshape(len(images), -1, features.shape[1])
        tokens = self.mix(torch.cat([self.state(joints)[:, None], pixels], dim=1))
        return self.head(tokens[:, 0]).reshape(-1, CHUNK, JOINTS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a few steps of batch 2 at 64 pixels, for a quick try")
    tiny = parser.parse_args(arguments).tiny

    torch.manual_seed(0)
    batch, height, width, steps = (2, 64, 64, 4) if tiny else (8, 120, 160, 20)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Policy().to(device).train()
    groups = [
        {"params": policy.backbone.parameters(), "lr": 1e-5},
        {"params": [p for name, p in policy.named_parameters() if not name.startswith("backbone")], "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    images = torch.rand(batch, CAMERAS, 3, height, width, device=device)
    joints = torch.rand(batch, JOINTS, device=device)
    targets = joints[:, None] + torch.linspace(0, 0.1, CHUNK, device=device)[:, None]
    for step in range(steps):
        loss = nn.functional.l1_loss(policy(images, joints), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    print(resnet_fast.stats())  # what ran fused in training, what did not, and why

    policy.eval()
    resnet_fast.reset_stats()
    with torch.inference_mode():  # on the robot: one observation at a time
        actions = policy(images[:1], joints[:1])
    print(f"{len(actions[0])} actions, the first {[round(a, 3) for a in actions[0, 0].tolist()]}")
    print(resnet_fast.stats())


if __name__ == "__main__":
    main()
