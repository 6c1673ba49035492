"""The launches whose measured times the cycle model is compared with are those of ResNet-50."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet50

from resnet_fast.benchmarks import simulated_peers as peers


def test_the_shapes_are_those_of_resnet50() -> None:
    normed, activated = [], []
    net = resnet50().to("meta").eval()

    def note(kept: list[tuple[int, int]]):  # type: ignore[no-untyped-def]
        def hook(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            n, c, h, w = given[0].shape
            kept.append((n * h * w, c))

        return hook

    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(note(normed))
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(note(activated))
    net(torch.empty(peers.BATCH, 3, 224, 224, device="meta"))
    assert sorted(peers.normed()) == sorted(normed) and sorted(peers.activated()) == sorted(activated)
    assert len(peers.added()) == 32


@pytest.mark.parametrize(
    "pixels, channels, grid, threads",
    [(3211264, 64, (2, 128, 1), (32, 16, 1)), (12544, 2048, (64, 49, 1), (32, 16, 1)), (64, 16, (1, 1, 1), (16, 4, 1))],
)
def test_the_grid_of_batch_norm_is_atens(pixels: int, channels: int, grid: tuple, threads: tuple) -> None:
    assert peers.channels_last_grid(pixels, channels) == (grid, threads)
