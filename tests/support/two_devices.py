"""Two CUDA devices without a GPU: which of them is current, and tensors that claim to be on one."""

from __future__ import annotations

import pytest
import torch


class TwoDevices:
    """The part of torch.cuda that enters a device. ``current`` starts at 0; ``changes`` counts the changes of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current, self.changes = 0, 0
        monkeypatch.setattr(torch.cuda, "_exchange_device", self.exchange)
        monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", self.exchange)

    def exchange(self, index: int) -> int:
        """Make a device current and return the one that was."""
        before = self.current
        self.changes += before != index
        self.current = index
        return before

    def place(self, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
        """Let every tensor claim to be on a device."""
        monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: index)
