"""The log's figures are those of an uninterrupted run, its speeds those of this process."""

from __future__ import annotations

import pytest

from resnet_fast.training import window
from resnet_fast.training.window import Window


def test_a_line_is_what_happened_since_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(window.time, "perf_counter", lambda: clock[0])
    here = Window(0, window.NOTHING, 0, 0, since=100.0)
    clock[0] = 104.0
    first = here.line(10, (2.0, 0.5, 80), 1.0, {"forward": 1.0, "count": 9.0})
    assert (first["loss"], first["error"], first["images_per_s"]) == (2.0, 0.5, 20.0)
    assert (first["step_ms"], first["data_ms"], first["host_ms"]) == (400.0, 100.0, 200.0)
    here.paused = 6.0
    clock[0] = 112.0
    second = here.line(14, (1.5, 0.25, 160), 0.0, {})
    assert (second["loss"], second["error"], second["images_per_s"], second["step_ms"]) == (1.0, 0.0, 40.0, 500.0)
    here.new_epoch()
    assert here.line(16, (3.0, 0.5, 32), 0.0, {})["loss"] == 3.0


def test_a_window_goes_on_where_it_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(window.time, "perf_counter", lambda: clock[0])
    whole = Window(0, window.NOTHING, 0, 0, since=100.0)
    whole.line(10, (2.0, 0.5, 80), 0.0, {})
    again = Window.at(13, (1.9, 0.4, 104), whole.to_dict())
    clock[0] = 101.0
    want, got = whole.line(20, (1.5, 0.25, 160), 0.0, {}), again.line(20, (1.5, 0.25, 160), 0.0, {})
    assert (got["loss"], got["error"]) == (want["loss"], want["error"])
    assert (got["images_per_s"], got["step_ms"]) == (56.0, pytest.approx(1000 / 7, abs=1e-3))  # of seven steps
