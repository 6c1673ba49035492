"""Run every shipped config as compiled, in the PTX machine, and write the result: docs/tables/ptx-sweep.*.

    python -m resnet_fast.benchmarks.tables.ptx_sweep                             everything: about two hours of a core
    python -m resnet_fast.benchmarks.tables.ptx_sweep --arch 90 --kernel conv_fwd     a part
    python -m resnet_fast.benchmarks.tables.ptx_sweep --sample 40 --seed 1            some, drawn by seed
    python -m resnet_fast.benchmarks.tables.ptx_sweep --write                     only write the tables

The pairs of launch and config are those that ``make gpu-check`` runs on ragged launches, and each is checked as there:
against float64, with the budget of numerics.py, and with all that a step adds to it where the config needs a proof. In
addition the machine checks every access, and each launch runs again under two other schedules of its warps, which must
leave the same bytes. Stock PyTorch's error, of which the budget is made, is a CPU's; for TF32 it is that of operands as
tensor cores read them (tools/ptx_machine/stock.py).

A row is kept in build/ptx-sweep.jsonl when its pair has run, so that the next run does what is left. It counts until
the compiler or a kernel's source changes; then the pair runs again, and what is compiled already is not compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import triton

from resnet_fast import devices
from resnet_fast.backends.triton import proofs
from resnet_fast.errors import named
from resnet_fast.spec import LaunchSpec
from resnet_fast.tools.ptx_machine.assembler import dropped_constants, packed_constants
from resnet_fast.tools.ptx_machine.machine import GPUS
from resnet_fast.tools.ptx_machine.recorded import expect_same_on_every_schedule, recorded
from resnet_fast.tools.ptx_machine.stock import Tf32Convolutions
from resnet_fast.tuning import configs
from resnet_fast.tuning.configs import Config

from .. import checkout, markdown
from ..gpu import cases, check
from ..markdown import LEFT, RIGHT
from . import FOLDER

JSON, PAGE = FOLDER / "ptx-sweep.json", FOLDER / "ptx-sweep.md"
ROWS = checkout.ROOT / "build" / "ptx-sweep.jsonl"
COMMAND = "python -m resnet_fast.benchmarks.tables.ptx_sweep"

ARCHS = (80, 90)
"""Architectures of the tables."""

# ----------------------------------------------------------------------------------------------------------- one pair


@dataclass(frozen=True)
class SweepPair:
    """A launch and a config to run it with, compiled for an architecture."""

    arch: int
    launch: LaunchSpec
    config: Config

    @property
    def name(self) -> str:
        return f"sm_{self.arch} {self.launch} :: {self.config}"


@dataclass(frozen=True)
class SweepRow:
    """How a pair ran.

    Attributes:
        name, arch, kernel, precision, config: which pair.
        needs_proof: whether the config runs on a GPU only with a proof.
        error: why it failed; empty if it did not.
        ratio: error to float64 in units of eager's; None if eager has none, or nothing was compared.
        launched: the kernels that the check launched, and how often.
        instructions: of warps, in all of them.
        ptx: digest of the compiled kernels, without the lines that name sources.
        packed_constants: additions of a constant to packed 16-bit integers, which some versions of ptxas get wrong.
        seconds: of CPU time, to compile and run.
        triton, kernels: version of the compiler, digest of the kernels' sources.
    """

    name: str
    arch: int
    kernel: str
    precision: str
    config: str
    needs_proof: bool
    error: str
    ratio: float | None
    launched: dict[str, int]
    instructions: int
    ptx: str
    packed_constants: int
    seconds: float
    triton: str
    kernels: str


def pairs(arch: int) -> list[SweepPair]:
    """Return every pair that the rules admit: first what needs a proof, then each config once in every precision."""
    gpu = devices.gpu(GPUS[arch]).gpu
    assert gpu is not None
    seen: set[tuple[str, str, str]] = set()
    ranked = []
    for launch in ragged():
        for config, verdict in cases.judged(launch, gpu):
            if verdict:
                kind = launch.kernel, check.precision_of(launch), str(config)
                rank = not configs.needs_proof(launch, config), kind in seen
                ranked.append((rank, SweepPair(arch, launch, config)))
                seen.add(kind)
    return [pair for _, pair in sorted(ranked, key=lambda one: one[0])]


def ragged() -> Iterator[LaunchSpec]:
    """Yield the ragged launches of ``make gpu-check`` in every precision."""
    for precision in cases.PRECISIONS:
        for group in cases.ragged(precision).values():
            yield from group
        yield from cases.ragged_training(precision)


def code_of(text: str) -> str:
    """Return PTX without what depends on where its sources lie: lines, files and debug sections."""
    code, *_ = text.split("\t.section\t.debug", 1)
    return "\n".join(line for line in code.split("\n") if not line.lstrip().startswith((".loc", ".file", "//")))


def run(pair: SweepPair) -> SweepRow:
    """Compile a pair, and check it in the machine."""
    begun = time.process_time()
    error, ratio = "", None
    tf32 = pair.launch.last.tf32
    with recorded(pair.arch) as (machine, launches), machine.one_pass(), Tf32Convolutions() if tf32 else nullcontext():
        try:
            ratio = check.Proof(pair.launch, pair.config, "cpu")()["ratio"]
            if not launches:
                raise AssertionError("expected a launch, got none")
        except Exception as failure:  # of the compiler, the machine or the comparison: each is the row's result
            error = named(failure)
    texts = sorted({code_of(launch.text) for launch in launches})
    if not error:
        try:
            expect_same_on_every_schedule(launches)
            for text in texts:
                if (count := dropped_constants(text)) != 0:
                    raise AssertionError(f"ptxas drops {count} constants that are added to packed integers")
        except AssertionError as failure:
            error = named(failure)
    facts = check.facts(pair.launch, pair.config)
    return SweepRow(
        pair.name, pair.arch, facts["kernel"], facts["precision"], facts["config"], facts.get("needs_proof", False),
        error, ratio, dict(Counter(launch.kernel for launch in launches)),
        sum(launch.instructions for launch in launches),
        hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
        sum(len(packed_constants(text)) for text in texts),
        round(time.process_time() - begun, 2), triton.__version__, proofs.versions()["kernels"],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- rows


def kept(path: Path = ROWS) -> dict[str, SweepRow]:
    """Return the rows of earlier runs by name, of this compiler; the last one of a pair counts."""
    if not path.exists():
        return {}
    rows = (SweepRow(**json.loads(line)) for line in path.read_text().splitlines())
    return {row.name: row for row in rows if row.triton == triton.__version__}


def sample(count: int, seed: int, archs: Sequence[int] = ARCHS) -> list[SweepPair]:
    """Return pairs drawn by ``seed``, as many of each architecture."""
    draw = random.Random(seed)
    return [pair for arch in archs for pair in draw.sample(pairs(arch), count // len(archs))]


def sweep(wanted: Iterable[SweepPair], again: bool = False, path: Path = ROWS) -> None:
    """Run pairs that have no row of these sources yet, and with ``again`` those that failed; keep each row.

    Pairs without any row come first.
    """
    now, done = proofs.versions()["kernels"], kept(path)
    wanted = sorted(wanted, key=lambda pair: pair.name in done)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        for pair in wanted:
            row = done.get(pair.name)
            if row is not None and row.kernels == now and not (again and row.error):
                continue
            row = run(pair)
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            print(f"{row.seconds:.1f} s", row.name, row.error or f"{row.ratio} of eager's error", flush=True)


# -------------------------------------------------------------------------------------------------------------- tables


def summary(rows: Iterable[SweepRow]) -> list[dict[str, object]]:
    """Return a line for each kernel, architecture and precision."""
    groups: dict[tuple[int, str, str], list[SweepRow]] = {}
    for row in rows:
        groups.setdefault((row.arch, row.kernel, row.precision), []).append(row)
    listed = {arch: pairs(arch) for arch in ARCHS}
    every = Counter((p.arch, p.launch.kernel, check.precision_of(p.launch)) for arch in ARCHS for p in listed[arch])
    return [
        {
            "arch": arch,
            "kernel": kernel,
            "precision": precision,
            "pairs": every[arch, kernel, precision],
            "run": len(group := groups.get((arch, kernel, precision), [])),
            "passed": sum(not row.error for row in group),
            "need_proof": sum(row.needs_proof for row in group),
            "ratio": max((row.ratio for row in group if row.ratio is not None), default=None),
            "instructions": sum(row.instructions for row in group),
        }
        for arch, kernel, precision in sorted(every, key=lambda key: (key[0], key[1], cases.PRECISIONS.index(key[2])))
    ]


def page(content: dict[str, object]) -> str:
    """Return the tables as Markdown."""
    lines: list[dict[str, object]] = content["summary"]  # type: ignore[assignment]
    failed: list[dict[str, str]] = content["failed"]  # type: ignore[assignment]
    launched: dict[str, list[int]] = content["launched"]  # type: ignore[assignment]
    of_kernels = markdown.table(
        ("kernel", "sm", "precision", "pairs", "run", "passed", "of these need a proof", "largest error, of eager's",
         "warp instructions"),
        [
            (x["kernel"], x["arch"], x["precision"], x["pairs"], x["run"], x["passed"], x["need_proof"],
             "" if x["ratio"] is None else x["ratio"],
             x["instructions"])
            for x in lines
        ],
        [LEFT, LEFT, LEFT, *[RIGHT] * 6],
    )  # fmt: skip
    of_launches = markdown.table(
        ("kernel", *(f"launches, sm_{arch}" for arch in ARCHS)),
        [(kernel, *counts) for kernel, counts in launched.items()],
        [LEFT, *[RIGHT] * len(ARCHS)],
    )
    return "\n\n".join(
        [
            "# Every shipped config, as compiled, in the PTX machine",
            f"Written by `{COMMAND}`, with Triton {content['triton']}; kernels' sources "
            + ", ".join(f"{digest} ({n} pairs)" for digest, n in content["kernels"].items())  # type: ignore[attr-defined]
            + ". A pair is a ragged launch of `make gpu-check` and a config that the rules admit for it. It passes if "
            "the machine finds nothing, the result is within the budget of numerics.py, and two other schedules of the "
            "warps leave the same bytes. Precisions: `tf32` is judged by operands as tensor cores read them.",
            f"{sum(x['run'] for x in lines)} of {sum(x['pairs'] for x in lines)} pairs were run, and "  # type: ignore[misc]
            f"{sum(x['passed'] for x in lines)} passed. Additions of a constant to packed 16-bit integers, which ptxas "  # type: ignore[misc]
            f"before 13.3 gets wrong (docs/notes/eight-warps.md): {content['packed_constants']}.",
            of_kernels,
            "## Not passed",
            "\n".join(f"- {row['name']}: {row['error']}" for row in failed) or "None.",
            "## Kernels launched",
            "Each check launches what its kernel needs too: statistics, coefficients, packing, sums.",
            of_launches + "\n",
        ]
    )


def write(rows: Sequence[SweepRow]) -> None:
    """Write both files."""
    launched: dict[str, list[int]] = {}
    for row in rows:
        for kernel, count in row.launched.items():
            launched.setdefault(kernel, [0] * len(ARCHS))[ARCHS.index(row.arch)] += count
    content = {
        "triton": triton.__version__,
        "kernels": dict(Counter(row.kernels for row in rows)),
        "packed_constants": sum(row.packed_constants for row in rows),
        "summary": summary(rows),
        "failed": [{"name": row.name, "error": row.error} for row in rows if row.error],
        "launched": dict(sorted(launched.items())),
    }
    JSON.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(page(content))


def main() -> int:
    """Run what is left, and write both files; return 1 if a pair fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, choices=GPUS, action="append")
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--sample", type=int, help="how many pairs, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="run again what failed")
    parser.add_argument("--write", action="store_true", help="write the tables of the rows that there are")
    args = parser.parse_args()
    archs = args.arch or ARCHS
    if args.sample:
        wanted = sample(args.sample, args.seed, archs)
    else:
        wanted = [p for both in zip_longest(*map(pairs, archs)) for p in both if p is not None]
    if not args.write:
        sweep((pair for pair in wanted if args.kernel in pair.launch.kernel), args.again)
    names = [pair.name for arch in ARCHS for pair in pairs(arch)]
    rows = [row for row in map(kept().get, names) if row is not None]
    write(rows)
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
