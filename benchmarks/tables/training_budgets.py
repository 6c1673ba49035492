"""Compile the training kernels and write docs/tables/training-budgets.{json,md}.

    python -m resnet_fast.benchmarks.tables.training_budgets

Every shipped config of conv_fwd, conv_dgrad and conv_wgrad on sm_80, sm_90 and sm_100 in bfloat16, on the kinds of
convolution in ResNet-50 and ResNeXt-50 at batch 256, with a packed prologue; the first config also with an exact
prologue, in TF32 and in fp32. A launch that takes passengers along in a step has them here too. Of the launches with
folded norms the two largest configs, because the others differ from those only in size. Of the kernels without products
one launch each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from resnet_fast.backends.triton.training import (
    batch_norm,
    block_end,
    channel_sums,
    conv_dgrad,
    conv_fwd,
    conv_wgrad,
    cudnn_passes,
    fold,
    fold_gradient,
    folded_convolution,
    norm_gradient,
    pack,
    pool,
    pool_winner,
    wgrad_sum,
)
from resnet_fast.backends.triton.training.vectors import Act, Grad
from resnet_fast.calls import Conv, Norm, Pool
from resnet_fast.spec import ITEMSIZE, ConvSpec, LaunchSpec
from resnet_fast.tuning import shapes, training_configs
from resnet_fast.tuning.configs import Config
from resnet_fast.tuning.routes import merged_groups

from . import FOLDER
from .capture import CapturedLaunch, capture
from .machine_code import CompileJob, compile_many, write_table
from .static_budgets import GPUS

COMMAND = "python -m resnet_fast.benchmarks.tables.training_budgets"
JSON, PAGE = FOLDER / "training-budgets.json", FOLDER / "training-budgets.md"

LAYERS = {
    "1x1": "r50.layer3.1.conv1",
    "1x1 first": "r50.layer3.0.conv1",
    "1x1 behind": "r50.layer3.1.conv3",
    "1x1/2": "r50.layer3.0.downsample.0",
    "3x3": "r50.layer3.1.conv2",
    "3x3/2": "r50.layer3.0.conv2",
    "7x7/2": "r50.conv1",
    "3x3 groups": "x50_32x4d.layer1.0.conv2",
    "3x3 narrow": "r50.layer1.1.conv2",
    "1x1 narrow": "r50.layer1.1.conv3",
    "1x1 wide": "r50.layer1.1.conv1",
}
"""Convolutions by what sets their kernels apart. ``behind``: a 1x1 after a prologue, as the 3x3s are; ``first``: of a
block with a projection, whose dgrad adds the projection's at every second pixel."""

PROLOGUE = ("1x1 behind", "3x3", "3x3/2", "3x3 groups", "3x3 narrow", "1x1 narrow")
ONE_CONFIG = ("1x1 first",)
"""Their main loops are those of other layers."""

FOLDED = ("3x3", "1x1 behind", "3x3 narrow")
"""Layers whose backward launches are also compiled with a folded norm: dgrad behind a ReLU, wgrad with its sums."""

NO_DGRAD = ("7x7/2",)
"""An image needs no gradient."""

SUM = ("1x1", "1x1 first", "1x1 wide")
"""First convolutions: their wgrad and their dgrad finish the wgrad before. ``1x1/2``: its dgrad alone does."""


@cache
def layers() -> dict[str, ConvSpec]:
    """Return name -> convolution at batch 256 in bfloat16, statistics of the batch."""
    every: dict[str, ConvSpec] = {}
    for net in ("resnet50", "resnext50_32x4d"):
        every |= shapes.problems(net, 256, dtype="bfloat16", batch_stats=True, grad=True)
    return {name: every[layer] for name, layer in LAYERS.items()}


@cache
def launches() -> dict[str, LaunchSpec]:
    """Return name -> launch; the name begins with the kernel's."""
    return {
        f"{kernel} {name}": training_configs.training_launch(kernel, conv, name in PROLOGUE)
        for kernel in training_configs.KERNELS
        for name, conv in layers().items()
        if kernel != "conv_dgrad" or name not in NO_DGRAD
    }


def _image(n: int, c: int, h: int, w: int, dtype: str) -> Tensor:
    empty = torch.empty(n, c, h, w, dtype=getattr(torch, dtype), device="meta")
    return empty.contiguous(memory_format=torch.channels_last)


def _rows(rows: int, channels: int, dtype: str = "float32") -> Tensor:
    return torch.empty(rows, channels, dtype=getattr(torch, dtype), device="meta")


def input_of(conv: ConvSpec, raw: bool) -> Act:
    """Return the input of a convolution, without memory."""
    y = _image(conv.n, conv.ci, conv.h, conv.w, conv.dtype)
    if not raw:
        return Act(y)
    return Act(y, _rows(10, conv.ci), _rows(3, conv.ci, conv.dtype) if ITEMSIZE[conv.dtype] == 2 else None)


def gradient_of(conv: ConvSpec) -> Grad:
    """Return the gradient of a convolution's raw output, without memory."""
    y = _image(conv.n, conv.co, conv.ho, conv.wo, conv.dtype)
    packed = _rows(4, conv.co, conv.dtype) if ITEMSIZE[conv.dtype] == 2 else None
    return Grad(torch.empty_like(y), y, _rows(3, conv.co), packed, conv.batch_stats)


def launched(name: str, one: LaunchSpec, config: Config) -> list[CapturedLaunch]:
    """Return the launches of a convolution's launcher."""
    conv, groups = one.last, merged_groups(one.last)
    x, dtype = input_of(conv, one.prologue), getattr(torch, one.dtype)
    with capture() as found:
        if one.kernel == "conv_fwd":
            weight = torch.empty(conv.co, conv.r, conv.s, conv.ci // groups, dtype=dtype, device="meta")
            const = torch.empty(conv.co, device="meta") if one.prologue and config.packed else None
            centre = torch.empty(conv.co, device="meta")
            conv_fwd.conv_fwd(one, config, weight, const, x, centre, True)
        elif one.kernel == "conv_dgrad":
            weight = torch.empty(conv.ci, conv.r, conv.s, conv.co // groups, dtype=dtype, device="meta")
            _dgrad(name.removeprefix("conv_dgrad "), one, config, weight, x)
        else:
            weight = torch.empty(conv.co, conv.ci // conv.groups, conv.r, conv.s, device="meta")
            passenger = _behind(name.removeprefix("conv_wgrad "), one, config)
            _, reduction = conv_wgrad.conv_wgrad(one, config, gradient_of(conv), x, 132, weight, passenger)
            wgrad_sum.reduce_splits(reduction)
    return found


def _finish() -> pack.Passenger:
    """Return the programs that finish a wgrad."""
    one = launches()["conv_wgrad 1x1 behind"]
    weight = torch.empty(one.last.co, one.last.ci, 1, 1, device="meta")
    config = training_configs.candidates(one, GPUS[90], packed=True)[0]
    with capture():
        return conv_wgrad.conv_wgrad(one, config, gradient_of(one.last), input_of(one.last, True), 132, weight)[1]


def _behind(layer: str, one: LaunchSpec, config: Config) -> pack.Passenger:
    """Return what a wgrad takes along in a bottleneck; of its third convolution, there is no wgrad to finish yet."""
    if not pack.takes_passengers(config) or not (one.prologue or layer in SUM):
        return conv_wgrad.NO_PASSENGER
    if layer in SUM:
        return norm_gradient.without_norm(_finish())
    second = one.last.r == 3
    below = layers()["1x1" if second else "3x3"]
    n, c, vector = below.n, below.co, torch.empty(below.co, device="meta")
    y = _image(n, c, below.ho, below.wo, one.dtype)
    grad = norm_gradient.gradient_of(y, y, True)
    weight = torch.empty(c, below.ci, below.r, below.s, device="meta")
    a = vector if config.packed else None
    packing = pack.dgrad_passenger(weight, grad.g.dtype, below, a, pack.tile_behind(config.num_warps))[1]
    partials, counters = torch.empty(2, 392, c, device="meta"), torch.empty(100, dtype=torch.int32, device="meta")
    return norm_gradient.passenger(
        grad, partials, _rows(10, c), (vector, vector, None), counters, packing,
        _finish() if second else wgrad_sum.NO_REDUCTION,
    )[1]  # fmt: skip


def _dgrad(layer: str, one: LaunchSpec, config: Config, weight: Tensor, x: Act) -> None:
    """As chain.py calls it in a block: with what the shortcut adds at its input, or with the norm below."""
    conv = one.last
    below = x if one.prologue else None
    add = torch.empty_like(x.y) if layer == "1x1" else None
    strided = (_image(conv.n, conv.ci, conv.h // 2, conv.w // 2, conv.dtype), (2, 2)) if layer == "1x1 first" else None
    packed = config.packed and below is not None
    takes = pack.takes_passengers(config) and layer in (*SUM, "1x1/2")
    reduction = _finish() if takes else wgrad_sum.NO_REDUCTION
    conv_dgrad.conv_dgrad(
        one, config, weight, gradient_of(conv), below, packed, add, strided, layer == "1x1/2", reduction
    )


def cast(one: LaunchSpec, dtype: str, tf32: bool) -> LaunchSpec:
    """Return a launch in another dtype."""
    return LaunchSpec(one.kernel, (one.last.with_(dtype=dtype, tf32=tf32),), prologue=one.prologue)


def label_of(name: str, config: Config, dtype: str = "") -> str:
    """Return the ``config`` of a table's row."""
    kind = "" if config.packed or dtype else " exact"
    return f"{name}, {config}{kind}" + (f", {dtype}" if dtype else "")


def conv_jobs(every: bool = True) -> Iterator[CompileJob]:
    """Yield the convolutions' compile jobs; ``every=False``: the first config of each launch, packed, on sm_90."""
    for name, one in launches().items():
        for arch, gpu in GPUS.items():
            legal = training_configs.candidates(one, gpu, packed=True)
            few = not every or name.partition(" ")[2] in ONE_CONFIG
            for config in legal[:1] if few else legal:
                if every or arch == 90:
                    yield launched(name, one, config)[0].job(arch, label_of(name, config))
            if not every:
                continue
            for config in training_configs.candidates(one, gpu, packed=False)[:1]:
                yield launched(name, one, config)[0].job(arch, label_of(name, config))
            if name.endswith(" 3x3"):
                for dtype, tf32 in (("tf32", True), ("fp32", False)):
                    wide = cast(one, "float32", tf32)
                    config = training_configs.candidates(wide, gpu, packed=False)[0]
                    yield launched(name, wide, config)[0].job(arch, label_of(name, config, dtype))


def folded_jobs(every: bool = True) -> Iterator[CompileJob]:
    """Yield the compile jobs of launches with folded norms; ``every=False``: one config each, on sm_90."""
    for layer in FOLDED:
        conv = layers()[layer].with_(batch_stats=False)
        for arch, gpu in GPUS.items() if every else ((90, GPUS[90]),):
            for one in training_configs.folded_launches(conv, masked=True):
                for config in training_configs.candidates(one, gpu, packed=False)[: 2 if every else 1]:
                    yield _folded(one, config).job(arch, f"{one.kernel} {layer} folded, {config}")


def _folded(one: LaunchSpec, config: Config) -> CapturedLaunch:
    """Return a launch as frozen_chain.py makes it."""
    conv, grad, x = one.last, Grad(gradient_of(one.last).g), input_of(one.last, False)
    with capture() as found:
        if one.kernel == "conv_wgrad":
            conv_wgrad.products(one, config, grad, x, 132, sums=True)
        else:
            weight = torch.empty(conv.ci, conv.r, conv.s, conv.co, dtype=grad.g.dtype, device="meta")
            conv_dgrad.conv_dgrad(one, config, weight, grad, x, False, None, None)
    return found[0]


def tf32_jobs() -> Iterator[CompileJob]:
    """Yield a compile job for every config of two layers in TF32 on sm_90; the table has one config each."""
    for name, one in launches().items():
        if name.endswith((" 3x3", " 1x1 behind")):
            wide = cast(one, "float32", True)
            for config in training_configs.admitted(wide, GPUS[90], packed=False):
                yield launched(name, wide, config)[0].job(90, label_of(name, config, "tf32"))


def passes() -> dict[str, CapturedLaunch]:
    """Return name -> launch of every kernel without products, on tensors of layer 3 and of the stem."""
    n, dtype, bf16 = 256, "bfloat16", torch.bfloat16
    conv = layers()["3x3"]
    y, z = (_image(n, 1024, 14, 14, dtype) for _ in range(2))
    v, vector = _rows(10, 1024), torch.empty(1024, device="meta")
    norm = Norm(vector, vector, vector, vector, True, 0.1, 1e-5)
    partials = torch.empty(2, 400, 1024, device="meta")
    stem, pooled = _image(n, 64, 112, 112, dtype), _image(n, 64, 56, 56, dtype)
    window, stem_v = Pool(3, 2, 1), _rows(10, 64)
    weight = torch.empty(conv.co, conv.ci, 3, 3, device="meta")
    out = batch_norm.outputs(1024, bf16, y.device)
    folded = pack.forward_passenger(weight, bf16, conv, _rows(10, conv.ci))[2]
    counters = torch.empty(2, 100, dtype=torch.int32, device="meta")
    wgrad = launches()["conv_wgrad 3x3"]
    tile = training_configs.candidates(wgrad, GPUS[90], packed=True)[0]
    with capture():
        _, reduction = conv_wgrad.conv_wgrad(wgrad, tile, gradient_of(conv), input_of(conv, True), 132, weight)

    def finalize(passenger: pack.Passenger) -> None:
        batch_norm.finalize(
            partials, 128, n * 196, norm, None, norm.mean, out, "", True, counters[0], passenger=passenger
        )

    def coefficients(packing: pack.Passenger, reduction: pack.Passenger) -> None:
        grad = norm_gradient.gradient_of(y, y, True)
        parameters = (norm.weight, norm.bias, None)
        norm_gradient.coefficients(grad, partials, v, parameters, "", counters[0], packing, reduction)

    def finalized(*places: int) -> list[pack.Passenger]:
        return [
            batch_norm.finalization(partials, 128, n * 196, norm, None, norm.mean, v, True, counters[i]) for i in places
        ]

    def stem_finalized() -> list[pack.Passenger]:
        narrow = torch.empty(64, device="meta")
        norm = Norm(narrow, narrow, narrow, narrow, True, 0.1, 1e-5)
        own = torch.empty(2, 400, 64, device="meta")
        return [batch_norm.finalization(own, 128, n * 112**2, norm, None, norm.mean, stem_v, True, counters[0])]

    arrivals = torch.empty(norm_gradient.arrivals_of(1024), dtype=torch.int32, device="meta")

    def finish(y: Tensor, like: Tensor) -> norm_gradient.Finish:
        return norm_gradient.finish_of(norm_gradient.gradient_of(y, y, True), (like, like, None))

    def block_end_backward(norms: int) -> None:
        finishes = [finish(y, vector) for _ in range(norms)]
        packings = [pack.dgrad_passenger(weight, bf16, conv, vector)[1] for _ in range(norms)]
        yd, vd = (z, v) if norms == 2 else (None, None)
        block_end.block_end_backward(y, z, y, v, yd, vd, counters, None, finishes, arrivals, packings)

    runs: dict[str, Callable[[], object]] = {
        "statistics": lambda: cudnn_passes.statistics(y),
        "finalize": lambda: finalize(pack.NO_FORWARD),
        "finalize packing": lambda: finalize(folded),
        "constant": lambda: batch_norm.constant(norm, None, norm.mean, out),
        "coefficients": lambda: coefficients(pack.NO_DGRAD, wgrad_sum.NO_REDUCTION),
        "coefficients packing": lambda: coefficients(pack.dgrad_passenger(weight, bf16, conv, vector)[1], reduction),
        "apply_backward": lambda: cudnn_passes.apply_backward(Grad(y, z, _rows(3, 1024), None, True)),
        "block_end": lambda: block_end.block_end(y, v, z, None, True, finalized(0)),
        "block_end projection": lambda: block_end.block_end(y, v, z, v, True, finalized(0, 1)),
        "block_end alone": lambda: block_end.block_end(y, v, None, None, True),
        "block_end_backward": lambda: block_end_backward(1),
        "block_end_backward projection": lambda: block_end_backward(2),
        "block_end_backward alone": lambda: block_end.block_end_backward(y, z, y, v, None, None),
        "pool_end": lambda: pool.pool_end(stem, stem_v, window, stem_finalized()),
        "pool_end_backward": lambda: pool.pool_end_backward(
            pooled, stem, stem_v, window, counters, None, [finish(stem, torch.empty(64, device="meta"))], arrivals
        ),
        "pack_forward": lambda: pack.pack_forward(weight, bf16, conv, input_of(conv, True)),
        "pack_dgrad": lambda: pack.pack_dgrad(weight, bf16, conv, torch.empty(conv.co, device="meta")),
    }
    runs |= _folded_passes(conv, z, stem, pooled, window)
    found: dict[str, CapturedLaunch] = {}
    for name, run in runs.items():
        with capture() as made:
            run()
        found |= _distinct(name, made)
    found |= _distinct("conv_wgrad", launched("conv_wgrad 3x3", wgrad, tile)[1:])
    return found


def _folded_passes(
    spec: ConvSpec, z: Tensor, stem: Tensor, pooled: Tensor, window: Pool
) -> dict[str, Callable[[], object]]:
    """Return name -> run of the kernels without products of frozen_chain.py: on a block of three 3x3, and the stem."""
    convs = [Conv(torch.empty(spec.co, spec.ci, 3, 3, device="meta"), None, *spec.geometry()) for _ in range(3)]
    vector, specs = torch.empty(spec.co, device="meta"), [spec] * 3
    norms = [Norm(vector, vector, vector, vector, False, 0.1, 1e-5)] * 3
    vectors, p, q = _rows(3, spec.co), torch.empty(7, spec.co, spec.gemm_k, device="meta"), _rows(7, spec.co)
    sums = folded_convolution.Sums(p, q)
    gradients = (convs[0].weight, vector, vector, None)
    wanted = [fold_gradient.Wanted(spec, c.weight, vectors, sums, *gradients) for c in convs]
    won = torch.empty_like(pooled, dtype=torch.uint8)
    return {
        "fold": lambda: fold.fold(convs, norms, specs, False, False, z.dtype),
        "transpose": lambda: fold.begin_backward(convs, specs, [vectors] * 3, [True] * 3, z, z),
        "fold_gradient": lambda: fold_gradient.fold_gradients(wanted),
        "channel_sums": lambda: channel_sums.channel_sums(z),
        "pool_winner": lambda: pool_winner.pool_forward(stem, window),
        "pool_winner_backward": lambda: pool_winner.pool_backward(pooled, won, 112, 112, window),
    }


def _distinct(name: str, made: list[CapturedLaunch]) -> dict[str, CapturedLaunch]:
    """One launch per kernel, the last, named by the kernel where there are several."""
    last = {one.fn.fn.__name__: one for one in made}
    return {name if len(last) == 1 else f"{name}: {kernel.strip('_')}": one for kernel, one in last.items()}


def jobs(every: bool = True) -> Iterator[CompileJob]:
    """Yield all compile jobs; ``every=False``: see :func:`conv_jobs`, and the passes on sm_90."""
    yield from conv_jobs(every)
    yield from folded_jobs(every)
    for name, one in passes().items():
        yield from (one.job(arch, name) for arch in GPUS if every or arch == 90)


def main() -> None:
    write_table(JSON, PAGE, compile_many(jobs()), "Static budgets of the training kernels")


if __name__ == "__main__":
    main()
