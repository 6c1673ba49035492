"""Signals are remembered between steps, and left alone where the caller ignores them."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from resnet_fast.training.stopping import NAMES, StopRequests


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_remembered_and_a_second_one_interrupts(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequests().heard() as stop:
        signal.raise_signal(number)
        assert stop.name == name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests().heard() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.name == "" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_the_terminal_is_gone_prints_go_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    ours, theirs = os.openpty()
    stop = StopRequests()
    stop.terminals = [theirs]
    os.close(ours)
    with pytest.raises(OSError):
        os.write(theirs, b"x")
    stop._remember(signal.SIGHUP, None)
    assert os.write(theirs, b"x") == 1 and stop.name == "SIGHUP"
    os.close(theirs)
