"""A training run as one frozen, printable value: the net, the data, and every number that the result depends on.

A recipe is a YAML file (``recipes/`` has those of the package) or the defaults, changed by ``key=value``. What changes
the speed of a run but not its result (workers, device, output folder) is not part of it: see
:class:`resnet_fast.training.options.RunOptions`. Two runs of one recipe on one device compute the same.
"""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .. import limits
from ..errors import UserError
from ..flags import check_backend
from . import recipe_text
from .data_sources import DATASETS
from .recipe_text import parse_assignments, shown

FOLDER = Path(__file__).with_name("recipes")

AUGMENT = ("none", "crop", "imagenet")
SCHEDULES = ("constant", "step", "cosine")
AMP = ("none", "bfloat16", "float16")

RANGES: dict[str, tuple[float, float]] = {
    "classes": (1, 10**5),
    "size": (1, limits.MOST_SIDE),
    "subset": (1, 10**9),
    "pad": (0, 1024),
    "batch": (1, limits.MOST_BATCH),
    "accumulate": (1, limits.MOST_BATCH),
    "epochs": (1e-6, 1e6),
    "steps": (1, 10**9),
    "lr": (0, 1e30),
    "weight_decay": (0, 1e6),
    "norm_weight_decay": (0, 1e6),
    "gamma": (0, 1e3),
    "milestones": (0, 1e9),
    "warmup": (0, 1e9),
    "warmup_factor": (0, 1e3),
    "mixup": (0, 1e3),
    "cutmix": (0, 1e3),
    "seed": (0, 2**63 - 1),
}
"""The least and the most allowed value of each number. Others make no sense, or PyTorch cannot take them (float32
overflows at 3e38, a seed has 63 bits). Memory is checked where it is used."""

FRACTIONS = ("momentum", "beta2", "label_smoothing", "ema")
"""Numbers of at least 0 and less than 1."""

LEAST_BETA = 1e-3
"""The least parameter of mixup's Beta distribution other than 0 (off): float32 draws NaN from much smaller ones."""

MOST_MILESTONES = 1000


@dataclass(frozen=True)
class Recipe:
    """One training run. The unit of ``milestones`` and ``warmup`` is that of its length: ``epochs`` or ``steps``.

    Attributes:
        weights: A file of trained weights to begin with. Its head is replaced if it has another number of classes.
        freeze: Keep everything up to this stage (``stem``, ``layer1`` …) as it is in ``weights``.
        data: A name of :data:`resnet_fast.training.data_sources.DATASETS`; ``data_path`` is its folder.
        follow_links: Read what links in a folder of images point to.
        classes: Outputs of the net, if more than the data has.
        size: The side of the input in pixels.
        subset: Keep that many training images, drawn by ``seed``.
        augment: ``crop`` pads by ``pad`` pixels, crops and flips (section 4.2 of the paper). ``imagenet`` crops a
            random part of random size and flips. ``flip`` allows the flips of both.
        batch: Images per optimizer step over all processes and all ``accumulate`` parts.
        optimizer: One of torch.optim's, in lower case. ``momentum`` and ``beta2`` are also Adam's betas.
        norm_weight_decay: Replaces ``weight_decay`` for norms and biases.
        warmup: Multiply the learning rate by ``warmup_factor`` at first. It rises linearly to 1 or, with
            ``warmup_shape="constant"``, stays until the warm-up ends.
        ema: Decay per step of averaged weights, which validation then uses; 0 for none.
        amp: The dtype of autocast, or ``none``.
        cuda_graph: Replay the net's forward and backward pass from CUDA graphs. Loss and optimizer run as without.
    """

    model: str = "cifar_resnet20"
    shortcut: str | None = None
    stride_in_1x1: bool = False
    zero_init_residual: bool = False
    weights: str | None = None
    freeze: str | None = None
    data: str = "digits"
    data_path: str | None = None
    follow_links: bool = False
    classes: int | None = None
    size: int = 16
    subset: int | None = None
    augment: str = "crop"
    pad: int = 2
    flip: bool = False
    batch: int = 64
    accumulate: int = 1
    epochs: float | None = 20.0
    steps: int | None = None
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    beta2: float = 0.999
    nesterov: bool = False
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.0
    warmup_factor: float = 0.1
    warmup_shape: str = "linear"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    amp: str = "none"
    channels_last: bool = True
    backend: str = "auto"
    save: str = "raw"
    cuda_graph: bool = False
    sync_bn: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._among("data", tuple(DATASETS))
        self._among("augment", AUGMENT)
        self._among("schedule", SCHEDULES)
        self._among("warmup_shape", ("linear", "constant"))
        self._among("amp", AMP)
        self._among("save", ("raw", "recompute"))
        check_backend(self.backend)
        if (self.epochs is None) == (self.steps is None):
            got = f"epochs={self.epochs}, steps={self.steps}"
            raise UserError("either epochs or steps", got, "give one length and set the other to null")
        for name in RANGES:
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else () if value is None else (value,):
                self._within(name, one)
        for name in FRACTIONS:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"0 <= {name} < 1", str(getattr(self, name)), f"correct {name}")
        for name in ("mixup", "cutmix"):
            if 0 < getattr(self, name) < LEAST_BETA:
                raise UserError(f"{name} of 0 or >= {LEAST_BETA}", str(getattr(self, name)), f"correct {name}")
        if list(self.milestones) != sorted(self.milestones) or len(self.milestones) > MOST_MILESTONES:
            got = shown(list(self.milestones))
            raise UserError(f"at most {MOST_MILESTONES} milestones in rising order", got, "sort them")
        if self.milestones and self.schedule != "step":
            raise UserError("milestones with schedule: step", f"schedule: {self.schedule}", "drop one of them")
        if self.lr * max(1.0, self.warmup_factor, self._most_gamma()) > RANGES["lr"][1]:
            got = f"lr {self.lr:g} with gamma {self.gamma:g} and warmup_factor {self.warmup_factor:g}"
            raise UserError(f"a learning rate of at most {RANGES['lr'][1]:g} at any time", got, "lower one of them")
        if self.nesterov and not self.momentum:
            raise UserError("a momentum for nesterov", "momentum 0", "raise momentum, or set nesterov to false")
        if self.freeze and not self.weights:
            raise UserError("weights for what is frozen", f"freeze {self.freeze} without", "give --weights FILE")
        if DATASETS[self.data].data_path == "required" and not self.data_path:
            raise UserError("data_path, the folder of images", "none", "give --data-path FOLDER")

    def _among(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise UserError(f"{name} among {', '.join(allowed)}", shown(getattr(self, name)), f"correct {name}")

    def _within(self, name: str, value: float) -> None:
        least, most = RANGES[name]
        if not least <= value <= most:
            raise UserError(f"{name} from {least:,} to {most:,}", shown(value), f"correct {name}")

    def _most_gamma(self) -> float:
        """Return the most that ``gamma`` multiplies the learning rate by; infinity if that overflows."""
        try:
            return self.gamma ** len(self.milestones)
        except OverflowError:
            return math.inf

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * steps_per_epoch))

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Return what multiplies ``lr`` in optimizer step ``step``, counted from 0.

        It is a pure function, so that resuming needs no state.
        Cosine: half a period from 1 towards 0 over the steps after the warm-up (Loshchilov and Hutter, "SGDR", 2016).
        """
        unit = 1 if self.steps is not None else steps_per_epoch
        warmup = round(self.warmup * unit)
        if step < warmup:
            if self.warmup_shape == "constant":
                return self.warmup_factor
            return self.warmup_factor + (1 - self.warmup_factor) * step / warmup
        if self.schedule == "step":
            return self.gamma ** bisect_right([round(m * unit) for m in self.milestones], step)
        if self.schedule == "cosine":
            length = max(1, self.total_steps(steps_per_epoch) - warmup)
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / length))
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON and YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Recipe:
    """Load a recipe and change it.

    Setting ``epochs`` removes ``steps``, and the other way round. If the recipe counts its warm-up or milestones in
    the other unit, they keep their share of the length.

    Args:
        source: The name of a recipe, a YAML file, or values; None takes the defaults.
        overrides: Values that replace those of ``source``.
        note: Called with a sentence if lengths were scaled.

    Raises:
        UserError: There is no such recipe, the file is no mapping, a key is unknown, or a value has another type or is
            out of range.
    """
    values: dict[Any, Any] = {} if source is None else dict(source) if isinstance(source, Mapping) else _read(source)
    changes = dict(overrides or {})
    said = []
    for key, other in (("epochs", "steps"), ("steps", "epochs")):
        for chosen in (values, changes):
            if chosen.get(key) is not None and chosen.get(other) is None:
                chosen[other] = None
        if values.get(other) is not None and changes.get(key) is not None:
            scaled = _scaled(values, _typed(key, changes[key]) / max(_typed(other, values[other]), 1e-9), set(changes))
            if scaled:
                changes |= scaled
                lengths = ", ".join(f"{name} {value}" for name, value in scaled.items())
                said.append(f"{key} {changes[key]} for {other} {values[other]}, and in proportion: {lengths}")
    recipe = replace(Recipe(), **{key: _typed(key, value) for key, value in (values | changes).items()})
    for text in said:  # only once the recipe is valid
        note(text)
    return recipe


def _scaled(values: Mapping[str, Any], share: float, given: Collection[str]) -> dict[str, Any]:
    """Return the lengths of a recipe, except those in ``given``, multiplied by ``share``."""
    stale = [name for name in ("warmup", "milestones") if values.get(name) and name not in given]
    old = {name: _typed(name, values[name]) for name in stale}
    return {
        k: [round(m * share, 6) for m in v] if isinstance(v, tuple) else round(v * share, 6) for k, v in old.items()
    }


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with these values; the inverse of :meth:`Recipe.to_dict`."""
    return replace(Recipe(), **{key: _typed(key, value) for key, value in values.items()})


def combine(named: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return the values of options such as ``--lr`` together with those of ``--set``.

    Args:
        named: The values that options gave.
        assignments: What ``--set`` was given, as :func:`~resnet_fast.training.recipe_text.parse_assignments` reads it.

    Raises:
        UserError: Both give one key, with different values.
    """
    given = parse_assignments(assignments)
    for key in given.keys() & named.keys():
        if _typed(key, given[key]) != _typed(key, named[key]):
            option = f"--{key.replace('_', '-')} {named[key]}"
            raise UserError(f"one value of {key}", f"{option} and --set {key}={given[key]}", "leave one of them out")
    return {**named, **given}


def _read(source: str | Path) -> dict[Any, Any]:
    path = Path(source)
    if not path.suffix and not os.path.isfile(path):
        if str(source) not in names():
            close = difflib.get_close_matches(str(source)[:100], names(), 3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names())}"
            raise UserError("a recipe's name or a YAML file", shown(str(source)), hint)
        path = FOLDER / f"{source}.yaml"
    return recipe_text.read_yaml(path)


_HINTS = typing.get_type_hints(Recipe)


def _typed(key: Any, value: Any) -> Any:
    """Return ``value`` as the type of the field. Raises UserError for an unknown key or another type."""
    if key not in _HINTS:
        known = [f.name for f in fields(Recipe)]
        close = difflib.get_close_matches(shown(key), known, 3)
        raise UserError(
            "a key of a recipe",
            shown(key),
            f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}",
        )
    allowed = typing.get_args(_HINTS[key]) if isinstance(_HINTS[key], types.UnionType) else (_HINTS[key],)
    for kind in allowed:
        try:
            return _READERS[typing.get_origin(kind) or kind](value)
        except (TypeError, ValueError, OverflowError):
            pass
    wanted = " or ".join("a list of numbers" if typing.get_origin(a) else a.__name__ for a in allowed)
    raise UserError(f"{key} as {wanted.replace('NoneType', 'null')}", shown(value), f"correct {key}")


def _exactly(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return read


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):  # YAML 1.1 reads 1e-4 as text
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    """Return text that can be a file name: without zero bytes and characters that cannot be encoded."""
    if not isinstance(value, (str, Path)) or b"\0" in os.fsencode(value):
        raise TypeError
    return str(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or any(isinstance(one, str) for one in value):
        raise TypeError
    return tuple(_number(one) for one in value)


_READERS: dict[Any, Callable[[Any], Any]] = {
    types.NoneType: _exactly(types.NoneType),
    bool: _exactly(bool),
    int: _whole,
    float: _number,
    str: _text,
    tuple: _numbers,
}
"""Type of a field -> function that converts a value. It raises TypeError, ValueError or OverflowError for others."""
