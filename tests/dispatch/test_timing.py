"""A launch is timed cold and without Python between the launches; the device is a fake one with a clock of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from resnet_fast.dispatch import timing

FLUSH_S, LAUNCH_S, PYTHON_S = 90e-6, 3e-6, 40e-6


class FakeGpu:
    """A device with a clock. A recorded launch takes its own time, an eager one also Python's; a warm one is free."""

    def __init__(self, launch_s: float = LAUNCH_S) -> None:
        self.clock, self.launch_s = 0.0, launch_s
        self.cold, self.recording, self.calls = True, False, 0
        self._record: list[str] = []

    def flush(self) -> None:
        self._do("flush")

    def launch(self) -> None:
        self.calls += 1
        self._do("launch")

    def _do(self, what: str) -> None:
        if self.recording:
            self._record.append(what)
        else:
            self._run(what, PYTHON_S)

    def _run(self, what: str, python_s: float) -> None:
        if what == "flush":
            self.clock, self.cold = self.clock + FLUSH_S, True
        else:
            self.clock += (self.launch_s if self.cold else 0.0) + python_s
            self.cold = False

    def recorded(self, work: Callable[[], object]) -> Callable[[], None]:
        self.recording, self._record = True, []
        work()
        self.recording = False
        steps = tuple(self._record)

        def replay() -> None:
            for what in steps:
                self._run(what, 0.0)

        return replay

    def elapsed(self, work: Callable[[], object]) -> float:
        before = self.clock
        work()
        return self.clock - before


@pytest.mark.parametrize("launch_s", [2e-6, 30e-6, 5e-3])
def test_a_time_is_the_launchs_own_with_a_cold_cache(launch_s: float) -> None:
    gpu = FakeGpu(launch_s)
    assert timing.cold_seconds(gpu.launch, gpu) == pytest.approx(launch_s)


def test_long_launches_are_recorded_a_few_times_and_short_ones_often() -> None:
    calls = []
    for launch_s in (1.0, 1e-6):
        gpu = FakeGpu(launch_s)
        timing.cold_seconds(gpu.launch, gpu)
        calls.append(gpu.calls)
    once = FLUSH_S + PYTHON_S + 1e-6
    assert calls == [3 + timing.FEWEST, 3 + round(timing.BUSY_S / once)]


def test_noise_is_no_negative_time() -> None:
    gpu = FakeGpu(0.0)
    assert timing.cold_seconds(gpu.launch, gpu) == timing.LEAST_S


def test_on_a_cpu_calls_are_timed_one_by_one() -> None:
    calls: list[bool] = []
    found = timing.seconds(lambda: calls.append(torch.is_inference_mode_enabled()), torch.device("cpu"))
    assert calls == [True] * 3 and 0 <= found < 1


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Return what is timed by events around each call."""
    testing = pytest.importorskip("triton.testing")
    timed: list[Callable[[], object]] = []

    def do_bench(call: Callable[[], object], **options: object) -> float:
        timed.append(call)
        return 0.25

    monkeypatch.setattr(testing, "do_bench", do_bench)
    return timed


def test_what_cannot_be_captured_is_timed_by_events(
    events: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refuses(FakeGpu):
        def recorded(self, work: Callable[[], object]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    gpu = Refuses()
    monkeypatch.setattr(timing, "GpuStopwatch", lambda device: gpu)
    with caplog.at_level("INFO", "resnet_fast"):
        assert timing.seconds(gpu.launch, torch.device("cuda", 0)) == pytest.approx(0.25e-3)
    assert events == [gpu.launch] and "not permitted when stream is capturing" in caplog.text


def test_full_memory_is_not_timed_in_another_way(
    events: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(device: torch.device) -> FakeGpu:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "GpuStopwatch", full)
    with pytest.raises(torch.OutOfMemoryError):
        timing.seconds(lambda: None, torch.device("cuda", 0))
    assert not events
