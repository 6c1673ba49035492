"""The paths of a :class:`~resnet_fast.blocks.mapping.BlockMapping`, taken apart once.

A block reads its layers at each call, because libraries exchange them. Here is what does not depend on the instance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..calls import Pool

Path = tuple[str, ...]
"""The names on the way to a module."""


class PlannedLayer(NamedTuple):
    """A layer that is fused.

    Attributes:
        names: paths of the convolution and of the norm as they were given, for sentences.
        conv: to the convolution.
        norm: to the norm; None if there is none.
        act: to the activation; None if it is no module.
        relu: whether the forward calls ReLU.
        inside: whether the norm is inside the convolution.
    """

    names: tuple[str, str]
    conv: Path
    norm: Path | None
    act: Path | None
    relu: bool
    inside: bool


class PlannedForm(NamedTuple):
    """A form of the shortcut.

    Attributes:
        paths: of the modules that an instance of this form has.
        before: to the module that the shortcut starts with; None if it starts with its projection.
        projection: the convolution and the norm; None if ``before`` is all.
        containers: the modules on the way to the projection.
    """

    paths: tuple[Path, ...]
    before: Path | None
    projection: PlannedLayer | None
    containers: tuple[Path, ...]


class MappingPlan(NamedTuple):
    """A whole description.

    Attributes:
        main: planned layers, paths of modules that run by themselves, and poolings.
        forms: of the shortcut; none if it is ``x``.
        act: to the activation after the sum; None if it is no module.
        relu: whether the forward calls ReLU after the sum.
        containers: the modules on the way to the layers of ``main``.
    """

    main: tuple[Any, ...]
    forms: tuple[PlannedForm, ...]
    act: Path | None
    relu: bool
    containers: tuple[Path, ...]


def planned(main: Iterable[Any], shortcut: Iterable[tuple[str, ...]], activation: Any) -> MappingPlan:
    """Take the fields of a mapping apart."""
    steps = tuple([step if isinstance(step, Pool) else _split(step) for step in main])
    layers = [step for step in steps if isinstance(step, PlannedLayer)]
    paths = [path for layer in layers for path in (layer.conv, layer.norm, layer.act) if path is not None]
    act = _split(activation) if isinstance(activation, str) else None
    return MappingPlan(
        steps, tuple(map(_form, shortcut)), act, act is None and activation is not None, _containers(paths)
    )


def _form(form: tuple[str, ...]) -> PlannedForm:
    paths = tuple(map(_split, form))
    projection = None if len(form) == 1 else _layer(form[-2], form[-1], None)
    before = None if len(form) == 2 else paths[0]
    return PlannedForm(paths, before, projection, () if projection is None else _containers(paths[-2:]))


def _split(step: Any) -> Any:
    """Take a path apart, or the paths of a layer."""
    return tuple(step.split(".")) if isinstance(step, str) else _layer(*step)


def _layer(conv: str, norm: str | None, act: Any) -> PlannedLayer:
    path = _split(act) if isinstance(act, str) else None
    inside = norm is not None and norm.startswith(conv + ".")
    split = None if norm is None else _split(norm)
    return PlannedLayer((conv, norm or "no norm"), _split(conv), split, path, path is None and act is not None, inside)


def _containers(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Return the paths of the modules on the way to these, each once."""
    return tuple(dict.fromkeys(path[:end] for path in paths for end in range(1, len(path))))
