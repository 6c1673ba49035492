"""What a step needs, against what is free."""

from __future__ import annotations

import pytest

from resnet_fast import limits
from resnet_fast.errors import UserError
from resnet_fast.models import registry
from resnet_fast.tools import summary
from resnet_fast.training import preview


def test_a_step_that_does_not_fit_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 8 * 10**9)
    preview.check_step_memory("resnet50", 64, 224)
    preview.check_step_memory("resnet50", 128, 224, "bfloat16")
    for images, amp in ((128, "none"), (256, "bfloat16")):
        with pytest.raises(UserError, match=rf"a training step of {images} images of 224x224 to fit into the 8 GB"):
            preview.check_step_memory("resnet50", images, 224, amp)
    monkeypatch.setattr(limits, "available_memory", lambda: None)
    preview.check_step_memory("resnet50", 4096, 224)


def test_a_small_step_asks_nothing_of_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(summary, "summarize", fail)
    monkeypatch.setattr(limits, "available_memory", lambda: 4 * 10**9)
    preview.check_step_memory("cifar_resnet20", 128, 16)


@pytest.mark.parametrize("name", sorted({"resnet18", "cifar_resnet20", "cifar_resnet110", "vgg16", "resnext101_64x4d"}))
def test_no_net_exceeds_the_most_planes(name: str) -> None:
    side = registry.image_size(name)
    one = summary.summarize(name, side)
    assert (one.min_bytes - 4 * one.params) / 4 / side**2 < preview.MOST_PLANES
