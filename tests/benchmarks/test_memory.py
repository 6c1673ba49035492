"""benchmarks/memory.py: the peak counts bytes held at once, not all bytes allocated."""

from __future__ import annotations

import pytest
import torch

from resnet_fast.benchmarks import memory

MIB = 1024**2


def _floats(mib: float) -> torch.Tensor:
    return torch.empty(int(mib * MIB / 4))


def test_peak_is_of_what_is_held_at_once_above_the_start() -> None:
    before = _floats(8)

    def call() -> None:
        before.zero_()
        for _ in range(3):
            _floats(2)  # one after the other
        both = _floats(12), _floats(3)
        del both

    assert memory.peak(call, "cpu") / MIB == pytest.approx(12 + 3, abs=0.01)


def test_an_error_inside_comes_out_and_the_next_call_is_measured() -> None:
    def broken() -> None:
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        memory.peak(broken, "cpu")
    assert memory.peak(lambda: _floats(1), "cpu") == MIB


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    memory.peak(lambda: _floats(1), "cpu")
    assert capfd.readouterr() == ("", "")


def test_size_counts_a_storage_once() -> None:
    a = torch.zeros(10)
    assert memory.size([a, a[2:], a.view(2, 5), torch.zeros(3, dtype=torch.uint8)]) == 43


def test_each_device_names_its_method() -> None:
    assert "torch.profiler" in memory.method("cpu")
    assert memory.method("cuda:1") == "torch.cuda.max_memory_allocated"


def test_on_a_gpu_the_peak_is_reset_first_and_what_was_there_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    calls = {"synchronize": 0, "reset_peak_memory_stats": 0, "memory_allocated": 30, "max_memory_allocated": 100}
    for name, value in calls.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, value=value: (seen.append(name), value)[1])
    assert memory.peak(lambda: seen.append("call"), "cuda:0") == 70
    assert seen == [
        "synchronize", "reset_peak_memory_stats", "memory_allocated", "call", "synchronize", "max_memory_allocated"
    ]  # fmt: skip
