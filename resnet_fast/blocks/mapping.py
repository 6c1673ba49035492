"""Describe a residual block of any library by the paths of its layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn.functional as F

from ..calls import Pool
from ..errors import UserError
from .plan import MappingPlan, planned

Activation = str | Callable[..., Any] | None


class LayerPath(NamedTuple):
    """One convolution with its norm and activation, each the path of a child module.

    Attributes:
        conv: path of the ``nn.Conv2d``. It may be of a subclass that runs its own norm, if ``norm`` is inside it.
        norm: path of the norm; None if there is none.
        act: path of the ``nn.ReLU``, or ``torch.nn.functional.relu`` if the forward calls that function (or its
            in-place form); None if no activation follows. A path may lead to an Identity or None in some instances.
    """

    conv: str
    norm: str | None = None
    act: Activation = None


Step = LayerPath | str | Pool
"""A layer that is fused, the path of a module that runs by itself, or a max-pooling that the forward calls."""

_NAME = re.compile(r"\w+|-\d+")
"""Of a child. CLIP numbers the pooling before a shortcut's convolution -1."""

Form = tuple[str, ...]
"""Paths of a shortcut: a module that runs by itself, (conv, norm), or (pool, conv, norm)."""


@dataclass(frozen=True)
class BlockMapping:
    """What a residual block computes: activation(main(x) + shortcut(x)).

    A path names an attribute, with dots between the levels, as in ``state_dict``: ``"layer.0.convolution"``. Lists
    become tuples.

    Args:
        main: the steps of the main branch in order. A step is a tuple ``(conv, norm, activation)`` of paths (see
            :class:`LayerPath`), the path of another module (squeeze-and-excitation, blur, dropout), which runs by
            itself and may be None or an Identity in some instances, or a :class:`~resnet_fast.calls.Pool`.
        shortcut: a path, ``(conv, norm)``, ``(pool, conv, norm)``, or a list of these, of which the first applies
            whose paths all exist. A lone path is a module that runs by itself. The shortcut is ``x`` where ``shortcut``
            is None, and in a block whose attribute of that name is absent, None, an Identity or an empty Sequential.
        activation: the activation after the sum, as in a layer.
        residual: False for a stem: there is no sum, and neither ``shortcut`` nor ``activation``.

    Raises:
        UserError: an argument is none of these.
    """

    main: tuple[Step, ...]
    shortcut: tuple[Form, ...] | None = None
    activation: Activation = None
    residual: bool = True
    plan: MappingPlan = field(init=False, compare=False, repr=False)
    """The same with its paths taken apart."""

    def __init__(self, main: Any, shortcut: Any = None, activation: Any = None, residual: bool = True):
        steps = tuple(map(_step, main)) if isinstance(main, (list, tuple)) else ()
        if not any(isinstance(step, LayerPath) for step in steps):
            raise UserError(
                "a mapping with at least one layer in main", repr(main), 'for example ("conv1", "bn1", "relu")'
            )
        object.__setattr__(self, "main", steps)
        object.__setattr__(self, "shortcut", _forms(shortcut))
        object.__setattr__(self, "activation", _activation(activation))
        object.__setattr__(self, "residual", bool(residual))
        object.__setattr__(self, "plan", planned(steps, self.shortcut or (), self.activation))
        if not residual and (shortcut is not None or activation is not None):
            got = f"shortcut={shortcut!r}, activation={activation!r}"
            raise UserError("neither shortcut nor activation where residual is False", got, "put the layers into main")

    def layers(self) -> list[LayerPath]:
        """Return the layers of the main branch."""
        return [step for step in self.main if isinstance(step, LayerPath)]

    def op(self) -> str:
        """Return the name under which reports count a block of this description that runs its stock layers."""
        if not self.residual:
            return "stem"
        return {2: "basic_block", 3: "bottleneck"}.get(len(self.layers()), "conv_bn_act")

    def required(self) -> list[str]:
        """Return the paths that every instance must have, though they may lead to None."""
        found: list[Any] = []
        for step in self.main:
            found += step if isinstance(step, LayerPath) else [step]
        return [path for path in (*found, self.activation) if isinstance(path, str)]


def _step(step: Any) -> Step:
    if isinstance(step, Pool):
        return step
    if isinstance(step, str):
        return _path(step)
    if isinstance(step, (list, tuple)) and 1 <= len(step) <= 3:
        conv, norm, act = (*step, None, None)[:3]
        return LayerPath(_path(conv), None if norm is None else _path(norm), _activation(act))
    raise UserError("a step of main: (conv, norm, activation), a path or a Pool", repr(step), "see help(BlockMapping)")


def _forms(shortcut: Any) -> tuple[Form, ...] | None:
    if shortcut is None:
        return None
    alternatives: Iterable[Any] = shortcut if isinstance(shortcut, list) else [shortcut]
    if isinstance(shortcut, tuple) and any(isinstance(form, tuple) for form in shortcut):  # of another mapping
        alternatives = shortcut
    forms = [(form,) if isinstance(form, str) else form for form in alternatives]
    for form in forms:
        if not isinstance(form, tuple) or not 1 <= len(form) <= 3:
            raise UserError(
                "a shortcut as a path, (conv, norm), (pool, conv, norm), or a list of these",
                repr(form),
                "see help(BlockMapping)",
            )
    return tuple(tuple(map(_path, form)) for form in forms)


def _activation(act: Any) -> Activation:
    if act is None or act is F.relu:
        return act
    if isinstance(act, str):
        return _path(act)
    raise UserError(
        "an activation as a path, torch.nn.functional.relu or None", repr(act), "the ops fuse no other activation"
    )


def _path(path: Any) -> str:
    if isinstance(path, str) and all(_NAME.fullmatch(part) for part in path.split(".")):
        return path
    raise UserError("a path of attribute names with dots between", repr(path), 'for example "layer.0.convolution"')
