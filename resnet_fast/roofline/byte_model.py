"""Count what each fusion plan launches and the bytes that its launches move.

A plan turns a problem into :class:`Work` items, one per kernel launch::

    separate   conv | bn | add | relu | maxpool, each through memory
    conv       one kernel per convolution with its bias, ReLU and add; the stem's max-pool apart
    proj       the same, but a projection accumulates into the last convolution's tile
    tail       the last two convolutions of a bottleneck in one kernel; stem and max-pool in one kernel
    stage12    blocks of at most 128 inner channels in one kernel (ResNet-50's stages 1 and 2), the rest as in conv
    block      every block one kernel; stem and max-pool in one kernel
    train-eager, train-bn-two-pass, train-bn-single-pass, train-conv-bn      forward and backward, see _training()

conv, proj and tail are the routes of tuning/routes.py. Bytes are counted twice:

- ``nbytes`` is the least that a launch moves: the input pixels that some output reads, weights, residual and output,
  once each. Floors and predictions use it.
- ``activations`` follows the hand counts that the plans were chosen by (162, 56.8, 35.1, 23.0 MB per image of ResNet-50
  at 224 in 16 bit; training 477, 370, 303, 247). It excludes weights and counts a convolution's whole input, even where
  a strided 1x1 skips three pixels of four. The global pool reads the last map; the few KB of the fully connected layer
  are included.

Neither counts what L2 holds between launches, nor the optimizer. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import UserError
from ..spec import ITEMSIZE, ConvSpec, Epilogue, LaunchSpec, NetSpec, Spec
from ..tuning import shapes
from ..tuning.routes import routes

INFERENCE = {
    "separate": "every operation its own kernel",
    "conv": "one kernel per convolution, with bias, ReLU and add",
    "proj": "conv, and projections inside the last convolution",
    "tail": "3x3 and last 1x1 in one kernel; stem and max-pool in one",
    "stage12": "whole blocks up to 128 inner channels, the rest conv",
    "block": "every block one kernel; stem and max-pool in one",
}
TRAINING = {
    "train-eager": "forward and backward, every operation its own kernel",
    "train-bn-two-pass": "BN, add and ReLU fused, statistics in a pass of their own",
    "train-bn-single-pass": "BN, add and ReLU fused, each tensor read once",
    "train-conv-bn": "BN in the convolutions' prologues and epilogues",
}
PLANS = INFERENCE | TRAINING
"""Every fusion plan and what it fuses."""

FUSED_BLOCK_CHANNELS = 128
"""Widest bottleneck that plan stage12 runs as one kernel, with its weights on chip."""

_ROUTES = {"conv": ("conv",), "proj": ("proj", "conv"), "tail": ("tail", "stem", "proj", "conv")}
"""The routes of a plan, in order of preference: it takes the first one that a problem has."""


@dataclass(frozen=True)
class Work:
    """One kernel launch.

    Attributes:
        part: the layer or block it belongs to.
        name: what it does there.
        kernel: its kind, such as conv, bn or dgrad.
        nbytes: least bytes read plus written.
        activations: the same by the convention of the hand counts, see above.
        flops: two per multiply-add.
        dtype: of its tensors.
        least_flops: without the products with a padding's zeros; None: all of ``flops``.
    """

    part: str
    name: str
    kernel: str
    nbytes: int
    activations: int
    flops: int
    dtype: str
    least_flops: int | None = None


def _taps(size: int, filters: int, out: int, stride: int, padding: int, dilation: int) -> int:
    """Return the pairs of an output and a filter tap along one side for which the tap is on the image."""
    starts = (o * stride - padding for o in range(out))
    return sum(sum(0 <= start + k * dilation < size for k in range(filters)) for start in starts)


def _least_flops(convs: Iterable[ConvSpec]) -> int:
    return sum(
        2 * c.n * c.co * (c.ci // c.groups)
        * _taps(c.h, c.r, c.ho, c.stride[0], c.padding[0], c.dilation[0])
        * _taps(c.w, c.s, c.wo, c.stride[1], c.padding[1], c.dilation[1])
        for c in convs
    )  # fmt: skip


def _size(c: ConvSpec) -> tuple[int, int, int]:
    """Return the elements of the input, of the convolution's output, and of the stored output after pooling."""
    ho, wo = c.out_hw()
    return c.n * c.h * c.w * c.ci, c.gemm_m * c.co, c.n * ho * wo * c.co


def _convs(spec: Spec) -> dict[str, ConvSpec]:
    """Return the convolutions of a problem by short name."""
    names = [f"conv{i}" for i, _ in enumerate(spec.main, 1)] if len(spec.main) > 1 else ["conv"]
    named = dict(zip(names, spec.main, strict=True))
    return named if spec.projection is None else named | {"downsample": spec.projection}


def _pass(part: str, name: str, kernel: str, elements: int, dtype: str) -> Work:
    """Return a launch that reads and writes ``elements`` in total; its few operations are negligible."""
    nbytes = elements * ITEMSIZE[dtype]
    return Work(part, f"{name} {kernel}".strip(), kernel, nbytes, nbytes, 0, dtype)


def _pool(c: ConvSpec, part: str) -> Work:
    return _pass(part, "", "maxpool", sum(_size(c)[1:]), c.dtype)


def _fused_launch(spec: LaunchSpec, part: str, names: dict[int, str]) -> Work:
    read = sum(_size(c)[0] for c in (spec.first, spec.projection) if c is not None)
    activations = (read + _size(spec.last)[2] * (2 if spec.residual else 1)) * ITEMSIZE[spec.dtype]
    name = "+".join(names.get(id(c), "conv") for c in spec.all_convs())
    least = _least_flops(spec.all_convs())
    return Work(part, name, spec.kernel, spec.min_bytes(), activations, spec.flops(), spec.dtype, least)


def _fused_block(spec: Spec, part: str) -> Work:
    x, stored = _size(spec.main[0])[0], _size(spec.main[-1])[2]
    activations = (x + stored * (2 if spec.shortcut == "given" else 1)) * ITEMSIZE[spec.dtype]
    least = _least_flops(spec.convs)
    return Work(part, "block", spec.op, spec.min_bytes(), activations, spec.flops(), spec.dtype, least)


def _separate(spec: Spec, part: str) -> Iterator[Work]:
    def passes(name: str, e: Epilogue, y: int) -> Iterator[Work]:
        tensors = {"bn": 2 * e.norm, "add": 3 * e.add, "relu": 2 * e.relu}
        return (_pass(part, name, kernel, k * y, spec.dtype) for kernel, k in tensors.items() if k)

    for name, c in _convs(spec).items():
        x, y, _ = _size(c)
        bare = c.with_(epilogue=Epilogue(norm=False))
        activations = (x + y) * ITEMSIZE[c.dtype]
        yield Work(part, name, "conv", bare.min_bytes(), activations, c.flops(), c.dtype, _least_flops([c]))
        yield from passes(name, c.epilogue, y)
        if c.epilogue.pool:
            yield _pool(c, part)


def _fused(spec: Spec, plan: str, part: str) -> Iterator[Work]:
    if len(spec.main) > 1:
        narrow = all(c.co <= FUSED_BLOCK_CHANNELS for c in spec.main[: -1 if spec.op == "bottleneck" else None])
        if plan == "block" or (plan == "stage12" and narrow):
            yield _fused_block(spec, part)
            return
    plan = {"stage12": "conv", "block": "tail"}.get(plan, plan)
    by_plan = {route.fusion: route for route in routes(spec)}
    route = next(by_plan[p] for p in _ROUTES[plan] if p in by_plan)
    names = {id(c): name for name, c in _convs(spec).items()}
    yield from (_fused_launch(one, part, names) for one in route.launches)
    if spec.pool and route.fusion != "stem":
        yield _pool(spec.main[0], part)


def _norm_passes(plan: str, e: Epilogue) -> dict[str, int]:
    """Return how many tensors of a convolution's output size each kernel between convolutions reads and writes.

    Fused BN stores no ReLU mask. It recomputes the mask from the raw output; after an added residual it reads the
    block's output instead, and writes the masked gradient for the shortcut.
    """
    if plan == "train-eager":
        forward = {"bn_stats": e.norm, "bn": 2 * e.norm, "add": 3 * e.add, "relu": 2 * e.relu}
        return forward | {"relu_grad": 3 * e.relu, "bn_reduce": 2 * e.norm, "bn_grad": 3 * e.norm}
    if plan == "train-bn-two-pass":
        return {"bn_stats": 1, "bn_act": 2 + e.add, "bn_reduce": 2 + 2 * e.add, "bn_grad": 3}
    if plan == "train-bn-single-pass":
        return {"bn_act": 2 + e.add, "bn_act_grad": 3 + 2 * e.add}
    return {"block_end": 3 * e.add}


def _dgrad_reads(name: str, before: Spec | None) -> int:
    """Return how many tensors of the input's size a dgrad of train-conv-bn reads in its epilogue.

    - An inner convolution: the raw output below it, for the ReLU mask and the BN's two sums.
    - A block's first convolution: the gradient of the shortcut, and of the block before, its output (mask), its raw
      last output and its projection's raw output, if any (sums). After a max-pool there is no BN to serve.
    - A projection: none, because its result is added by the first convolution's dgrad.
    """
    if name == "downsample":
        return 0
    if name != "conv1":
        return 1
    if before is None:
        return 3
    return 3 + (before.projection is not None) if len(before.main) > 1 else 1 + (before.pool is None)


def _training(spec: Spec, plan: str, part: str, before: Spec | None) -> Iterator[Work]:
    """Yield a training step's kernels, forward and backward, of a problem that ``before`` feeds (by default a block).

    - Each convolution has three kernels: itself, dgrad (none for an image) and wgrad. Each reads or writes the weights
      once.
    - In the eager plan and those of fused BN kernels, BN, add and ReLU run between convolutions, and a kernel adds the
      two gradients that meet at a block's input.
    - In train-conv-bn the convolutions do the forward statistics and the normalisation; only block ends are kernels.
      dgrad and wgrad read gradient and raw output and compute the BN's gradient in their prologues; dgrad's epilogue
      does the rest, see :func:`_dgrad_reads`.
    """
    fused = plan == "train-conv-bn"
    for name, c in _convs(spec).items():
        x, y, stored = _size(c)
        once = y * 2 if fused else y
        elements = {"conv": x + y, "dgrad": once + x, "wgrad": once + x}
        if fused:
            elements["dgrad"] += x * _dgrad_reads(name, before)
        if c.ci == 3:
            del elements["dgrad"]
        for kernel, count in elements.items():
            size, weights = ITEMSIZE[c.dtype], c.co * c.gemm_k
            label = name if kernel == "conv" else f"{name} {kernel}"
            yield Work(part, label, kernel, (count + weights) * size, count * size, c.flops(), c.dtype)
        for kernel, k in _norm_passes(plan, c.epilogue).items():
            if k:
                yield _pass(part, name, kernel, k * y, c.dtype)
        if c.epilogue.pool:
            yield _pool(c, part)
            yield _pass(part, "", "maxpool_grad", stored + once, c.dtype)
    if len(spec.main) > 1 and not fused:
        yield _pass(part, "", "add_grad", 3 * _size(spec.convs[0])[0], spec.dtype)


def work(
    spec: Spec | LaunchSpec | NetSpec, plan: str = "block", part: str = "", before: Spec | None = None
) -> tuple[Work, ...]:
    """Return what a plan launches for a problem.

    Args:
        spec: a problem, a launch or a net.
        plan: one of :data:`PLANS`.
        part: the name of the layer or block, for the items.
        before: the problem that feeds this one; used by train-conv-bn only.

    Raises:
        UserError: an unknown plan.
    """
    if plan not in PLANS:
        raise UserError(f"a fusion plan out of {', '.join(PLANS)}", repr(plan), "choose one of them")
    if isinstance(spec, LaunchSpec):
        return (_fused_launch(spec, part, {}),)
    items: list[Work] = []
    for one in spec.parts:
        if plan in TRAINING:
            items += _training(one, plan, part, before)
        else:
            items += _separate(one, part) if plan == "separate" else _fused(one, plan, part)
        before = one
    return tuple(items)


def net_work(
    name: str, plan: str, batch: int = 1, image: int | tuple[int, int] | None = None, dtype: str = "bfloat16"
) -> tuple[Work, ...]:
    """Return what a plan launches for a whole net, including the global pool and the fully connected layer.

    Args:
        name: a net of tuning/shapes.py.
        plan: one of :data:`PLANS`.
        batch: number of images.
        image: side in pixels or (height, width); by default the net's own.
        dtype: of activations and weights.

    Raises:
        UserError: an unknown plan, net, size or dtype.
    """
    blocks = shapes.blocks(name, batch, image, dtype)
    parts: dict[str, Spec] = {}
    for key, conv in shapes.problems(name, batch, image, dtype).items():
        block = next((b for b in blocks if key.startswith(f"{b}.")), None)
        parts[block or key] = blocks[block] if block else conv
    items: list[Work] = []
    before: Spec | None = None
    for key, spec in parts.items():
        items += work(spec, plan, key, before)
        before = spec
    assert before is not None
    n, c, h, w = before.out_shape()
    classes, size, part = 1000 if shapes.arch(name).stem == "imagenet" else 10, ITEMSIZE[dtype], "head"
    activations, weights = n * (c + classes) * size, c * classes * size
    items.append(_pass(part, "", "avgpool", n * c * (h * w + 1), dtype))
    for kernel in ("fc", "fc_dgrad", "fc_wgrad") if plan in TRAINING else ("fc",):
        items.append(Work(part, kernel, kernel, activations + weights, activations, 2 * n * c * classes, dtype))
    if plan in TRAINING:
        items.append(_pass(part, "", "avgpool_grad", n * c * (h * w + 1), dtype))
    if plan == "train-conv-bn":  # no dgrad above the last block: its mask and sums are a kernel
        items.append(_pass(part, "", "block_end_grad", 4 * n * c * h * w, dtype))
    return tuple(items)


def bytes_moved(spec: Spec | NetSpec, plan: str = "block") -> int:
    """Return the least bytes read plus written under a plan of :data:`PLANS`."""
    return sum(item.nbytes for item in work(spec, plan))
