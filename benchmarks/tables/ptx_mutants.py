"""Change compiled kernels one instruction at a time, and write how the PTX machine notices: docs/tables/ptx-mutants.*.

    python -m resnet_fast.benchmarks.tables.ptx_mutants        needs nvcc

Launches are small and ragged: Triton's kernels as compiled for sm_80 and sm_90, through the ops and layers
that launch them on a GPU, and nvcc's of the CUDA ops. Each case runs at several sizes, twice on different numbers.
Launches of the same PTX are relatives: a mutant that survives one must survive all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fast import accelerate
from resnet_fast.backends.cuda import bottleneck, conv_bn_act, stem
from resnet_fast.spec import BlockSpec, ConvSpec
from resnet_fast.tools.ptx_machine import mutants
from resnet_fast.tools.ptx_machine.judgement import MutantVerdict, judge
from resnet_fast.tools.ptx_machine.recorded import RecordedLaunch, recorded
from resnet_fast.tuning import shapes

from .. import compiled_cuda, markdown
from ..markdown import LEFT, RIGHT
from . import FOLDER
from .cuda_budgets import nvcc_version, readable

JSON, PAGE = FOLDER / "ptx-mutants.json", FOLDER / "ptx-mutants.md"
COMMAND = "python -m resnet_fast.benchmarks.tables.ptx_mutants"
ARCHS = (80, 90)
SEED = 19

RELATIVES = 3
"""Further launches that a survivor must survive, where there are as many."""

Size = tuple[int, int, int]
HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


# -------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class MutantCase:
    """Launches to change: ``run(size)`` makes them for ``sizes`` (images, height, width), one after another.

    ``each``: mutants of each kind for each of its kernels.
    """

    run: Callable[[Size], Any]
    sizes: Sequence[Size]
    each: int = 1
    cuda: bool = False
    archs: tuple[int, ...] = ARCHS


def _nhwc(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)


def _step(block: nn.Module, channels: int, dtype: torch.dtype, size: Size, frozen: bool = False) -> None:
    """Run a training step of a block; ``frozen``: with its norms in eval mode."""
    n, h, w = size
    net = accelerate(block, backend="triton").to(memory_format=torch.channels_last).train()
    for m in net.modules():
        if frozen and isinstance(m, nn.BatchNorm2d):
            m.eval()
    x = _nhwc(n, channels, h, w, FULL).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != FULL):
        y = net(x)
    y.backward(torch.randn_like(y))


def _eval(block: nn.Module, channels: int, dtype: torch.dtype, size: Size) -> None:
    """Run inference of a block."""
    n, h, w = size
    net = accelerate(block, backend="triton").to(dtype).to(memory_format=torch.channels_last).eval()
    with torch.inference_mode():
        net(_nhwc(n, channels, h, w, dtype))


def _conv(ci: int, co: int, k: int, dtype: torch.dtype, add: bool, size: Size) -> None:
    """Run a convolution, its norm and ReLU; ``add``: and a residual."""
    n, h, w = size
    weight = (torch.randn(co, ci, k, k) / (ci * k * k) ** 0.5).to(dtype)
    norm = [t.to(dtype) for t in _norm(co)]
    residual = _nhwc(n, co, h, w, dtype) if add else None
    steps = ((1, 1), (k // 2, k // 2), (1, 1), 1)
    torch.ops.resnet_fast.conv_bn_act(
        _nhwc(n, ci, h, w, dtype), weight, None, *steps, *norm, False, 0.1, 1e-3, True, residual, "triton"
    )


def _norm(c: int) -> list[Tensor]:
    return [torch.rand(c) + 0.5, torch.randn(c), torch.randn(c), torch.rand(c) + 0.5]


def _stem(co: int, dtype: torch.dtype, train: bool, size: Size) -> None:
    """Run a stem of 7x7 and max-pool, or a training step of it."""
    n, h, w = size
    weight, norm = torch.randn(co, 3, 7, 7) / 147**0.5, _norm(co)
    if train:
        for t in (weight, *norm[:2]):
            t.requires_grad_()
    else:
        weight, norm = weight.to(dtype), [t.to(dtype) for t in norm]
    y = torch.ops.resnet_fast.stem(
        _nhwc(n, 3, h, w, dtype), weight, None, (2, 2), (3, 3), (1, 1), 1, *norm, train, 0.1, 1e-3, [3, 2, 1], "triton"
    )
    if train:
        y.backward(torch.randn_like(y))


def _strided() -> nn.Module:
    return BasicBlock(16, 32, 2, nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32)))


def _folded(conv: ConvSpec) -> tuple[Tensor, Tensor]:
    return torch.randn(conv.co, conv.ci, conv.r, conv.s) / conv.gemm_k**0.5, torch.randn(conv.co)


def _cuda(layer: str, size: Size) -> None:
    """Run a layer or block of ResNet-50 by the CUDA op for it, with the layer's channels."""
    n, h, w = size
    every: dict[str, Any] = {**shapes.problems("resnet50", 1, dtype="bfloat16")}
    every |= shapes.blocks("resnet50", 1, dtype="bfloat16")
    spec: ConvSpec | BlockSpec = every[layer]
    if isinstance(spec, BlockSpec):
        x = _nhwc(n, spec.convs[0].ci, h, w, BF16)
        convs = [_folded(c) for c in spec.convs]
        bottleneck.launch(x, bottleneck.pack(convs, spec.shortcut == "projection", BF16))
        return
    spec = spec.with_(n=n, h=h, w=w)
    x = _nhwc(n, spec.ci, h, w, BF16)
    if spec.epilogue.pool:
        stem.launch(spec, stem.pack(spec, *_folded(spec)), x)
    else:
        conv_bn_act.launch(spec, conv_bn_act.pack(spec, *_folded(spec)), x, None)


SMALL: tuple[Size, ...] = ((2, 5, 3), (3, 7, 5), (2, 8, 8))
STRIDED: tuple[Size, ...] = ((2, 5, 3), (4, 15, 17))
WIDE: tuple[Size, ...] = ((2, 16, 18), (1, 19, 13))

"""Ragged ones, and one of whole tiles: where rows of a tile are zero, a wrong factor of them changes nothing."""

CASES = {
    "inference: 3x3, fp16, residual": MutantCase(lambda size: _conv(32, 40, 3, HALF, True, size), SMALL, 2),
    "inference: 1x1, bf16": MutantCase(lambda size: _conv(64, 64, 1, BF16, False, size), SMALL, 2),
    "inference: 3x3, TF32": MutantCase(lambda size: _conv(16, 24, 3, FULL, False, size), SMALL, 2),
    "inference: bottleneck, fp16": MutantCase(lambda size: _eval(Bottleneck(128, 32), 128, HALF, size), SMALL, 2),
    "inference: stem, fp16": MutantCase(lambda size: _stem(16, HALF, False, size), WIDE, 2),
    "step: bottleneck, bf16": MutantCase(lambda size: _step(Bottleneck(32, 8), 32, BF16, size), SMALL),
    "step: basic block, TF32": MutantCase(lambda size: _step(BasicBlock(16, 16), 16, FULL, size), SMALL),
    "step: strided block, fp16": MutantCase(lambda size: _step(_strided(), 16, HALF, size), STRIDED),
    "step: stem, fp16": MutantCase(lambda size: _stem(16, HALF, True, size), WIDE[:1]),
    "CUDA: 1x1": MutantCase(lambda size: _cuda("r50.layer1.0.conv1", size), SMALL[:2], 3, True, (80,)),
    "CUDA: 3x3": MutantCase(lambda size: _cuda("r50.layer1.0.conv2", size), SMALL[:2], 3, True, (80,)),
    "CUDA: stem": MutantCase(lambda size: _cuda("r50.conv1", size), WIDE[1:], 3, True, (80,)),
    "CUDA: bottleneck": MutantCase(lambda size: _cuda("r50.layer1.1", size), SMALL[:1], 3, True),
    "step: frozen norms, bf16": MutantCase(lambda size: _step(BasicBlock(16, 16), 16, BF16, size, True), SMALL),
}
"""Cases by name."""


def launches_of(case: MutantCase, arch: int) -> list[list[RecordedLaunch]]:
    """Run a case, and return its launches: the relatives together, in the order in which they came."""
    found: dict[tuple[str, str], list[RecordedLaunch]] = {}
    for n, size in enumerate([*case.sizes, *case.sizes]):
        torch.manual_seed(n)
        with recorded(arch) as (machine, launches):
            if case.cuda:
                with compiled_cuda.launched(machine, sms=2):
                    case.run(size)
            else:
                case.run(size)
        for launch in launches:
            found.setdefault((launch.kernel, launch.text), []).append(launch)
    return list(found.values())


# -------------------------------------------------------------------------------------------------------------- score


@dataclass(frozen=True)
class MutantRow:
    """A mutant of the table: its kernel (as people call it), architecture, kind, change and verdict."""

    kernel: str
    arch: int
    kind: str
    change: str
    caught: str
    equivalent: str


def rows_of(name: str, arch: int) -> Iterator[MutantRow]:
    """Yield the mutants of a case, judged."""
    case = CASES[name]
    for launch, *relatives in launches_of(case, arch):
        for mutant in mutants.draw(launch, SEED, each=case.each):
            verdict = judge(launch, mutant, relatives[:RELATIVES])
            yield row_of(mutant, arch, verdict)


def row_of(mutant: mutants.Mutant, arch: int, verdict: MutantVerdict) -> MutantRow:
    """Return the row of a judged mutant."""
    new = "nothing" if mutant.new is None else str(mutant.new)
    change = f"{mutant.was} -> {new}"
    kernel = readable(mutant.kernel) if mutant.kernel.startswith("_Z") else mutant.kernel
    return MutantRow(kernel, arch, mutant.kind, change, verdict.caught, verdict.equivalent)


def all_rows() -> list[MutantRow]:
    """Return every mutant of every case."""
    return [row for name, case in CASES.items() for arch in case.archs for row in rows_of(name, arch)]


WAYS = ("finding", "result", "schedules", "counts")


def score(rows: Iterable[MutantRow], by: Callable[[MutantRow], str]) -> str:
    """Return a table of how mutants ended, a row for each value of ``by`` and one for all."""
    ends: dict[str, Counter[str]] = {}
    for row in rows:
        end = row.caught or ("equivalent" if row.equivalent else "survivor")
        for key in (by(row), "all"):
            ends.setdefault(key, Counter())[end] += 1
    columns = (*WAYS, "equivalent", "survivor")
    order = sorted(ends, key=lambda key: (key == "all", key))
    body = [(key, ends[key].total(), *(ends[key][c] for c in columns)) for key in order]
    return markdown.table(("", "mutants", *columns), body, [LEFT, *[RIGHT] * (1 + len(columns))])


def page(rows: Sequence[MutantRow], compilers: dict[str, str]) -> str:
    """Return the table as Markdown."""
    others = [row for row in rows if not row.caught]
    listed = markdown.table(
        ("kernel", "sm", "kind", "change", "why it computes the same"),
        [(r.kernel, r.arch, r.kind, f"`{r.change}`", r.equivalent or "**survivor**") for r in others],
    )
    versions = ", ".join(f"{name} {version}" for name, version in compilers.items())
    return "\n\n".join(
        [
            "# Mutants of compiled kernels in the PTX machine",
            f"Written by `{COMMAND}`; compiled by {versions}. docs/ptx-machine.md says what a mutant is, how one is "
            "caught, and what makes one equivalent.",
            "## By kernel",
            score(rows, lambda r: f"{r.kernel}, sm_{r.arch}"),
            "## By kind of change",
            score(rows, lambda r: r.kind),
            "## Not caught",
            listed + "\n",
        ]
    )


def compilers() -> dict[str, str]:
    """Return name -> version of the compilers whose PTX is changed."""
    return {"Triton": triton.__version__, "nvcc": nvcc_version().removeprefix("nvcc ")}


def main() -> None:
    """Write both files."""
    rows, by = all_rows(), compilers()
    listed = ",\n".join(json.dumps(asdict(row)) for row in rows)
    JSON.write_text(f'{{"compilers": {json.dumps(by)}, "mutants": [\n{listed}\n]}}\n')
    PAGE.write_text(page(rows, by))


if __name__ == "__main__":
    main()
