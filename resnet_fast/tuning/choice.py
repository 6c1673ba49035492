"""Route and configs of a problem: measured where it was measured, modelled where not.

A problem's routes (routes.py) are compared by the sum of their launches' times. If any route is measured throughout,
only such routes compete, and PyTorch's own kernels compete with ours launch by launch: after tuning, what runs is never
slower than stock beyond noise. Without measurements the heuristic's times decide among our kernels, without those that
tuning refused: a kernel that gave a wrong answer there never runs. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..devices import Device
from ..errors import BackendError
from ..spec import BlockSpec, ConvSpec, LaunchSpec
from . import configs, heuristic
from .configs import Config
from .routes import Route, routes
from .tables import Table, user_file


@dataclass(frozen=True)
class Chosen:
    """A route with one config per launch. ``seconds``: their sum; ``measured``: were all of them measured?

    ``others``: the routes that lost, with their seconds.
    """

    route: Route
    configs: tuple[Config, ...]
    seconds: float
    measured: bool
    others: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        steps = " | ".join(
            f"{launch.kernel} {config}" for launch, config in zip(self.route.launches, self.configs, strict=True)
        )
        how = "measured" if self.measured else "modelled"
        lost = "".join(f", {plan} {seconds * 1e6:.1f}" for plan, seconds in self.others)
        return f"{self.route.plan}: {steps} ({self.seconds * 1e6:.1f} us {how}{lost})"


def measured(launch: LaunchSpec, device: Device, table: Table) -> tuple[Config, float] | None:
    """The fastest candidate in the table and its seconds; None where nothing usable was measured."""
    times = table.times(launch)
    if not times or device.gpu is None:
        return None
    known = {str(c): c for c in (*configs.candidates(launch, device.gpu), *configs.stock_candidates(launch))}
    usable = [(known[name], us * 1e-6) for name, us in times.items() if us is not None and name in known]
    return min(usable, key=lambda pair: pair[1]) if usable else None


def modelled(launch: LaunchSpec, device: Device, table: Table) -> tuple[Config, float] | None:
    """The heuristic's best among what the table does not refuse; None where that leaves nothing."""
    refused = {name for name, us in table.times(launch).items() if us is None}
    return next((pick for pick in heuristic.ranked(launch, device) if str(pick[0]) not in refused), None)


def choose(spec: ConvSpec | BlockSpec, device: Device, table: Table) -> Chosen:
    """The fastest known way to run ``spec`` on ``device``. BackendError where tuning refused every one."""
    found = []
    for route in routes(spec):
        known = [measured(launch, device, table) for launch in route.launches]
        picks = [k or modelled(launch, device, table) for k, launch in zip(known, route.launches, strict=True)]
        best = [p for p in picks if p is not None]
        if len(best) < len(picks):
            continue  # a chain too wide for every config, or a launch that failed with each of its configs
        seconds = sum(s for _, s in best) + _pooling(spec, route, device)
        found.append(Chosen(route, tuple(c for c, _ in best), seconds, None not in known))
    if not found:
        raise BackendError(
            f"no kernel for {spec} passed its check on {table.gpu}; use another backend, or delete "
            f"{user_file(table.gpu)} and tune again"
        )
    if any(c.measured for c in found):
        found = [c for c in found if c.measured]
    fastest = min(found, key=lambda c: c.seconds)
    return replace(fastest, others=tuple((c.route.plan, c.seconds) for c in found if c is not fastest))


def stock(spec: ConvSpec | BlockSpec, device: Device, table: Table) -> float | None:
    """Seconds of ``spec`` on PyTorch's kernels alone; None where they were not measured."""
    sums = []
    for route in routes(spec):
        times = [[table.times(launch).get(name) for name in configs.STOCK] for launch in route.launches]
        least = [min((us for us in group if us is not None), default=None) for group in times]
        best = [us * 1e-6 for us in least if us is not None]
        if len(best) == len(least):
            sums.append(sum(best) + _pooling(spec, route, device))
    return min(sums, default=None)


def _pooling(stem: ConvSpec | BlockSpec, route: Route, device: Device) -> float:
    """PyTorch's max-pool behind an unpooled stem: reads the convolution's output, writes the pooled one. Else 0."""
    if route.plan != "conv" or not isinstance(stem, ConvSpec) or not stem.epilogue.pool:
        return 0.0
    ho, wo = stem.out_hw()
    elements = stem.n * stem.co * (stem.ho * stem.wo + ho * wo)
    assert device.gpu is not None
    return elements * configs.ITEMSIZE[stem.dtype] / device.bandwidth.value + device.gpu.launch_s.value
