r"""Run one training step of a call: forward and backward of a chain of convolutions and norms, launch by launch.

    forward     x --conv1--> y1 --conv2--> y2 --conv3--> y3 --\                         y: raw, with its statistics
                 \---------------projection--> yd -------------+--block end--> z        (He et al. 2015, figure 5)

    backward    dz --block end--> g3, sums --dgrad3--> g2, sums --dgrad2--> g1, sums --dgrad1--> dx
                                  g3 --projection's dgrad--------------------------------(added)--^
                g and y of each layer --wgrad--> dW                  sums --> dgamma, dbeta, and the next dgrad's dy

Each dgrad runs before the wgrad of its layer, except the first. Then the sums that it gathered become coefficients in
the launch of that wgrad, behind its tiles (norm_gradient.py). A wgrad leaves the addition of its splits to the next
launch that takes it along: the wgrad below, and in the end the first dgrad.

A convolution's prologue applies the norm and ReLU before it, and its epilogue computes the statistics of its output. A
dgrad's prologue turns g into dy, and its epilogue applies the ReLU before it and computes the sums for that norm. So a
layer writes its raw output once, and neither an activation nor dy. For each convolution and direction, the tuning table
may select cuDNN instead (tuning/launch_plan.py), with the passes of block_end.py and cudnn_passes.py around it.

An op is a chain: ``conv_bn_act`` of one convolution, ``stem`` of one that ends in a max-pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .... import flags
from ....calls import Call, Conv, Norm
from ....spec import ConvSpec, Spec, Verdict
from ....tuning import launch_plan
from ....tuning.configs import Config
from ....tuning.launch_plan import TrainingConfigs
from ....tuning.training_configs import CUDNN
from ...layouts import in_layout
from .. import proofs
from ..device import Target, device_of, place_of, planned_for, table_of, table_version
from ..launch import nhwc
from ..submission import Passes
from . import batch_norm, block_end, conv_wgrad, convolution, hand_over, norm_gradient, pack, pool, wgrad_sum
from .arrival import counters_for
from .convolution import Packed
from .gradients import BackwardPass
from .passes import empty_image
from .problem import training_problem
from .vectors import BATCH_MEAN, BATCH_VAR, CENTRE, SCALE, Act, Grad


@dataclass(frozen=True)
class StepPlan:
    """The chosen configs of every convolution, by its place in the call.

    ``note``: why faster configs were left out; empty if none was. ``target``: the GPU that they were chosen for.
    ``passes``: how forward and backward pass run, once they have.
    """

    specs: tuple[ConvSpec, ...]
    chosen: tuple[TrainingConfigs, ...]
    target: Target
    note: str = ""
    passes: Passes = field(default_factory=Passes, init=False, compare=False)

    def __str__(self) -> str:
        notes = "".join(f"; {note}" for note in (self.note, str(self.passes)) if note)
        return "training, forward / dgrad / wgrad: " + " | ".join(map(str, self.chosen)) + notes

    @property
    def fusion(self) -> str:
        """The plan of :mod:`resnet_fast.roofline.byte_model` with its floor: one kernel per convolution."""
        return "conv"


def plan_of(spec: Spec, device: torch.device) -> StepPlan:
    """Return the configs of forward, dgrad and wgrad of each convolution, measured if possible, else modelled."""
    packed = flags.PROLOGUE.read() == "packed"
    key = spec, device, packed, table_version(device)
    known = _plans.get(key)
    if known is not None:
        return known
    plan, lasts = _plan(spec, device, packed)
    if lasts:
        if len(_plans) >= KEEP:
            _plans.clear()
        _plans[key] = plan
    return plan


KEEP = 1024
_plans: dict[tuple[Spec, torch.device, bool, object], StepPlan] = {}


def trains_on(device: torch.device) -> tuple[Verdict, bool]:
    """Return whether these kernels may train on a device, and whether that lasts; prove it if it was never proved."""
    return proofs.hand_over(hand_over.check, place_of(device), table_of(device))


def _plan(spec: Spec, device: torch.device, packed: bool) -> tuple[StepPlan, bool]:
    """Return a plan whose configs are proved on ``device`` or need no proof, and whether it lasts."""
    gpu, table, place = device_of(device), table_of(device), place_of(device)
    convs = [(c, 0 < i < len(spec.main)) for i, c in enumerate(spec.convs)]

    def plan(hopeful: bool) -> StepPlan:
        chosen = (launch_plan.plan_training(c, raw, gpu, table, packed, hopeful) for c, raw in convs)
        return StepPlan(spec.convs, tuple(chosen), Target(gpu, table, place))

    def pairs(plan: StepPlan) -> list[proofs.Pair]:
        return [pair for (c, raw), found in zip(convs, plan.chosen, strict=True) for pair in found.chosen(c, raw)]

    verdict, known = trains_on(device)
    found, note, lasts = proofs.settled(plan, pairs, training_problem, place, table)
    return replace(found, note="; ".join(filter(None, (verdict.reason, note)))), lasts and known


# ---------------------------------------------------------------------------------------------------------- forward


def forward(call: Call, spec: Spec, save: str, update: bool) -> tuple[Tensor, list[Tensor], StepPlan]:
    """Return (output, saved, plan); with ``update``, move the running statistics.

    ``saved``: raw outputs of the convolutions, then the vectors of the norms, then the clamps of the norms that a
    convolution reads through, in the order of the call, then zeros for the backward pass to count in.
    """
    plan = plan_of(spec, call.x.device)
    images = [None if t is None else nhwc(t) for t in (call.x, call.added)]
    momenta = [float(norm.momentum) for norm in call.norms]

    def launchers(given: list[Any]) -> list[Tensor]:
        tensors, numbers = given[: -len(momenta)], given[-len(momenta) :]
        with planned_for(plan.target):
            return _forward(with_tensors(call, tensors, numbers), spec, save, update, plan)

    key = (save, update, *[(norm.batch_stats, norm.eps, norm.sync) for norm in call.norms])
    z, *saved = plan.passes.run(key, launchers, [*images, *call.parameters()], numbers=momenta)
    return in_layout(z, spec.layout), saved, plan


def with_tensors(call: Call, tensors: list[Any], momenta: list[Any]) -> Call:
    """Return the call with other tensors (``x``, ``added``, then those of :meth:`Call.parameters`) and momenta."""
    x, added, *rest = tensors
    convs, norms = [], []
    for i, (conv, norm) in enumerate(zip(call.convs, call.norms, strict=True)):
        own = rest[6 * i : 6 * i + 6]
        convs.append(Conv(own[0], own[1], *conv[2:]))
        norms.append(Norm(own[2], own[3], own[4], own[5], norm.batch_stats, momenta[i], norm.eps, norm.sync))
    return call._replace(x=x, added=added, convs=tuple(convs), norms=tuple(norms))


def _forward(call: Call, spec: Spec, save: str, update: bool, plan: StepPlan) -> list[Tensor]:
    """Return the output in NHWC and what is saved."""
    x, main = call.x, len(spec.main)
    every, counters, arrivals = _counters(x, call, norm_gradient.arrivals_of(spec.main[-1].co))
    packed, passenger = _packing(call, plan, 0, Act(x))
    projection, passenger_d = _packing(call, plan, main, Act(x))
    pack.launch([passenger, passenger_d], every)
    finalizations: list[pack.Passenger] = []
    raws: list[Tensor] = []
    vectors: list[Tensor] = []
    clamps: list[Tensor] = []
    act = Act(x)
    for i, norm in enumerate(call.norms):
        y, partials, rows = _convolve(call, plan, i, act, packed)
        out = batch_norm.outputs(y.shape[1], y.dtype, y.device)
        inner = i < main - 1
        if inner:
            act = Act(y, *out)
            packed, passenger = _packing(call, plan, i + 1, act)
            clamps.append(x.new_empty(0) if out[1] is None else out[1])
        else:  # the block's end reads these vectors, and no convolution
            out, act, packed, passenger = (out[0], None), Act(x), projection, pack.NO_FORWARD
        raws.append(y)
        vectors.append(out[0])
        bias, centre, count = _bias(call, i), _centre(call, plan, i), plan.specs[i].gemm_m
        own = None if counters is None else counters[i]
        if partials is None:
            batch_norm.constant(norm, bias, centre, out)
            pack.launch([passenger])
        elif inner or norm.sync:
            batch_norm.finalize(partials, rows, count, norm, bias, centre, out, norm.sync, update, own, passenger)
        else:
            finalizations.append(
                batch_norm.finalization(partials, rows, count, norm, bias, centre, out[0], update, own)
            )
    z = _end(call, spec, x, raws, vectors, finalizations)
    if _recomputes(spec, save):
        raws[main - 1] = x.new_empty(0)
    return [z, *raws, *vectors, *clamps, x.new_empty(0, dtype=torch.int32) if arrivals is None else arrivals]


def _recomputes(spec: Spec, save: str) -> bool:
    """Return whether the backward pass computes the last raw output of the main branch again."""
    return save == "recompute" and len(spec.main) > 1


def _counters(x: Tensor, call: Call, arrivals: int = 0) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return all counters of a pass, to be cleared: a row per norm, and ``arrivals`` more; None if none is needed."""
    if not call.batch_stats:
        return None, None, None
    blocks = max(batch_norm.blocks_of(c.weight.shape[0]) for c in call.convs)
    return counters_for(x, len(call.norms), blocks, arrivals)


def _packing(call: Call, plan: StepPlan, i: int, act: Act) -> tuple[Packed | None, pack.Passenger]:
    """Return what convolution ``i`` reads as its weight, and the programs that write it; nothing after the last."""
    if i == len(call.convs):
        return None, pack.NO_FORWARD
    return convolution.packing(call.convs[i].weight, plan.specs[i], plan.chosen[i].fwd, call.x.dtype, act)


def _bias(call: Call, i: int) -> Tensor | None:
    bias = call.convs[i].bias
    return None if bias is None else bias.detach()


def _centre(call: Call, plan: StepPlan, i: int) -> Tensor | None:
    """Return what is subtracted from raw output ``i`` before it is stored: the running mean before this step."""
    mean = call.norms[i].mean
    return None if mean is None or plan.chosen[i].fwd == CUDNN else mean.detach()


def _convolve(call: Call, plan: StepPlan, i: int, act: Act, packed: Packed | None) -> tuple[Tensor, Tensor | None, int]:
    """Return raw output ``i``, its statistics by tile or None, and the rows of a tile."""
    spec, config, statistics = plan.specs[i], plan.chosen[i].fwd, call.norms[i].batch_stats
    centre, bias = _centre(call, plan, i), _bias(call, i)
    return convolution.forward(call.convs[i].weight, spec, config, act, centre, statistics, bias, packed)


def _end(
    call: Call, spec: Spec, x: Tensor, raws: list[Tensor], vectors: list[Tensor], finalizations: list[pack.Passenger]
) -> Tensor:
    """Return the output, by norm, add and ReLU, or by norm, ReLU and max-pool; finalize the norms first."""
    if call.pool is not None:
        return pool.pool_end(raws[0], vectors[0], call.pool, finalizations)
    if call.projection:
        return block_end.block_end(raws[-2], vectors[-2], raws[-1], vectors[-1], call.relu, finalizations)
    added = x if spec.shortcut == "identity" else call.added
    shortcut = None if added is None else nhwc(added)
    return block_end.block_end(raws[-1], vectors[-1], shortcut, None, call.relu, finalizations)


def statistics(call: Call, saved: list[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
    """Return the batch's (mean, unbiased variance) of every norm with batch statistics; None for the others."""
    first = len(call.convs)
    return [
        (v[BATCH_MEAN], v[BATCH_VAR]) if norm.batch_stats else None
        for norm, v in zip(call.norms, saved[first:], strict=False)
    ]


def shapes(call: Call, spec: Spec, save: str) -> list[tuple[tuple[int, ...], torch.dtype, str]]:
    """Return (shape, dtype, layout) of every tensor in ``saved``."""
    dtype, last = call.x.dtype, len(spec.main) - 1
    raws: list[tuple[tuple[int, ...], torch.dtype, str]]
    raws = [((c.n, c.co, c.ho, c.wo), dtype, "nhwc") for c in spec.convs]
    if _recomputes(spec, save):
        raws[last] = ((0,), dtype, "")
    narrow = dtype.itemsize == 2
    clamps = [((3, c.co) if narrow else (0,), dtype, "") for c in spec.main[:last]]
    arrivals = norm_gradient.arrivals_of(spec.main[last].co) if call.batch_stats else 0
    vectors = [((10, c.co), torch.float32, "") for c in spec.convs]
    return [*raws, *vectors, *clamps, ((arrivals,), torch.int32, "")]


# --------------------------------------------------------------------------------------------------------- backward


def backward(
    call: Call, spec: Spec, saved: list[Tensor], z: Tensor, dz: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients that ``needs`` asks for, in the order of :meth:`Call.leaves`."""
    plan, count = plan_of(spec, call.x.device), len(call.convs)
    # a saved-tensor hook may bring them back in another layout (by way of NumPy, from a file)
    images = [nhwc(t) if t.dim() == 4 else t for t in (z, dz, *saved[:count], call.x)]
    leaves = [*images, *saved[count:], *call.leaves()[1:]]
    at = len(saved) + 3

    def launchers(given: list[Any]) -> list[Tensor | None]:
        z, dz, *rest = given
        held = [*rest[:count], *rest[count + 1 : at - 2]]
        bound = call.with_leaves([rest[count], *given[at:]])
        with planned_for(plan.target):
            return _Backward(bound, spec, plan, held, needs).run(z, dz)

    dx, added, *others = plan.passes.run(("backward", *needs), launchers, leaves)
    return (*[None if t is None else in_layout(t, spec.layout) for t in (dx, added)], *others)


class _Backward(BackwardPass):
    """One backward pass: the tensors that the forward pass saved, and the gradients computed so far."""

    def __init__(self, call: Call, spec: Spec, plan: StepPlan, saved: list[Tensor], needs: Sequence[bool]) -> None:
        super().__init__(call, spec, needs)
        self.plan, self.convs, self.norms = plan, call.convs, call.norms
        count = self.count
        self.raws = saved[:count]
        self.vectors = saved[count : 2 * count]
        self.clamps = [c if c.numel() else None for c in saved[2 * count : -1]]
        self.arrivals = saved[-1] if saved[-1].numel() else None
        self.x = call.x
        self.every, self.counters, _ = _counters(self.x, call)
        self.wts: list[Tensor | None] = [None] * count
        self.pending: list[pack.Passenger] = []

    def below(self, i: int) -> Act:
        """Return the input of convolution ``i``."""
        if i == 0 or i >= self.main:
            return Act(self.x)
        return Act(self.raws[i - 1], self.vectors[i - 1], self.clamps[i - 1])

    def run(self, z: Tensor, dz: Tensor) -> list[Tensor | None]:
        """Return the gradients in NHWC, from the output ``z`` and its gradient ``dz``."""
        last = self.main - 1
        if not self.raws[last].numel():
            centre = self.vectors[last][CENTRE]  # as the forward pass subtracted it; the running mean has changed since
            spec, config = self.plan.specs[last], self.plan.chosen[last].fwd
            # with statistics: the same code as in the forward pass, which is compiled and, where needed, proved
            batch = self.norms[last].batch_stats
            self.raws[last] = convolution.forward(self.weight(last), spec, config, self.below(last), centre, batch)[0]
        g, (grad, *of_projection) = self.end(z, dz)
        dx_of_projection = self.projection(of_projection.pop()) if of_projection else None
        dx: Tensor | None = None
        for i in range(last, 0, -1):
            below = self.dgrad_inner(i, grad) if self.passes_on(i) else None
            self.wgrad(i, grad, below)
            if below is None:
                break
            grad = below[0]
        else:
            self.wgrad(0, grad)
            if self.passes_on(0):
                identity = g if self.spec.shortcut == "identity" else None
                dx = self.dgrad_first(grad, identity, dx_of_projection)
        for reduction in self.pending:
            wgrad_sum.reduce_splits(reduction)
        return self.found(dx, g, dz)

    def end(self, z: Tensor, dz: Tensor) -> tuple[Tensor, list[Grad]]:
        """Return the gradient of the sum at the end of the chain, and that of each raw output in it.

        The launch writes their coefficients too, and packs the weights of their dgrads, if no all-reduce comes first.
        """
        call, last = self.call, self.main - 1
        ends = [last, self.main] if call.projection else [last]
        masked = z if call.relu else None
        g = block_end.gradient_memory(dz, masked) if call.pool is None else empty_image(self.raws[last])
        grads = [self.gradient_of(i, g, self.raws[i]) for i in ends]
        finishes, packings = [], []
        if self.arrivals is not None and not any(self.norms[i].sync and self.norms[i].batch_stats for i in ends):
            for i, grad in zip(ends, grads, strict=True):
                finishes.append(norm_gradient.finish_of(grad, self.parameters(i)))
                self.gammas[i], self.betas[i], self.biases[i] = finishes[-1].found
                if call.pool is None:
                    packings.append(self.packing(i, grad))
        y, v, arrivals = self.raws[last], self.vectors[last], self.arrivals
        sums: Sequence[Tensor | None]
        if call.pool is not None:
            _, *sums = pool.pool_end_backward(dz, y, v, call.pool, self.every, g, finishes, arrivals)
        else:
            yd, vd = (self.raws[-1], self.vectors[-1]) if call.projection else (None, None)
            _, *sums = block_end.block_end_backward(
                dz, masked, y, v, yd, vd, self.every, g, finishes, arrivals, packings
            )
        if not finishes:
            for i, grad, own in zip(ends, grads, sums, strict=False):
                assert own is not None
                self.coefficients(i, grad, own)
        return g, grads

    def gradient_of(self, i: int, g: Tensor, y: Tensor) -> Grad:
        """Return the gradient of raw output ``i``, whose coefficients are not written yet."""
        return norm_gradient.gradient_of(g, y, self.norms[i].batch_stats)

    def coefficients(self, i: int, grad: Grad, sums: Tensor) -> None:
        """Launch the programs of :meth:`passenger`, and before them what adds up the sums of several processes."""
        found = norm_gradient.coefficients(
            grad, sums, self.vectors[i], self.parameters(i), self.norms[i].sync, self.counters_of(i),
            self.packing(i, grad), self.take(),
        )  # fmt: skip
        self.gammas[i], self.betas[i], self.biases[i] = found

    def passenger(self, i: int, grad: Grad, sums: Tensor, warps: int) -> pack.Passenger:
        """Return what a launch of ``warps`` warps takes along.

        Its programs write the coefficients of raw output ``i`` and the gradients of its norm and bias, pack the weight
        of its dgrad, and finish the oldest wgrad that is not finished.
        """
        found, programs = norm_gradient.passenger(
            grad, sums, self.vectors[i], self.parameters(i), self.counters_of(i),
            self.packing(i, grad, pack.tile_behind(warps)), self.take(),
        )  # fmt: skip
        self.gammas[i], self.betas[i], self.biases[i] = found
        return programs

    def parameters(self, i: int) -> norm_gradient.Parameters:
        """Return gamma, beta and the bias of layer ``i``, where their gradients are wanted."""
        norm, needs = self.norms[i], self.needs
        gamma = norm.weight if needs.norms[i].weight else None
        beta = norm.bias if needs.norms[i].bias else None
        return gamma, beta, self.convs[i].bias if needs.convs[i].bias else None

    def counters_of(self, i: int) -> Tensor | None:
        return None if self.counters is None else self.counters[i]

    def packing(self, i: int, grad: Grad, tile: int = pack.TILE) -> pack.Passenger:
        """Return the programs that pack the weight of dgrad ``i``, if it runs on our kernel."""
        config = self.plan.chosen[i].dgrad
        if config == CUDNN or not self.passes_on(i):
            return pack.NO_DGRAD
        a = self.vectors[i][SCALE] if config.packed else None
        weight, spec = self.weight(i), self.plan.specs[i]
        self.wts[i], programs = pack.dgrad_passenger(weight, grad.g.dtype, spec, a, tile)
        return programs

    def take(self) -> pack.Passenger:
        """Return the programs that finish the oldest wgrad that is not finished, for one launch to take along."""
        return self.pending.pop(0) if self.pending else wgrad_sum.NO_REDUCTION

    def taken_by(self, config: Config) -> pack.Passenger:
        """Return what a launch with ``config`` takes along of :meth:`take`."""
        return self.take() if pack.takes_passengers(config) else wgrad_sum.NO_REDUCTION

    def weight(self, i: int) -> Tensor:
        return self.convs[i].weight.detach()

    def wgrad(self, i: int, grad: Grad, below: tuple[Grad, Tensor] | None = None) -> None:
        """Store the gradient of weight ``i``, if it is wanted; a later launch finishes it.

        ``below``: the gradient of raw output ``i - 1`` and its sums. Its coefficients are written in the same launch,
        if our kernel runs and takes passengers, and no all-reduce comes first.
        """
        spec, config = self.plan.specs[i], self.plan.chosen[i].wgrad
        wanted = self.needs.convs[i].weight
        takes = wanted and pack.takes_passengers(config)
        passenger = conv_wgrad.NO_PASSENGER
        if below is not None and not (takes and not self.norms[i - 1].sync):
            self.coefficients(i - 1, *below)
        elif below is not None:
            passenger = self.passenger(i - 1, *below, config.num_warps)
        elif takes:
            passenger = norm_gradient.without_norm(self.take())
        if wanted:
            self.weights[i], reduction = convolution.wgrad(self.weight(i), spec, config, grad, self.below(i), passenger)
            if reduction.programs:
                self.pending.append(reduction)

    def stock_dx(self, i: int, grad: Grad) -> Tensor:
        """Return dx of a convolution that reads the call's input, by cuDNN."""
        return nhwc(convolution.stock_backward(self.weight(i), self.plan.specs[i], grad, self.x, (True, False))[0])

    def dgrad_inner(self, i: int, grad: Grad) -> tuple[Grad, Tensor]:
        """Return the gradient of raw output ``i - 1`` from that of ``i``, without coefficients yet, and its sums."""
        chosen, below = self.plan.chosen[i], self.below(i)
        g, sums = convolution.dgrad_to(
            self.weight(i), self.plan.specs[i], chosen.dgrad, grad, below, chosen.fwd.packed, self.wts[i]
        )
        return self.gradient_of(i - 1, g, below.y), sums

    def projection(self, grad: Grad) -> tuple[Tensor, tuple[int, int] | None] | None:
        """Store dW of the projection, and return its dx: for every pixel, or for those that it reads."""
        i = self.main
        self.wgrad(i, grad)
        if not self.needs.x:
            return None
        spec, config = self.plan.specs[i], self.plan.chosen[i].dgrad
        if config == CUDNN:
            return self.stock_dx(i, grad), None
        compact = (spec.r, spec.s) == (1, 1) and spec.padding == (0, 0) and spec.stride != (1, 1)
        dx, _ = convolution.dgrad(
            self.weight(i), spec, config, grad, compact=compact, wt=self.wts[i], reduction=self.taken_by(config)
        )
        return dx, spec.stride if compact else None

    def dgrad_first(
        self, grad: Grad, identity: Tensor | None, projected: tuple[Tensor, tuple[int, int] | None] | None
    ) -> Tensor:
        """Return dx of the first convolution plus that of the shortcut."""
        spec, config = self.plan.specs[0], self.plan.chosen[0].dgrad
        if config == CUDNN:
            dx = self.stock_dx(0, grad)
            if projected is not None:
                down, across = projected[1] or (1, 1)
                dx[:, :, ::down, ::across] += projected[0]
            return dx if identity is None else dx.add_(identity)
        add, strided = identity, None
        if projected is not None:
            dx, stride = projected
            add, strided = (dx, None) if stride is None else (None, (dx, stride))
        return convolution.dgrad(
            self.weight(0), spec, config, grad, add=add, add_strided=strided, wt=self.wts[0],
            reduction=self.taken_by(config),
        )[0]  # fmt: skip
