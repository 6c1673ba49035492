"""Floor times and predictions: what each fusion plan launches, the bytes that moves, and what a device makes of them.

A plan turns a problem into :class:`Work` items, one per kernel launch::

    separate   conv | bn | add | relu | maxpool, each through memory
    conv       one kernel per convolution with its bias, ReLU and add; the stem's max-pool apart
    proj       the same, but a projection accumulates into the last convolution's tile
    tail       the last two convolutions of a bottleneck in one kernel; stem and max-pool in one kernel
    stage12    blocks of at most 128 inner channels in one kernel (ResNet-50's stages 1 and 2), the rest as in conv
    block      every block one kernel; stem and max-pool in one kernel
    train-eager, train-bn-two-pass, train-bn-single-pass, train-conv-bn      forward and backward, see _training()

conv, proj and tail are the routes of tuning/routes.py. Bytes are counted twice. ``nbytes`` is the least that a launch
moves: input pixels that some output reads, weights, residual and output, once each; floors and predictions use it.
``activations`` is the convention of the hand counts that the plans were chosen by (162, 56.8, 35.1, 23.0 MB per image
of ResNet-50 at 224 in 16 bit; training 477, 370, 303, 247): no weights, and a convolution's input counts whole even
where a strided 1x1 skips three pixels of four; the global pool reads the last map; the fully connected layer's few KB
are in. Neither counts what L2 holds between launches, nor the optimizer.

The floor of a launch is ``max(nbytes / bandwidth, flops / rate)`` (Williams et al., Roofline, 2009), no cost for the
launch; that of a net is the sum. On a GPU a floor is a bound of the model, not of nature: bytes count as if no cache
held anything before the call, so a problem that fits a cache may beat its floor when it runs again and again. On a CPU
it holds (cpu.py): ceilings are the best ever measured and an allowance; only bytes beyond what caches can hold before
and after the call come from memory, the others from a cache; and products with the zeros of a padding do not count,
because kernels leave them out. A prediction
is ``floor / reached + launch_s`` per launch, with what stock kernels of that kind reached on an H100
(:func:`calibration`): what a plan would give with kernels as good as those, and no more. L2 bandwidth is in neither:
how often a launch reads an operand from L2 depends on its tile, which tuning/heuristic.py knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache

from .cpu import calibrate_cpu as calibrate_cpu
from .devices import H100 as H100
from .devices import ORIGINS as ORIGINS
from .devices import Ceiling as Ceiling
from .devices import Device as Device
from .devices import Gpu as Gpu
from .devices import detect as detect
from .devices import gpu as gpu
from .devices import gpus as gpus
from .devices import unknown_gpu as unknown_gpu
from .errors import UserError
from .spec import ITEMSIZE, BlockSpec, ConvSpec, Epilogue, LaunchSpec, NetSpec, PointwiseSpec, Spec
from .tuning import shapes
from .tuning.routes import routes

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
"""Every fusion plan, and what it fuses."""

FUSED_BLOCK_CHANNELS = 128
"""Widest bottleneck that plan stage12 runs as one kernel: its weights stay on chip."""

_ROUTES = {"conv": ("conv",), "proj": ("proj", "conv"), "tail": ("tail", "stem", "proj", "conv")}
"""The routes that a plan takes, the first that a problem has."""


@dataclass(frozen=True)
class Work:
    """One kernel launch: ``part`` the layer or block it belongs to, ``name`` what of it, ``kernel`` which kind.

    ``nbytes``: least bytes read plus written; ``activations``: the same by the convention of the hand counts (see
    above); ``flops``: two per multiply-add; ``least_flops``: those without products with a padding's zeros, by default
    all of them.
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
    """Along one side: pairs of an output and a filter tap that lies on the image, not on its padding."""
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
    """Elements of the input, of the convolution's output, and of what is stored after pooling."""
    ho, wo = c.out_hw()
    return c.n * c.h * c.w * c.ci, c.gemm_m * c.co, c.n * ho * wo * c.co


def _convs(spec: Spec) -> dict[str, ConvSpec]:
    """The convolutions of a problem by short name."""
    if isinstance(spec, PointwiseSpec):
        return {}
    if isinstance(spec, ConvSpec):
        return {"conv": spec}
    named = {f"conv{i}": c for i, c in enumerate(spec.main, 1)}
    return named | ({"downsample": spec.convs[-1]} if spec.shortcut == "projection" else {})


def _pass(part: str, name: str, kernel: str, elements: int, dtype: str) -> Work:
    """A launch that reads and writes ``elements`` in all; its few operations cost nothing beside its bytes."""
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


def _fused_block(spec: BlockSpec, part: str) -> Work:
    x, stored = _size(spec.main[0])[0], _size(spec.main[-1])[2]
    activations = (x + stored * (2 if spec.shortcut == "given" else 1)) * ITEMSIZE[spec.dtype]
    least = _least_flops(spec.convs)
    return Work(part, "block", spec.op, spec.min_bytes(), activations, spec.flops(), spec.dtype, least)


def _separate(spec: Spec, part: str) -> Iterator[Work]:
    def passes(name: str, e: Epilogue, y: int) -> Iterator[Work]:
        tensors = {"bn": 2 * e.norm, "add": 3 * e.add, "relu": 2 * e.relu}
        return (_pass(part, name, kernel, k * y, spec.dtype) for kernel, k in tensors.items() if k)

    if isinstance(spec, PointwiseSpec):
        yield from passes("", spec.epilogue, spec.n * spec.h * spec.w * spec.c)
    for name, c in _convs(spec).items():
        x, y, _ = _size(c)
        bare = c.with_(epilogue=Epilogue(norm=False))
        activations = (x + y) * ITEMSIZE[c.dtype]
        yield Work(part, name, "conv", bare.min_bytes(), activations, c.flops(), c.dtype, _least_flops([c]))
        yield from passes(name, c.epilogue, y)
        if c.epilogue.pool:
            yield _pool(c, part)


def _fused(spec: Spec, plan: str, part: str) -> Iterator[Work]:
    if isinstance(spec, PointwiseSpec):
        elements = spec.n * spec.h * spec.w * spec.c * (3 if spec.epilogue.add else 2)
        activations = elements * ITEMSIZE[spec.dtype]
        yield Work(part, "bn_act", "bn_act", spec.min_bytes(), activations, spec.flops(), spec.dtype)
        return
    if isinstance(spec, BlockSpec):
        narrow = all(c.co <= FUSED_BLOCK_CHANNELS for c in spec.main[: -1 if spec.op == "bottleneck" else None])
        if plan == "block" or (plan == "stage12" and narrow):
            yield _fused_block(spec, part)
            return
    plan = {"stage12": "conv", "block": "tail"}.get(plan, plan)
    by_plan = {route.plan: route for route in routes(spec)}
    route = next(by_plan[p] for p in _ROUTES[plan] if p in by_plan)
    names = {id(c): name for name, c in _convs(spec).items()}
    yield from (_fused_launch(one, part, names) for one in route.launches)
    if isinstance(spec, ConvSpec) and spec.epilogue.pool and route.plan != "stem":
        yield _pool(spec, part)


def _norm_passes(plan: str, e: Epilogue) -> dict[str, int]:
    """Tensors of a convolution's output size that the kernels between convolutions read and write, per kernel.

    Fused BN keeps no ReLU mask: it recomputes the mask from the raw output, or where a residual was added reads the
    block's output, and then writes the masked gradient for the shortcut.
    """
    if plan == "train-eager":
        forward = {"bn_stats": e.norm, "bn": 2 * e.norm, "add": 3 * e.add, "relu": 2 * e.relu}
        return forward | {"relu_grad": 3 * e.relu, "bn_reduce": 2 * e.norm, "bn_grad": 3 * e.norm}
    if plan == "train-bn-two-pass":
        return {"bn_stats": 1, "bn_act": 2 + e.add, "bn_reduce": 2 + 2 * e.add, "bn_grad": 3}
    if plan == "train-bn-single-pass":
        return {"bn_act": 2 + e.add, "bn_act_grad": 3 + 2 * e.add}
    return {"block_end": 3 * e.add}


def _dgrad_reads(spec: ConvSpec | BlockSpec, name: str, before: Spec | None) -> int:
    """Tensors of the input's size that a dgrad of train-conv-bn reads in its epilogue.

    Below an inner convolution that is the raw output, for the ReLU mask and the BN's two sums. Below a block's first it
    is the gradient of the shortcut, and of the block before: its output (mask), its raw last output, and its
    projection's where it has one (sums). Behind a max-pool there is no BN to serve, and a projection's dgrad hands
    over to the first convolution's.
    """
    if isinstance(spec, ConvSpec) or name == "downsample":
        return int(name != "downsample")
    if name != "conv1":
        return 1
    if isinstance(before, ConvSpec):
        return 1 + (before.epilogue.pool is None)
    return 3 + (isinstance(before, BlockSpec) and before.shortcut == "projection")


def _training(spec: Spec, plan: str, part: str, before: Spec | None) -> Iterator[Work]:
    """One step's kernels, forward and backward, of a problem that ``before`` feeds (by default a block).

    Each convolution is three: itself, dgrad (none for an image) and wgrad. In the eager plan and those of fused BN
    kernels, BN, add and ReLU lie between, and the two gradients that meet at a block's input are added in a kernel. In
    train-conv-bn the forward statistics and the normalisation ride on the convolutions and only the block ends are
    kernels; dgrad and wgrad read gradient and raw output (the BN's gradient is computed in their prologues), and
    dgrad's epilogue does the rest, see :func:`_dgrad_reads`. Weights are read or written once in each of the three.
    """
    fused = plan == "train-conv-bn"
    if isinstance(spec, PointwiseSpec):
        y = spec.n * spec.h * spec.w * spec.c
        tensors = _norm_passes("train-bn-single-pass" if fused else plan, spec.epilogue)
        yield from (_pass(part, "", kernel, k * y, spec.dtype) for kernel, k in tensors.items() if k)
        return
    for name, c in _convs(spec).items():
        x, y, stored = _size(c)
        once = y * 2 if fused else y
        elements = {"conv": x + y, "dgrad": once + x, "wgrad": once + x}
        if fused:
            elements["dgrad"] += x * _dgrad_reads(spec, name, before)
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
    if isinstance(spec, BlockSpec) and not fused:
        yield _pass(part, "", "add_grad", 3 * _size(spec.convs[0])[0], spec.dtype)


def work(
    spec: Spec | LaunchSpec | NetSpec, plan: str = "block", part: str = "", before: Spec | None = None
) -> tuple[Work, ...]:
    """What ``plan`` launches for a problem; :class:`UserError` for an unknown plan.

    ``part``: the name that the items carry. ``before``: the problem that feeds this one; it matters in train-conv-bn.
    """
    if plan not in PLANS:
        raise UserError(f"a fusion plan out of {', '.join(PLANS)}", repr(plan), "choose one of them")
    if isinstance(spec, NetSpec):
        feeds = (before, *spec.parts)
        return tuple(i for one, fed in zip(spec.parts, feeds, strict=False) for i in work(one, plan, part, fed))
    if isinstance(spec, LaunchSpec):
        return (_fused_launch(spec, part, {}),)
    if plan in TRAINING:
        return tuple(_training(spec, plan, part, before))
    return tuple(_separate(spec, part) if plan == "separate" else _fused(spec, plan, part))


def net_work(
    name: str, plan: str, batch: int = 1, image: int | tuple[int, int] | None = None, dtype: str = "bfloat16"
) -> tuple[Work, ...]:
    """What ``plan`` launches for a whole net of tuning/shapes.py, global pool and fully connected layer included."""
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
    """Least bytes read plus written under a plan of :data:`PLANS`; :class:`UserError` for an unknown plan."""
    return sum(item.nbytes for item in work(spec, plan))


@dataclass(frozen=True)
class Floor:
    """A least time. ``bound``: memory or compute, whichever takes longer. ``origin``: that of the binding figure, or
    ``mixed`` in a sum. ``nbytes``: bytes read plus written; ``flops``: two per multiply-add."""

    seconds: float
    bound: str
    origin: str
    memory_s: float
    compute_s: float
    nbytes: int
    flops: int
    device: str
    plan: str

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.nbytes if self.nbytes else 0.0

    def to_dict(self) -> dict[str, float | int | str]:
        """One flat row, for CSV or JSON."""
        return asdict(self) | {"intensity": self.intensity}


def _floor(item: Work, device: Device, plan: str) -> Floor:
    rate = device.rate(item.dtype)
    memory_s, compute_s, origin = item.nbytes / device.bandwidth.value, item.flops / rate.value, device.bandwidth.origin
    if device.cache is not None:
        flops = item.flops if item.least_flops is None else item.least_flops
        compute_s = flops / rate.value
        memory_s = max(0, item.nbytes - 2 * device.cache.nbytes) / device.bandwidth.value
        if memory_s < (cached_s := item.nbytes / device.cache.bandwidth.value):
            memory_s, origin = cached_s, device.cache.bandwidth.origin
    memory = memory_s >= compute_s
    return Floor(
        seconds=max(memory_s, compute_s),
        bound="memory" if memory else "compute",
        origin=origin if memory else rate.origin,
        memory_s=memory_s,
        compute_s=compute_s,
        nbytes=item.nbytes,
        flops=item.flops,
        device=device.name,
        plan=plan,
    )


def floor(items: Iterable[Work], device: Device, plan: str) -> Floor:
    """The floors of launches that run one after another, summed; ``bound``: which kind takes most of the time."""
    floors = [_floor(item, device, plan) for item in items]
    if not floors:
        raise UserError("at least one problem", "none", "pass the values of tuning.shapes.problems(...)")
    seconds = sum(f.seconds for f in floors)
    in_memory = sum(f.seconds for f in floors if f.bound == "memory")
    origins = {f.origin for f in floors}
    return Floor(
        seconds=seconds,
        bound="memory" if in_memory >= seconds / 2 else "compute",
        origin=origins.pop() if len(origins) == 1 else "mixed",
        memory_s=sum(f.memory_s for f in floors),
        compute_s=sum(f.compute_s for f in floors),
        nbytes=sum(f.nbytes for f in floors),
        flops=sum(f.flops for f in floors),
        device=device.name,
        plan=plan,
    )


def floor_seconds(spec: Spec | NetSpec, device: Device, plan: str = "block") -> Floor:
    """The roofline of one problem, its launches one after another."""
    return floor(work(spec, plan), device, plan)


def net_floor(specs: Iterable[Spec], device: Device, plan: str = "block") -> Floor:
    """The floors of problems that run one after another, summed."""
    return floor((item for spec in specs for item in work(spec, plan)), device, plan)


@dataclass(frozen=True)
class Measured:
    """ResNet-50 at 224 in bfloat16 on an H100 SXM (torch 2.11): images/s by batch size, and the plan it comes close to.

    Cells whose time is Python's and not the GPU's are left out.
    """

    what: str
    plan: str
    images_per_s: tuple[tuple[int, float], ...]


MEASURED = (
    Measured(
        "best stock inference: cuDNN's fused ops, BN folded, CUDA graph",
        "conv",
        ((1, 2575), (8, 12810), (32, 20746), (128, 24164), (256, 25700)),
    ),
    Measured(
        "torch.compile inference, frozen, CUDA graph", "conv", ((1, 2224), (32, 19750), (128, 21671), (256, 22800))
    ),
    Measured("eager inference", "separate", ((128, 12359), (256, 12986))),
    Measured("eager AMP training step", "train-eager", ((128, 3753), (256, 4013))),
    Measured("best stock training step: torch.compile, AMP", "train-bn-two-pass", ((256, 5692),)),
)

PROFILE_S = {
    ("conv", "dgrad", "wgrad"): 18.5e-3,
    ("bn_stats",): 9.005e-3,
    ("bn",): 5.375e-3,
    ("relu",): 3.187e-3,
    ("add", "add_grad"): 5.471e-3,
    ("relu_grad",): 4.709e-3,
    ("bn_reduce",): 5.709e-3,
    ("bn_grad",): 7.021e-3,
    ("maxpool",): 0.862e-3,
    ("maxpool_grad",): 1.835e-3,
}
"""Measured seconds of an eager AMP training step's kernels by kind: ResNet-50, batch 256, the H100 of MEASURED."""

_LIKE = {"bn_act": "bn", "block_end": "bn", "bn_act_grad": "bn_grad", "block_end_grad": "bn_grad"}
"""Kernels that no stock path has, and the stock kernel that they are taken to be as good as."""


@dataclass(frozen=True)
class Calibration:
    """What stock kernels reached on an H100, so that ``seconds = floor / reached + launch_s`` per launch.

    ``by_kernel``: fraction of the floor by kernel, from :data:`PROFILE_S`; ``fused``: that of every other kernel, and
    ``launch_s`` seconds: the least-squares fit of relative errors to the best stock inference, five batch sizes.
    ``launch_s`` is more than a launch: ramp-up, the first loads' latency and the last wave's tail are in it. ``error``:
    the fit's worst relative one.
    """

    fused: float
    launch_s: float
    by_kernel: tuple[tuple[str, float], ...]
    error: float

    def reached(self, kernel: str) -> float:
        """The fraction for a kernel."""
        return dict(self.by_kernel).get(_LIKE.get(kernel, kernel), self.fused)


def _measured_kernels() -> dict[str, float]:
    items = net_work("resnet50", "train-eager", 256)
    reached: dict[str, float] = {}
    for kernels, seconds in PROFILE_S.items():
        least = floor((i for i in items if i.kernel in kernels), H100, "train-eager").seconds
        # ReLU and add come out 2-4 % faster than memory allows: the end of one tensor is still in L2
        reached |= dict.fromkeys(kernels, min(1.0, least / seconds))
    return reached


@cache
def calibration() -> Calibration:
    """The fit to :data:`MEASURED` and :data:`PROFILE_S`, made once."""
    known, rows = _measured_kernels(), []
    for batch, rate in MEASURED[0].images_per_s:
        items = net_work("resnet50", MEASURED[0].plan, batch)
        floors = [(i.kernel, _floor(i, H100, "conv").seconds) for i in items]
        fused = sum(s for kernel, s in floors if kernel not in known)
        rest = sum(s / known[kernel] for kernel, s in floors if kernel in known)
        rows.append((fused * rate / batch, len(items) * rate / batch, 1 - rest * rate / batch))
    (uu, uv, uw), (vv, vw) = ([sum(r[i] * r[j] for r in rows) for j in range(i, 3)] for i in (0, 1))
    determinant = uu * vv - uv * uv
    slowdown, launch_s = (uw * vv - vw * uv) / determinant, (vw * uu - uw * uv) / determinant
    error = max(abs(slowdown * u + launch_s * v - w) for u, v, w in rows)
    return Calibration(1 / slowdown, launch_s, tuple(known.items()), error)


@dataclass(frozen=True)
class Prediction:
    """What launches would take with kernels as good as stock ones, see :class:`Calibration`; always modelled.

    ``bound``: memory, compute or launch, whichever takes longest (in a sum: most of the time).
    """

    seconds: float
    bound: str
    launches: int
    floor: Floor

    def to_dict(self) -> dict[str, float | int | str]:
        """One flat row: the floor's, with ``floor_s`` and ``floor_bound`` for its time and bound."""
        row = self.floor.to_dict()
        row["floor_s"], row["floor_bound"] = row.pop("seconds"), row.pop("bound")
        return row | {"predicted_s": self.seconds, "bound": self.bound, "launches": self.launches}


def predict(items: Iterable[Work], device: Device, plan: str) -> Prediction:
    """Seconds of launches that run one after another in a CUDA graph; :class:`UserError` for a device without one."""
    if device.gpu is None:
        raise UserError("a GPU to predict for", device.name, "use floor() for its bound")
    items, fit = tuple(items), calibration()
    least = floor(items, device, plan)
    spent = dict.fromkeys(("memory", "compute", "launch"), 0.0)
    for item in items:
        f = _floor(item, device, plan)
        busy = f.seconds / fit.reached(item.kernel)
        spent["launch" if fit.launch_s > busy else f.bound] += busy + fit.launch_s
    return Prediction(sum(spent.values()), max(spent, key=lambda kind: spent[kind]), len(items), least)
