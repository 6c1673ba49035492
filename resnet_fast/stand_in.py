"""A stand-in for a GPU: it runs compiled GPU kernels on CPU tensors, while it is entered.

Backends with GPU kernels ask :func:`present` whether they may serve CPU tensors, and for which GPU to plan.
:mod:`resnet_fast.tools.ptx_machine` is the one that there is. What was decided while another one, or none, was present
does not hold any more: :meth:`resnet_fast.tools.ptx_machine.PtxMachine.__enter__` has everything decided anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Temporary(NamedTuple):
    """Memory that launches of a pass use between them: its address, bytes, and its first and last launch, from 0."""

    address: int
    nbytes: int
    first: int
    last: int


class StandIn(Protocol):
    """What backends ask of a stand-in.

    ``gpu`` is a name of :func:`resnet_fast.devices.gpus`: kernels are planned and compiled for it. ``tf32``: whether it
    rounds the products of float32 convolutions to TF32. Memory that is allocated inside ``one_pass()`` counts as
    written by nobody. ``lend(used, fresh, temporaries)`` is for a pass that is submitted in one call: it may touch this
    memory and no other, and nobody has written to ``fresh`` and the temporaries. ``fault()`` returns the error of a
    launch that failed where no exception could be raised, and forgets it.
    """

    gpu: str
    tf32: bool

    def one_pass(self) -> AbstractContextManager[Any]: ...

    def lend(
        self, used: Sequence[Tensor | None], fresh: Sequence[Tensor], temporaries: Sequence[Temporary]
    ) -> None: ...

    def fault(self) -> Exception | None: ...


_present: StandIn | None = None


def present() -> StandIn | None:
    """Return the stand-in that is entered in this process, if any."""
    return _present


def put(stand_in: StandIn | None) -> None:
    """Make this the one that is present; None: no one is."""
    global _present
    _present = stand_in
