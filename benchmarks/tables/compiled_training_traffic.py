"""Count in the PTX machine what a training step's kernels move as compiled, beside the interpreter's counts.

    python -m resnet_fast.benchmarks.tables.compiled_training_traffic   docs/tables/compiled-training-traffic.{json,md}

The steps are those of the table training-traffic: every distinct block of ResNet-50 and its stem, forward and backward,
at batch 1, 224x224, with the configs that an H100 would run at batch 256, compiled for sm_80 and sm_90. Each launch
runs whole; nothing is scaled. Activations are the tensors of 16 bits whose first size is the batch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from unittest import mock

import torch

from resnet_fast import flags
from resnet_fast.backends.triton.training import chain, pack
from resnet_fast.spec import BlockSpec, ConvSpec
from resnet_fast.tools.ptx_machine import PtxLaunch, ptx_machine

from .. import markdown
from ..markdown import LEFT, RIGHT
from . import FOLDER, training_traffic
from .compiled_traffic import ARCHS, SECTOR, CompiledCounts
from .training_traffic import BATCH, call_of, kind

JSON, PAGE = FOLDER / "compiled-training-traffic.json", FOLDER / "compiled-training-traffic.md"
_ACTIVATION = re.compile(r"\(float16 \(1, \d+, \d+, \d+\)")


@dataclass(frozen=True)
class CompiledStepRow:
    """The launches of one kind in one part of the net as compiled for an architecture.

    ``activations``: bytes of their distinct sectors. ``source``: the same by the interpreter.
    """

    part: str
    kind: str
    arch: int
    launches: int
    activations: int
    source: int
    counted: CompiledCounts

    @property
    def over_source(self) -> float:
        return self.activations / self.source


def activations(launch: PtxLaunch) -> int:
    """Return the bytes of distinct sectors of activations that a launch reads or writes."""
    memory = launch.report.counters["allocations"]
    return SECTOR * sum(
        a["unique_sectors_read"] + a["unique_sectors_written"] for name, a in memory.items() if _ACTIVATION.search(name)
    )


def step(spec: ConvSpec | BlockSpec, arch: int) -> list[PtxLaunch]:
    """Run forward and backward of a block or stem in the PTX machine; weights are zeros, as in training_traffic."""
    spec = spec.with_(batch_stats=True, grad=True)
    call, cpu = call_of(spec), torch.device("cpu")
    settled = mock.patch.object(
        chain.proofs, "settled", lambda plan, *_: (plan(True), "", True)
    )  # as if all were proved
    with ptx_machine(90), settled:
        plan = replace(chain.plan_of(spec.with_(n=BATCH), cpu), specs=spec.convs)
    chain._plans.clear()
    needs = [call.op != "stem", *[t is not None for t in call.leaves()[1:]]]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {flags.SUBMIT.name: "python"}))
        stack.enter_context(mock.patch.object(chain, "plan_of", lambda *_: plan))
        stack.enter_context(mock.patch.object(pack, "forward_passenger", training_traffic._zero_forward))
        stack.enter_context(mock.patch.object(pack, "dgrad_passenger", training_traffic._zero_dgrad))
        machine = stack.enter_context(ptx_machine(arch))
        z, saved, _ = chain.forward(call, spec, "raw", True)
        chain.backward(call, spec, saved, z, torch.randn_like(z), needs)
    return machine.launches


def rows(parts: Sequence[str], archs: Sequence[int] = ARCHS) -> list[CompiledStepRow]:
    """Count the steps of these parts of the net."""
    every = training_traffic.parts()
    known = {(r["part"], r["kind"]): r for r in json.loads(training_traffic.JSON.read_text())["rows"]}
    found = []
    for part in parts:
        for arch in archs:
            by_kind: dict[str, list[PtxLaunch]] = {}
            for one in step(every[part][0], arch):
                by_kind.setdefault(kind(one.kernel), []).append(one)
            for name, launches in by_kind.items():
                if (part, name) not in known:
                    continue
                moved, source = sum(map(activations, launches)), known[part, name]["counted"]
                row = CompiledStepRow(part, name, arch, len(launches), moved, source, CompiledCounts.of(launches))
                found.append(row)
                print(f"{part} {name} sm_{arch}: {row.over_source:.3f} {row.counted}", flush=True)
    return found


def page(found: Iterable[CompiledStepRow]) -> str:
    """Return the page to read."""
    cells = [
        (
            r.part, r.kind, f"sm_{r.arch}", r.launches, f"{r.activations / 1e3:,.1f}", f"{r.over_source:.3f}",
            f"{r.counted.distinct / 1e3:,.1f}", f"{r.counted.moved / 1e3:,.1f}", f"{r.counted.wavefronts:,}",
            f"{r.counted.conflicts:,}",
        )
        for r in found
    ]  # fmt: skip
    head = ("part", "launches", "arch", "", "activations KB", "/ source", "distinct KB", "all KB", "wavefronts")
    table = markdown.table((*head, "conflicts"), cells, [LEFT, LEFT, LEFT, *[RIGHT] * 7])
    return "\n\n".join([*EXPLAINED, table]) + "\n"


EXPLAINED = (
    "# Traffic of a training step, as compiled",
    "Counted in the PTX machine, beside the interpreter's counts of the sources ([training-traffic]"
    f"(training-traffic.md)). ResNet-50, batch 1, 224x224, float16, with the configs of an H100 at batch {BATCH}, "
    "compiled for sm_80 too. Each launch runs whole; nothing is scaled. Weights are zeros, as in that table. "
    "Activations and distinct: sectors of 32 bytes that are read, and those that are written, of images and of all "
    "tensors. All: for "
    "each instruction of a warp, the sectors that it touches. Wavefronts: rounds through the banks of shared memory, "
    "without those of wgmma; conflicts: how many of them the same bytes would not take elsewhere. Written by "
    "benchmarks/tables/compiled_training_traffic.py.",
    "Compiled kernels touch the activations that their sources touch. The weight gradient has bank conflicts where it "
    "multiplies by mma.sync; [why](../notes/wgrad-bank-conflicts.md).",
)


def main() -> None:
    torch.set_num_threads(1)
    found = rows(list(training_traffic.parts()))
    JSON.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
