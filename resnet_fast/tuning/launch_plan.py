"""Plan the launches of a problem: its route and a config per launch, by measured times where there are any.

A problem's routes (routes.py) are compared by the sum of their launches' times.

- If any route is measured throughout, only such routes compete, and PyTorch's own kernels compete with ours launch by
  launch: after tuning, what runs is never slower than stock beyond noise.
- Without measurements the model's times (heuristic.py) decide among our kernels, and PyTorch's takes the place of one
  that its model (stock_model.py) sees clearly faster.
- A config that gave a wrong answer during tuning is refused and never runs.
- A config that needs a proof (configs.needs_proof) competes only if it was proved on this GPU (proofs.py). A caller
  that is going to prove what it gets asks for a ``hopeful`` plan, in which what was not tried yet competes too.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..devices import Device
from ..errors import BackendError
from ..spec import ConvSpec, LaunchSpec, Spec
from . import configs, heuristic, proofs, stock_model, training_configs
from .configs import Config
from .routes import LaunchRoute, folded_routes, planned, routes
from .tables import Table, user_file
from .training_configs import CUDNN, training_launch


@dataclass(frozen=True)
class LaunchPlan:
    """A route with one config per launch.

    Attributes:
        route: the launches.
        configs: the config of each launch.
        seconds: the sum of the launches' times, and of a separate max-pool.
        measured: whether all of those times were measured.
        others: the routes that lost, by name, with their seconds.
        note: why a faster config was left out; empty if none was.
        refused: configs of its launches that could not be compiled, with the reason.
        batch: images that the configs and seconds are for, where these do not follow the batch; 0 where they do.
    """

    route: LaunchRoute
    configs: tuple[Config, ...]
    seconds: float
    measured: bool
    others: tuple[tuple[str, float], ...] = ()
    note: str = ""
    refused: tuple[str, ...] = ()
    batch: int = 0

    @property
    def chosen(self) -> tuple[tuple[LaunchSpec, Config], ...]:
        """Each launch with its config."""
        return tuple(zip(self.route.launches, self.configs, strict=True))

    def __str__(self) -> str:
        steps = " | ".join(f"{launch.kernel} {config}" for launch, config in self.chosen)
        how = "measured" if self.measured else "modelled"
        lost = "".join(f", {fusion} {seconds * 1e6:.1f}" for fusion, seconds in self.others)
        batch = f" at batch {self.batch}, configs of any batch" if self.batch else ""
        note = f"; {self.note}" if self.note else ""
        refused = refused_text(self.refused)
        return f"{self.route.fusion}: {steps} ({self.seconds * 1e6:.1f} us {how}{lost}{batch}){refused}{note}"

    def of(self, spec: Spec) -> LaunchPlan:
        """Return the plan with the launches of ``spec``, which differs from the planned problem in its batch only."""
        return replace(self, route=next(r for r in routes(spec) if r.fusion == self.route.fusion))


def _may_run(launch: LaunchSpec, config: Config, table: Table, hopeful: bool) -> bool:
    """Return whether a config needs no proof or is proved; with ``hopeful`` also if it was not tried yet."""
    refusal = table.proofs.verdict(launch, config)
    if refusal is None:
        return hopeful and proofs.at_first_use(launch)
    return not refusal


def fastest_measured(
    launch: LaunchSpec, device: Device, table: Table, hopeful: bool = False
) -> tuple[Config, float] | None:
    """Return the fastest candidate in the table and its seconds; None where nothing usable was measured."""
    times = table.times(launch)
    if not times or device.gpu is None:
        return None
    known = {str(c): c for c in (*configs.candidates(launch, device.gpu), *configs.stock_candidates(launch))}
    usable = [(known[name], us * 1e-6) for name, us in times.items() if us is not None and name in known]
    usable = [pair for pair in usable if _may_run(launch, pair[0], table, hopeful)]
    return min(usable, key=lambda pair: pair[1]) if usable else None


def fastest_of_ours(
    launch: LaunchSpec, device: Device, table: Table, hopeful: bool = False
) -> tuple[Config, float] | None:
    """Return the model's fastest config that the table does not refuse, and its seconds; None where none is left."""
    refused = {name for name, us in table.times(launch).items() if us is None}
    return next(
        (
            pick
            for pick in heuristic.rank(launch, device)
            if str(pick[0]) not in refused and _may_run(launch, pick[0], table, hopeful)
        ),
        None,
    )


def fastest_modelled(
    launch: LaunchSpec, device: Device, table: Table, hopeful: bool = False
) -> tuple[Config, float] | None:
    """Return the same, or PyTorch's kernel where its model sees it clearly faster and the table does not refuse it."""
    ours, stock = fastest_of_ours(launch, device, table, hopeful), stock_model.fastest(launch, device)
    if stock is None or not _may_run(launch, stock[0], table, hopeful):
        return ours
    if table.times(launch).get(str(stock[0]), 0) is None:
        return ours
    return stock if ours is None or stock[1] * stock_model.MARGIN < ours[1] else ours


def plan_launches(spec: Spec, device: Device, table: Table, hopeful: bool = False) -> LaunchPlan:
    """Return the fastest known way to run ``spec`` on ``device``.

    The configs of an ``invariant`` problem are those of :func:`~.routes.planned`: the same at any batch size.

    Args:
        spec: a convolution or a block of inference.
        device: a GPU with known ceilings.
        table: what was measured and proved on it.
        hopeful: whether configs that need a proof compete before they were tried.

    Raises:
        BackendError: tuning refused every config of a launch in every route.
    """
    found = []
    problem = planned(spec)
    for route in routes(problem):
        known = [fastest_measured(launch, device, table, hopeful) for launch in route.launches]
        picks = [
            k or fastest_modelled(launch, device, table, hopeful)
            for k, launch in zip(known, route.launches, strict=True)
        ]
        best = [p for p in picks if p is not None]
        if len(best) < len(picks):
            continue  # a chain too wide for every config, or a launch that failed with each of its configs
        seconds = sum(s for _, s in best) + _pooling(problem, route, device)
        found.append(LaunchPlan(route, tuple(c for c, _ in best), seconds, None not in known))
    if not found:
        refused = tuple(dict.fromkeys(t for r in routes(problem) for one in r.launches for t in table.refusals(one)))
        raise BackendError(
            f"no kernel for {spec} passed its check on {table.gpu}{refused_text(refused)}; use another backend, or "
            f"delete {user_file(table.gpu)} and tune again"
        )
    if any(c.measured for c in found):
        found = [c for c in found if c.measured]
    fastest = min(found, key=lambda c: c.seconds)
    others = tuple((c.route.fusion, c.seconds) for c in found if c is not fastest)
    refused = tuple(text for launch in fastest.route.launches for text in table.refusals(launch))
    plan = replace(fastest, others=others, refused=refused)
    return replace(plan, batch=problem.n).of(spec) if spec.invariant else plan


def refused_text(refused: tuple[str, ...]) -> str:
    """Return how a plan names the configs that could not be compiled; empty if there are none."""
    return f", refused {'; '.join(refused)}" if refused else ""


def stock_seconds(spec: Spec, device: Device, table: Table) -> float | None:
    """Return the seconds of ``spec`` on PyTorch's kernels alone; None where they were not measured."""
    sums = []
    for route in routes(planned(spec)):
        times = [[table.times(launch).get(name) for name in configs.STOCK] for launch in route.launches]
        least = [min((us for us in group if us is not None), default=None) for group in times]
        best = [us * 1e-6 for us in least if us is not None]
        if len(best) == len(least):
            sums.append(sum(best) + _pooling(spec, route, device))
    return min(sums, default=None)


def _pooling(problem: Spec, route: LaunchRoute, device: Device) -> float:
    """Return the seconds of PyTorch's max-pool after an unpooled stem, 0 for any other problem.

    It reads the convolution's output and writes the pooled one.
    """
    if route.fusion != "conv" or not problem.pool:
        return 0.0
    (stem,) = problem.main
    ho, wo = stem.out_hw()
    elements = stem.n * stem.co * (stem.ho * stem.wo + ho * wo)
    assert device.gpu is not None
    return elements * configs.ITEMSIZE[stem.dtype] / device.bandwidth.value + device.gpu.launch_s.value


@dataclass(frozen=True)
class TrainingConfigs:
    """The configs of one convolution's three launches; ``CUDNN`` for a launch that runs on PyTorch's kernels.

    ``refused``: configs that could not be compiled, with the reason. ``stock``: why PyTorch's kernels run a launch, for
    each that they run.
    """

    fwd: Config
    dgrad: Config
    wgrad: Config
    refused: tuple[str, ...] = ()
    stock: tuple[str, ...] = ()

    def chosen(self, conv: ConvSpec, prologue: bool) -> tuple[tuple[LaunchSpec, Config], ...]:
        """Return each launch of ``conv`` with its config; ``prologue`` as of :func:`plan_training`."""
        launches = (training_launch(kernel, conv, prologue) for kernel in training_configs.KERNELS)
        return tuple(zip(launches, (self.fwd, self.dgrad, self.wgrad), strict=True))

    def __str__(self) -> str:
        reasons = "".join(f"; {reason}" for reason in self.stock)
        return " / ".join(str(c) for c in (self.fwd, self.dgrad, self.wgrad)) + refused_text(self.refused) + reasons


def plan_training(
    conv: ConvSpec, prologue: bool, device: Device, table: Table, packed: bool, hopeful: bool = False
) -> TrainingConfigs:
    """Return a config for each direction of a convolution: the fastest measured, otherwise the model's.

    Args:
        conv: a convolution of a training step.
        prologue: whether its input is raw, so that BatchNorm and ReLU are applied as it is read.
        device: a GPU with known ceilings.
        table: what was measured and proved on it.
        packed: whether a prologue in 16-bit pairs is wanted, where the launch may take one.
        hopeful: whether configs that need a proof compete before they were tried.
    """
    launches = [training_launch(kernel, conv, prologue) for kernel in training_configs.KERNELS]
    picked = fwd, dgrad, wgrad = [_fastest_training(one, device, table, packed, hopeful) for one in launches]
    refused = tuple(text for launch in launches for text in table.refusals(launch))
    return TrainingConfigs(fwd, dgrad, wgrad, refused, stock_reasons(zip(launches, picked, strict=True), table))


def _fastest_training(launch: LaunchSpec, device: Device, table: Table, packed: bool, hopeful: bool) -> Config:
    """Return the fastest config of a training launch, measured or else modelled; ``CUDNN`` where none is left."""
    assert device.gpu is not None
    times, every = table.times(launch), training_configs.admitted(launch, device.gpu, packed)
    may_run = [c for c in every if _may_run(launch, c, table, hopeful)]
    known = {str(c): c for c in (*may_run, CUDNN)}
    usable = [(us, name) for name, us in times.items() if us is not None and name in known]
    if usable:
        return known[min(usable)[1]]
    left_out = frozenset(c for c in every if c not in may_run or times.get(str(c), 0) is None)
    return next((c for c, _ in heuristic.rank_training(launch, device, packed, left_out)), CUDNN)


@dataclass(frozen=True)
class FoldedConfigs:
    """The configs of a training step whose norms are folded into the weights.

    Attributes:
        route: the launches of the forward pass.
        forward: a config for each of them, maybe one of PyTorch's kernels.
        dgrads, wgrads: a config for each convolution; ``CUDNN`` for a launch that runs on PyTorch's kernels.
        refused: configs that could not be compiled, with the reason.
        stock: why PyTorch's kernels run a launch, for each that they run.
    """

    route: LaunchRoute
    forward: tuple[Config, ...]
    dgrads: tuple[Config, ...]
    wgrads: tuple[Config, ...]
    refused: tuple[str, ...] = ()
    stock: tuple[str, ...] = ()

    def chosen(self, spec: Spec) -> tuple[tuple[LaunchSpec, Config], ...]:
        """Return each launch of ``spec`` with its config."""
        backward = [config for pair in zip(self.dgrads, self.wgrads, strict=True) for config in pair]
        every = (*self.route.launches, *training_configs.training_launches(spec))
        return tuple(zip(every, (*self.forward, *backward), strict=True))

    def __str__(self) -> str:
        steps = " | ".join(f"{one.kernel} {c}" for one, c in zip(self.route.launches, self.forward, strict=True))
        backward = " | ".join(f"{d} / {w}" for d, w in zip(self.dgrads, self.wgrads, strict=True))
        reasons = "".join(f"; {reason}" for reason in self.stock)
        return f"{self.route.fusion}: {steps}; dgrad / wgrad: {backward}{refused_text(self.refused)}{reasons}"


def plan_folded(spec: Spec, device: Device, table: Table, hopeful: bool = False) -> FoldedConfigs:
    """Return the fastest known way to train ``spec``, whose norms all have constant statistics.

    As in :func:`plan_training`, PyTorch's kernels run where they were measured faster, or nothing of ours is left. Not
    where they are only modelled faster, because a pass with one of them is launched one by one.

    Args:
        spec: a convolution or a block of a training step.
        device: a GPU with known ceilings.
        table: what was measured and proved on it.
        hopeful: whether configs that need a proof compete before they were tried.
    """
    found: list[tuple[float, bool, LaunchRoute, tuple[Config, ...]]] = []
    for route in folded_routes(spec):
        known = [fastest_measured(one, device, table, hopeful) for one in route.launches]
        picks = [
            k or fastest_of_ours(one, device, table, hopeful) or _left_to_stock(one)
            for k, one in zip(known, route.launches, strict=True)
        ]
        best = [pick for pick in picks if pick is not None]
        if len(best) == len(picks):
            found.append((sum(s for _, s in best), None not in known, route, tuple(c for c, _ in best)))
    complete = [pick for pick in found if pick[1]]
    _, _, route, forward = min(complete or found, key=lambda pick: pick[0])
    backward = training_configs.training_launches(spec)
    picked = [_fastest_training(one, device, table, False, hopeful) for one in backward]
    plan = FoldedConfigs(route, forward, tuple(picked[::2]), tuple(picked[1::2]))
    refused = tuple(text for one in (*route.launches, *backward) for text in table.refusals(one))
    return replace(plan, refused=refused, stock=stock_reasons(plan.chosen(spec), table))


def _left_to_stock(launch: LaunchSpec) -> tuple[Config, float] | None:
    """Return PyTorch's kernels, in no time known, for a launch that nothing of ours can run; None if they cannot."""
    return (CUDNN, float("inf")) if CUDNN in configs.stock_candidates(launch) else None


def stock_reasons(chosen: Iterable[tuple[LaunchSpec, Config]], table: Table) -> tuple[str, ...]:
    """Return why PyTorch's kernels run a launch, for each of ``chosen`` that they run."""
    return tuple(_stock_reason(launch, config, table) for launch, config in chosen if config.stock)


def _stock_reason(launch: LaunchSpec, config: Config, table: Table) -> str:
    times = table.times(launch)
    own = min((us for name, us in times.items() if us is not None and name not in configs.STOCK), default=None)
    us = times.get(str(config))
    compared = us is not None and own is not None
    why = f"{us:.1f} us measured, ours {own:.1f}" if compared else "no config of ours is left"
    return f"{config} runs {launch}: {why}"
