"""Hold which gradients a backward pass is asked for, and those that it has computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ....calls import Call
from ....spec import Spec


class BackwardPass:
    """What both chains' backward passes start from and return.

    ``needs``: a record like the call, with True in place of each tensor whose gradient is wanted. ``weights``,
    ``biases``, ``gammas``, ``betas``: the gradients computed so far, by convolution.
    """

    def __init__(self, call: Call, spec: Spec, needs: Sequence[bool]) -> None:
        self.call, self.spec = call, spec
        self.needs: Any = call.with_leaves(needs)
        self.count, self.main = len(call.convs), len(spec.main)
        self.weights: list[Tensor | None] = [None] * self.count
        self.biases: list[Tensor | None] = [None] * self.count
        self.gammas: list[Tensor | None] = [None] * self.count
        self.betas: list[Tensor | None] = [None] * self.count

    def wanted(self, i: int) -> bool:
        """Return whether a gradient of a parameter of layer ``i`` is wanted."""
        return any([*self.needs.convs[i][:2], *self.needs.norms[i][:2]])

    def passes_on(self, i: int) -> bool:
        """Return whether a gradient of the input of convolution ``i`` is wanted."""
        below = range(i) if i < self.main else ()
        return self.needs.x or any(self.wanted(j) for j in below)

    def found(self, dx: Tensor | None, g: Tensor, dz: Tensor) -> list[Tensor | None]:
        """Return all gradients in the order of :meth:`Call.leaves`; ``g`` is that of the sum at the end."""
        added = g if self.needs.added else None
        if added is not None and (added is dx or added is dz):
            added = added.clone()  # an op's outputs are its own
        return [dx, added, *self.weights, *self.biases, *self.gammas, *self.betas]
