"""Inference as a program, run launch by launch in the interpreter: the bits of its launchers, for blocks and a net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fast import accelerate
from tests.support.block_cases import projection

pytestmark = pytest.mark.interpret

NETS: dict[str, Any] = {
    "bottleneck": lambda: Bottleneck(16, 4),
    "projection": lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)),
    "stage": lambda: nn.Sequential(Bottleneck(16, 8, 2, projection(16, 32, 2)), Bottleneck(32, 8)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_program_gives_the_bits_of_its_launchers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_fast.backends.triton import program, submission

    torch.manual_seed(0)
    net = NETS[name]().half().eval()
    x = torch.randn(2, 16, 6, 5).half().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        direct = accelerate(net, backend="triton")(x)

    made: list[Any] = []

    def planned(launchers: Any, leaves: Any, fixed: Any, numbers: int) -> Any:
        found = program.plan(launchers, [*leaves, *fixed])
        assert isinstance(found, program.Program), found
        made.append(found)
        return lambda given, numbers: found.replay([*given, *fixed], numbers)

    monkeypatch.setattr(submission, "planned", planned)
    torch.manual_seed(0)
    with torch.inference_mode():
        again = accelerate(NETS[name]().half().eval(), backend="triton")
        for _ in range(2):
            assert torch.equal(again(x), direct)
    assert made
