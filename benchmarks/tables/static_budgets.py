"""Compile every shipped Triton config and write docs/tables/static-budgets.{json,md}.

    python -m resnet_fast.benchmarks.tables.static_budgets

Every shipped config of every kernel on sm_80, sm_90 and sm_100 in bfloat16, on the layers of ResNet-50 that stress it:
with a residual (the epilogue that holds most in registers) and with a fused projection; the configs that split K on
layers of a batch of one; and one config per kernel in TF32 and in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from resnet_fast import devices
from resnet_fast.backends.triton import launchers
from resnet_fast.backends.triton.launch import FoldedWeights
from resnet_fast.devices import Gpu
from resnet_fast.spec import ConvSpec, LaunchSpec
from resnet_fast.tuning import configs, shapes
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.routes import merged_groups, routes, stem_step

from . import FOLDER
from .capture import capture
from .machine_code import CompileJob, compile_many, write_table

COMMAND = "python -m resnet_fast.benchmarks.tables.static_budgets"
JSON, PAGE = FOLDER / "static-budgets.json", FOLDER / "static-budgets.md"


def _gpu(name: str) -> Gpu:
    found = devices.gpu(name).gpu
    assert found is not None
    return found


GPUS = {80: _gpu("a100"), 90: _gpu("h100"), 100: _gpu("b200")}


def launches() -> dict[str, LaunchSpec]:
    """Return name -> launch, from ResNet-50 and ResNet-34 at batch 256 and ResNeXt-50."""
    found = {}
    r50 = shapes.blocks("resnet50", 256, dtype="bfloat16")
    r34 = shapes.blocks("resnet34", 256, dtype="bfloat16")
    stem = shapes.problems("resnet50", 256, dtype="bfloat16")["r50.conv1"]
    x50 = shapes.problems("resnext50_32x4d", 256, dtype="bfloat16")["x50_32x4d.layer1.0.conv2"]
    plans = {name: {r.fusion: r.launches for r in routes(block)} for name, block in (r50 | r34).items()}
    found["1x1 residual"] = plans["r50.layer2.1"]["conv"][-1]
    found["1x1 projection"] = plans["r50.layer2.0"]["proj"][-1]
    found["1x1"] = plans["r50.layer3.1"]["conv"][0]
    found["3x3"] = plans["r50.layer3.1"]["conv"][1]
    found["3x3 residual"] = plans["r34.layer3.1"]["conv"][-1]
    found["3x3 projection"] = plans["r34.layer3.0"]["proj"][-1]
    found["tail 64"] = plans["r50.layer1.1"]["tail"][-1]
    found["tail 64 projection"] = plans["r50.layer1.0"]["tail"][-1]
    found["tail 128"] = plans["r50.layer2.1"]["tail"][-1]
    found["tail 256"] = plans["r50.layer3.1"]["tail"][-1]
    found["stem"] = LaunchSpec("stem", (stem,))
    one50, one34 = (shapes.blocks(name, 1, dtype="bfloat16") for name in ("resnet50", "resnet34"))
    found["1x1 split"] = routes(one50["r50.layer4.1"])[0].launches[0]
    found["3x3 split"] = routes(one50["r50.layer4.1"])[0].launches[1]
    found["3x3 split residual"] = routes(one34["r34.layer4.1"])[0].launches[-1]
    found["general 5x5"] = LaunchSpec(
        "conv_bn_act", (plans["r50.layer1.1"]["conv"][1].first.with_(r=5, s=5, padding=(2, 2)),)
    )
    found["general 5x5 groups"] = LaunchSpec("conv_bn_act", (x50.with_(r=5, s=5, padding=(2, 2)),))
    return found


def meta(
    launch: LaunchSpec, config: Config
) -> tuple[FoldedWeights, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Make a launch's tensors without memory, as launchers.py would pack them."""
    dtype = getattr(torch, launch.dtype)

    def image(shape: tuple[int, int, int, int]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)

    def weight(c: ConvSpec) -> torch.Tensor:
        if launch.kernel == "stem":
            return torch.empty(c.co, c.r, stem_step(c), dtype=dtype, device="meta")
        return torch.empty(c.co, c.r, c.s, c.ci // merged_groups(c), dtype=dtype, device="meta")

    def bias(c: ConvSpec) -> torch.Tensor:
        return torch.empty(c.co, device="meta")

    first, last, p = launch.first, launch.last, launch.projection
    chain = len(launch.convs) > 1
    w0, b0 = (weight(first), bias(first)) if chain else (None, None)
    packed = FoldedWeights(weight(last), bias(last), w0, b0, None if p is None else weight(p))
    x = image((first.n, first.ci, first.h, first.w))
    xp = None if p is None else image((p.n, p.ci, p.h, p.w))
    return packed, x, image(last.out_shape()) if launch.residual else None, xp


def jobs(every: bool = True) -> Iterator[CompileJob]:
    """Yield the compile jobs; ``every=False``: the first config of each launch, on sm_90 only."""
    for dtype, tf32 in (("bfloat16", False), ("float32", True), ("float32", False)):
        for name, launch in launches().items():
            cast = LaunchSpec(
                launch.kernel,
                tuple(c.with_(dtype=dtype, tf32=tf32) for c in launch.convs),
                launch.projection and launch.projection.with_(dtype=dtype, tf32=tf32),
            )
            for arch, gpu in GPUS.items():
                legal = [c for c in configs.candidates(cast, gpu) if (c.splits > 1) == ("split" in name)]
                if not every and (arch != 90 or dtype != "bfloat16"):
                    continue
                chosen = legal if every and dtype == "bfloat16" else legal[:1]
                for config in chosen:
                    label = f"{name}, {config}" + {"bfloat16": ""}.get(dtype, ", tf32" if tf32 else ", fp32")
                    yield _job(cast, config, arch, label)


def tf32_jobs() -> Iterator[CompileJob]:
    """Yield a compile job for every config of each launch in TF32 on sm_90; the table has the first of each."""
    for name, launch in launches().items():
        convs = tuple(c.with_(dtype="float32", tf32=True) for c in launch.convs)
        projection = launch.projection and launch.projection.with_(dtype="float32", tf32=True)
        wide = LaunchSpec(launch.kernel, convs, projection)
        for config in configs.candidates(wide, GPUS[90]):
            if (config.splits > 1) == ("split" in name):
                yield _job(wide, config, 90, f"{name}, {config}, tf32")


def _job(launch: LaunchSpec, config: Config, arch: int, label: str) -> CompileJob:
    split = {} if config.splits == 1 else {"arrivals": torch.empty(128, dtype=torch.int32, device="meta")}
    with capture() as found:
        launchers.LAUNCHERS[config.kernel](launch, config, *meta(launch, config), **split)
    return found[0].job(arch, label)


def main() -> None:
    write_table(JSON, PAGE, compile_many(jobs()), "Static budgets of the Triton kernels")


if __name__ == "__main__":
    main()
