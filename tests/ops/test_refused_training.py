"""A GPU on which training kernels may not run: ``auto`` trains with the reference and says why, a name raises.

In Triton's interpreter on the CPU, with a verdict in place of the GPU's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import resnet_fast
from resnet_fast import BackendError
from resnet_fast.dispatch import catalog, select
from resnet_fast.ops import train
from resnet_fast.spec import YES, Verdict

pytestmark = pytest.mark.interpret

NO = Verdict.no("a GPU on which programs of one launch hand results over", "one where the proof failed", "train else")
DOUBT = Verdict.yes("not proved: the GPU's memory is full")
CPU = torch.device("cpu")


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Verdict, bool]]]:
    """Prefer Triton to every other backend, as on a GPU. The last verdict of the list is what it says of the device."""
    from resnet_fast.backends.triton.training import chain

    plain, said = catalog.impls, [(YES, True)]

    def forget() -> None:
        catalog.ranked.cache_clear()
        select._choose.cache_clear()
        train._decisions.clear()
        chain._plans.clear()

    def impls(op: str) -> tuple[Any, ...]:
        return tuple(replace(i, rank=1000) if i.backend == "triton" else i for i in plain(op))

    forget()
    monkeypatch.setattr(catalog, "impls", impls)
    monkeypatch.setattr(chain, "trains_on", lambda device: said[-1])
    resnet_fast.reset_stats()
    yield said
    monkeypatch.undo()
    forget()


def block(backend: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    return resnet_fast.accelerate(BasicBlock(8, 8).train(), backend=backend)


def step(net: nn.Module) -> list[Tensor]:
    x = torch.linspace(-1, 1, 2 * 8 * 3 * 3).view(2, 8, 3, 3).requires_grad_()
    y = net(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y, x.grad, *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()]


def ran() -> dict[str, int]:
    return resnet_fast.stats()["calls"]


def test_auto_trains_with_the_reference_and_says_why(
    verdicts: list[tuple[Verdict, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    verdicts.append((NO, True))
    with caplog.at_level(logging.WARNING, logger="resnet_fast"):
        ours = step(block())
    torch.manual_seed(0)
    for found, want in zip(ours, step(BasicBlock(8, 8).train()), strict=True):
        assert torch.equal(found, want)
    assert ran() == {"basic_block/reference": 1}
    (counted,) = resnet_fast.stats()["fallbacks"]
    assert counted.startswith("basic_block runs on reference: ") and f"triton: {NO.reason}" in counted
    assert counted in caplog.text
    assert NO.reason in str(resnet_fast.explain(block(), torch.randn(2, 8, 3, 3)))
    with resnet_fast.strict(), pytest.raises(BackendError, match="hand results over"):
        step(block())
    assert not select.trains(CPU, torch.float32, "auto") and not select.trains_nhwc(CPU, torch.float32, "auto")


def test_a_request_by_name_raises(verdicts: list[tuple[Verdict, bool]]) -> None:
    verdicts.append((NO, True))
    for net in (block("triton"), block()):
        with (
            resnet_fast.use_backend("triton"),
            pytest.raises(BackendError, match=r"'triton' cannot run .* hand results"),
        ):
            step(net)
    assert ran() == {}
    with torch.no_grad():
        block("triton").eval()(torch.randn(2, 8, 3, 3))  # inference hands nothing over
        assert ran() == {"basic_block/triton": 1}


def test_a_verdict_that_comes_later_is_seen(verdicts: list[tuple[Verdict, bool]]) -> None:
    net = block()
    verdicts.append((DOUBT, False))
    step(net)
    assert ran() == {"basic_block/triton": 1}
    verdicts.append((NO, True))
    step(net)
    assert ran() == {"basic_block/triton": 1, "basic_block/reference": 1}


def test_a_verdict_between_the_passes_leaves_the_step_whole(verdicts: list[tuple[Verdict, bool]]) -> None:
    verdicts.append((DOUBT, False))
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    y = block()(x)
    verdicts.append((NO, True))
    y.sum().backward()
    assert x.grad is not None and ran() == {"basic_block/triton": 1}
