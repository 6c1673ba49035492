"""What each CUDA kernel costs on GPUs that are not here: machine code by nvcc, counts and predictions by the emulator.

    python -m tests.emulator.kernel_budgets     write docs/tables/cuda-budgets.{json,md} and cuda-predictions.md

Rows are the kernels as compiled for bfloat16; half differs in opcodes' names alone.
Shared memory and threads are what the launches below ask for: every kernel must appear in one of them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_fast import devices
from resnet_fast.roofline import floors
from resnet_fast.roofline.kernel_time import KernelCounts, KernelTime, extrapolated, kernel_time
from resnet_fast.spec import Spec
from resnet_fast.tuning import shapes
from tests.emulator import test_bottleneck_fwd as bottleneck
from tests.emulator import test_conv_bn_act_kernels as convolution
from tests.emulator import test_stem_fwd as stem
from tests.support import emulation
from tests.support.emulation import H100, KERNELS, Emulator
from tests.triton.static_budget import ARCHS as LIMITS
from tests.triton.static_budget import Budget, Code, write_table

TABLES = KERNELS.parents[1] / "docs" / "tables"
JSON, PAGE, PREDICTIONS = (TABLES / f"cuda-{name}" for name in ("budgets.json", "budgets.md", "predictions.md"))
ARCHS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
COMMAND = "python -m tests.emulator.kernel_budgets"
BF16 = torch.bfloat16

native: Any = torch.ops.resnet_fast_native


def small_launches(module: Path) -> Iterator[dict[str, Any]]:
    """One launch of every kernel, with whatever shared memory it asks for."""
    for channels, device in bottleneck.VARIANTS:
        with Emulator(module, **bottleneck.DEVICES[device]) as emulator:
            bottleneck.block(1, 8, 8, *channels, BF16).run()
            yield from emulator.launches()
    for sms in (1, 132):  # wide and narrow tiles
        with Emulator(module, sms=sms) as emulator:
            for filter_ in ((1, 1), (3, 3)):
                convolution.Problem((1, 8, 8), (128, 128), filter_, padding=(filter_[0] // 2,) * 2).run()
            yield from emulator.launches()
    with Emulator(module) as emulator:
        stem.Stem(1, 16, 16, BF16).run()
        yield from emulator.launches()


def readable(mangled: str) -> str:
    """``kernel<Type, 3>`` of a mangled name, as the emulator spells it."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = text.removeprefix("void ").replace("(anonymous namespace)::", "").replace("resnet_fast::", "")
    return plain(text[: text.rindex("(")])


def plain(name: str) -> str:
    """Without spaces."""
    return re.sub(r"\s+", "", name)


def nvcc_version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"release ([\d.]+)", said)[1]  # type: ignore[index]


def compiled(source: Path, arch: int, launches: dict[str, dict[str, Any]], compiler: str) -> list[Budget]:
    """The kernels of one file that were launched."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={ARCHS[arch]}", f"-I{KERNELS / 'include'}", "-cubin"]
        subprocess.run([*command, source, "-o", cubin], check=True, capture_output=True)
        code = Code(cubin)
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


def budgets(archs: tuple[int, ...] = tuple(ARCHS), files: tuple[str, ...] = ()) -> list[Budget]:
    """The rows for some architectures and files; all by default."""
    launches: dict[str, dict[str, Any]] = {}
    for launch in small_launches(emulation.build()):
        known = launches.setdefault(plain(launch["kernel"]), launch)
        if launch["shared"] > known["shared"]:
            launches[plain(launch["kernel"])] = launch
    sources = [p for p in sorted(KERNELS.glob("*.cu")) if "RF_KERNEL" in p.read_text()]
    jobs = [(p, a) for p in sources for a in archs if not files or p.name in files]
    compiler = nvcc_version()
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: compiled(*job, launches, compiler), jobs)
    return [row for rows in found for row in rows]


@dataclass(frozen=True)
class Row:
    """A kernel on a layer of ResNet-50 at batch 256: counted, predicted for an H100, and the floor of its work."""

    layer: str
    counted: KernelCounts
    predicted: KernelTime
    floor_s: float

    @property
    def ratio(self) -> float:
        return self.predicted.seconds / self.floor_s


LAYERS = (
    "r50.conv1",
    "r50.layer1.0",
    "r50.layer1.1",
    "r50.layer2.1",
    *(f"r50.layer2.1.conv{i}" for i in (1, 2, 3)),
)


def predictions(layers: Sequence[str] = LAYERS, batch: int = 256) -> list[Row]:
    """Layers and whole bottlenecks at full size, counted with one image and with two, extrapolated to the batch."""
    blocks = shapes.blocks("resnet50", batch, dtype="bfloat16")
    gpu = devices.gpu("h100")
    assert gpu.gpu is not None
    rows = []
    for name, channels in (
        ("r50.layer1.0", (64, 64, 256)),
        ("r50.layer1.1", (256, 64, 256)),
        ("r50.layer2.1", (512, 128, 512)),
    ):
        if name not in layers:
            continue
        spec = blocks[name]
        counts = one_and_two(lambda n: bottleneck.block(n, spec.h, spec.w, *channels, BF16).run())  # noqa: B023
        tiles = batch * -(-spec.h // 8) * -(-spec.w // 8)
        rows.append(row(name, spec, extrapolated(*counts, batch, gpu.gpu.sms, tiles), gpu))
    for name, spec in shapes.problems("resnet50", batch, dtype="bfloat16").items():
        if name not in layers:
            continue
        if name != "r50.conv1":
            counts = one_and_two(lambda n: convolution.Problem(
                (n, spec.h, spec.w), (spec.ci, spec.co), (spec.r, spec.s), spec.stride, spec.padding,  # noqa: B023
                relu=spec.epilogue.relu, add=spec.epilogue.add).run())  # noqa: B023  # fmt: skip
        else:
            counts = one_and_two(lambda n: stem.Stem(n, spec.h, spec.w, BF16).run())  # noqa: B023
        # a block per tile: nothing stays from one to the next, and the last round of thousands is like the others
        rows.append(row(name, spec, extrapolated(*counts, batch, gpu.gpu.sms, gpu.gpu.sms), gpu))
    return rows


def one_and_two(run: Callable[[int], object]) -> list[KernelCounts]:
    """The counts of a launch for one image and for two, by the variant that an H100 would run, on a single block."""
    counts = []
    for images in (1, 2):
        with Emulator(emulation.build(), **H100 | {"sms": 1}) as emulator:
            run(images)
            counts.append(KernelCounts.of(emulator.launches()[0]))
    return counts


def row(name: str, spec: Spec, counted: KernelCounts, gpu: devices.Device) -> Row:
    return Row(name, counted, kernel_time(counted, gpu), floors.floor_seconds(spec, gpu, "block").seconds)


HEAD = (
    "layer", "kernel", "DRAM MB", "L2 MB", "shared wavefronts, M", "multiply-adds, G", "predicted us", "bound",
    "floor us", "ratio",
)  # fmt: skip


def write_predictions(rows: list[Row], path: Path = PREDICTIONS) -> None:
    lines = [
        "# Predicted times of the CUDA kernels",
        "",
        "Counted by the emulator at full image size, with one image and with two, and extrapolated to a batch of 256; "
        f"predicted from that for {devices.gpu('h100').name} (resnet_fast/roofline/kernel_time.py). Nothing "
        "here was measured. Floor: the least bytes and operations of the layer or block "
        "(resnet_fast/roofline/floors.py).",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + " --- |" * len(HEAD),
    ]
    for r in rows:
        c, us = r.counted, r.predicted.seconds * 1e6
        lines.append(
            f"| {r.layer} | {c.kernel} | {c.dram / 1e6:.1f} | {c.l2 / 1e6:.1f} | {c.wavefronts / 1e6:.1f} | "
            f"{(c.macs + c.group_macs) / 1e9:.1f} | {us:.1f} | {r.predicted.bound} | {r.floor_s * 1e6:.1f} | "
            f"{r.ratio:.2f} |"
        )
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_table(JSON, PAGE, budgets(), "Static budgets of the CUDA kernels")
    write_predictions(predictions())
