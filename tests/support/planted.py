"""Mistakes planted in kernels: the edit that makes one, and how the emulator must find it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest

from resnet_fast.benchmarks.emulation import Edit


class Planted(NamedTuple):
    """An edit, the report that it must end in (``None``: only numbers are wrong), and what runs the edited kernel."""

    edit: Edit
    report: str | None = None
    run: Any = None

    def found(self) -> AbstractContextManager[pytest.ExceptionInfo[Exception]]:
        """Expect the report, or that the comparison with the truth fails."""
        return pytest.raises(AssertionError if self.report is None else RuntimeError, match=self.report)
