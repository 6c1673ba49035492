"""``report(model)``: which convolutions of a model are fused, and why the others are not, without running it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from ..errors import UserError


@dataclass(frozen=True)
class ModuleReport:
    """A residual block or a stem, or the convolutions of one other module.

    Attributes:
        layer: the module's name in the model.
        kind: its class, in full.
        op: the op that runs it; ``pieces`` for one op per convolution; ``stock`` if none does.
        convs: how many ``Conv2d`` it has.
        fused: how many of them run inside an op.
        reason: why the others do not; empty if there are none.
    """

    layer: str
    kind: str
    op: str
    convs: int
    fused: int
    reason: str = ""


@dataclass(frozen=True)
class ModelReport:
    """The answer of :func:`report`. ``print`` it for a table with one line per class and reason."""

    rows: tuple[ModuleReport, ...]

    @property
    def convs(self) -> int:
        """The number of ``Conv2d`` modules in the model."""
        return sum(row.convs for row in self.rows)

    @property
    def fused(self) -> int:
        """How many of them run inside an op."""
        return sum(row.fused for row in self.rows)

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[ModuleReport]] = defaultdict(list)
        for row in self.rows:
            groups[row.kind, row.op, row.reason].append(row)
        lines = [f"{self.fused} of {self.convs} convolutions are fused"]
        for (kind, op, reason), rows in groups.items():
            fused, convs = sum(row.fused for row in rows), sum(row.convs for row in rows)
            names = ", ".join(row.layer or "the model" for row in rows[:3])
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            lines.append(f"{fused} of {convs} as {op} in {len(rows)} {kind}  [{names}{more}]")
            if reason:
                lines.append(f"    {reason}")
        return "\n".join(lines)


def report(model: nn.Module) -> ModelReport:
    """Report which convolutions of a model run inside fused ops, and why the others do not.

    It reads the layers as a call would, in the mode that the model is in, and runs nothing. What depends on a call (the
    input, autograd, the backend) is in :func:`resnet_fast.explain`.

    Args:
        model: a module that :func:`resnet_fast.accelerate` has been called on, or one to be asked about before.

    Returns:
        The report: ``fused`` of ``convs`` convolutions, and one row per block or stem. ``Conv2d`` modules outside of
        them have a row for the module that holds them.

    Raises:
        UserError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise UserError("an nn.Module", type(model).__name__, "pass the model itself")
    from ..blocks import unfused
    from ..blocks.fused import Fused
    from .known import fused_classes

    known = fused_classes()
    others = {id(each.module()): each.reason for each in unfused.find(model)}
    rows: list[ModuleReport] = []
    seen: set[int] = set()
    for name, m in model.named_modules():
        if isinstance(m, Fused):
            own, reason = m.own_modules(), m.unfusable()
            ops = {} if reason else {id(conv) for conv in m.op_convs()}
            kind, op = m.stock_class, "stock" if reason else m.op_name()
        elif id(m) in others or type(m) in known:
            own, ops, kind, op = [m], set(), type(m), "stock"
            reason = others.get(id(m), "expected a model that accelerate() changed, got a stock one; call accelerate()")
        else:
            continue
        convs = [c for part in own for c in part.modules() if isinstance(c, nn.Conv2d) and id(c) not in seen]
        seen.update(map(id, convs))
        fused = sum(id(c) in ops for c in convs)
        if not reason and fused < len(convs):
            reason = "a foreign part of the block runs by itself"
        if convs:
            rows.append(ModuleReport(name, f"{kind.__module__}.{kind.__qualname__}", op, len(convs), fused, reason))
    for name, m in model.named_modules():
        convs = [c for c in m.children() if isinstance(c, nn.Conv2d) and id(c) not in seen]
        if convs:
            full = f"{type(m).__module__}.{type(m).__qualname__}"
            rows.append(
                ModuleReport(name, full, "stock", len(convs), 0, "outside of the blocks that accelerate() knows")
            )
    return ModelReport(tuple(rows))
