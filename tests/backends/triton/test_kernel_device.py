"""Every launch of inference, of both passes of training and of tuning happens on the device of its tensors.

Tensors claim to be on a second device, which the interpreter cannot have, and a launch looks which one is current.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import resnet_fast
from resnet_fast import accelerate, paper_nets
from resnet_fast.dispatch import tune as tuning
from tests.support.launches import before_each
from tests.support.two_devices import TwoDevices

pytestmark = pytest.mark.interpret


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The current device at each launch, once every tensor is on device 1 and device 0 is current."""
    cuda, seen = TwoDevices(monkeypatch), []
    before_each(monkeypatch, lambda kernel: seen.append(cuda.current))

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        before = cuda.exchange(1)
        yield
        cuda.exchange(before)

    cuda.place(monkeypatch, 1)
    monkeypatch.setattr(tuning, "on_device", on_device)
    yield seen
    assert cuda.current == 0


def net(train: bool) -> torch.nn.Module:
    model = paper_nets.cifar_resnet20(shortcut="B")
    for stage in (model.layer1, model.layer2, model.layer3):
        del stage[1:]
    return accelerate(model.train(train), backend="triton")


def test_inference(devices: list[int]) -> None:
    with torch.inference_mode():
        net(False)(torch.randn(1, 3, 8, 8))
    assert len(devices) > 5 and set(devices) == {1}


def test_both_passes_of_training(devices: list[int]) -> None:
    y = net(True)(torch.randn(2, 3, 8, 8))
    forward = len(devices)
    y.sum().backward()
    assert forward > 10 and len(devices) > forward + 10 and set(devices) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_tuning(devices: list[int], train: bool, tmp_path: Path) -> None:
    """That includes the launches that make a problem's tensors."""
    resnet_fast.tune(net(train), torch.randn(2, 3, 8, 8), budget_s=0.5, path=tmp_path / "table.json")
    assert len(devices) > 10 and set(devices) == {1}
