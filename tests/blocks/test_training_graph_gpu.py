"""Captured training on a GPU."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast.blocks import recorder
from tests.support.graph_cases import fallbacks, image, large, replays
from tests.support.processes import in_threads

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    resnet_fast.reset_stats()


def pair(dropout: float = 0.0, backend: str = "auto") -> tuple[nn.Module, nn.Module]:
    """Return two accelerated copies of a net: the first runs eagerly, the second is captured."""
    model = large().cuda().to(memory_format=torch.channels_last).train()
    if dropout:
        model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)
    return (
        resnet_fast.accelerate(copy.deepcopy(model), backend),
        resnet_fast.accelerate(copy.deepcopy(model), backend, cuda_graph=True),
    )


def batch(n: int = 8) -> Tensor:
    return image(n, 64).cuda().contiguous(memory_format=torch.channels_last)


def loss_of(y: Tensor) -> Tensor:
    return F.cross_entropy(y.float(), torch.arange(len(y), device=y.device) % 10)


def train(model: nn.Module, amp: torch.dtype | None = None, parts: int = 1) -> list[Tensor]:
    """Return the losses of four steps with a gradient scaler, then weights and statistics, then random numbers."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=amp == torch.float16, init_scale=2.0**8)
    losses = []
    for _ in range(4):
        for _ in range(parts):
            with torch.autocast("cuda", amp or torch.bfloat16, enabled=amp is not None):
                loss = loss_of(model(batch())) / parts
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [*losses, *model.state_dict().values(), torch.rand(4, device="cuda")]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gpu_training_is_replayed(backend: str, amp: torch.dtype | None) -> None:
    plain, replayed = pair(backend=backend)
    same(train(replayed, amp, parts=2), train(plain, amp, parts=2))
    assert replays() == 8 and resnet_fast.stats()["calls"]["cuda_graph/capture"] == 1
    assert "CUDA graph" not in fallbacks()


def test_gpu_the_first_call_counts_one_batch_and_draws_once() -> None:
    x = batch()
    states = []
    for model in pair(dropout=0.5):
        torch.manual_seed(2)
        y = model(x)
        states.append([y.detach(), model.bn1.running_mean, torch.rand(4, device="cuda"), torch.rand(4)])
        assert model.bn1.num_batches_tracked == 1
    same(*states)
    assert torch.equal(states[0][2], states[1][2]) and torch.equal(states[0][3], states[1][3])


def test_gpu_dropout_draws_what_eager_draws() -> None:
    plain, replayed = pair(dropout=0.5)
    same(train(replayed), train(plain))


def test_gpu_shapes_and_evaluations_alternate() -> None:
    plain, replayed = pair()
    for n in (8, 4, 8, 4):
        x = batch(n)
        for model in (plain, replayed):
            loss_of(model.train()(x)).backward()
        with torch.inference_mode():
            torch.testing.assert_close(replayed.eval()(x), plain.eval()(x), rtol=1e-2, atol=1e-3)
    same([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    assert resnet_fast.stats()["calls"]["cuda_graph/capture"] == 2 + 4 and replays() == 8


def test_gpu_streams_and_threads() -> None:
    plain, replayed = pair()
    xs = [batch() for _ in range(6)]
    torch.cuda.synchronize()
    for x in xs:
        loss_of(plain(x)).backward()
    for x in xs:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which added to .grad
        with torch.cuda.stream(stream):
            loss = loss_of(replayed(x))
            in_threads(loss.backward)
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    same([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    assert replays() == 6


def test_gpu_an_output_that_waits() -> None:
    plain, replayed = pair()
    x, z = batch(), batch()
    for model in (plain, replayed):
        (loss_of(model(x)) + loss_of(model(z))).backward()
        loss_of(model(x)).backward()
    same([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    assert replays() == 2 and "still waits for its backward pass" in fallbacks()


def in_capture(error: Exception | None) -> Any:
    """Return a head that raises ``error`` while it is captured, or waits for the GPU."""
    head = type(resnet_fast.accelerate(large())).head_forward

    def forward(self: Any, x: Tensor) -> Tensor:
        if error is None:
            assert x.sum().isfinite().item()
        elif torch.cuda.is_current_stream_capturing():
            raise error
        return head(self, x)

    return forward


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_gpu_a_failed_capture(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, replayed = pair(dropout=0.2)
    stream = torch.cuda.current_stream()
    with monkeypatch.context() as patch:
        patch.setattr(type(replayed), "head_forward", in_capture(error))
        same(train(replayed), train(plain))
    assert torch.cuda.current_stream() == stream and replays() == 0
    assert "capturing the training step failed" in fallbacks()
    resnet_fast.accelerate(replayed, cuda_graph=True)
    loss_of(replayed(batch())).backward()
    assert replays() == 1


def test_gpu_memory_that_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up runs out of memory, and what it took is free again for the eager step."""
    _, replayed = pair()
    x = batch(64)
    warm_up = recorder.Recorder.warm_up

    def greedy(self: Any, fn: Any, x: Tensor, layout: torch.memory_format) -> Tensor:
        warm_up(self, fn, x, layout)
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        raise AssertionError("expected too little memory")

    monkeypatch.setattr(recorder.Recorder, "warm_up", greedy)
    loss_of(replayed(x)).backward()
    assert "OutOfMemoryError" in fallbacks() and replays() == 0


def test_gpu_training_gives_its_memory_back() -> None:
    def used() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    plain, replayed = pair()
    x = batch(64)
    for model in (plain, replayed):
        loss_of(model(x)).backward()
        model.zero_grad()
    during = used()
    resnet_fast.accelerate(replayed)
    after = used()
    assert during - after > 10 * x.nbytes  # the pool of a captured step holds its activations


def test_gpu_ddp_exchanges_the_gradients(tmp_path: Any) -> None:
    import torch.distributed as dist

    plain, replayed = pair()
    x = batch()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for model in (plain, replayed):
            spread = nn.parallel.DistributedDataParallel(model, device_ids=[0], gradient_as_bucket_view=True)
            with spread.no_sync():
                loss_of(spread(x)).backward()
            loss_of(spread(x)).backward()
        same([p.grad for p in replayed.parameters()], [p.grad for p in plain.parameters()])
    finally:
        dist.destroy_process_group()
    assert replays() == 2
