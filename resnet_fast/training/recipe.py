"""A training run as one frozen, printable value: which net on which data, and every number that the result depends on.

A recipe is a YAML file (those in ``recipes/`` ship with the package) or the defaults, with ``key=value`` on top. What
changes how fast a run goes but not what it computes (workers, device, output folder) is not here: see
:class:`resnet_fast.training.loop.Options`. Two runs of one recipe on one device compute the same thing.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_package
from ..flags import check_backend

FOLDER = Path(__file__).with_name("recipes")

DATA = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder", "synthetic")
AUGMENT = ("none", "crop", "imagenet")
SCHEDULES = ("constant", "step", "cosine")
AMP = ("none", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """One training run. Lengths (``milestones``, ``warmup``) are in the unit that ``epochs`` or ``steps`` fixes.

    ``batch`` counts images per optimizer step over all processes and all ``accumulate`` parts. ``follow_links`` reads
    what links in a folder of images point to. ``classes``, more than the data have, makes a wider classifier.
    ``subset`` keeps that many training images, drawn by ``seed``. ``size`` is the side of the network's input.
    ``augment``: ``crop`` pads by ``pad`` pixels, crops and flips (section 4.2 of the paper); ``imagenet`` crops a
    random part of random size and flips. ``norm_weight_decay`` replaces ``weight_decay`` for norms and biases.
    ``warmup`` multiplies the learning rate by ``warmup_factor`` at first, linearly up to 1 or, with
    ``warmup_shape="constant"``, until it ends. ``ema`` is the decay per step of averaged weights, which validation then
    uses. ``dtype`` of autocast is ``amp``.
    """

    model: str = "cifar_resnet20"
    shortcut: str | None = None
    stride_in_1x1: bool = False
    zero_init_residual: bool = False
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
    momentum: float = 0.9
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
    sync_bn: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._among("data", DATA)
        self._among("augment", AUGMENT)
        self._among("schedule", SCHEDULES)
        self._among("warmup_shape", ("linear", "constant"))
        self._among("amp", AMP)
        self._among("save", ("raw", "recompute"))
        check_backend(self.backend)
        if (self.epochs is None) == (self.steps is None):
            got = f"epochs={self.epochs}, steps={self.steps}"
            raise UserError("either epochs or steps", got, "give one length and set the other to null")
        self._at_least(1, "size", "batch", "accumulate")
        for name in ("subset", "steps", "classes"):
            if getattr(self, name) is not None:
                self._at_least(1, name)
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserError("epochs > 0", str(self.epochs), "correct epochs")
        self._at_least(0, "pad", "weight_decay", "warmup", "warmup_factor", "gamma", "mixup", "cutmix", "lr", "seed")
        if self.norm_weight_decay is not None:
            self._at_least(0, "norm_weight_decay")
        for name in ("label_smoothing", "ema", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"0 <= {name} < 1", str(getattr(self, name)), f"correct {name}")
        if list(self.milestones) != sorted(self.milestones) or not all(map(math.isfinite, self.milestones)):
            raise UserError("finite milestones in rising order", str(list(self.milestones)), "sort them")
        if self.milestones and self.schedule != "step":
            raise UserError("milestones with schedule: step", f"schedule: {self.schedule}", "drop one of them")
        if self.data == "folder" and not self.data_path:
            raise UserError("data_path, the folder of images", "none", "give --data-path FOLDER")

    def _among(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise UserError(f"{name} among {', '.join(allowed)}", repr(getattr(self, name)), f"correct {name}")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= least or math.isinf(getattr(self, name)):
                raise UserError(f"{name} >= {least}", str(getattr(self, name)), f"correct {name}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * steps_per_epoch))

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """What multiplies ``lr`` in optimizer step ``step`` (from 0): a pure function, so that resuming needs no state.

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
        """Plain values, as JSON and YAML take them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(source: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name or YAML file (the defaults if None), with ``overrides`` on top.

    Raises UserError for a recipe that is not there, a file that is no mapping, an unknown key (with close matches), or
    a value of another type. Setting ``epochs`` removes ``steps``, and the other way round; where the recipe counts its
    warm-up or milestones in the other unit, they have to be set as well.
    """
    values: dict[str, Any] = {} if source is None else _read(source)
    changes = dict(overrides or {})
    for key, other in (("epochs", "steps"), ("steps", "epochs")):
        for chosen in (values, changes):
            if chosen.get(key) is not None and chosen.get(other) is None:
                chosen[other] = None
        stale = [k for k in ("milestones", "warmup") if values.get(k) and k not in changes]
        if values.get(other) is not None and changes.get(key) is not None and stale:
            got = f"{key} in place of {other}, with the recipe's {' and '.join(stale)} in {other}"
            raise UserError(f"every length in {key}", got, f"set {' and '.join(stale)} too")
    return replace(Recipe(), **{key: _typed(key, value) for key, value in (values | changes).items()})


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The inverse of :meth:`Recipe.to_dict`."""
    return replace(Recipe(), **{key: _typed(key, value) for key, value in values.items()})


def parse(assignments: Sequence[str]) -> dict[str, Any]:
    """``["lr=0.1", "milestones=[30, 60]"]`` -> values, read as YAML. UserError without an equals sign."""
    yaml = _yaml()
    values = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError("key=value", repr(text), "for instance --set lr=0.05")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError("a value that YAML can read", repr(value), f"correct --set {key}=") from error
    return values


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise missing_package("pyyaml", "which reads recipes", error, "train") from error
    return yaml


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.suffix and not path.is_file():
        if str(source) not in names():
            close = difflib.get_close_matches(str(source), names(), 3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names())}"
            raise UserError("a recipe's name or a YAML file", repr(str(source)), hint)
        path = FOLDER / f"{source}.yaml"
    yaml = _yaml()
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError("a recipe in YAML", f"{path} ({reason})", "correct the file or its path") from error
    if not isinstance(values, dict):
        raise UserError("a recipe of key: value lines", f"{path} with {type(values).__name__}", "correct the file")
    return values


_HINTS = typing.get_type_hints(Recipe)


def _typed(key: str, value: Any) -> Any:
    """``value`` as the field's type; UserError for an unknown key or another type."""
    if key not in _HINTS:
        known = [f.name for f in fields(Recipe)]
        close = difflib.get_close_matches(str(key), known, 3)
        raise UserError(
            "a key of a recipe",
            repr(key),
            f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}",
        )
    allowed = typing.get_args(_HINTS[key]) if isinstance(_HINTS[key], types.UnionType) else (_HINTS[key],)
    if value is None and type(None) in allowed:
        return None
    if bool in allowed and isinstance(value, bool):
        return value
    if not isinstance(value, bool):
        if int in allowed and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            return int(value)
        if float in allowed and isinstance(value, (int, float)):
            return float(value)
        if float in allowed and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
            try:
                return float(value)
            except ValueError:
                pass
        if str in allowed and isinstance(value, (str, Path)):
            return str(value)
        several = isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)
        if several and any(typing.get_origin(a) is tuple for a in allowed):
            return tuple(float(v) for v in value)
    wanted = " or ".join("a list of numbers" if typing.get_origin(a) else a.__name__ for a in allowed)
    raise UserError(f"{key} as {wanted.replace('NoneType', 'null')}", repr(value), f"correct {key}")
