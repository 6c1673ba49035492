"""``explain(model, x)``: run once, and report per layer which backend ran, why not the others, and the floor time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import devices, invariance
from ..calls import Call
from ..errors import UserError
from ..roofline import cpu_ceilings, floors
from . import record


@dataclass(frozen=True)
class LayerRow:
    """One op call, or one module that ran its stock layers (``backend`` is then ``stock`` and ``spec`` empty).

    ``detail``: the kernels and configs of the backend; empty for backends without a choice of kernels.
    """

    layer: str
    op: str
    spec: str
    backend: str
    why_not: dict[str, str]
    gflop: float | None = None
    megabytes: float | None = None
    floor_ms: float | None = None
    bound: str = ""
    detail: str = ""


HEAD = ("layer", "op", "spec", "backend", "GFLOP", "MB", "floor ms", "bound")


@dataclass(frozen=True)
class Explanation:
    """The report of :func:`explain`. ``str()`` is a table, ``to_dict()`` is for JSON."""

    rows: tuple[LayerRow, ...]
    device: str
    ceilings: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "ceilings": self.ceilings,
            "rows": [asdict(r) for r in self.rows],
            "notes": self.notes,
        }

    def cells(self) -> list[tuple[str, ...]]:
        """Return the lines of the table without the headings :data:`HEAD`."""
        return [
            (
                r.layer,
                r.op,
                r.spec or "-",
                r.backend,
                _number(r.gflop),
                _number(r.megabytes),
                _number(r.floor_ms),
                r.bound or "-",
            )
            for r in self.rows
        ]

    def __str__(self) -> str:
        body = self.cells()
        widths = [max(len(line[i]) for line in (HEAD, *body)) for i in range(len(HEAD))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (HEAD, *body)
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, "", *self.remarks()])

    def remarks(self) -> list[str]:
        """Return the lines below the table: kernels per layer, the ceilings, and why not the other backends."""
        reasons: dict[str, list[str]] = {}
        for r in self.rows:
            for name, why in r.why_not.items():
                reasons.setdefault(f"not {name}: {why}" if r.backend != "stock" else f"stock layers: {why}", []).append(
                    r.layer
                )
        lines = [f"{r.layer}: {r.detail}" for r in self.rows if r.detail]
        lines += [f"floors: {self.ceilings}", *self.notes]
        for reason, layers in reasons.items():
            where = "every layer" if len(layers) == len(self.rows) else ", ".join(dict.fromkeys(layers))
            lines.append(f"{reason}  [{where}]")
        return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def explain(model: nn.Module, x: Any, *more: Any) -> Explanation:
    """Run ``model(x, *more)`` once, in the mode it is in, and report every block of an accelerated net.

    A model in training mode is explained as its training runs it: with autograd, unless the caller has switched it off.
    Buffers (running statistics) and random state are restored.

    Args:
        model: a module that :func:`resnet_fast.accelerate` has been called on.
        x: the first argument of the model, with the shape, dtype, layout and device to explain: a tensor (N, C, H, W),
            or a structure of tensors such as a detector's list of images.
        more: its further arguments, such as a detector's targets in training.

    Returns:
        The report; ``print`` it for a table.

    Raises:
        UserError: no tensor in ``x``, or ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise UserError("an nn.Module", type(model).__name__, "pass the model itself")
    first = next((t for t in tree_leaves(x) if isinstance(t, Tensor)), None)
    if first is None:
        got = f"{type(x).__name__} without any"
        raise UserError("a tensor, or a structure of tensors", got, "pass what the model is called with")
    names = {id(p): name.rsplit(".", 1)[0] for name, p in model.named_parameters()}
    modules = {id(m): name for name, m in model.named_modules()}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    random_devices = [first.device] if first.device.type == "cuda" else []
    graph = model.training and torch.is_grad_enabled()
    with record.tape() as tape, torch.set_grad_enabled(graph), torch.random.fork_rng(devices=random_devices):
        try:
            model(x, *more)
        finally:
            for buffer, before in buffers:
                _put_back(buffer, before)
    device, ceilings = _device(first.device)
    rows, seen = [], set()
    for event in tape:
        if isinstance(event, record.Stock):
            layer = ".".join(filter(None, (modules.get(id(event.module), "?"), getattr(event.module, "part", ""))))
            row = LayerRow(layer, event.op, "", "stock", {"fused": event.reason})
        else:
            layer = _name(event.call, names)
            row = _row(layer, event, device)
        if layer not in seen:  # a batch in tiles passes each layer several times
            rows.append(row)
        seen.add(layer)
    order = {name: i for i, name in enumerate(modules.values())}
    rows.sort(key=lambda row: order.get(row.layer, -1))  # unfused blocks are recorded first
    runs = len(tape) // max(1, len(rows))
    batch = f"the batch of {x.shape[0]} ran in {runs} tiles" if x is first else f"each layer ran {runs} times"
    notes = (f"{batch}; rows show one",) if runs > 1 else ()
    floors = [row.floor_ms for row in rows if row.floor_ms is not None]
    if floors:
        notes = (*notes, f"sum of the floors above: {sum(floors):.3f} ms")
    return Explanation(tuple(rows), str(first.device), ceilings, (*notes, *_mode(tape), *_untouched(model, tape)))


def _put_back(buffer: Tensor, before: Tensor) -> None:
    """Restore a buffer if it changed. Any write makes every weight derived from the buffer stale."""
    if buffer.device.type != "meta" and not torch.equal(buffer, before):
        with torch.inference_mode(buffer.is_inference()):
            buffer.copy_(before)


def _row(layer: str, event: record.Ran, device: devices.Device | None) -> LayerRow:
    spec, choice = event.spec, event.choice
    floor = floors.floor_seconds(spec, device, _plan(event)) if device else None
    return LayerRow(
        layer,
        spec.op,
        str(spec),
        choice.impl.backend,
        dict(choice.refused),
        spec.flops() / 1e9,
        floor.nbytes / 1e6 if floor else spec.min_bytes() / 1e6,
        floor.seconds * 1e3 if floor else None,
        floor.bound if floor else "",
        str(event.state) if _fusion(event.state) else "",
    )


def _fusion(state: Any) -> str:
    """Return the fusion plan of the roofline that a state follows; empty if the state describes no launches."""
    return getattr(state, "fusion", "")


def _plan(event: record.Ran) -> str:
    """Return the fusion plan whose bytes give the floor of a call: the backend's, else one kernel per convolution.

    Training writes every raw output, so its floor is that of one kernel per convolution.
    """
    if event.spec.grad or event.spec.batch_stats:
        return "conv"
    return _fusion(event.state) or "conv"


def _device(device: torch.device) -> tuple[devices.Device | None, str]:
    """Return the device with its ceilings, and a text about them. A CPU's are measured once per process."""
    if device.type == "cuda" and (known := devices.detect(torch.cuda.get_device_name(device))):
        copy, rate = known.bandwidth, known.rate("bfloat16")
        return known, (
            f"modelled, from {known.name}: copy {copy.value / 1e12:.2f} TB/s ({copy.origin}), "
            f"bfloat16 {rate.value / 1e12:.0f} TFLOP/s ({rate.origin})"
        )
    if device.type != "cpu":
        return None, f"none known for {device}"
    cpu = cpu_ceilings.calibrate_cpu()
    assert cpu.cache is not None
    rates = ", ".join(f"{name} {c.value / 1e9:.0f} GFLOP/s ({c.origin})" for name, c in cpu.rates[:2])
    copy, near = cpu.bandwidth, cpu.cache.bandwidth
    return cpu, (
        f"lower bounds, from what {cpu.name}, can do at most: {rates}, memory {copy.value / 1e9:.0f} GB/s "
        f"({copy.origin}) beyond twice {cpu.cache.nbytes / 2**20:.0f} MiB of caches, in them "
        f"{near.value / 1e9:.0f} GB/s ({near.origin}). Measured: {copy.source}"
    )


def _name(call: Call, names: dict[int, str]) -> str:
    """Return the name of a call's layer: its convolution, or the innermost module that contains its convolutions."""
    convs = [names.get(id(conv.weight), "?").split(".") for conv in call.convs]
    if len(convs) == 1:
        return ".".join(convs[0])
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*convs, strict=False))]
    return ".".join(shared or convs[0])


def _mode(tape: list[record.Ran | record.Stock]) -> tuple[str, ...]:
    """Return what batch-invariant mode changed, if it is on."""
    if not invariance.is_on():
        return ()
    impls = {event.choice.impl for event in tape if isinstance(event, record.Ran)}
    whole = sorted({i.backend for i in impls if i.batch_invariant})
    singly = sorted({i.backend for i in impls if not i.batch_invariant})
    changes = [f"{name} gets one image at a time, packs at once and compiles no graph" for name in singly]
    changes += [f"{name} runs whole batches with kernels and configs that do not follow the batch" for name in whole]
    return (f"batch-invariant mode: {'; '.join(changes)}",)


def _untouched(model: nn.Module, tape: list[record.Ran | record.Stock]) -> tuple[str, ...]:
    """Return a note on convolutions outside of op calls and stock blocks: their parents are of unknown classes."""
    covered: set[int] = set()
    for event in tape:
        if isinstance(event, record.Stock):
            part = getattr(event.module, "part", "")
            layers = getattr(event.module, part) if part else event.module
            covered |= {id(p) for p in layers.parameters()}
        else:
            covered |= {id(c.weight) for c in event.call.convs}
    left = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and id(m.weight) not in covered]
    if not left:
        return ()
    shown = ", ".join(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
    note = f"stock convolutions outside fused blocks: {shown}"
    return (note,) if tape else (note, "no fused block ran: call resnet_fast.accelerate(model) first")
