"""Training steps on random problems: ours, stock autocast and the truth in fp64, and the budget between them.

A gradient jumps where an activation crosses zero or two pooled values swap, so rounding there says nothing
about the arithmetic. ``case`` moves each channel's beta into a gap of its values: every ReLU decides the same in
every precision, and both ways in each channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import numerics
from tests.support.op_cases import BLOCKS, Problem, _bn, _conv, lay_out, make

WIDE = torch.float64


def case(
    op: str, dtype: torch.dtype = torch.float32, *, frozen: tuple[int, ...] = (), drift: float = 0.5, **options: Any
) -> Problem:
    """Return a training problem of :func:`op_cases.make`: x and residual in ``dtype`` and NHWC, parameters fp32.

    gamma has both signs and is 0 in the first two channels, before a positive and before a negative beta. ``frozen``:
    the norms that are in eval mode. ``drift``: how many standard deviations a running mean lies off the batch's. Raw
    outputs are stored less the running mean, which is as good as eager's storage where the mean is near.
    """
    layout = options.pop("layout", "nhwc")
    options = {"n": 2, "h": 5, "w": 3, "ci": 16, "co": 8, "batch_stats": True, **options}
    p = make(op, **options)

    def prepare(name: str, t: Tensor) -> Tensor:
        if name in ("x", "residual"):
            return lay_out(t.to(dtype), layout)
        if name.startswith("gamma"):
            t = t * torch.where(torch.arange(len(t)) % 3 == 2, -1, 1)
            t[:2] = 0
        return t

    p = p.map(prepare)
    p = replace(p, norms=tuple(n._replace(batch_stats=False) if i in frozen else n for i, n in enumerate(p.norms)))
    return _without_ties(p, drift)


def _without_ties(p: Problem, drift: float) -> Problem:
    """Return ``p`` with running means near the batch's, each beta before a ReLU moved to keep values away from 0."""
    if p.projection:
        _set_mean(p, len(p.convs) - 1, _conv(p.to(WIDE).x, p.to(WIDE).convs[-1]), drift)
    main = list(range(BLOCKS.get(p.op, 1)))
    y = p.x.to(WIDE)
    for i in main:
        y = _conv(y, p.to(WIDE).convs[i])
        _set_mean(p, i, y, drift)
        exact = p.to(WIDE)
        y = _bn(y, exact.norms[i])
        if i == main[-1]:
            y = y + _added(exact)
        beta = p.norms[i].bias
        if beta is not None:
            shift = _to_gap(y).to(beta.dtype)
            beta += shift
            y = y + shift.to(WIDE).view(-1, 1, 1)
        y = torch.relu(y)
    return p


def _set_mean(p: Problem, i: int, y: Tensor, drift: float) -> None:
    mean = p.norms[i].mean
    if mean is not None:
        flat = y.transpose(0, 1).flatten(1)
        mean.copy_(flat.mean(1) + drift * flat.std(1) * torch.randn(len(flat), dtype=WIDE))


def _added(p: Problem) -> Tensor | float:
    if p.projection:
        return _bn(_conv(p.x, p.convs[-1]), p.norms[-1])
    if p.residual is not None:
        return p.residual
    return p.x if p.op in BLOCKS else 0.0


def _to_gap(y: Tensor) -> Tensor:
    """Return the shift per channel that centres 0 in the widest gap of its middle half; 0 for a constant channel."""
    values = y.transpose(0, 1).flatten(1).sort(1).values
    count = values.shape[1]
    lo, hi = count // 4, max(count // 4 + 1, 3 * count // 4)
    gaps = values[:, lo + 1 : hi + 1] - values[:, lo:hi]
    widest = gaps.max(1, keepdim=True)
    middle = values[:, lo:hi].gather(1, widest.indices) + widest.values / 2
    constant = values[:, -1:] - values[:, :1] < 1e-9
    return -torch.where(constant, 0.0, middle).squeeze(1)


def cotangent(y: Tensor) -> Tensor:
    """Return a random gradient with the dtype and strides of an output."""
    numbers = torch.arange(y.numel(), dtype=WIDE).mul(0.7).cos() + 0.1
    return torch.empty_like(y).copy_(numbers.view(y.shape))


def step(
    p: Problem,
    run: Callable[[Problem], Tensor],
    frozen: Callable[[str], bool] = lambda name: False,
    dy: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run one training step on copies of the tensors: return ``y``, ``grad NAME`` of every leaf not ``frozen``, and
    the running statistics by name."""
    q = p.copy(grad=True)
    for name, t in q.leaves().items():
        t.requires_grad_(not frozen(name))
    y = run(q)
    y.backward(cotangent(y) if dy is None else dy.to(y.dtype))
    found = {"y": y.detach()}
    for name, t in q.leaves().items():
        assert (t.grad is None) == frozen(name), name
        if t.grad is not None:
            assert t.grad.dtype == t.dtype and t.grad.shape == t.shape, name
            found[f"grad {name}"] = t.grad
    return found | q.statistics()


def fused(p: Problem) -> Tensor:
    return p.run("triton")


def stock(p: Problem) -> Tensor:
    """Run eager PyTorch, under autocast for a 16-bit x."""
    with torch.autocast("cpu", p.x.dtype, enabled=p.x.dtype.itemsize == 2):
        y = p.eager()
    return y.to(p.x.dtype)


def is_zero(p: Problem, name: str) -> bool:
    """Return whether the true gradient is exactly 0: a norm on batch statistics cancels a convolution's bias."""
    return name.startswith("grad bias") and p.norms[int(name.removeprefix("grad bias"))].batch_stats


def check(p: Problem, ours: dict[str, Tensor] | None = None) -> dict[str, numerics.ErrorReport]:
    """Assert that every tensor of a step is within the budget; return the reports by name.

    Per-channel tensors of a kind (all gammas, for example) are judged together: a handful of sums, each with its own
    error of any fraction of the standard deviation, says little about a kernel.
    """
    ours = step(p, fused) if ours is None else ours
    eager, truth = step(p, stock), step(p.to(WIDE), lambda q: q.eager(), dy=cotangent(ours["y"]))
    kinds: dict[str, list[str]] = {}
    for name, t in ours.items():
        if is_zero(p, name):
            assert not t.any(), name
        else:
            assert t.dtype == eager[name].dtype and t.shape == truth[name].shape, name
            kinds.setdefault(name.rstrip("0123456789") if t.dim() == 1 else name, []).append(name)
    reports: dict[str, numerics.ErrorReport] = {}
    for kind, names in kinds.items():
        reports[kind] = numerics.compare(*(torch.cat([f[n].flatten() for n in names]) for f in (ours, truth, eager)))
    problems = []
    for name, report in reports.items():
        allowed = numerics.budget(report, p.x.dtype, p.gemm_k())
        if report.mismatched or not report.rel <= allowed.rel or not report.max_abs <= allowed.max_abs:
            problems.append(f"{name}: {report}, granted {allowed.rel:.2e} (max {allowed.max_abs:.2e})")
    assert not problems, "\n".join(problems)
    return reports


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Assert that two steps are equal bit for bit, NaN for NaN."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].nan_to_num(7e4), b[name].nan_to_num(7e4)), name


def pooled_gap(p: Problem) -> float:
    """Return the least distance between the two largest positive values of any pooling window of a stem."""
    exact = p.to(WIDE)
    y = torch.relu(_bn(_conv(exact.x, exact.convs[0]), exact.norms[0]))
    kernel, stride, padding = p.pool
    y = F.pad(y, (padding,) * 4)
    windows = y.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)
    top = windows.topk(2).values
    gaps = (top[..., 0] - top[..., 1])[top[..., 0] > 0]
    moving = (p.norms[0].weight != 0).nonzero().flatten().tolist() if p.norms[0].weight is not None else None
    if moving is not None:
        gap = (top[..., 0] - top[..., 1])[:, moving]
        gaps = gap[top[:, moving][..., 0] > 0]
    return gaps.min().item()
