"""Captured training: what cannot be captured or replayed runs eagerly or raises an error, and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.blocks import training_graph
from tests.support.graph_cases import fallbacks, replays
from tests.support.nets import assert_equal
from tests.support.training_graph_cases import TapeRecorder, batch, loss_of, pair, small, train


def test_a_second_forward_before_the_backward_runs_eagerly(tapes: type[TapeRecorder]) -> None:
    grads = []
    for model in pair(small()):
        torch.manual_seed(6)
        loss_of(model(batch(4))).backward()
        (loss_of(model(batch(4))) + loss_of(model(batch(4)))).backward()
        loss_of(model(batch(4))).backward()
        grads.append([[p.grad for p in model.parameters()], dict(model.state_dict())])
    assert_equal(*grads)
    assert replays() == 3 and "an earlier call still waits for its backward pass" in fallbacks()


def test_the_wrong_backward_passes_are_errors(tapes: type[TapeRecorder]) -> None:
    _, model = pair(small())
    loss = loss_of(model(batch(4)))
    loss.backward(retain_graph=True)
    with pytest.raises(resnet_fast.BackendError, match="expected one backward pass for each forward pass"):
        loss.backward()
    loss = loss_of(model(batch(4)))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    (grad,) = torch.autograd.grad(loss_of(model(batch(4))), [model.fc.weight], create_graph=True)
    assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match="a request to differentiate it again"):
        grad.sum().backward()
    y = model(batch(4))
    with torch.no_grad():
        model.conv1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    del y
    loss_of(model(batch(4))).backward()
    assert replays() == 5


def test_too_many_shapes_run_eagerly_until_one_is_idle(
    tapes: type[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_graph, "GRAPHS", 2)
    monkeypatch.setattr(training_graph, "IDLE", 3)
    _, model = pair(small())
    for n in (2, 3, 4):
        loss_of(model(batch(n))).backward()
    assert "2 training steps are kept for other input shapes" in fallbacks() and len(tapes.captures) == 4
    for n in (3, 3, 4):  # 2 is idle now
        loss_of(model(batch(n))).backward()
    assert len(tapes.captures) == 6 and tapes.drained == 1


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: setattr(m.bn1, "momentum", None), "bn1 has momentum None, for which its batch counter is read"),
        (lambda m: m.fc.register_forward_hook(lambda *args: None), "fc has a hook"),
        (lambda m: m.requires_grad_(False), "nothing requires a gradient"),
        (lambda m: setattr(m, "bn1", nn.SyncBatchNorm(16)), "bn1 is a SyncBatchNorm, which exchanges statistics"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly(edit: Any, reason: str, tapes: type[TapeRecorder]) -> None:
    outputs = []
    for model in pair(small()):
        edit(model)
        torch.manual_seed(9)
        try:
            outputs.append(model(batch(4)).detach())
        except Exception as error:  # stock SyncBatchNorm refuses the CPU
            outputs.append(str(error))
    assert_equal(*outputs)
    assert reason in fallbacks() and not tapes.captures
    with resnet_fast.strict(), pytest.raises(resnet_fast.BackendError, match="strict mode: the net runs without its"):
        model(batch(4))


def under_no_grad(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def in_a_checkpoint(model: nn.Module, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False)


def in_a_reentrant_checkpoint(model: nn.Module, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=True)


def with_anomaly_detection(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        return model(x)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (under_no_grad, "autograd is off in training mode"),
        (in_a_checkpoint, "saved-tensor hooks are set"),
        (in_a_reentrant_checkpoint, "it runs inside a backward pass"),
        (with_anomaly_detection, "anomaly detection is on"),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_calls_that_run_eagerly(call: Any, reason: str, tapes: type[TapeRecorder]) -> None:
    results = []
    for model in pair(small(dropout=0.1)):
        torch.manual_seed(10)
        y = call(model, batch(4))
        if y.requires_grad:
            loss_of(y).backward()
        results.append([y.detach(), [p.grad for p in model.parameters()], dict(model.state_dict())])
    assert_equal(*results)
    assert reason in fallbacks() and replays() == 0


def test_who_looks_at_the_layers_sees_them(tapes: type[TapeRecorder]) -> None:
    _, model = pair(small())
    assert len(resnet_fast.explain(model, batch(4)).rows) == 4
    tapes.recording = True  # a capture of the caller's
    model(batch(4))
    tapes.recording = False
    assert replays() == 0 and "CUDA graph" not in fallbacks()


def test_memory_that_does_not_suffice(tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small(dropout=0.2))
    loss_of(replayed(batch(2))).backward()
    replayed.load_state_dict(plain.state_dict())
    replayed.zero_grad()
    tapes.broken = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert_equal(train(replayed), train(plain))
    reason = "capturing the training step failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert reason in fallbacks() and len(tapes.captures) == 3
    assert tapes.given_back == 1 and tapes.drained == 1  # the other shape's step went too
    tapes.broken = None
    loss_of(replayed(batch(2))).backward()
    assert len(tapes.captures) == 3  # nothing is tried again by itself
    loss_of(resnet_fast.accelerate(replayed, cuda_graph=True)(batch(4))).backward()
    assert len(tapes.captures) == 5 and replays() == 2


def test_a_failed_capture_is_not_repeated(tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small(dropout=0.2))
    tapes.broken = RuntimeError("operation not permitted\nmore")
    assert_equal(train(replayed), train(plain))
    assert len(tapes.captures) == 1
    assert "capturing the training step failed: RuntimeError: operation not permitted" in fallbacks()
    tapes.broken = None
    loss_of(replayed(batch(4))).backward()
    assert len(tapes.captures) == 1
    loss_of(replayed(batch(3))).backward()
    assert len(tapes.captures) == 3


def test_a_layer_that_waits_for_the_gpu(tapes: type[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, replayed = pair(small())
    head = type(plain).head_forward

    def synchronizing(self: Any, x: Tensor) -> Tensor:
        assert x.sum().item() == x.sum().item()
        return head(self, x)

    monkeypatch.setattr(type(plain), "head_forward", synchronizing)
    assert_equal(train(replayed), train(plain))
    assert "not permitted when stream is capturing" in fallbacks() and replays() == 0


def test_errors_are_those_of_the_net(tapes: type[TapeRecorder]) -> None:
    plain, replayed = pair(small())
    bad: tuple[Any, ...] = (torch.randn(2, 4, 32, 32), torch.randn(3, 32, 32), batch(4).long(), None)
    for x in bad:
        with pytest.raises(Exception) as want:
            plain(x)
        with pytest.raises(type(want.value)) as got:
            replayed(x)
        assert str(got.value) == str(want.value)
    assert "CUDA graph" not in fallbacks() and not tapes.captures
