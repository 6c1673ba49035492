"""The momentum of a planned training step: a number of each call, which makes no other program.

In the interpreter a program runs launch by launch, with the numbers where the native library writes them; that it
writes the same bytes as Triton's launcher is tested in ``test_native_launches.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from resnet_fast import accelerate

pytestmark = pytest.mark.interpret

STEPS = 40  # more than the variants that are kept for a problem


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Run every pass as a program, launch by launch; the list holds each program."""
    from resnet_fast.backends.triton import program, submission
    from resnet_fast.backends.triton.training import chain

    made: list[Any] = []

    def planned(launchers: Any, leaves: Any, fixed: Any, numbers: int) -> Any:
        found = program.plan(launchers, leaves, numbers)
        assert isinstance(found, program.Program), found
        made.append(found)
        return found.replay

    assert submission.MOST_VARIANTS < STEPS
    chain._plans.clear()
    monkeypatch.setattr(submission, "planned", planned)
    yield made
    chain._plans.clear()


def block(momentum: float | None) -> nn.Module:
    torch.manual_seed(0)
    found = BasicBlock(8, 8).train()
    for m in found.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    return found


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in net.named_buffers() if "running" in name}


def test_a_cumulative_average_is_one_program(programs: list[Any]) -> None:
    ours, stock = accelerate(block(None), backend="triton"), block(None)
    xs = [torch.randn(2, 8, 3, 3) + i % 5 for i in range(STEPS)]
    with torch.no_grad():
        for x in xs:
            ours(x)
            stock(x)
    assert len(programs) == 1
    exact = block(None).double()
    with torch.no_grad():
        for x in xs:
            exact(x.double())
    own, found = statistics(stock), statistics(ours)
    for name, want in statistics(exact).items():
        error = (found[name].double() - want).abs().max() / want.abs().max()
        of_stock = (own[name].double() - want).abs().max() / want.abs().max()
        assert error <= 2 * of_stock + STEPS * 2**-24, name  # each update rounds to fp32 once
    assert ours.bn1.num_batches_tracked == STEPS


def test_a_schedule_moves_the_statistics_as_eager_does(programs: list[Any]) -> None:
    ours, stock = accelerate(block(0.1), backend="triton"), block(0.1)
    for momentum in (0.9, 0.5, 0.0, 1, 0.25):  # one as an int
        x = torch.randn(2, 8, 3, 3)
        for net in (ours, stock):
            net.bn1.momentum = momentum
            y = net(x)
            y.sum().backward()
        for name, want in statistics(stock).items():
            torch.testing.assert_close(statistics(ours)[name], want, rtol=1e-5, atol=1e-6, msg=name)
    assert len(programs) == 2  # forward and backward


def test_a_launcher_can_only_pass_a_number_on() -> None:
    from resnet_fast.backends.triton.program import Number

    momentum = Number(1)
    assert (momentum.of([0.5, 0.1]), (1 - momentum).of([0.5, 0.1])) == (0.1, 0.9)
    for compute in (lambda n: n * 2, lambda n: n + 1, lambda n: 2 - n, lambda n: 1 - (1 - n), lambda n: n < 1, bool):
        with pytest.raises(TypeError):
            compute(momentum)
