"""Read the CUDA kernels' machine code, predict their times, and write docs/tables/cuda-{budgets,predictions}.

    python -m resnet_fast.benchmarks.tables.cuda_budgets        needs nvcc

Machine code comes from nvcc, counts and predictions from the emulator. Rows are the kernels as compiled for bfloat16;
half differs in opcodes' names alone. Shared memory and threads are those of the launches below: every kernel must
appear in one of them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fast import devices
from resnet_fast.backends.cuda import bottleneck, conv_bn_act, stem
from resnet_fast.roofline import floors
from resnet_fast.roofline.kernel_time import KernelCounts, KernelTime, extrapolated, kernel_time
from resnet_fast.spec import BlockSpec, ConvSpec
from resnet_fast.tuning import shapes

from .. import emulation, markdown
from ..emulation import A100, B200, H100, KERNELS, Emulator
from . import FOLDER
from .machine_code import ARCHS as LIMITS
from .machine_code import Cubin, KernelBudget, write_table

JSON, PAGE, PREDICTIONS = (FOLDER / f"cuda-{name}" for name in ("budgets.json", "budgets.md", "predictions.md"))
ARCHS = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}
COMMAND = "python -m resnet_fast.benchmarks.tables.cuda_budgets"
BF16 = torch.bfloat16


def run_launch(spec: ConvSpec | BlockSpec) -> None:
    """Launch a bottleneck, a pooled stem or a convolution on zeros: no count depends on a value."""
    convs = spec.convs if isinstance(spec, BlockSpec) else (spec,)
    folded = [(torch.zeros(c.co, c.ci, c.r, c.s), torch.zeros(c.co)) for c in convs]
    first = convs[0]
    x = _image(first.n, first.ci, first.h, first.w)
    if isinstance(spec, BlockSpec):
        bottleneck.launch(x, bottleneck.pack(folded, spec.shortcut == "projection", BF16))
    elif spec.epilogue.pool:
        stem.launch(spec, stem.pack(spec, *folded[0]), x)
    else:
        residual = _image(spec.n, spec.co, spec.ho, spec.wo) if spec.epilogue.add else None
        conv_bn_act.launch(spec, conv_bn_act.pack(spec, *folded[0]), x, residual)


def _image(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BF16).contiguous(memory_format=torch.channels_last)


def small_launches(module: Path) -> Iterator[dict[str, Any]]:
    """Yield a launch of every kernel, with the shared memory that it asks for."""
    layers = shapes.problems("resnet50", 1, dtype="bfloat16")
    blocks = shapes.blocks("resnet50", 1, dtype="bfloat16")
    identity, projects = blocks["r50.layer1.1"], blocks["r50.layer1.0"]
    for cmid, co in sorted(bottleneck.CHANNELS):
        for block, ci in ((identity, co), (projects, cmid)):
            for device in (A100, H100, B200):
                with Emulator(module, **device) as emulator:
                    run_launch(_resized(block, ci, cmid, co))
                    yield from emulator.launches()
    for sms in (1, 132):  # wide and narrow tiles
        with Emulator(module, sms=sms) as emulator:
            for name in ("r50.layer2.1.conv1", "r50.layer2.1.conv2"):
                run_launch(layers[name].with_(h=8, w=8, ci=128, co=128))
            yield from emulator.launches()
    with Emulator(module) as emulator:
        run_launch(layers["r50.conv1"].with_(h=16, w=16))
        yield from emulator.launches()


def _resized(block: BlockSpec, ci: int, cmid: int, co: int) -> BlockSpec:
    """A bottleneck on 8x8 pixels with these channels."""
    channels = ((ci, cmid), (cmid, cmid), (cmid, co), (ci, co))
    convs = (c.with_(h=8, w=8, ci=i, co=o) for c, (i, o) in zip(block.convs, channels, strict=False))
    return replace(block, convs=tuple(convs))


def readable(mangled: str) -> str:
    """Return ``kernel<Type,3>`` of a mangled name, as the emulator spells it."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = text.removeprefix("void ").replace("(anonymous namespace)::", "").replace("resnet_fast::", "")
    return plain(text[: text.rindex("(")])


def plain(name: str) -> str:
    """Remove spaces."""
    return re.sub(r"\s+", "", name)


def nvcc_version() -> str:
    """Return the compiler as rows name it."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"release ([\d.]+)", said)[1]  # type: ignore[index]


def compiled(source: Path, arch: int, launches: dict[str, dict[str, Any]], compiler: str) -> list[KernelBudget]:
    """Compile a file and read those of its kernels that were launched."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={ARCHS[arch]}", f"-I{KERNELS / 'include'}", "-cubin"]
        subprocess.run([*command, source, "-o", cubin], check=True, capture_output=True)
        code = Cubin(cubin)
    rows = []
    for function in code.usage:
        name = readable(function)
        if "Half" in name:
            continue
        if "_sm90a_" in name and arch != 90:
            continue  # empty there, see hopper.h
        launch = launches[name]  # KeyError: add a launch of this kernel to small_launches
        if launch["shared"] > LIMITS[arch].shared_per_block:
            continue  # compiled for every architecture, launched where it fits
        kernel, _, variant = name.partition("<")
        config = variant.removesuffix(">") or "-"
        rows.append(code.budget(function, kernel, config, arch, compiler, launch["threads"] // 32, launch["shared"]))
    return rows


def budgets(archs: tuple[int, ...] = tuple(ARCHS), files: tuple[str, ...] = ()) -> list[KernelBudget]:
    """Return the rows for some architectures and files; all by default."""
    launches: dict[str, dict[str, Any]] = {}
    for launch in small_launches(emulation.build()):
        known = launches.setdefault(plain(launch["kernel"]), launch)
        if launch["shared"] > known["shared"]:
            launches[plain(launch["kernel"])] = launch
    sources = [p for p in sorted(KERNELS.glob("*.cu")) if "RF_KERNEL" in p.read_text()]
    jobs = [(p, a) for p in sources for a in archs if not files or p.name in files]
    compiler = nvcc_version()
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: compiled(job[0], job[1], launches, compiler), jobs)
    return [row for rows in found for row in rows]


@dataclass(frozen=True)
class PredictionRow:
    """A kernel on a layer of ResNet-50 at batch 256: counted, predicted for an H100, and the floor of its work."""

    layer: str
    counted: KernelCounts
    predicted: KernelTime
    floor_s: float

    @property
    def ratio(self) -> float:
        """Predicted over floor."""
        return self.predicted.seconds / self.floor_s


LAYERS = (
    "r50.conv1",
    "r50.layer1.0",
    "r50.layer1.1",
    "r50.layer2.1",
    *(f"r50.layer2.1.conv{i}" for i in (1, 2, 3)),
)


def predictions(layers: Sequence[str] = LAYERS, batch: int = 256) -> list[PredictionRow]:
    """Predict layers and whole bottlenecks at full size, by counts of one image and of two."""
    gpu = devices.gpu("h100")
    assert gpu.gpu is not None
    sms, rows = gpu.gpu.sms, []
    every: dict[str, ConvSpec | BlockSpec] = dict(shapes.blocks("resnet50", batch, dtype="bfloat16"))
    every |= shapes.problems("resnet50", batch, dtype="bfloat16")
    for name, spec in every.items():
        if name not in layers:
            continue
        # a block per tile: nothing stays from one to the next, and the last round of thousands is like the others
        tiles = batch * -(-spec.h // 8) * -(-spec.w // 8) if isinstance(spec, BlockSpec) else sms
        one, two = (_counts(spec.with_(n=images)) for images in (1, 2))
        counted = extrapolated(one, two, batch, sms, tiles)
        floor = floors.floor_seconds(spec, gpu, "block").seconds
        rows.append(PredictionRow(name, counted, kernel_time(counted, gpu), floor))
    return rows


def _counts(spec: ConvSpec | BlockSpec) -> KernelCounts:
    """The counts of a launch by the variant that an H100 would run, on a single block."""
    with Emulator(emulation.build(), **H100 | {"sms": 1}) as emulator:
        run_launch(spec)
        return KernelCounts.of(emulator.launches()[0])


HEAD = (
    "layer", "kernel", "DRAM MB", "L2 MB", "shared wavefronts, M", "multiply-adds, G", "predicted us", "bound",
    "floor us", "ratio",
)  # fmt: skip


def write_predictions(rows: list[PredictionRow]) -> None:
    """Write the page of predicted times."""
    cells = [
        (
            r.layer, r.counted.kernel, f"{r.counted.dram / 1e6:.1f}", f"{r.counted.l2 / 1e6:.1f}",
            f"{r.counted.wavefronts / 1e6:.1f}", f"{(r.counted.macs + r.counted.group_macs) / 1e9:.1f}",
            f"{r.predicted.seconds * 1e6:.1f}", r.predicted.bound, f"{r.floor_s * 1e6:.1f}", f"{r.ratio:.2f}",
        )
        for r in rows
    ]  # fmt: skip
    parts = [
        "# Predicted times of the CUDA kernels",
        "Counted by the emulator at full image size, with one image and with two, and extrapolated to a batch of 256; "
        f"predicted from that for {devices.gpu('h100').name} (resnet_fast/roofline/kernel_time.py). Nothing "
        "here was measured. Floor: the least bytes and operations of the layer or block "
        "(resnet_fast/roofline/floors.py).",
        markdown.table(HEAD, cells),
    ]
    PREDICTIONS.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    write_table(JSON, PAGE, budgets(), "Static budgets of the CUDA kernels")
    write_predictions(predictions())
