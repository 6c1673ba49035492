"""CUDA graphs on a GPU."""

from __future__ import annotations

import copy
import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import numerics
from resnet_fast.blocks import inference_graph
from tests.support.graph_cases import (
    change_classifier,
    change_eps,
    change_statistics,
    change_weight,
    dilate,
    fallbacks,
    image,
    large,
    replays,
)
from tests.support.processes import in_threads


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    resnet_fast.reset_stats()
    return large().cuda()


def check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Assert that ``y`` is as close to float64 as the stock net's output."""
    plain = resnet_fast.restore(copy.deepcopy(model))
    with torch.no_grad():
        numerics.assert_close(y, copy.deepcopy(plain).double()(x.double()), plain(x), gemm_k=4608)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gpu_replays(on_gpu: nn.Module, backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = resnet_fast.accelerate(on_gpu.to(dtype), backend=backend, cuda_graph=True)
    xs = [image(size=64).to("cuda", dtype).contiguous(memory_format=layout) for _ in range(3)]
    with torch.inference_mode():
        ys = [model(x) for x in xs]
    assert replays() == 3 and resnet_fast.stats()["calls"]["cuda_graph/capture"] == 1
    assert "CUDA graph" not in fallbacks()
    for x, y in zip(xs, ys, strict=True):
        check(model, x, y)


@pytest.mark.gpu
def test_gpu_weights_may_change(on_gpu: nn.Module) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    with torch.no_grad():
        model(x)
        for edit in (change_weight, change_statistics, change_classifier, dilate, change_eps):
            edit(model)
            check(model, x, model(x))
        model.load_state_dict(large().state_dict())
        check(model, x, model(x))
        model.half()
        check(model, x.half(), model(x.half()))
    assert replays() == 8 and resnet_fast.stats()["calls"]["cuda_graph/capture"] == 8


@pytest.mark.gpu
def test_gpu_autocast(on_gpu: nn.Module) -> None:
    """The casts that autocast keeps are freed at the end of its ``with``; a graph must not read them."""
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    eager = resnet_fast.accelerate(copy.deepcopy(on_gpu))
    with torch.no_grad():
        for _ in range(2):
            with torch.autocast("cuda", torch.float16):
                want = eager(x)
                torch.nn.functional.linear(torch.randn(1, model.fc.in_features, device="cuda"), model.fc.weight)
                y = model(x)
            assert y.dtype == torch.float16
            torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2)
            check(model, x, model(x))
        with torch.autocast("cuda", torch.float16):
            for net in (model, eager):
                change_classifier(net)
            torch.testing.assert_close(model(x), eager(x), rtol=1e-2, atol=1e-2)
    assert resnet_fast.stats()["calls"]["cuda_graph/capture"] == 3 and "CUDA graph" not in fallbacks()


@pytest.mark.gpu
def test_gpu_training_between(on_gpu: nn.Module) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        with torch.inference_mode():
            y = model.eval()(x)
        check(model, x, y.clone())
        model.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert replays() == 3


@pytest.mark.gpu
def test_gpu_many_shapes_share_memory(on_gpu: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_graph, "GRAPHS", 3)
    model = resnet_fast.accelerate(on_gpu, cuda_graph=True)
    xs = [image(n, 64).cuda() for n in (1, 2, 3, 4, 5)]
    with torch.inference_mode():
        ys = [[model(x) for x in xs] for _ in range(2)]
    for round_ in ys:
        for x, y in zip(xs, round_, strict=True):
            check(model, x, y.clone())


@pytest.mark.gpu
def test_gpu_streams_take_turns(on_gpu: nn.Module) -> None:
    model = resnet_fast.accelerate(on_gpu, cuda_graph=True)
    streams = [torch.cuda.Stream() for _ in range(3)]
    xs = [image(8, 128).cuda() for _ in range(24)]
    with torch.inference_mode():
        wants = [model(x) for x in xs]
        torch.cuda.synchronize()
        got = []
        for i, x in enumerate(xs):
            with torch.cuda.stream(streams[i % 3]):
                got.append(model(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y, want in zip(got, wants, strict=True))
    check(model, xs[0], wants[0].clone())


@pytest.mark.gpu
def test_gpu_threads(on_gpu: nn.Module) -> None:
    model = resnet_fast.accelerate(on_gpu, cuda_graph=True)
    xs = [image(1 + i % 3, 64).cuda() for i in range(24)]
    with torch.inference_mode():
        wants = [model(x) for x in xs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(start: int) -> None:
        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for i in range(start, 24, 4):
                y = model(xs[i])
                stream.synchronize()
                if not torch.equal(y, wants[i]):
                    wrong.append(i)

    in_threads(*(partial(work, start) for start in range(4)))
    assert not wrong and replays() == 48


@pytest.mark.gpu
def test_gpu_memory_is_given_back(on_gpu: nn.Module) -> None:
    def used() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    x = image(64, 256).cuda()
    model = resnet_fast.accelerate(on_gpu)
    with torch.inference_mode():
        model(x)
        before = used()
        resnet_fast.accelerate(model, cuda_graph=True)(x)
        during = used()
        resnet_fast.accelerate(model)(x)
    assert during - before > x.nbytes
    assert used() - before < (during - before) / 2


@pytest.mark.gpu
def test_gpu_failed_capture(on_gpu: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    forward = type(model).head_forward

    def synchronizing(self: Any, x: Tensor) -> Tensor:
        assert x.sum().isfinite().item()  # waits for the GPU, which a capture cannot
        return forward(self, x)

    with torch.inference_mode():
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "head_forward", synchronizing)
            stream = torch.cuda.current_stream()
            y = model(x)
            assert torch.cuda.current_stream() == stream
        torch.rand(2, device="cuda")
        check(model, x, y.clone())
        assert "capturing it failed" in fallbacks() and replays() == 0
        resnet_fast.clear_derived()
        check(model, x, model(x).clone())
    assert replays() == 1


@pytest.mark.gpu
def test_gpu_inside_a_capture_of_the_callers(on_gpu: nn.Module) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    with torch.no_grad():
        want = model(x)
        mine = torch.cuda.CUDAGraph()
        with torch.cuda.graph(mine):
            y = model(x)
        mine.replay()
    torch.testing.assert_close(y, want)
    assert replays() == 1 and "CUDA graph" not in fallbacks()


@pytest.mark.gpu
def test_gpu_refusals(on_gpu: nn.Module) -> None:
    model, x = resnet_fast.accelerate(on_gpu, cuda_graph=True), image(size=64).cuda()
    with torch.no_grad():
        model.layer3[0].conv1.register_forward_hook(lambda *args: None)
        check(model, x, model(x))
    assert "layer3.0.conv1 has a hook" in fallbacks() and replays() == 0
    with torch.no_grad(), pytest.raises(resnet_fast.BackendError, match="expected an input on cuda"):
        model(x.cpu())
