"""Launches whose compiled kernels ptx_mutants.py changes, and the kernels that the package ships.

Launches are small and ragged: Triton's kernels as compiled for sm_80 and sm_90, through the ops, layers and launchers
that launch them on a GPU, and nvcc's of the CUDA ops. Each case runs at several sizes, twice on different numbers, the
second time with longer walks. Launches of the same PTX are relatives: a mutant that survives one must survive all.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fast
from resnet_fast import accelerate
from resnet_fast.backends.cuda import bottleneck, conv_bn_act, stem
from resnet_fast.backends.triton.training import (
    batch_norm,
    block_end,
    channel_sums,
    cudnn_passes,
    norm_gradient,
    pack,
    pool_winner,
)
from resnet_fast.backends.triton.training.problem import launch_problem
from resnet_fast.calls import Norm, Pool
from resnet_fast.spec import BlockSpec, ConvSpec, Epilogue, LaunchSpec
from resnet_fast.tools.ptx_machine.recorded import RecordedLaunch, recorded
from resnet_fast.tuning import shapes
from resnet_fast.tuning.configs import Config

from .. import compiled_cuda, emulation

ARCHS = (80, 90)

Size = tuple[int, int, int]
Tile = tuple[int, int, int, int, int]
HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class MutantCase:
    """Launches to change: ``run(size)`` makes them for ``sizes`` (images, height, width), one after another.

    ``each``: mutants of each kind for each of its kernels. ``cuda``: the kernels are nvcc's. ``tf32``: products of
    float32 are rounded to TF32. ``only``: the one kernel that the case is for, where launches prepare its input.
    """

    run: Callable[[Size], Any]
    sizes: Sequence[Size]
    each: int = 1
    cuda: bool = False
    tf32: bool = False
    only: str = ""
    archs: tuple[int, ...] = ARCHS


def _nhwc(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------ ops and layers


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


# ------------------------------------------------------------------------------------------------------ kernels alone


def _filter(ci: int, co: int, k: int, dtype: str, **more: Any) -> ConvSpec:
    """Return a convolution that keeps the image's size, with ReLU; of another size once ``_launch`` has it."""
    pad, epilogue = (k // 2, k // 2), more.pop("epilogue", Epilogue(relu=True))
    return ConvSpec(1, 1, 1, ci, co, k, k, padding=pad, dtype=dtype, epilogue=epilogue, tf32=dtype == "float32", **more)


def _launch(convs: Sequence[ConvSpec], config: Config, size: Size) -> None:
    """Run one launch with this config, whatever a plan would choose."""
    n, h, w = size
    spec = LaunchSpec(config.kernel, tuple(c.with_(n=n, h=h, w=w) for c in convs))
    launch_problem(spec, seed=int(torch.randint(1000, ()))).prepared(config)()


def _tail(middle: int, tile: Tile) -> Callable[[Size], None]:
    """Return the run of a bottleneck's 3x3 and last 1x1 as one launch, with a residual."""
    last = _filter(middle, 2 * middle, 1, "bfloat16", epilogue=Epilogue(relu=True, add=True))
    return partial(_launch, (_filter(middle, middle, 3, "bfloat16"), last), Config("bottleneck", *tile))


def _alone(kernel: str, conv: ConvSpec, tile: Tile, **more: Any) -> Callable[[Size], None]:
    """Return the run of one convolution with this tile."""
    return partial(_launch, (conv,), Config(kernel, *tile, **more))


def _passes(dtype: torch.dtype, c: int, size: Size) -> None:
    """Run the passes beside a convolution of cuDNN: norms, their gradients, pools, weights, and sums of processes."""
    n, h, w = size
    y, g = _nhwc(n, c, h, w, dtype), _nhwc(n, c, h, w, dtype)
    gamma, beta, mean, var = _norm(c)
    norm = Norm(gamma, beta, mean, var, True, 0.1, 1e-5)
    _, rows = cudnn_passes.statistics(y)
    batch_norm._own(torch.rand(2, 131, c), rows, rows * 131 - 5)
    norm_gradient._sum(torch.randn(2, 131, c), batch_norm.CHUNK)
    for centre in (None, torch.randn(c)):
        out = batch_norm.outputs(c, dtype, y.device)
        batch_norm.constant(norm, torch.randn(c), centre, out)
    for batch in (True, False):
        grad = norm_gradient.gradient_of(g, y, batch)
        grad.coefficients.copy_(torch.randn(3, c))  # type: ignore[union-attr]
        cudnn_passes.apply_backward(grad)
    channel_sums.channel_sums(g)
    act, pool = torch.relu(y), Pool(3, 2, 1)
    z, won = pool_winner.pool_forward(act, pool)
    pool_winner.pool_backward(_nhwc(n, c, z.shape[2], z.shape[3], dtype), won, h, w, pool)
    conv = _filter(c, 24, 3, str(dtype).removeprefix("torch."))
    pack.pack_dgrad(torch.randn(24, c, 3, 3), dtype, conv, torch.rand(24) + 0.5)


# -------------------------------------------------------------------------------------------------------- CUDA kernels


def _folded(conv: ConvSpec, weight: float = 1, bias: float = 1) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution; each times a factor."""
    return weight * torch.randn(conv.co, conv.ci, conv.r, conv.s) / conv.gemm_k**0.5, bias * torch.randn(conv.co)


def _cuda(layer: str, dtype: torch.dtype, size: Size) -> None:
    """Run a layer or block of ResNet-50 by the CUDA op for it, with the layer's channels."""
    n, h, w = size
    name = str(dtype).removeprefix("torch.")
    every: dict[str, Any] = {**shapes.problems("resnet50", 1, dtype=name), **shapes.blocks("resnet50", 1, dtype=name)}
    spec: ConvSpec | BlockSpec = every[layer]
    if isinstance(spec, BlockSpec):
        _cuda_block(spec, dtype, size)
        return
    spec = spec.with_(n=n, h=h, w=w)
    for infinite in (False, True):  # infinity times a zero of the padding is seen
        x = _nhwc(n, spec.ci, h, w, dtype)
        x[n // 2, :, h // 2, w // 2] = float("inf") if infinite else 0
        if spec.epilogue.pool:
            stem.launch(spec, stem.pack(spec, *_folded(spec)), x)
        else:
            residual = _nhwc(*spec.out_shape(), dtype) if spec.epilogue.add else None
            conv_bn_act.launch(spec, conv_bn_act.pack(spec, *_folded(spec)), x, residual)


def _cuda_block(spec: BlockSpec, dtype: torch.dtype, size: Size) -> None:
    """Run a bottleneck twice: the second time with tiny activations inside, among which a tiny number is seen."""
    n, h, w = size
    first, second, third = spec.main
    tiny = 2.0**-120 if dtype == BF16 else 2.0**-12
    for small in (1.0, tiny):
        convs = [_folded(first, small, small), _folded(second, 1 / small), _folded(third)]
        convs += [_folded(spec.projection)] if spec.projection else []
        x = _nhwc(n, first.ci, h, w, dtype)
        bottleneck.launch(x, bottleneck.pack(convs, spec.projection is not None, dtype))


# -------------------------------------------------------------------------------------------------------------- cases

SMALL: tuple[Size, ...] = ((2, 5, 3), (3, 7, 5), (2, 8, 8))
STRIDED: tuple[Size, ...] = ((2, 7, 5), (4, 15, 17), (3, 21, 11))
WIDE: tuple[Size, ...] = ((2, 16, 18), (1, 19, 13))
"""Ragged ones, and one of whole tiles: where rows of a tile are zero, a wrong factor of them changes nothing."""
SEVERAL: tuple[Size, ...] = (*SMALL, (2, 21, 23))
"""And one whose passes have several blocks, which hand each other sums."""

_EIGHT = (128, 128, 64, 8, 3)
_POOLED = Epilogue(relu=True, pool=(3, 2, 1))
_FUSED_STEM = _filter(3, 40, 7, "float16", stride=(2, 2), epilogue=_POOLED)

CASES = {
    "inference: 3x3, fp16, residual": MutantCase(partial(_conv, 32, 40, 3, HALF, True), SMALL, 2),
    "inference: 1x1, bf16": MutantCase(partial(_conv, 64, 64, 1, BF16, False), SMALL, 2),
    "inference: 3x3, TF32": MutantCase(partial(_conv, 16, 24, 3, FULL, False), SMALL, 2, tf32=True),
    "inference: 1x1, TF32": MutantCase(partial(_conv, 32, 40, 1, FULL, True), SMALL, tf32=True),
    "inference: 3x3, fp32": MutantCase(partial(_conv, 16, 24, 3, FULL, False), SMALL),
    "inference: bottleneck, fp16": MutantCase(lambda size: _eval(Bottleneck(128, 32), 128, HALF, size), SMALL, 2),
    "inference: tail 64, bf16": MutantCase(_tail(64, (64, 64, 64, 4, 3)), SMALL),
    "inference: tail 128, bf16": MutantCase(_tail(128, (64, 128, 64, 8, 3)), SMALL[:2]),
    "inference: tail 256, bf16": MutantCase(_tail(256, (32, 64, 64, 4, 3)), SMALL[:1]),
    "inference: 1x1, fp16, eight warps": MutantCase(
        _alone("conv_bn_act_1x1", _filter(128, 128, 1, "float16"), _EIGHT), SMALL
    ),
    "inference: 1x1, bf16, eight warps, descriptors": MutantCase(
        _alone("conv_bn_act_1x1", _filter(128, 128, 1, "bfloat16"), _EIGHT, descriptors=True), SMALL, archs=(90,)
    ),
    "inference: 3x3, bf16, eight warps": MutantCase(
        _alone("conv_bn_act_3x3", _filter(64, 128, 3, "bfloat16"), _EIGHT), SMALL
    ),
    "inference: 1x1, fp16, split": MutantCase(
        _alone("conv_bn_act_1x1", _filter(200, 72, 1, "float16"), (32, 64, 32, 4, 3), splits=4), SMALL
    ),
    "inference: 3x3, bf16, split": MutantCase(
        _alone("conv_bn_act_3x3", _filter(40, 72, 3, "bfloat16"), (32, 64, 32, 4, 3), splits=4), SMALL
    ),
    "inference: stem, fp16": MutantCase(partial(_stem, 16, HALF, False), WIDE, 2),
    "inference: fused stem, fp16": MutantCase(_alone("stem", _FUSED_STEM, (64, 64, 32, 4, 1), rows=4), WIDE, 2),
    "step: bottleneck, bf16": MutantCase(lambda size: _step(Bottleneck(64, 16), 64, BF16, size), SEVERAL),
    "step: basic block, TF32": MutantCase(lambda size: _step(BasicBlock(16, 16), 16, FULL, size), SEVERAL, tf32=True),
    "step: strided block, fp16": MutantCase(lambda size: _step(_strided(), 16, HALF, size), STRIDED),
    "step: stem, fp16": MutantCase(partial(_stem, 16, HALF, True), WIDE[:1]),
    "step: frozen norms, bf16": MutantCase(lambda size: _step(BasicBlock(16, 16), 16, BF16, size, True), SMALL),
    "step: passes, bf16": MutantCase(partial(_passes, BF16, 40), SMALL),
    "step: passes, fp32": MutantCase(partial(_passes, FULL, 24), SMALL[:2]),
    "step: forward, fp16, eight warps": MutantCase(
        _alone("conv_fwd", _filter(64, 128, 3, "float16", batch_stats=True), _EIGHT), SMALL, only="_conv_fwd_kernel"
    ),
    "step: input's gradient, bf16, eight warps": MutantCase(
        _alone("conv_dgrad", _filter(128, 64, 3, "bfloat16", batch_stats=True), _EIGHT),
        SMALL,
        only="_conv_dgrad_kernel",
    ),
    "step: weight's gradient, fp16, eight warps": MutantCase(
        _alone("conv_wgrad", _filter(128, 128, 1, "float16", batch_stats=True), _EIGHT),
        SMALL,
        only="_conv_wgrad_kernel",
    ),
    "CUDA: 1x1, bf16": MutantCase(partial(_cuda, "r50.layer1.0.conv1", BF16), SMALL[:2], 2, True),
    "CUDA: 1x1, fp16, residual": MutantCase(partial(_cuda, "r50.layer1.1.conv3", HALF), SMALL[:2], 1, True),
    "CUDA: 3x3, bf16": MutantCase(partial(_cuda, "r50.layer1.0.conv2", BF16), SMALL[:2], 2, True),
    "CUDA: 3x3, fp16": MutantCase(partial(_cuda, "r50.layer2.1.conv2", HALF), SMALL[:1], 1, True),
    "CUDA: stem, bf16": MutantCase(partial(_cuda, "r50.conv1", BF16), WIDE[1:], 2, True),
    "CUDA: stem, fp16": MutantCase(partial(_cuda, "r50.conv1", HALF), WIDE[1:], 1, True),
    "CUDA: bottleneck, bf16": MutantCase(partial(_cuda, "r50.layer1.1", BF16), SMALL[:1], 2, True),
    "CUDA: bottleneck with projection, fp16": MutantCase(partial(_cuda, "r50.layer1.0", HALF), SMALL[:1], 1, True),
    "CUDA: wide bottleneck, fp16": MutantCase(partial(_cuda, "r50.layer2.1", HALF), SMALL[:1], 1, True, archs=(90,)),
}
"""Cases by name."""


def launches_of(case: MutantCase, arch: int) -> list[list[RecordedLaunch]]:
    """Run a case, and return its launches: the relatives together, in the order in which they came."""
    found: dict[tuple[str, str], list[RecordedLaunch]] = {}
    for n, size in enumerate([*case.sizes, *case.sizes]):
        torch.manual_seed(n)
        with recorded(arch, tf32=case.tf32) as (machine, launches), _walks(1 + n // len(case.sizes)):
            if case.cuda:
                with compiled_cuda.launched(machine, sms=2):
                    case.run(size)
            else:
                case.run(size)
        for launch in launches:
            if case.only in ("", launch.kernel):
                found.setdefault((launch.kernel, launch.text), []).append(launch)
    return list(found.values())


@contextmanager
def _walks(steps: int) -> Iterator[None]:
    """Let programs of a pass over the batch walk ``steps`` tiles, as only those of large tensors do."""

    def walk(t: Tensor, tile: tuple[int, int]) -> tuple[int, int]:
        return steps, -(-t.numel() // t.shape[1] // (tile[0] * steps))

    with (
        mock.patch.object(cudnn_passes, "walk", walk),
        mock.patch.object(block_end, "walk", walk),
        mock.patch.object(channel_sums, "walk", walk),
    ):
        yield


# ---------------------------------------------------------------------------------------------------- shipped kernels

UNLAUNCHED = {
    ("_conv_bn_act_1x1_descriptor_fwd_kernel", 80): "tensor descriptors are sm_90's",
    ("bottleneck_fwd_sm90a_kernel", 80): "written for sm_90a",
}
"""(kernel, architecture) -> why no launch there reaches it."""


def shipped_kernels() -> set[str]:
    """Return the names of all kernels of the package: functions of Triton that no other one calls, and CUDA's."""
    called, defined = set(), set()
    for path in sorted((Path(resnet_fast.__file__).parent / "backends" / "triton").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                defined.add(node.name)
                called |= {
                    n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
                }
                called |= {ast.unparse(k) for n in ast.walk(node) if isinstance(n, ast.Call) for k in n.args}
    cuda = [
        re.findall(r"\nRF_KERNEL\([^;{]*?\n(\w+)\(", p.read_text()) for p in emulation.sources() if p.suffix == ".cu"
    ]
    return (defined - called) | {name for names in cuda for name in names}
