"""Compare what the native library submits with what Triton's own launcher passes to the driver, byte for byte.

    python -m tests.support.native_launches

Runs training steps and inference on the null GPU, each pass twice in the same memory: submitted natively into the
library's sink, and launch by launch through Triton's launcher, whose arguments are packed here by the types of its
signature. Prints JSON: the number of launches compared, how each pass ran, and the most passes planned for a problem.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, resnet18, resnet50
from triton.backends.nvidia import driver as nvidia

from resnet_fast import accelerate, native
from resnet_fast.benchmarks import null_gpu

TYPES = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip

C_TYPES = {
    "CUdeviceptr": "*", "CUtensorMap": "nvTmaDesc", "int8_t": "i8", "int16_t": "i16", "int32_t": "i32",
    "int64_t": "i64", "uint32_t": "fp32", "uint64_t": "fp64",
}  # fmt: skip
"""Types of parameters in the C that Triton 3.6 generates. No kernel here takes an unsigned number."""

Row = tuple[str, tuple[int, ...], int, int, list[bytes]]


class Launcher:
    """In place of the C function that Triton's launcher calls: keeps name, grid, threads, shared memory, arguments."""

    def __init__(self) -> None:
        self.kept: list[Row] = []

    def launch(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        _, _, about, *_, scratch, profile, annotations, signature, arguments = rest
        flat = [a for (_, kind), a in zip(annotations, arguments, strict=True) if kind == nvidia.ARG_KERNEL]
        packed = [_bytes(kind, value) for kind, value in zip(signature, flat, strict=True)]
        self._keep((x, y, z), stream, function, about, [*packed, _bytes("*", scratch), _bytes("*", profile)])

    def compiled(self, src: str, **kwargs: Any) -> SimpleNamespace:
        """Return the module of the C function that Triton 3.6 has generated for a signature."""
        declared = re.search(r"CUdeviceptr profile_scratch((?:, \w+ arg\d+)*)\) \{", src)
        assert declared
        parameters = [(kind, int(i)) for kind, i in re.findall(r"(\w+) arg(\d+)", declared[1])]

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            _, _, scratch, profile, about, _, _, _, *arguments = rest
            packed = [_bytes(C_TYPES[kind], arguments[i]) for kind, i in parameters]
            self._keep((x, y, z), stream, function, about, [*packed, _bytes("*", scratch), _bytes("*", profile)])

        return SimpleNamespace(launch=launch)

    def _keep(self, grid: tuple[int, ...], stream: int, function: int, about: Any, packed: list[bytes]) -> None:
        warps, clusters, shared = about
        assert clusters == 1 and stream == 0
        self.kept.append((null_gpu._names[function], grid, 32 * warps, shared, packed))


def _bytes(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return bytes(ctypes.c_uint64(0 if value is None else value.data_ptr()))
    if kind == "nvTmaDesc":  # the null GPU's is the tuple of what it would be made of, first the address
        return bytes(ctypes.c_uint64(value[0])) + bytes(120)
    return bytes(TYPES[kind](value))


def main() -> None:
    null_gpu.install()
    import triton

    from resnet_fast.backends.triton import submission
    from resnet_fast.backends.triton.training import chain, frozen_chain

    launcher, library = Launcher(), native.submitter()
    utils: Any = triton.runtime.driver.active.utils
    utils.launch, utils.build_signature_metadata = launcher.launch, list
    nvidia.compile_module_from_src = launcher.compiled
    compared: Counter[str] = Counter()

    def both(self: Any, leaves: Any, numbers: Any) -> Any:
        found = self.program
        fresh, arena = found.allocate(self.device)
        held = [fresh, arena]
        found.__dict__["allocate"] = lambda device: held
        launcher.kept.clear()
        library.sink(True)
        results = real(self, leaves, numbers)
        library.sink(False)
        assert results is not None
        rows = [(name, grid, threads, shared, arguments) for name, grid, threads, shared, arguments in library.sunk()]
        found.replay_in([*leaves, *self.fixed], fresh, arena, numbers)
        del found.__dict__["allocate"]
        assert len(rows) == len(launcher.kept) == len(found.steps) == len(self.kernels)
        for ours, theirs in zip(rows, launcher.kept, strict=True):
            assert ours == theirs, f"\n{ours}\n{theirs}"
            compared[ours[0]] += 1
        return results

    real = submission._Native.__call__
    submission._Native.__call__ = both  # type: ignore[method-assign]
    for net, shape in nets():
        run(net, shape)
    infer(resnet50(), (1, 3, 64, 64))
    passes = [plan.passes for plan in (*chain._plans.values(), *frozen_chain._plans.values())]
    ways = sorted({way for one in passes for way in one.ways})
    variants = max(len(one.runners) for one in passes)
    print(json.dumps({"compared": compared, "ways": ways, "variants": variants}), flush=True)
    os._exit(0)  # autograd's thread for the device would end the process by abort()


def nets() -> list[tuple[torch.nn.Module, tuple[int, ...]]]:
    """Return blocks and a net with the shapes of their inputs."""
    mixed, frozen = Bottleneck(64, 16), resnet18()
    mixed.bn2.eval()
    for m in frozen.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    return [(Bottleneck(64, 16), (2, 64, 8, 8)), (mixed, (2, 64, 8, 8)), (BasicBlock(32, 32), (2, 32, 7, 5)),
            (resnet18(), (2, 3, 64, 64)), (frozen, (2, 3, 64, 64))]  # fmt: skip


def run(net: torch.nn.Module, shape: tuple[int, ...]) -> None:
    """Run a training step, of the gradients of parameters and of the input."""
    training = [m.training for m in net.modules()]
    net = accelerate(net, backend="triton").cuda().to(memory_format=torch.channels_last)
    for module, mode in zip(net.modules(), training, strict=True):
        module.training = mode
    x: Tensor = torch.empty(shape, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    for step in range(2):
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.1 / (1 + step)  # as a schedule does
        with torch.autocast("cuda", torch.bfloat16):
            y = net(x)
        y.backward(torch.empty_like(y))


def infer(net: torch.nn.Module, shape: tuple[int, ...]) -> None:
    """Run inference of a whole net."""
    net = accelerate(net, backend="triton").to(torch.bfloat16).cuda().to(memory_format=torch.channels_last).eval()
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(2):
            net(x)


if __name__ == "__main__":
    main()
