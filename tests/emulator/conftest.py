"""One build of the emulator for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import harness
import pytest

from resnet_fast import native


@pytest.fixture(scope="session")
def emulator() -> Path:
    """The module, built from the sources as they are; for :class:`harness.Emulator`."""
    if not native.status():
        pytest.skip(native.status().reason)
    return harness.build()
