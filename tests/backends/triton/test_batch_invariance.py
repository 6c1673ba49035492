"""Batch-invariant mode on Triton's kernels: launches that do not follow the batch give every image the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fast
from resnet_fast.backends.triton import plan
from resnet_fast.backends.triton.launch import INTERPRETED
from resnet_fast.paper_nets import CifarResNet
from resnet_fast.tuning import configs, routes
from tests.support.nets import randomize

pytestmark = pytest.mark.interpret


def _differing(net: nn.Module, x: Tensor, sizes: tuple[int, ...]) -> list[int]:
    """Return the batch sizes, from the last image of ``x`` on, at which the last two differ from each one alone."""
    with torch.inference_mode():
        alone = torch.cat([net(image.clone()) for image in x[-2:].split(1)])
        return [n for n in sizes if not torch.equal(net(x[-n:])[-2:], alone)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_net(dtype: torch.dtype) -> None:
    """Its head adds by halves (3x2 pixels: an odd count of pairs) and its classifier is a 1x1 convolution."""
    net = resnet_fast.accelerate(randomize(CifarResNet(BasicBlock, 1)).eval().to(dtype), "triton")
    x = torch.randn(3, 3, 9, 7).to(dtype)
    resnet_fast.reset_stats()
    with resnet_fast.batch_invariant():
        assert not _differing(net, x, (3,))
    assert "conv_bn_act/reference" not in resnet_fast.stats()["calls"]
    with torch.inference_mode(), resnet_fast.batch_invariant():
        got = net(x)
    with torch.inference_mode():
        torch.testing.assert_close(got, net(x), rtol=2**-6 if dtype != torch.float32 else 1e-5, atol=1e-2)


def _block() -> nn.Module:
    """A bottleneck of wide layers on few pixels, whose K steps a batch of one splits."""
    shortcut = nn.Sequential(nn.Conv2d(256, 512, 1, bias=False), nn.BatchNorm2d(512))
    return randomize(Bottleneck(256, 128, downsample=shortcut)).eval()


def test_a_block_whose_configs_would_follow_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the problem is planned for its own batch, with split-K."""
    net = resnet_fast.accelerate(nn.Sequential(_block().bfloat16()), "triton")
    x = torch.randn(9, 256, 4, 4).bfloat16()
    with resnet_fast.batch_invariant():
        assert not _differing(net, x, (9,))
        if not INTERPRETED:
            return  # compiled kernels are planned without split-K until it is proved, and add in order of k in any tile
        resnet_fast.clear_derived()
        plan._kept_plan.cache_clear()
        monkeypatch.setattr("resnet_fast.tuning.launch_plan.planned", lambda spec: spec)
        monkeypatch.setattr(plan, "planned", lambda spec: spec)
        monkeypatch.setattr(configs, "RULES", (*configs.RULES[:-1], _any_splits))
        assert _differing(net, x, (9,))
    plan._kept_plan.cache_clear()


_SPLITS_APPLY = configs._splits_apply


def _any_splits(launch, config, gpu):
    own = launch.last.with_(invariant=False)
    return _SPLITS_APPLY(routes.launch(own), config, gpu) if len(launch.convs) == 1 else configs.YES
