"""Compare the results of an experiment with the paper's claims, as sentences with figures.

A difference of two error rates counts if it exceeds two standard errors of counting: with n images an error rate p is
known to sqrt(p (1 - p) / n). This is only the noise of the images; another seed would change a net more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .responses import Responses
from .runs import Run


@dataclass(frozen=True)
class Finding:
    """A claim, whether the figures show it, and the figures."""

    claim: str
    shown: bool
    because: str


def noise(p: float, q: float, n: int, m: int) -> float:
    """Return two standard errors of the difference of error rates ``p`` of ``n`` images and ``q`` of ``m``."""
    return 2 * math.sqrt(p * (1 - p) / n + q * (1 - q) / m)


def _points(value: float) -> str:
    return f"{100 * value:.2f}"


def _compared(shallow: Run, deep: Run) -> tuple[float, float, str]:
    """Return how much higher the training error of the deep net is, the noise, and both in words."""
    higher = deep.train_error - shallow.train_error
    limit = noise(shallow.train_error, deep.train_error, shallow.images_seen, deep.images_seen)
    words = (
        f"training error {_points(shallow.train_error)} % with {shallow.case.label}, {_points(deep.train_error)} % "
        f"with {deep.case.label}: {100 * higher:+.2f} points, counting noise {_points(limit)}"
    )
    return higher, limit, words


def degradation(runs: Mapping[str, Run]) -> list[Finding]:
    out = []
    for shallow, deep in (("plain-20", "plain-56"), ("plain-18", "plain-34")):
        higher, limit, words = _compared(runs[shallow], runs[deep])
        out.append(Finding(f"{deep} has a higher training error than {shallow}", higher > limit, words))
    for shallow, deep in (("resnet-20", "resnet-56"), ("resnet-18", "resnet-34")):
        higher, limit, words = _compared(runs[shallow], runs[deep])
        out.append(Finding(f"{deep} has no higher training error than {shallow}", higher <= limit, words))
    for plain, residual in (("plain-56", "resnet-56"), ("plain-34", "resnet-34")):
        higher, limit, words = _compared(runs[residual], runs[plain])
        out.append(Finding(f"{residual} has a lower training error than {plain}", higher > limit, words))
    return out


def depth(runs: Mapping[str, Run]) -> list[Finding]:
    out = []
    for deep in ("resnet-56", "resnet-110"):
        higher, limit, words = _compared(runs["resnet-20"], runs[deep])
        out.append(Finding(f"{deep} has no higher training error than resnet-20", higher <= limit, words))
    first, last = runs["resnet-1202"].trains[0], runs["resnet-1202"].trains[-1]
    words = (
        f"training error {_points(first['error'])} % in the first {first['step']} steps, {_points(last['error'])} % in "
        f"the last of {last['step']} (loss {first['loss']:.2f} and {last['loss']:.2f})"
    )
    # The paper's own sign that a deep net has begun to converge, in its warm-up of 110 layers.
    out.append(Finding("1202 layers can be optimized: the training error falls below 80 %", last["error"] < 0.8, words))
    return out


def bottleneck(runs: Mapping[str, Run]) -> list[Finding]:
    basic, deep = runs["resnet-34"], runs["resnet-50"]
    limit = noise(basic.val_error, deep.val_error, basic.last["val_images"], deep.last["val_images"])
    words = (
        f"validation error {_points(basic.val_error)} % with two-layer blocks, {_points(deep.val_error)} % with "
        f"bottlenecks; counting noise {_points(limit)}"
    )
    return [Finding("bottlenecks have the lower error", deep.val_error < basic.val_error - limit, words)]


def shortcuts(runs: Mapping[str, Run]) -> list[Finding]:
    errors = {label: run.val_error for label, run in runs.items()}
    spread = max(errors.values()) - min(errors.values())
    n = min(run.last["val_images"] for run in runs.values())
    limit = noise(max(errors.values()), min(errors.values()), n, n)
    words = ", ".join(f"{label} {_points(error)} %" for label, error in errors.items())
    text = f"validation error {words}: {_points(spread)} points apart, counting noise {_points(limit)}"
    return [Finding("A, B and C differ by less than two points: projections are not essential", spread < 0.02, text)]


def responses(measured: Mapping[str, Responses]) -> list[Finding]:
    def compare(large: str, small: str, claim: str) -> Finding:
        a, b = measured[large].mean, measured[small].mean
        return Finding(claim, b < a, f"mean over layers {a:.3f} in {large}, {b:.3f} in {small}")

    return [
        compare("plain-20", "resnet-20", "20 layers respond less with shortcuts than without"),
        compare("plain-56", "resnet-56", "56 layers respond less with shortcuts than without"),
        compare("resnet-20", "resnet-56", "the layers of resnet-56 respond less than those of resnet-20"),
        compare("resnet-56", "resnet-110", "the layers of resnet-110 respond less than those of resnet-56"),
    ]
