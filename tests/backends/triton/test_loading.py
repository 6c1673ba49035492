"""Loading the code of a planned launch's kernel: without Triton's launcher where that is a C module to build."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime.errors import OutOfResources

from resnet_fast.backends.triton import submission


class Compiled:
    """What is read of a compiled kernel. Triton's own way to load it makes its launcher too."""

    def __init__(self) -> None:
        self.name, self.kernel, self.module, self.function = "kernel", b"code", None, 0
        self.metadata = SimpleNamespace(shared=512, num_warps=8)
        self.launchers = 0

    def _init_handles(self) -> None:
        if self.module is None:
            self.module, self.function, self.launchers = 1, 77, self.launchers + 1


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A driver's device 3, of a Triton that builds launchers in C; the list holds what is loaded there."""
    found: list[Any] = []

    def load_binary(*given: Any) -> tuple[int, ...]:
        found.append(given)
        return 5, 99, 0, 0, 256

    active = SimpleNamespace(utils=SimpleNamespace(load_binary=load_binary), get_current_device=lambda: 3)
    monkeypatch.setattr(submission.triton.runtime, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(nvidia, "make_launcher", None, raising=False)
    yield found
    submission._functions.clear()


def test_code_is_loaded_once_and_no_launcher_is_built(loads: list[Any]) -> None:
    compiled = Compiled()
    assert [submission._loaded(compiled) for _ in range(2)] == [99, 99]  # type: ignore[arg-type]
    assert loads == [("kernel", b"code", 512, 3)] and not compiled.launchers
    compiled._init_handles()  # Triton launches it
    assert submission._loaded(compiled) == 77


def test_a_kernel_of_too_many_threads_is_an_error_as_in_triton(loads: list[Any]) -> None:
    compiled = Compiled()
    compiled.metadata.num_warps = 16
    for _ in range(2):
        with pytest.raises(OutOfResources, match="Required: 512, Hardware limit: 256"):
            submission._loaded(compiled)


@pytest.mark.parametrize("why", ["no C", "hook"])
def test_otherwise_triton_loads_it(why: str, loads: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "hook":  # a tool that wants to see the code as it is loaded
        monkeypatch.setattr(knobs.runtime, "kernel_load_end_hook", lambda *args: None)
    else:
        monkeypatch.delattr(nvidia, "make_launcher")
    compiled = Compiled()
    assert [submission._loaded(compiled) for _ in range(2)] == [77, 77]
    assert not loads and compiled.launchers == 1
