"""Read and write the facts in a weights file: its net, its class names and the preprocessing of its images.

A training run writes them as one JSON text into the metadata of ``model.safetensors``; exported programs carry the same
text. Files come from anywhere, so every value is checked before it decides what is built or how much memory is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UserError
from ..limits import MOST_SIDE
from .safe_files import json_text

KEY = "resnet_fast"
"""The entry of the metadata that holds the JSON text."""

MAX_TEXT = 4 << 20
"""Most characters of the text; 20,000 classes with long names take a fifth of it."""
MAX_RESIZE = 2.0
"""Largest ratio of the resized short side to the crop; 256 to 224 is usual. It bounds the memory of a resized image."""
AMP = ("none", "bfloat16", "float16")


@dataclass(frozen=True)
class Facts:
    """The facts of a trained net.

    Attributes:
        model: the net's name; ``shortcut`` and ``stride_in_1x1`` are its variant.
        size: side of the input in pixels.
        classes: names in the order of the rows of the last layer.
        mean, std: per channel, of pixels scaled to 0-1; one value each for grey images.
        resize: the resized short side over ``size``.
        amp: the dtype of autocast that the run validated in, or ``none``.
        data: the data set of the training run; empty if unknown.
    """

    model: str
    size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: float
    shortcut: str | None = None
    stride_in_1x1: bool = False
    amp: str = "none"
    data: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the JSON text that :func:`parse` reads."""
        return json_text(self.to_dict())

    @property
    def variant(self) -> dict[str, Any]:
        """The keyword arguments of :func:`resnet_fast.models.registry.build`."""
        return {"shortcut": self.shortcut, "stride_in_1x1": self.stride_in_1x1}

    @property
    def look(self) -> dict[str, Any]:
        """The keyword arguments of :func:`resnet_fast.io.images.preprocess`."""
        return {key: getattr(self, key) for key in ("size", "mean", "std", "resize")}


def parse(text: str, where: str) -> Facts:
    """Parse and check the facts in ``text``.

    Unknown entries are ignored, because a later version may write more. Whether the net exists is not checked.

    Args:
        text: the JSON text.
        where: the file's name for error messages.

    Raises:
        UserError: an entry is missing, has another type or is out of range.
    """
    if len(text) > MAX_TEXT:
        raise refusal(f"at most {MAX_TEXT:,} characters", f"{len(text):,}", where)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal("JSON", f"{type(error).__name__} while reading", where) from error
    if not isinstance(found, dict):
        raise refusal("a JSON object", f"a {type(found).__name__}", where)
    facts = Facts(
        model=_value(found, "model", str, where),
        size=_value(found, "size", int, where),
        classes=_texts(found, "classes", where),
        mean=_numbers(found, "mean", where),
        std=_numbers(found, "std", where),
        resize=float(_value(found, "resize", (int, float), where)),
        shortcut=_value(found, "shortcut", (str, type(None)), where, None),
        stride_in_1x1=_value(found, "stride_in_1x1", bool, where, False),
        amp=_value(found, "amp", str, where, "none"),
        data=_value(found, "data", str, where, ""),
    )
    _check(facts, where)
    return facts


def _check(facts: Facts, where: str) -> None:
    if not 1 <= facts.size <= MOST_SIDE:
        raise refusal(f"size in 1 … {MOST_SIDE}", str(facts.size), where)
    if not 0 < facts.resize <= MAX_RESIZE or round(facts.size * facts.resize) < 1:
        raise refusal(f"resize above 0, up to {MAX_RESIZE:g}", str(facts.resize), where)
    if len(facts.mean) not in (1, 3) or len(facts.mean) != len(facts.std):
        got = f"{len(facts.mean)} and {len(facts.std)}"
        raise refusal("mean and std of 1 or 3 channels each", got, where)
    if not all(map(math.isfinite, (*facts.mean, *facts.std))) or min(facts.std) <= 0:
        raise refusal("finite means and deviations above 0", f"{list(facts.mean)} and {list(facts.std)}", where)
    if facts.amp not in AMP:
        raise refusal(f"amp among {', '.join(AMP)}", repr(facts.amp), where)


_REQUIRED = object()


def _value(found: Mapping[str, Any], key: str, kind: Any, where: str, default: Any = _REQUIRED) -> Any:
    value = found.get(key, default)
    if value is _REQUIRED:
        raise refusal(key, "none", where)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise refusal(f"{key} as {names}", _shown(value), where)
    return value


def _texts(found: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = _value(found, key, list, where)
    if not values or not all(isinstance(value, str) for value in values):
        raise refusal(f"{key} as a list of names", _shown(values), where)
    return tuple(values)


def _numbers(found: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    values = _value(found, key, list, where)
    numbers: Sequence[Any] = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    try:
        if len(numbers) != len(values):
            raise ValueError
        return tuple(float(v) for v in numbers)
    except (ValueError, OverflowError) as error:  # OverflowError: an integer of hundreds of digits
        raise refusal(f"{key} as a list of numbers", _shown(values), where) from error


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "…"


def refusal(expected: str, got: str, where: str) -> UserError:
    """Return the error about the facts of the file ``where``."""
    return UserError(
        f"{expected} in what {where} says of its weights (metadata {KEY!r})",
        got,
        "use the file that the training run wrote, or correct its metadata",
    )
