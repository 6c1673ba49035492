"""One build of the emulator for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_fast import native
from resnet_fast.benchmarks import emulation


@pytest.fixture(scope="session")
def emulator() -> Path:
    """Build the module from the unedited sources, for :class:`emulation.Emulator`."""
    if not native.status():
        pytest.skip(native.status().reason)
    return emulation.build()
