"""The recorder's order of streams and events, on a torch.cuda that records its calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from resnet_fast.blocks import inference_graph, training_step
from resnet_fast.blocks import recorder as recorder_module
from tests.support.graph_cases import (
    image,
)


class FakeCuda:
    """The part of torch.cuda that the recorder uses; it records the order of calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.log: list[str] = []
        self.current = self.Stream("main")
        for name in ("Stream", "Event", "CUDAGraph", "stream", "graph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.log.append("clear"), raising=False)

    def Stream(self, device: object) -> Any:
        class Stream:
            name = device if isinstance(device, str) else "side"
            wait_stream = staticmethod(lambda other: self.log.append(f"{Stream.name} waits for {other.name}"))
            wait_event = staticmethod(lambda event: self.log.append(f"{Stream.name} waits for event"))

        return Stream

    def Event(self) -> Any:
        class Event:
            record = staticmethod(lambda stream: self.log.append(f"event on {stream.name}"))
            synchronize = staticmethod(lambda: self.log.append("synchronize"))

        return Event

    def CUDAGraph(self) -> Any:
        class CUDAGraph:
            replay = staticmethod(lambda: self.log.append("replay"))
            pool = staticmethod(lambda: "pool")

        return CUDAGraph

    def current_stream(self, device: torch.device) -> Any:
        return self.current

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"begin {pool}")
        self.current = stream
        try:
            yield
        except ZeroDivisionError:
            raise RuntimeError("broken capture") from None  # and the stream stays current
        self.log.append("end")


def test_the_recorder_orders_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    x = image()
    recorder = recorder_module.Recorder(x.device)
    static = recorder.warm_up(lambda x: cuda.log.append(cuda.current.name) or x, x, torch.channels_last)
    assert cuda.log == [
        "main waits for event", "side waits for main", *["side"] * recorder_module.WARM_UPS, "main waits for side",
        "event on main"
    ]  # fmt: skip
    assert torch.equal(static, x) and static.is_contiguous(memory_format=torch.channels_last)
    cuda.log.clear()
    launch, y = recorder.capture(lambda x: cuda.log.append(cuda.current.name) or x, static)
    assert cuda.log == ["begin None", "clear", "side", "clear", "end"]
    recorded = inference_graph.Graph(recorder, launch, static, y, [])
    cuda.log.clear()
    cuda.current = cuda.Stream("other")
    assert torch.equal(recorded.replay(2 * x), 2 * x)
    assert cuda.log == ["other waits for event", "replay", "event on other"]
    cuda.log.clear()
    with pytest.raises(RuntimeError, match="broken capture"):
        recorder.capture(lambda x: x * (1 // 0), static)
    assert cuda.log == ["begin pool", "clear", "clear", "begin pool", "end"]
    assert cuda.current.name == "other"
    cuda.log.clear()
    del recorded
    assert cuda.log == ["synchronize"]


def test_a_training_step_orders_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass may come from another stream than its forward pass."""
    cuda = FakeCuda(monkeypatch)
    x, y, grad = image(), torch.ones(2, 3), torch.ones(4)
    recorder = recorder_module.Recorder(x.device)
    written = torch.zeros(1)
    launches = (lambda: cuda.log.append("forward"), lambda: cuda.log.append("backward"))
    step = training_step.Step(recorder, *launches, x.clone(), y, torch.empty(2, 3), [grad], [written], [])
    assert torch.equal(step.forward(x), y) and written._version == 1
    cuda.current = cuda.Stream("other")
    (got,) = step.backward(y)
    assert torch.equal(got, grad) and got.data_ptr() != grad.data_ptr()
    assert cuda.log == [
        "main waits for event", "forward", "event on main", "other waits for event", "backward", "event on other"
    ]  # fmt: skip
    cuda.log.clear()
    del step
    assert cuda.log == ["synchronize"]
