"""Count in Triton's interpreter what the kernels move, and write docs/tables/traffic.{json,md}.

    TRITON_INTERPRET=1 python -m resnet_fast.benchmarks.tables.traffic

Every distinct launch of ResNet-50's eval routes at batch 1, 224x224, float16, with the config that an H100 would run.
Unique bytes are what memory must deliver if caches are perfect, and are compared with the plan's least
(``LaunchSpec.min_bytes``); total bytes are what all programs ask for, the L2's share included.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from resnet_fast import devices
from resnet_fast.backends.triton.problem import problem
from resnet_fast.spec import ITEMSIZE, BlockSpec, ConvSpec, LaunchSpec
from resnet_fast.tuning import heuristic, shapes
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.routes import LaunchRoute, routes

from .. import markdown
from ..markdown import LEFT, RIGHT
from . import FOLDER
from .counting import count

JSON, PAGE = FOLDER / "traffic.json", FOLDER / "traffic.md"
H100 = devices.gpu("h100")


@dataclass(frozen=True)
class LaunchTraffic:
    """One launch. Bytes; ``least`` is the plan's; ``weights`` the part of it that is filters and biases."""

    launch: str
    config: str
    unique: int
    total: int
    least: int
    weights: int
    flops: int
    least_flops: int

    @property
    def ratio(self) -> float:
        return self.unique / self.least


def weights_of(launch: LaunchSpec) -> int:
    """Return the bytes of a launch's filters and biases."""
    filters = sum(c.co * c.gemm_k for c in launch.all_convs()) * ITEMSIZE[launch.dtype]
    return filters + sum(4 * c.co for c in launch.convs)


def counted(launch: LaunchSpec, config: Config | None = None) -> LaunchTraffic:
    """Run a launch in the counting interpreter; out of bounds accesses raise."""
    chosen = config
    if chosen is None:
        found = heuristic.select(launch, H100)
        assert found is not None
        chosen = found[0]
    p = problem(launch)
    call = p.prepared(chosen)
    with count(inside_views=True) as counts:
        call()
    run = counts.only
    return LaunchTraffic(
        str(launch), str(chosen), run.unique, run.read + run.written, launch.min_bytes(), weights_of(launch),
        run.flops, launch.flops(),
    )  # fmt: skip


def net_routes(plan: str, **size: Any) -> list[LaunchRoute]:
    """Return the routes of ResNet-50 under a plan: ``conv``, or ``tail`` and the next best where a block has none."""
    stem = shapes.problems("resnet50", 1, dtype="float16", **size)["r50.conv1"]
    found: list[LaunchRoute] = []
    specs: list[ConvSpec | BlockSpec] = [stem, *shapes.blocks("resnet50", 1, dtype="float16", **size).values()]
    for spec in specs:
        by = {r.fusion: r for r in routes(spec)}
        best = [by[p] for p in ("tail", "stem", "proj", "conv") if p in by and runs(by[p])]
        found.append(by["conv"] if plan == "conv" else best[0])
    return found


def runs(route: LaunchRoute) -> bool:
    """Return whether each launch has a config that may be used unmeasured."""
    return all(heuristic.select(launch, H100) for launch in route.launches)


def pooled_apart(routes: Iterable[LaunchRoute]) -> int:
    """Return the bytes that PyTorch's max-pool moves where the stem's route leaves it out."""
    moved = 0
    for route in routes:
        last = route.launches[-1].last
        if last.r == 7 and last.epilogue.pool is None:
            hp, wp = -(-last.ho // 2), -(-last.wo // 2)
            moved += (last.ho * last.wo + hp * wp) * last.co * last.n * ITEMSIZE[last.dtype]
    return moved


def main() -> None:
    plans = {name: net_routes(name) for name in ("conv", "tail")}
    every = dict.fromkeys(launch for found in plans.values() for r in found for launch in r.launches)
    with ProcessPoolExecutor(2) as workers:
        rows = dict(zip(every, workers.map(counted, every), strict=True))
    totals = {}
    for name, found in plans.items():
        used = [rows[launch] for r in found for launch in r.launches]
        pool = pooled_apart(found)
        totals[name] = {
            "counted activations, MB/img": (sum(r.unique - r.weights for r in used) + pool) / 1e6,
            "least activations, MB/img": (sum(r.least - r.weights for r in used) + pool) / 1e6,
            "weights, MB": sum(r.weights for r in used) / 1e6,
            "launches": len(used) + (pool > 0),
        }
    JSON.write_text(json.dumps({"net": totals, "launches": [vars(r) for r in rows.values()]}, indent=1) + "\n")
    PAGE.write_text(page(totals, rows.values()))


def page(totals: dict[str, dict[str, float]], rows: Iterable[LaunchTraffic]) -> str:
    """Return the page to read."""
    plans = [[name, *(f"{v:.1f}" for v in t.values())] for name, t in totals.items()]
    launches = [
        (
            r.launch, r.config, f"{r.unique / 1e3:,.1f}", f"{r.least / 1e3:,.1f}", f"{r.ratio:.3f}",
            f"{r.total / 1e3:,.1f}", f"{r.flops / r.least_flops:.2f}",
        )
        for r in rows
    ]  # fmt: skip
    head = ("launch", "config", "unique KB", "least KB", "ratio", "total KB", "FLOPs")
    parts = [
        "# Traffic of the Triton kernels, counted",
        "ResNet-50, eval, batch 1, 224x224, float16: every distinct launch ran in a counting interpreter with the "
        "config that an H100 would run. Unique: bytes read or written at least once. Least: the plan's minimum, each "
        "input, weight and output once. Total: what all programs ask for; the difference to unique is served by L1 "
        "and L2. "
        "FLOPs: executed over needed, masked lanes and padding included. Written by benchmarks/tables/traffic.py.",
        markdown.table(["plan", *next(iter(totals.values()))], plans, [LEFT, *[RIGHT] * 4]),
        "conv: one launch per convolution, the max-pool by PyTorch. tail: the stem with its pool, conv2 and conv3 in "
        "one launch where a config keeps conv2's output on chip, projections in conv3's launch.",
        markdown.table(head, launches, [LEFT, LEFT, *[RIGHT] * 5]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
