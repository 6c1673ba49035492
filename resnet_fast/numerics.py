"""Judge the error of an output: error report, error budget, and the boundary band of ReLU.

The reference is the same problem in float64 on the same, already rounded, inputs. The allowed error depends on the
error of stock torch in the same dtype and layout ("eager"), never on a fixed tolerance:

    error(out) <= 2 * error(eager) + floor,    error(x) = ||x - ref|| / ||ref||

The largest single error, which a norm over a whole tensor would hide, has a similar bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError

FACTOR = 2.0
"""Allowed error in units of eager's own error."""

PEAK = 8.0
"""Largest normally distributed error in standard deviations; the chance to exceed it is 1e-15 per element."""


@dataclass(frozen=True)
class ErrorReport:
    """Errors of ``out`` (and of eager) against the float64 reference.

    Attributes:
        rel: ``||out - ref|| / ||ref||`` over the finite part of the reference.
        max_abs, max_at: the largest single error and its index.
        out_at, ref_at: output and reference at ``max_at``.
        mismatched, mismatch_at: elements where only one side is finite or infinities differ, and the first of them.
        rms, peak: root mean square and largest magnitude of the reference.
        eager_rel, eager_max: ``rel`` and ``max_abs`` of eager; None without it.
    """

    rel: float
    max_abs: float
    max_at: tuple[int, ...]
    out_at: float
    ref_at: float
    mismatched: int
    mismatch_at: tuple[int, ...] | None
    rms: float
    peak: float
    eager_rel: float | None = None
    eager_max: float | None = None

    @property
    def ratio(self) -> float | None:
        """``rel`` in units of eager's: 1.0 is as good, inf if only eager is exact; None without eager."""
        if self.eager_rel is None:
            return None
        if self.eager_rel == 0:
            return 1.0 if self.rel == 0 else math.inf
        return self.rel / self.eager_rel

    def __str__(self) -> str:
        text = (
            f"error {self.rel:.3e} (max {self.max_abs:.3e} at {self.max_at}: {self.out_at:.6g}, not {self.ref_at:.6g})"
        )
        if self.mismatched:
            text += f"; {self.mismatched} elements NaN or infinite on one side only, the first at {self.mismatch_at}"
        if self.eager_rel is not None:
            text += f"; eager's own {self.eager_rel:.3e} (max {self.eager_max:.3e}), ratio {self.ratio:.2f}"
        return text


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def _check(out: Tensor, ref64: Tensor, what: str) -> None:
    if ref64.dtype != torch.float64:
        raise UserError("a float64 reference", str(ref64.dtype), "compute it from the same inputs after .double()")
    if out.shape != ref64.shape:
        raise UserError(f"{what} of shape {tuple(ref64.shape)}", str(tuple(out.shape)), "compare the same problem")


def compare(out: Tensor, ref64: Tensor, eager: Tensor | None = None) -> ErrorReport:
    """Compare an output with the reference.

    Where the reference is not finite, ``out`` must have the same value (NaN for NaN); otherwise the element counts as
    mismatched. Such elements never enter a norm. An empty tensor has no error.

    Args:
        out: any dtype, layout and device.
        ref64: float64, same shape.
        eager: stock torch's result for the same problem in the dtype and layout of ``out``.

    Raises:
        UserError: the shapes differ, or the reference is not float64.
    """
    _check(out, ref64, "an output")
    ref = ref64.detach().cpu().contiguous()
    x = out.detach().cpu().double().contiguous()
    finite = ref.isfinite() & x.isfinite()
    wrong = ~finite & ~((ref == x) | (ref.isnan() & x.isnan()))
    zero = torch.zeros((), dtype=torch.float64)
    known = torch.where(finite, ref, zero)
    diff = torch.where(finite, x - ref, zero).abs()
    norm, error = known.norm().item(), diff.norm().item()
    at = int(diff.argmax()) if diff.numel() else 0
    worst = _index(at, ref.shape) if diff.numel() else ()
    own = compare(eager, ref64) if eager is not None else None
    return ErrorReport(
        rel=error / norm if norm else (math.inf if error else 0.0),
        max_abs=diff.max().item() if diff.numel() else 0.0,
        max_at=worst,
        out_at=x.flatten()[at].item() if diff.numel() else 0.0,
        ref_at=ref.flatten()[at].item() if diff.numel() else 0.0,
        mismatched=int(wrong.sum()),
        mismatch_at=_index(int(wrong.flatten().int().argmax()), ref.shape) if wrong.any() else None,
        rms=norm / math.sqrt(max(1, diff.numel())),
        peak=known.abs().max().item() if diff.numel() else 0.0,
        eager_rel=own.rel if own else None,
        eager_max=own.max_abs if own else None,
    )


def floor(dtype: torch.dtype, gemm_k: int) -> float:
    """Return the relative error that is allowed even if eager is exact: ``(u_out + u_acc * sqrt(gemm_k)) / 4``.

    u is half the epsilon of the output's dtype, and of the accumulator (float32, or float64 for float64). A sum of k
    terms in another order differs like a random walk, therefore the root. The quarter is about the standard deviation
    of one rounding in units of u, so that the floor stays below eager's usual error.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    u_out, u_acc = torch.finfo(dtype).eps / 2, torch.finfo(accumulator).eps / 2
    return (u_out + u_acc * math.sqrt(gemm_k)) / 4


@dataclass(frozen=True)
class Budget:
    """The largest allowed relative error and the largest allowed single error."""

    rel: float
    max_abs: float


def budget(report: ErrorReport, dtype: torch.dtype, gemm_k: int) -> Budget:
    """Return the errors that :func:`assert_close` allows.

    Args:
        report: a report with eager's errors.
        dtype: of the output.
        gemm_k: products per output.

    Raises:
        UserError: the report lacks eager's errors.
    """
    if report.eager_rel is None or report.eager_max is None:
        raise UserError("a report with eager's own error", "none", "pass eager to compare()")
    granted, u_out = floor(dtype, gemm_k), torch.finfo(dtype).eps / 2
    return Budget(
        rel=FACTOR * report.eager_rel + granted,
        max_abs=FACTOR * report.eager_max + PEAK * granted * report.rms + u_out * report.peak,
    )


@dataclass(frozen=True)
class BandReport:
    """Elements that ReLU treats differently in output and reference.

    Attributes:
        half_width: the band is ``|pre| <= half_width``.
        inside: elements in the band.
        flips_inside: elements of the band that are zero on one side and positive on the other.
        flips_outside, flip_at: the same outside the band, where the sign is certain, and the first of them.
    """

    half_width: float
    inside: int
    flips_inside: int
    flips_outside: int
    flip_at: tuple[int, ...] | None

    def __str__(self) -> str:
        text = f"ReLU band |pre| <= {self.half_width:.2e}: {self.inside} inside, {self.flips_inside} flipped"
        return text + (f"; {self.flips_outside} flipped OUTSIDE, first at {self.flip_at}" if self.flips_outside else "")


def relu_band(out: Tensor, pre64: Tensor, half_width: float) -> BandReport:
    """Count the elements for which only one of ``out = relu(...)`` and ``relu(pre64)`` is positive.

    Args:
        out: the output after ReLU.
        pre64: the reference before ReLU, float64, same shape.
        half_width: width of the band around zero in which either answer is right.
    """
    _check(out, pre64, "an output")
    pre = pre64.detach().cpu().contiguous()
    flipped = (out.detach().cpu().contiguous() > 0) != (pre > 0)
    inside = pre.abs() <= half_width
    outside = flipped & ~inside
    return BandReport(
        half_width=half_width,
        inside=int(inside.sum()),
        flips_inside=int((flipped & inside).sum()),
        flips_outside=int(outside.sum()),
        flip_at=_index(int(outside.flatten().int().argmax()), pre.shape) if outside.any() else None,
    )


def assert_close(out: Tensor, ref64: Tensor, eager: Tensor, gemm_k: int, pre64: Tensor | None = None) -> ErrorReport:
    """Assert that an output is within its error budget, and return the report.

    Args:
        out: the output.
        ref64: the reference, float64, same shape.
        eager: stock torch's result in the dtype and layout of ``out``.
        gemm_k: products per output of the largest convolution that ``out`` depends on.
        pre64: the reference before a final ReLU, if any. Then no element may change between zero and positive, except
            within rounding of zero.

    Raises:
        AssertionError: an error is over its budget, the shape or dtype is wrong, or ``out`` has a NaN or infinity that
            the reference lacks. The message gives the errors, the budgets and the index of the maximum.
    """
    if out.dtype != eager.dtype:
        raise AssertionError(f"expected the dtype of eager, {eager.dtype}, got {out.dtype}; compare like with like")
    try:
        report = compare(out, ref64, eager)
    except UserError as error:
        raise AssertionError(str(error)) from error
    allowed = budget(report, out.dtype, gemm_k)
    problems = []
    if report.mismatched:
        problems.append("not finite where the reference is, or the other way round")
    if not (report.rel <= allowed.rel and math.isfinite(report.rel)):
        problems.append(f"relative error over the budget of {allowed.rel:.3e}")
    if not report.max_abs <= allowed.max_abs:
        problems.append(f"largest error over the budget of {allowed.max_abs:.3e}")
    if pre64 is not None:
        band = relu_band(out, pre64, allowed.max_abs)
        if band.flips_outside:
            problems.append(str(band))
    if problems:
        raise AssertionError(f"{'; '.join(problems)}. {report}. {out.dtype}, gemm_k {gemm_k}")
    return report
