"""Captured training with a momentum that changes: a graph repeats the one that it was captured with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.blocks import training_graph
from tests.support.graph_cases import fallbacks, replays
from tests.support.training_graph_cases import TapeRecorder, pair, small


def test_a_schedule_of_the_momentum_gives_eagers_statistics(
    tapes: type[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step for each momentum until as many are kept as may be; the others run eagerly, and say so."""
    monkeypatch.setattr(training_graph, "GRAPHS", 2)
    nets = pair(small())
    momenta = (0.1, 0.2, 0.3, 0.4, 0.2)
    for momentum in momenta:
        x = torch.randn(2, 3, 32, 32)
        for net in nets:
            for m in net.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.momentum = momentum
            net(x).sum().backward()
    buffers = [dict(net.named_buffers()) for net in nets]
    for name, want in buffers[0].items():
        assert torch.equal(buffers[1][name], want), name
    assert len(tapes.captures) == 2 * 2  # a forward and a backward pass each
    assert replays() == 3 and resnet_fast.stats()["fallbacks"]
    assert "2 training steps are kept for other input shapes and settings of the net" in fallbacks()
