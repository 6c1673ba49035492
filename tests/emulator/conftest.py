"""One build of the emulator for all tests of this folder; with ``--compiled-for`` the PTX machine in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from resnet_fast import native
from resnet_fast.benchmarks import compiled_cuda, emulation


@pytest.fixture(scope="session")
def emulator() -> Path:
    """Build the module from the unedited sources, for :class:`emulation.Emulator`."""
    if not native.status():
        pytest.skip(native.status().reason)
    return emulation.build()


@pytest.fixture(autouse=True)
def _as_nvcc_compiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run what a test gives to the emulator as PTX; what the emulator alone counts is not there then."""
    arch = request.config.getoption("--compiled-for")
    if arch is None or not hasattr(request.module, "Emulator"):
        yield
        return
    from resnet_fast.tools.ptx_machine import ptx_machine

    with ptx_machine(arch, seed=request.config.getoption("--schedule-seed")) as machine:

        def compiled(module: Path, seed: int = 0, **device: int) -> AbstractContextManager[None]:
            return compiled_cuda.launched(machine, device.get("sms", 4))

        monkeypatch.setattr(request.module, "Emulator", compiled)
        yield
