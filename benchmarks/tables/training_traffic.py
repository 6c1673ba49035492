"""Count in Triton's interpreter what a training step moves, and write docs/tables/training-traffic.{json,md}.

    TRITON_INTERPRET=1 python -m resnet_fast.benchmarks.tables.training_traffic

Every distinct block of ResNet-50 and its stem, forward and backward, at batch 1, 224x224, float16 activations and fp32
parameters, with the configs that an H100 would run at batch 256. Unique bytes are what memory must deliver if caches
are perfect. Of them, activations (16-bit images) grow with the batch; weights, partial sums and per-channel vectors are
counted apart: at batch 256 they are shared by 256 images, or small.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from resnet_fast.backends.triton.training import chain, frozen_chain, pack
from resnet_fast.calls import Call, Conv, Norm, Pool
from resnet_fast.roofline import byte_model
from resnet_fast.spec import ITEMSIZE, BlockSpec, ConvSpec
from resnet_fast.tuning import shapes, training_configs
from resnet_fast.tuning.routes import merged_groups

from .. import markdown
from ..markdown import LEFT, RIGHT
from . import FOLDER
from .counting import LaunchCounts, TensorTraffic, count

JSON, PAGE = FOLDER / "training-traffic.json", FOLDER / "training-traffic.md"

BATCH = 256
"""The batch whose configs are counted."""

ACTIVATIONS, WEIGHTS, PARTIALS, VECTORS = "activations", "weights", "partial sums", "vectors"
ROLES = (ACTIVATIONS, WEIGHTS, PARTIALS, VECTORS)
WEIGHT_ARGUMENTS = {
    "weight_ptr",
    "w_ptr",
    "wp_ptr",
    "wt_ptr",
    "dw_ptr",
    "weight_d_ptr",
    "w_d_ptr",
    "wt_d_ptr",
    "weight",
    "w",
    "wt",
    "dw",
}
PARTIAL_ARGUMENTS = {
    "partials_ptr", "partials_d_ptr", "out_ptr", "own_ptr", "merged_ptr", "merged_d_ptr", "p_ptr", "q_ptr", "z_ptr",
    "sum_p_ptr", "sum_q_ptr", "sum_z_ptr", "p", "q",
}  # fmt: skip
"""z_ptr: in fp32, of a wgrad; the block's output has 16 bits. Arguments of a launch for several convolutions are named
without ``_ptr``, and with the number of the convolution."""


@dataclass(frozen=True)
class StepTrafficRow:
    """The launches of one kind in one part of the net. ``least``: activations that they must move; bytes."""

    part: str
    times: int
    kind: str
    launches: int
    counted: int
    least: int


@dataclass(frozen=True)
class StepTraffic:
    """A step through one block or the stem: bytes by kind of launch and role of tensor, launches by kind, the plan."""

    plan: str
    bytes: dict[str, dict[str, int]]
    launches: dict[str, int]

    def total(self, role: str) -> int:
        return sum(by_role.get(role, 0) for by_role in self.bytes.values())

    @property
    def activations(self) -> int:
        return self.total(ACTIVATIONS)


def role(t: TensorTraffic) -> str:
    """Return what a kernel's argument holds. Split-K products are partial sums too."""
    names = {name.rstrip("0123456789").removesuffix("_") for name in t.name.split("=")}
    if names & WEIGHT_ARGUMENTS:
        return WEIGHTS
    if t.dtype != "float32" and len(t.shape) == 4:
        return ACTIVATIONS
    return PARTIALS if t.dtype == "float32" and names & PARTIAL_ARGUMENTS else VECTORS


def kind(kernel: str) -> str:
    """Return ``conv_fwd`` for ``_conv_fwd_kernel``."""
    return kernel.strip("_").removesuffix("_kernel")


def call_of(spec: ConvSpec | BlockSpec) -> Call:
    """Make a random call of a bottleneck, a basic block or a pooled stem, running statistics included."""
    dtype = getattr(torch, spec.dtype)
    convs = spec.convs

    def vector(c: ConvSpec) -> Tensor:
        return torch.rand(c.co) + 0.5

    first = convs[0]
    x = torch.randn(first.n, first.ci, first.h, first.w).to(dtype).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(c.co, c.ci // c.groups, c.r, c.s) / c.gemm_k**0.5 for c in convs]
    parameters = tuple(Conv(w, None, *c.geometry()) for w, c in zip(weights, convs, strict=True))
    norms = tuple(Norm(vector(c), torch.randn(c.co), torch.zeros(c.co), vector(c), True, 0.1, 1e-5) for c in convs)
    pool = None if spec.pool is None else Pool(*spec.pool)
    return Call(spec.op, x, parameters, norms, pool=pool, projection=spec.projection is not None)


def step(spec: ConvSpec | BlockSpec, batch: int = BATCH, packing: bool = True) -> StepTraffic:
    """Run forward and backward of a block or stem in the counting interpreter, with the configs of ``batch``.

    Without ``packing`` weights are zeros: no byte depends on a value, and packing moves no activation but takes most of
    the time, a program per row of a filter; see :func:`packed_bytes`.
    """
    spec = spec.with_(batch_stats=True, grad=True)
    call, cpu = call_of(spec), torch.device("cpu")
    with mock.patch.object(chain.proofs, "settled", lambda plan, *_: (plan(True), "", True)):  # as if all were proved
        plan = replace(chain.plan_of(spec.with_(n=batch), cpu), specs=spec.convs)
    chain._plans.clear()
    needs = [call.op != "stem", *[t is not None for t in call.leaves()[1:]]]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(chain, "plan_of", lambda *_: plan))
        if not packing:
            stack.enter_context(mock.patch.object(pack, "forward_passenger", _zero_forward))
            stack.enter_context(mock.patch.object(pack, "dgrad_passenger", _zero_dgrad))
        counts = stack.enter_context(count())
        z, saved, _ = chain.forward(call, spec, "raw", True)
        chain.backward(call, spec, saved, z, torch.randn_like(z), needs)
    return summed(str(plan), counts)


def frozen_step(spec: ConvSpec | BlockSpec) -> StepTraffic:
    """Run forward and backward of a block or stem with frozen norms in the counting interpreter."""
    spec = spec.with_(batch_stats=False, grad=True)
    call = call_of(spec)
    call = call._replace(norms=tuple(n._replace(batch_stats=False) for n in call.norms))
    needs = [call.op != "stem", False, *[t is not None for t in call.leaves()[2:]]]
    with count() as counts:
        z, saved, plan = frozen_chain.forward(call, spec, "raw", True)
        frozen_chain.backward(call, spec, saved, z, torch.randn_like(z), needs)
    return summed(str(plan), counts)


def _zero_forward(
    weight: Tensor, dtype: torch.dtype, conv: ConvSpec, rows: Tensor | None
) -> tuple[Tensor, Tensor | None, pack.Passenger]:
    w = weight.new_zeros((conv.co, conv.r, conv.s, conv.ci // merged_groups(conv)), dtype=dtype)
    return w, None if rows is None else weight.new_zeros(conv.co), pack.NO_FORWARD


def _zero_dgrad(
    weight: Tensor, dtype: torch.dtype, conv: ConvSpec, a: Tensor | None, tile: int
) -> tuple[Tensor, pack.Passenger]:
    wt = weight.new_zeros((conv.ci, conv.r, conv.s, conv.co // merged_groups(conv)), dtype=dtype)
    return wt, pack.NO_DGRAD


def packed_bytes(spec: ConvSpec | BlockSpec) -> int:
    """Return the bytes that packing moves: each parameter in fp32 and its 16-bit copy, per direction."""
    convs, directions = (spec.convs, 2) if isinstance(spec, BlockSpec) else ((spec,), 1)
    return sum(directions * c.co * c.gemm_k * (4 + ITEMSIZE[c.dtype]) for c in convs)


def summed(plan: str, counts: LaunchCounts) -> StepTraffic:
    """Sum bytes by kind of launch and role of tensor."""
    by_kind: dict[str, Counter[str]] = {}
    for one in counts.launches:
        roles = by_kind.setdefault(kind(one.kernel), Counter())
        for t in one.tensors:
            roles[role(t)] += t.unique
    launches = Counter(kind(one.kernel) for one in counts.launches)
    return StepTraffic(plan, {k: dict(v) for k, v in by_kind.items()}, dict(launches))


def least(spec: ConvSpec | BlockSpec) -> dict[str, int]:
    """Return the activation bytes that each kind of launch must move: ``min_bytes`` without filters, and a dgrad's sum.

    Of a bottleneck with the identity they are 82 tensors of its inner width: 12 of the convolutions, 24 of their dgrads
    (with the shortcut's gradient), 18 of their wgrads, 12 and 16 of the block's end, forward and backward.
    """
    spec = spec.with_(batch_stats=True, grad=True)
    size, block = ITEMSIZE[spec.dtype], isinstance(spec, BlockSpec)
    convs = spec.convs if isinstance(spec, BlockSpec) else (spec,)
    inner = len(spec.main) if isinstance(spec, BlockSpec) else 1
    found: Counter[str] = Counter()
    for i, c in enumerate(convs):
        for kernel in training_configs.KERNELS if block else ("conv_fwd", "conv_wgrad"):
            filters = c.co * c.gemm_k * (4 if kernel == "conv_wgrad" else size)
            found[kernel] += (
                training_configs.min_bytes(training_configs.training_launch(kernel, c, 0 < i < inner)) - filters
            )
    first = convs[0]
    x = first.n * first.h * first.w * first.ci * size
    last = convs[inner - 1]
    y = last.n * last.ho * last.wo * last.co * size
    if not isinstance(spec, BlockSpec):
        ho, wo = spec.out_hw()
        z = spec.n * spec.co * ho * wo * size
        return dict(found) | {"pool_end_fwd": y + z, "pool_end_bwd": 2 * y + z}
    projects = spec.shortcut == "projection"
    if projects:
        p = convs[-1]
        # its dgrad writes the pixels that it reads, and the first convolution's adds them
        compact = p.n * p.ho * p.wo * p.ci * size
        found["conv_dgrad"] += 2 * compact - x
    else:
        found["conv_dgrad"] += x
    return dict(found) | {"block_end_fwd": 3 * y, "block_end_bwd": (4 + projects) * y}


def parts() -> dict[str, tuple[ConvSpec | BlockSpec, int]]:
    """Return name -> (spec, how often it occurs) of every distinct part of ResNet-50 at batch 1."""
    every: dict[str, ConvSpec | BlockSpec] = {"r50.conv1": shapes.problems("resnet50", 1, dtype="float16")["r50.conv1"]}
    every |= shapes.blocks("resnet50", 1, dtype="float16")
    times = Counter(every.values())
    first: dict[ConvSpec | BlockSpec, str] = {}
    for name, spec in every.items():
        first.setdefault(spec, name)
    return {name: (spec, times[spec]) for spec, name in first.items()}


def head() -> int:
    """Return the activation bytes of the global pool and the fully connected layer, which PyTorch runs."""
    items = byte_model.net_work("resnet50", "train-conv-bn", dtype="float16")
    return sum(i.activations for i in items if i.part == "head" and i.kernel != "block_end_grad")


def rows_of(name: str, times: int, spec: ConvSpec | BlockSpec, part: StepTraffic) -> list[StepTrafficRow]:
    """Return one row per kind of launch that moves activations."""
    wanted = least(spec)
    return [
        StepTrafficRow(name, times, k, part.launches[k], roles[ACTIVATIONS], wanted.get(k, 0))
        for k, roles in part.bytes.items()
        if roles.get(ACTIVATIONS)
    ]


def _unpacked(spec: ConvSpec | BlockSpec) -> StepTraffic:
    torch.set_num_threads(1)
    return step(spec, packing=False)


def net() -> tuple[dict[str, float], list[StepTrafficRow], dict[str, str]]:
    """Return totals of ResNet-50 in MB per image, the rows, and each part's configs."""
    every = parts()
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip(every, pool.map(_unpacked, [spec for spec, _ in every.values()]), strict=True))
    rows = [row for name, (spec, times) in every.items() for row in rows_of(name, times, spec, found[name])]
    model = {
        plan: sum(i.activations for i in byte_model.net_work("resnet50", plan, dtype="float16")) / 1e6
        for plan in ("train-eager", "train-conv-bn")
    }
    totals = {
        "counted activations": (sum(r.times * r.counted for r in rows) + head()) / 1e6,
        "least of these launches": (sum(r.times * r.least for r in rows) + head()) / 1e6,
        "plan train-conv-bn": model["train-conv-bn"],
        "stock, plan train-eager": model["train-eager"],
    }
    for what in ROLES[1:]:
        totals[what] = sum(times * found[name].total(what) for name, (_, times) in every.items()) / 1e6
    totals[WEIGHTS] += sum(times * packed_bytes(spec) for spec, times in every.values()) / 1e6
    return totals, rows, {name: part.plan for name, part in found.items()}


def page(totals: dict[str, float], rows: list[StepTrafficRow], plans: dict[str, str]) -> str:
    """Return the page to read."""
    per_part: dict[str, tuple[int, int, int]] = {}
    for r in rows:
        before = per_part.get(r.part, (r.times, 0, 0))
        per_part[r.part] = (r.times, before[1] + r.counted, before[2] + r.least)

    net = [(name, f"{mb:.1f}") for name, mb in totals.items()]
    parts = [
        (name, n, f"{a / 1e3:,.1f}", f"{b / 1e3:,.1f}", f"{a / b:.3f}", plans[name])
        for name, (n, a, b) in per_part.items()
    ]
    launches = [
        (
            r.part, r.kind, r.launches, f"{r.counted / 1e3:,.1f}", f"{r.least / 1e3:,.1f}",
            f"{r.counted / r.least:.3f}" if r.least else "none needed",
        )
        for r in rows
    ]  # fmt: skip
    bytes_ = ("counted KB", "least KB", "ratio")
    blocks = [
        "# Traffic of a training step, counted",
        "ResNet-50, forward and backward, batch 1, 224x224, float16 activations, fp32 parameters: every distinct block "
        f"ran in a counting interpreter with the configs that an H100 would run at batch {BATCH}. Bytes are unique: "
        "read or written at least once in a launch. Least: each operand that some output needs and each output once "
        "(tuning/training_configs.py), and what is added. Weights, partial sums (split-K products included) and "
        "per-channel vectors are counted apart. The global pool and the fully connected layer are PyTorch's, by the "
        "model. Written by benchmarks/tables/training_traffic.py.",
        markdown.table(("ResNet-50", "MB"), net, (LEFT, RIGHT)),
        markdown.table(("part", "times", *bytes_, "configs"), parts, (LEFT, *[RIGHT] * 4, LEFT)),
        markdown.table(("part", "launches", "", *bytes_), launches, (LEFT, LEFT, *[RIGHT] * 4)),
    ]
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    totals, rows, plans = net()
    table = {"net": totals, "plans": plans, "rows": [vars(r) for r in rows]}
    JSON.write_text(json.dumps(table, indent=1) + "\n")
    PAGE.write_text(page(totals, rows, plans))


if __name__ == "__main__":
    main()
