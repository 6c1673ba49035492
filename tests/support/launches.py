"""Every launch of a Triton kernel, where it arrives: in the interpreter, or in the machine that stands in for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from resnet_fast import stand_in


def before_each(monkeypatch: pytest.MonkeyPatch, seen: Callable[[str], None]) -> None:
    """Call ``seen`` with a kernel's name before each of its launches; one native call may submit several."""
    from triton.runtime.interpreter import InterpretedFunction

    machine = stand_in.present()
    owner = InterpretedFunction if machine is None else type(machine)
    real = owner.run

    def run(of: Any, *args: Any, **kwargs: Any) -> Any:
        seen(of.fn.__name__ if machine is None else args[0].name)
        return real(of, *args, **kwargs)

    monkeypatch.setattr(owner, "run", run)
