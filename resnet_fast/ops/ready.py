"""Compile the kernels of a call ahead of its first run on a GPU."""

from __future__ import annotations

from ..calls import Call, NetCall
from ..impl import Impl, PlannedCall
from ..progress import announced, is_off
from ..spec import NetSpec, Spec


def ready(call: Call | NetCall, spec: Spec | NetSpec, impl: Impl) -> None:
    """Compile what a call of inference launches. Call it without a lock."""
    if not impl.ahead or is_off() or not all(spec.out_shape()):
        return
    device, ahead = call.x.device, impl.compiler
    with announced() as progress:
        ahead.compile_ahead([PlannedCall(ahead.meta_call(call), spec)], ahead.target_of(None, device), progress)
