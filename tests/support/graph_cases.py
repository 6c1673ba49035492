"""Nets, edits of them and a recorder without a GPU: for the tests of CUDA graphs.

The recorder replays a copy of the net from the time of capture on static CPU buffers: a graph that should be stale
gives wrong numbers here as it would on a GPU.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

import resnet_fast
from resnet_fast import paper_nets
from resnet_fast.blocks import recorder as recorder_module
from tests.support.nets import randomize


def small() -> nn.Module:
    """A CIFAR net with one block per stage."""
    model = paper_nets.cifar_resnet20(shortcut="B")
    for stage in (model.layer1, model.layer2, model.layer3):
        del stage[1:]
    return randomize(model).eval()


def large() -> nn.Module:
    return randomize(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10)).eval()


class CpuRecorder(recorder_module.Recorder):
    """Record like a CUDA recorder, without the device. ``net`` is the net whose forward is captured."""

    device_type = "cpu"
    net: ClassVar[nn.Module]
    recording: ClassVar[bool] = False
    broken: ClassVar[str] = ""
    captures: ClassVar[list[CpuRecorder]] = []

    def __init__(self, device: torch.device):
        self.device = device
        self.lock = threading.Lock()
        self.drained = 0

    @staticmethod
    def is_recording() -> bool:
        return CpuRecorder.recording

    def warm_up(self, fn: recorder_module.Forward, x: Tensor, layout: torch.memory_format) -> Tensor:
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        static = torch.empty_like(x, memory_format=layout).copy_(x)
        fn(static)
        return static

    def capture(self, fn: recorder_module.Forward, x: Tensor) -> tuple[Callable[[], None], Tensor]:
        if CpuRecorder.broken:
            raise RuntimeError(CpuRecorder.broken)
        CpuRecorder.captures.append(self)
        frozen = resnet_fast.accelerate(copy.deepcopy(CpuRecorder.net))
        y = fn(x)

        def launch() -> None:
            with torch.no_grad():
                y.copy_(frozen(x))

        return launch, y

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self.lock:
            yield

    def drain(self) -> None:
        self.drained += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[CpuRecorder]:
    monkeypatch.setattr(recorder_module, "Recorder", CpuRecorder)
    for name, value in {"captures": [], "recording": False, "broken": ""}.items():
        monkeypatch.setattr(CpuRecorder, name, value)
    resnet_fast.reset_stats()
    return CpuRecorder


@pytest.fixture
def net(recorder: type[CpuRecorder], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = resnet_fast.accelerate(small(), cuda_graph=True)
    monkeypatch.setattr(recorder, "net", model, raising=False)
    return model


def eager(model: nn.Module, x: Tensor) -> Tensor:
    """Run the net without a graph."""
    with torch.no_grad():
        return resnet_fast.accelerate(copy.deepcopy(model))(x)


def fallbacks() -> str:
    return "; ".join(resnet_fast.stats()["fallbacks"])


def replays() -> int:
    return resnet_fast.stats()["calls"].get("cuda_graph/replay", 0)


def image(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size)


def change_weight(model: nn.Module) -> None:
    model.layer2[0].conv1.weight.mul_(0.5)


def change_statistics(model: nn.Module) -> None:
    model.layer3[0].bn2.running_mean.add_(1)


def change_classifier(model: nn.Module) -> None:
    model.fc.bias.add_(1)


def load(model: nn.Module) -> None:
    model.load_state_dict(small().state_dict())


def load_assigned(model: nn.Module) -> None:
    model.load_state_dict(small().state_dict(), assign=True)


def to_double(model: nn.Module) -> None:
    model.double()


def replace_classifier(model: nn.Module) -> None:
    model.fc = nn.Linear(64, 4).eval()


def replace_activation(model: nn.Module) -> None:
    model.layer1[0].relu = nn.SiLU().eval()


def dilate(model: nn.Module) -> None:
    model.layer1[0].conv2.dilation = model.layer1[0].conv2.padding = (2, 2)


def change_eps(model: nn.Module) -> None:
    model.bn1.eps = 0.1


def train_a_little(model: nn.Module) -> None:
    """Update the statistics; no weight changes."""
    model.train()
    with torch.no_grad():
        model(3 + image())
    model.eval()


def train_a_stage(model: nn.Module) -> None:
    model.layer1.train()
    with torch.no_grad():
        model.layer1(torch.randn(2, 16, 32, 32))
    model.eval()


def restore_a_stage(model: nn.Module) -> None:
    resnet_fast.restore(model.layer1)


EDITS = [
    change_weight, change_statistics, change_classifier, load, load_assigned, to_double, replace_classifier,
    replace_activation, dilate, change_eps, train_a_little, train_a_stage, restore_a_stage,
]  # fmt: skip
