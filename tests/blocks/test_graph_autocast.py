"""CUDA graphs of inference in autocast: one for each state of it, with casts of the weights as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fast
from tests.support.graph_cases import change_classifier, change_weight, eager, fallbacks, image, replays, small
from tests.support.training_graph_cases import TapeRecorder

BF16 = torch.bfloat16


def bf16(**options: Any) -> torch.autocast:
    return torch.autocast("cpu", BF16, **options)


@pytest.fixture
def model(tapes: type[TapeRecorder]) -> Iterator[nn.Module]:
    """A net on the backend that computes the same bits whether a recorder watches it or not."""
    with resnet_fast.use_backend("reference"):
        yield resnet_fast.accelerate(small(), cuda_graph=True)


@pytest.mark.parametrize("grad_off", [torch.no_grad, torch.inference_mode])
def test_replays_follow_the_input(grad_off: Any, model: nn.Module, tapes: type[TapeRecorder]) -> None:
    xs = [image(), image()]
    with grad_off(), bf16():
        ys = [model(x) for x in xs]
        wants = [eager(model, x) for x in xs]
    for y, want in zip(ys, wants, strict=True):
        assert y.dtype == BF16 and torch.equal(y, want)
    assert len(tapes.captures) == 1 and replays() == 2 and not fallbacks()


def test_each_state_of_autocast_has_a_graph(model: nn.Module, tapes: type[TapeRecorder]) -> None:
    x = image()
    states = (
        nullcontext(),
        bf16(),
        torch.autocast("cpu", torch.float16),
        bf16(enabled=False),
        bf16(cache_enabled=False),
    )
    with torch.no_grad():
        for _ in range(2):
            found = []
            for state in states:
                with state:
                    found.append(model(x))
            plain, rounded, half, off, uncached = found
            assert [y.dtype for y in found] == [torch.float32, BF16, torch.float16, torch.float32, BF16]
            assert torch.equal(plain, off) and torch.equal(rounded, uncached) and not torch.equal(half, plain)
        want = eager(model, x)
        assert torch.equal(plain, want)
        with bf16():
            assert torch.equal(rounded, eager(model, x))
    assert len(tapes.captures) == 3 and replays() == 10


@pytest.mark.parametrize("change", [change_weight, change_classifier, lambda m: m.fc.weight.mul_(0.5)])
def test_a_write_to_a_weight_is_seen_where_autocast_keeps_its_cast(
    change: Any, model: nn.Module, tapes: type[TapeRecorder]
) -> None:
    x = image()
    with torch.no_grad(), bf16():
        for p in model.parameters():  # an eager call of the caller's makes autocast keep these
            if p.dim() == 4:
                F.conv2d(torch.randn(1, p.shape[1], 3, 3), p, padding=1)
        F.linear(torch.randn(1, model.fc.in_features), model.fc.weight, model.fc.bias)
        before = model(x)
        change(model)
        for _ in range(2):
            y = model(x)
    with torch.no_grad(), bf16():
        want = eager(model, x)
    assert torch.equal(y, want) and not torch.equal(y, before)
    assert len(tapes.captures) == 2 and replays() == 3


@pytest.mark.parametrize("fails", [False, True])
def test_autocast_is_as_it_was(fails: bool, model: nn.Module, tapes: type[TapeRecorder]) -> None:
    tapes.broken = RuntimeError("no memory pool") if fails else None
    with torch.no_grad(), bf16():
        model(image())
        assert torch.is_autocast_cache_enabled() and torch.is_autocast_enabled("cpu")
    with torch.no_grad(), bf16(cache_enabled=False):
        model(image())
        assert not torch.is_autocast_cache_enabled()
    assert bool(fallbacks()) is fails


def test_fused_layers_are_packed_in_autocasts_dtype(tapes: type[TapeRecorder]) -> None:
    model, x = resnet_fast.accelerate(small(), cuda_graph=True), image()
    with torch.no_grad(), bf16():
        first = model(x)
        assert torch.equal(model(x), first)
        torch.testing.assert_close(first, eager(model, x), rtol=0.02, atol=0.02)
        change_weight(model)
        torch.testing.assert_close(model(x), eager(model, x), rtol=0.02, atol=0.02)
        assert not torch.equal(model(x), first)
    assert len(tapes.captures) == 2
