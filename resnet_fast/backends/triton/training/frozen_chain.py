r"""Run one training step of a call without batch statistics: every norm is folded into its convolution's weight.

    forward     x --conv1--> z1 --conv2--> z2 --conv3--> z           z: activations, after norm, ReLU and add
                 \---projection--- into conv3's tile, or --- yd ----/

    backward    dz --mask of z--> g3 --dgrad3, mask of z2--> g2 --dgrad2, mask of z1--> g1 --dgrad1--> dx
                                  g3 --projection's dgrad----------------------------------(added)---^
                g and the input of each convolution --wgrad--> P, Q --> dW, dgamma, dbeta, dbias

Detectors train like this: their norms are FrozenBatchNorm2d, or BatchNorm2d in eval mode. The statistics are known
before the launch, so nothing has to be raw. The forward pass runs the kernels of inference, one per convolution, with
norm, ReLU and add in their epilogues (../conv_bn_act_1x1.py and others; of a stem also pool_winner.py). The backward
pass runs conv_dgrad and conv_wgrad without a prologue: the gradient behind a ReLU, masked, is the gradient of the
folded convolution's output.

Saved for the backward pass: the activations between the convolutions, which are their inputs and hold the ReLUs' masks
(z > 0), and three vectors per norm. Input and output are saved by the caller. chain.py would save a raw output per
convolution and ten vectors per norm.

Launches of a bottleneck with the identity: 1 + 3 forward, 1 + 3 + 3 + 1 backward, and none with a block's end:

    forward     fold, conv1, conv2, conv3
    backward    mask and fold, then wgrad and dgrad of each convolution, then the sums over the splits of all wgrads

A gradient that nobody wants is not computed: a wgrad for its weight and gamma together, the sums of g without its
products for beta and bias, a dgrad for the input and all that is in front of it.

For each launch the tuning table may select PyTorch's kernel instead (tuning/launch_plan.py), in the backward pass with
the passes of folded_convolution.py around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....calls import Call
from ....spec import Spec
from ....tuning import launch_plan
from ....tuning.launch_plan import FoldedConfigs
from ....tuning.training_configs import folded_launches
from ...layouts import in_layout
from .. import proofs
from ..device import Target, device_of, place_of, planned_for, table_of, table_version
from ..launch import FoldedWeights, arrivals, nhwc
from ..launchers import LAUNCHERS
from ..submission import Passes
from . import chain, fold, fold_gradient, folded_convolution, pool_winner
from .gradients import BackwardPass
from .problem import launch_problem


@dataclass(frozen=True)
class FoldedPlan:
    """The chosen configs of a step. ``note``, ``target`` and ``passes`` as of :class:`.chain.StepPlan`."""

    configs: FoldedConfigs
    target: Target
    note: str = ""
    passes: Passes = field(default_factory=Passes, init=False, compare=False)

    def __str__(self) -> str:
        notes = "".join(f"; {note}" for note in (self.note, str(self.passes)) if note)
        return f"training with folded norms, forward {self.configs}{notes}"

    @property
    def fusion(self) -> str:
        """The plan of :mod:`resnet_fast.roofline.byte_model` with its floor."""
        return self.configs.route.fusion


def plan_of(spec: Spec, device: torch.device) -> FoldedPlan:
    """Return the configs of a step's launches, measured if possible, else modelled."""
    key = spec, device, table_version(device)
    known = _plans.get(key)
    if known is not None:
        return known
    gpu, table, place = device_of(device), table_of(device), place_of(device)
    found, note, lasts = proofs.settled(
        lambda hopeful: launch_plan.plan_folded(spec, gpu, table, hopeful),
        lambda configs: configs.chosen(spec),
        launch_problem,
        place,
        table,
    )
    plan = FoldedPlan(found, Target(gpu, table, place), note)
    if lasts:
        if len(_plans) >= chain.KEEP:
            _plans.clear()
        _plans[key] = plan
    return plan


_plans: dict[tuple[Spec, torch.device, object], FoldedPlan] = {}


# ---------------------------------------------------------------------------------------------------------- forward


def forward(call: Call, spec: Spec, save: str, update: bool) -> tuple[Tensor, list[Tensor], FoldedPlan]:
    """Return (output, saved, plan). ``save`` and ``update`` change nothing: no raw output, no statistics.

    ``saved``: the activations between the convolutions of the residual branch, then the vectors of the norms in the
    order of the call, then what a max-pool's windows were won by.
    """
    plan = plan_of(spec, call.x.device)
    images = [None if t is None else nhwc(t) for t in (call.x, call.added)]
    numbers = [norm.eps for norm in call.norms]

    def launchers(given: list[Any]) -> list[Tensor]:
        with planned_for(plan.target):
            return _forward(chain.with_tensors(call, given, [0.0] * len(numbers)), spec, plan.configs)

    z, *saved = plan.passes.run(("forward", *numbers), launchers, [*images, *call.parameters()])
    return in_layout(z, spec.layout), saved, plan


def _forward(call: Call, spec: Spec, configs: FoldedConfigs) -> list[Tensor]:
    """Return the output in NHWC and what is saved."""
    x, main, route = call.x, len(spec.main), configs.route
    joined = route.fusion == "proj"
    steps = tuple(zip(route.launches, configs.forward, strict=True))
    order = [*([main] if call.projection and not joined else []), *range(main)]
    stock = [i for i, config in zip(order, configs.forward, strict=True) if config.stock]
    folded = fold.fold(call.convs, call.norms, spec.convs, call.projection, joined, x.dtype, stock)
    counters = arrivals(steps, x)
    y, shortcut, kept = x, call.added, []
    for i, (launch, config) in zip(order, steps, strict=True):
        split = {} if config.splits == 1 else {"arrivals": counters}
        w, const, _ = folded[i]
        run = LAUNCHERS[config.kernel]
        if i == main:
            shortcut = run(launch, config, FoldedWeights(w, const), x, None, None, **split)
            continue
        res = (x if shortcut is None else shortcut) if launch.residual else None
        merged = launch.projection is not None
        weights = FoldedWeights(w, const, projection=folded[main].w if merged else None)
        y = run(launch, config, weights, y, res, x if merged else None, **split)
        kept.append(y)
    won = []
    if call.pool is not None:
        y, winner = pool_winner.pool_forward(y, call.pool)
        won = [winner]
    return [y, *kept[:-1], *[one.vectors for one in folded], *won]


def statistics(call: Call, saved: list[Tensor]) -> list[None]:
    """Return None for every norm: none used the batch's statistics."""
    return [None] * len(call.norms)


def shapes(call: Call, spec: Spec, save: str) -> list[tuple[tuple[int, ...], torch.dtype, str]]:
    """Return (shape, dtype, layout) of every tensor in ``saved``."""
    found: list[tuple[tuple[int, ...], torch.dtype, str]]
    found = [((c.n, c.co, c.ho, c.wo), call.x.dtype, "nhwc") for c in spec.main[:-1]]
    found += [((3, c.co), torch.float32, "") for c in spec.convs]
    if call.pool is not None:
        found.append((spec.out_shape(), pool_winner.winner_dtype(call.pool), "nhwc"))
    return found


# --------------------------------------------------------------------------------------------------------- backward


def backward(
    call: Call, spec: Spec, saved: list[Tensor], z: Tensor, dz: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients that ``needs`` asks for, in the order of :meth:`Call.leaves`."""
    plan = plan_of(spec, call.x.device)
    # a saved-tensor hook may bring them back in another layout (by way of NumPy, from a file)
    images = [nhwc(t) if t.dim() == 4 else t for t in (z, dz, *saved)]
    leaves = [*images, nhwc(call.x), *call.leaves()[1:]]
    count = len(saved)

    def launchers(given: list[Any]) -> list[Tensor | None]:
        z, dz, *rest = given
        bound = call.with_leaves(rest[count:])
        with planned_for(plan.target):
            return _FoldedBackward(bound, spec, plan.configs, rest[:count], needs).run(z, dz)

    dx, added, *others = plan.passes.run(("backward", *needs), launchers, leaves)
    return (*[None if t is None else in_layout(t, spec.layout) for t in (dx, added)], *others)


class _FoldedBackward(BackwardPass):
    """One backward pass.

    ``inputs``: what each convolution read; of the residual branch, then of the projection.
    """

    def __init__(
        self, call: Call, spec: Spec, configs: FoldedConfigs, saved: list[Tensor], needs: Sequence[bool]
    ) -> None:
        super().__init__(call, spec, needs)
        self.configs = configs
        inner = self.main - 1
        self.inputs = [call.x, *saved[:inner], *[call.x] * call.projection]
        self.vectors = saved[inner : inner + self.count]
        self.won = saved[-1]
        self.launches = [folded_launches(c, 0 < i < self.main) for i, c in enumerate(spec.convs)]
        self.sums: list[fold_gradient.Wanted] = []

    def run(self, z: Tensor, dz: Tensor) -> list[Tensor | None]:
        """Return the gradients in NHWC, from the output ``z`` and its gradient ``dz``."""
        g, wts = self.begin(z, dz)
        last = self.main - 1
        self.wgrad(last, g)
        projected = self.projection(g, wts[self.main]) if self.call.projection else None
        dx: Tensor | None = None
        grad = g
        for i in range(last, -1, -1):
            if i < last:
                self.wgrad(i, grad)
            if not self.passes_on(i):
                break
            if i > 0:
                grad = self.dgrad(i, grad, wts[i])
            else:
                add, strided = g if self.spec.shortcut == "identity" else None, None
                if projected is not None:
                    add, strided = projected
                dx = self.dgrad(0, grad, wts[0], add, strided)
        fold_gradient.fold_gradients(self.sums)
        return self.found(dx, g, dz)

    def begin(self, z: Tensor, dz: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradient in front of the last ReLU, and the weights of the dgrads that our kernels will run."""
        call, dgrads = self.call, self.configs.dgrads
        wanted = [self.passes_on(i) and not dgrads[i].stock for i in range(self.count)]
        masked = z if call.relu and call.pool is None else None
        wts, g = fold.begin_backward(call.convs, self.spec.convs, self.vectors, wanted, dz, masked)
        if call.pool is not None:
            conv = self.spec.main[0]
            g = pool_winner.pool_backward(dz, self.won, conv.ho, conv.wo, call.pool)
        return g, wts

    def wgrad(self, i: int, g: Tensor) -> None:
        """Launch the products for the gradients of the parameters of layer ``i``, which the last launch finishes."""
        if not self.wanted(i):
            return
        conv, norm, needs = self.call.convs[i], self.call.norms[i], self.needs
        tensors = (conv.weight, norm.weight, norm.bias, conv.bias)
        flags = (needs.convs[i].weight, needs.norms[i].weight, needs.norms[i].bias, needs.convs[i].bias)
        found = [
            torch.empty_like(t) if flag and t is not None else None for t, flag in zip(tensors, flags, strict=True)
        ]
        self.weights[i], self.gammas[i], self.betas[i], self.biases[i] = found
        launch, config = self.launches[i][1], self.configs.wgrads[i]
        products, sums = flags[0] or flags[1], any(flags[1:])
        given = folded_convolution.wgrad(launch, config, conv.weight, g, self.inputs[i], products, sums)
        self.sums.append(fold_gradient.Wanted(self.spec.convs[i], conv.weight, self.vectors[i], given, *found))

    def dgrad(
        self,
        i: int,
        g: Tensor,
        wt: Tensor | None,
        add: Tensor | None = None,
        strided: folded_convolution.Strided | None = None,
        compact: bool = False,
    ) -> Tensor:
        """Return the gradient of the input of convolution ``i``; arguments as of :func:`.folded_convolution.dgrad`."""
        launch, config, conv = self.launches[i][0], self.configs.dgrads[i], self.call.convs[i]
        return folded_convolution.dgrad(
            launch, config, conv, self.vectors[i], wt, g, self.inputs[i], add, strided, compact
        )

    def projection(
        self, g: Tensor, wt: Tensor | None
    ) -> tuple[Tensor | None, folded_convolution.Strided | None] | None:
        """Launch the projection's wgrad, and return its dx for every pixel, or for those that it reads."""
        i = self.main
        self.wgrad(i, g)
        if not self.needs.x:
            return None
        spec, ours = self.spec.convs[i], not self.configs.dgrads[i].stock
        compact = ours and (spec.r, spec.s) == (1, 1) and spec.padding == (0, 0) and spec.stride != (1, 1)
        dx = self.dgrad(i, g, wt, compact=compact)
        return (None, (dx, spec.stride)) if compact else (dx, None)
