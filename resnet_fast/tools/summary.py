"""Count what a net costs by running it once on the meta device: the paper's Table 1 for any net.

A dispatch mode sees every ATen call of one inference without computing anything, and module hooks tell which module
made it. Each convolution and fully connected layer becomes a :class:`~resnet_fast.spec.ConvSpec`; the operations that
follow it (norm, add, ReLU, max-pool) become its epilogue. Parameters, multiply-adds and minimal bytes all come from
that list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import limits
from ..errors import UserError
from ..models import registry
from ..spec import ITEMSIZE, ConvSpec, Epilogue, conv_out
from ..tuning.shapes import ARCHS, unknown_name

COUNTED = (
    "Multiply-adds are those of convolutions and fully connected layers (what the paper calls FLOPs); "
    "BatchNorm, ReLU, pooling and additions are not counted."
)
BYTES = (
    "Minimal bytes: every convolution one kernel with its norm, add, ReLU and max-pool inside; "
    "each kernel reads its inputs and weights once and writes its output once."
)


@dataclass(frozen=True)
class Layer:
    """One convolution or fully connected layer; ``params`` includes its bias and the norm that follows it."""

    name: str
    spec: ConvSpec
    params: int
    linear: bool = False


@dataclass(frozen=True)
class Stage:
    """A row of Table 1. ``output`` is (height, width); ``macs`` and ``min_bytes`` are for the whole batch."""

    name: str
    module: str
    output: tuple[int, int]
    formula: str
    params: int
    macs: int
    min_bytes: int


@dataclass(frozen=True)
class Summary:
    """The stages of one net and their sums."""

    name: str
    variant: str
    batch: int
    image: int
    dtype: str
    stages: tuple[Stage, ...]
    params: int
    macs: int
    min_bytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


class _Recorder(TorchDispatchMode):
    """Collects convolutions and matrix products, and merges the operations after a convolution into its epilogue."""

    def __init__(self, dtype: str, layout: str):
        super().__init__()
        self.running: list[str] = []
        self.found: list[tuple[str, ConvSpec, bool]] = []
        self._dtype, self._layout = dtype, layout
        # Maps a tensor's id to its convolution. The tensors are kept alive, so that no id is reused.
        self._source: dict[int, tuple[int, Tensor]] = {}

    def _extend(self, x: Any, out: Tensor, **epilogue: Any) -> None:
        """Extend the epilogue of the convolution that ``x`` comes from, if any; ``out`` is the result."""
        if id(x) in self._source:
            index = self._source[id(x)][0]
            name, spec, linear = self.found[index]
            self.found[index] = name, spec.with_(epilogue=replace(spec.epilogue, **epilogue)), linear
            self._source[id(out)] = index, out

    def _pending(self, x: Any) -> bool:
        return id(x) in self._source and not self.found[self._source[id(x)][0]][1].epilogue.relu

    def _pool(self, args: tuple[Any, ...], out: Tensor) -> None:
        kernel, stride, padding = args[1], args[2] if len(args) > 2 else args[1], args[3] if len(args) > 3 else [0, 0]
        square = all(len(set(p)) == 1 for p in (kernel, stride, padding))
        window = kernel[0], stride[0], padding[0]
        # An Epilogue does not describe a ceil-mode window that extends beyond the border.
        if square and all(conv_out(i, *window, 1) == o for i, o in zip(args[0].shape[2:], out.shape[2:], strict=True)):
            self._extend(args[0], out, pool=window)

    def _conv(self, args: tuple[Any, ...], out: Tensor) -> None:
        x, weight, _, stride, padding, dilation, transposed, _, groups = args
        if transposed or x.dim() != 4:
            got = f"a {'transposed ' if transposed else ''}convolution of a {x.dim()}-d tensor in {self.running[-1]}"
            raise UserError("2-d convolutions", got, "summarise the part of the net that is 2-d")
        n, ci, h, w = x.shape
        co, _, r, s = weight.shape
        spec = ConvSpec(
            *(n, h, w, ci, co, r, s),
            stride=(stride[0], stride[-1]),
            padding=(padding[0], padding[-1]),
            dilation=(dilation[0], dilation[-1]),
            groups=groups,
            dtype=self._dtype,
            layout=self._layout,
            epilogue=Epilogue(norm=False),
        )
        self._source[id(out)] = len(self.found), out
        self.found.append((self.running[-1], spec, False))

    def _linear(self, x: Tensor, weight: Tensor) -> None:
        (n, ci), co = x.shape, weight.shape[1]
        bare = Epilogue(norm=False)
        spec = ConvSpec(n, 1, 1, ci, co, 1, 1, dtype=self._dtype, layout=self._layout, epilogue=bare)
        self.found.append((self.running[-1], spec, True))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, tuple | list) else result
        match str(func.overloadpacket).removeprefix("aten."):
            case "convolution":
                self._conv(args, out)
            case "addmm":
                self._linear(args[1], args[2])
            case "mm":
                self._linear(args[0], args[1])
            case "native_batch_norm" | "_native_batch_norm_legit_no_training" | "native_group_norm":
                self._extend(args[0], out, norm=True)
            case "relu" | "relu_":
                self._extend(args[0], out, relu=True)
            case "add" | "add_":
                # The residual branch is the operand without a ReLU; of two, the first, as in `out += identity`.
                branch = next((a for a in args[:2] if self._pending(a)), None)
                self._extend(branch, out, add=True)
            case "max_pool2d_with_indices":
                self._pool(args, out)
        return result


def trace(
    model: nn.Module, batch: int = 1, image: int = 224, dtype: str = "float32", layout: str = "nhwc"
) -> list[Layer]:
    """Return every convolution and fully connected layer of a net in order of execution.

    Biases count as parameters, but not as bytes.

    Args:
        model: on the meta device. It runs once in eval mode on (batch, 3, image, image); nothing is computed.
        batch: number of images.
        image: side in pixels.
        dtype, layout: labels for the specs.

    Raises:
        UserError: the image is too small for the net, a size or dtype does not exist, or a convolution is not 2-d.
    """
    if batch < 1 or image < 1:
        raise UserError("at least one image of at least one pixel", f"batch {batch}, image {image}", "raise it")
    limits.check_input(batch, image, planes=0)
    if dtype not in ITEMSIZE:
        raise unknown_name("dtype", dtype, ITEMSIZE)
    recorder, handles, was_training = _Recorder(dtype, layout), [], model.training

    def leave(*_: object) -> None:  # returning anything but None would replace the module's output
        recorder.running.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _x, name=name: recorder.running.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad(), recorder:
            model.eval()(torch.empty(batch, 3, image, image, device="meta"))
    except RuntimeError as error:
        got = f"{image}x{image} ({str(error).splitlines()[0]})"
        raise UserError("an image that every layer of the net fits in", got, "use a larger image") from error
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    params = _params(model, [name for name, _, _ in recorder.found])
    return [
        Layer(name, spec, count, linear) for (name, spec, linear), count in zip(recorder.found, params, strict=True)
    ]


def _params(model: nn.Module, layers: list[str]) -> list[int]:
    """Return parameters per layer: its own, and those of the modules between it and the next layer (its norm)."""
    position = {name: index for index, name in reversed(list(enumerate(layers)))}  # of its first call, if reused
    counts, index = [0] * len(layers), 0
    for name, parameter in model.named_parameters():
        index = position.get(name.rpartition(".")[0], index)
        counts[index] += parameter.numel()
    return counts


def _conv_text(layer: Layer, show_stride: bool) -> str:
    s = layer.spec
    if layer.linear:
        return f"{s.co}-d fc"
    text = f"{s.r}x{s.s}, {s.co}"
    text += f", C={s.groups}" if s.groups != 1 else ""
    text += f", d={s.dilation[0]}" if s.dilation != (1, 1) else ""
    return text + (f", stride {s.stride[0]}" if show_stride and s.stride != (1, 1) else "")


def _is_projection(layer: Layer) -> bool:
    return "downsample" in layer.name.split(".")


def _formula(layers: Sequence[Layer]) -> str:
    """Return a stage's blocks, with equal neighbours counted and projections omitted.

    Example: ``[1x1, 64; 3x3, 64; 1x1, 256] x 3``.
    """
    main = [layer for layer in layers if not _is_projection(layer)]
    if all(layer.name.count(".") < 2 for layer in main):
        return "; ".join(_conv_text(layer, show_stride=True) for layer in main)
    texts = []
    for _, block in groupby(main, key=lambda layer: ".".join(layer.name.split(".")[:2])):
        texts.append("; ".join(_conv_text(layer, show_stride=False) for layer in block))
    runs = [(text, len(list(same))) for text, same in groupby(texts)]
    return "; ".join(f"[{text}]{f' x {times}' if times > 1 else ''}" for text, times in runs)


def _stage_key(layer: Layer) -> tuple[str, tuple[int, int]]:
    """Return the key that groups layers into stages: the container, and for a flat one (VGG's) the output size too."""
    top, *rest = layer.name.split(".")
    return top, ((layer.spec.ho, layer.spec.wo) if len(rest) == 1 else (0, 0))


def stages(layers: Sequence[Layer], paper_names: bool) -> tuple[Stage, ...]:
    """Return the rows of Table 1; ``paper_names`` renames ``layer1`` to conv2_x as in the paper, and so on."""
    rows, before = [], ""
    for (top, _), group in groupby(layers, key=_stage_key):
        members = list(group)
        last = [layer for layer in members if not _is_projection(layer)][-1].spec
        name = f"conv{int(top[5:]) + 1}_x" if paper_names and top.startswith("layer") else top
        formula = _formula(members)
        if paper_names and members[-1].linear:
            formula = f"global average pool; {formula}"
        rows.append(
            Stage(
                name=name,
                module=top,
                output=(last.ho, last.wo),
                formula=before + formula,
                params=sum(layer.params for layer in members),
                macs=sum(layer.spec.macs() for layer in members),
                min_bytes=sum(layer.spec.min_bytes() for layer in members),
            )
        )
        pool = last.epilogue.pool
        before = f"{pool[0]}x{pool[0]} max pool, stride {pool[1]}; " if pool else ""
    return tuple(rows)


def build_meta(name: str, shortcut: str | None = None, stride_in_1x1: bool = False) -> nn.Module:
    """Build the net of that name on the meta device: shapes without storage."""
    with torch.device("meta"):
        return registry.build(name, shortcut=shortcut, stride_in_1x1=stride_in_1x1)


def variant(name: str, shortcut: str | None = None, stride_in_1x1: bool = False) -> str:
    """Return the paper's variant in words, such as ``shortcut B, stride in 3x3 (v1.5)``."""
    entry = ARCHS.get(name)
    if entry is None:
        return "torchvision"
    if entry.shortcut is None:
        return "no shortcuts"
    text = f"shortcut {shortcut or entry.shortcut}"
    if entry.block == "bottleneck":
        text += f", stride in {'1x1 (v1)' if stride_in_1x1 else '3x3 (v1.5)'}"
    return text


def summarize(
    name: str,
    image: int | None = None,
    batch: int = 1,
    dtype: str = "float32",
    shortcut: str | None = None,
    stride_in_1x1: bool = False,
) -> Summary:
    """Return Table 1 for one net.

    Args:
        name: a net of the registry.
        image: side in pixels; by default the net's own.
        batch: number of images.
        dtype: of activations and weights, for the byte counts.
        shortcut: A, B or C; by default the net's own.
        stride_in_1x1: put a bottleneck's stride in the first 1x1.

    Raises:
        UserError: no such net or variant, or see :func:`trace`.
    """
    image = registry.image_size(name) if image is None else image
    model = build_meta(name, shortcut, stride_in_1x1)
    layers = trace(model, batch, image, dtype)
    rows = stages(layers, paper_names=name in ARCHS)
    note = _row(name, shortcut, stride_in_1x1, image, model, layers).note
    return Summary(
        name=name,
        variant=variant(name, shortcut, stride_in_1x1),
        batch=batch,
        image=image,
        dtype=dtype,
        stages=rows,
        params=sum(p.numel() for p in model.parameters()),
        macs=sum(row.macs for row in rows),
        min_bytes=sum(row.min_bytes for row in rows),
        notes=(COUNTED, BYTES, *([f"{name}: {note}."] if note else [])),
    )


@dataclass(frozen=True)
class Published:
    """A published figure as printed: ``gmacs`` in 10^9 multiply-adds or ``mparams`` in 10^6, and its variant."""

    gmacs: str | None = None
    mparams: str | None = None
    shortcut: str | None = None
    stride_in_1x1: bool = False
    source: str = "He et al., Table 1"
    remark: str = ""


PUBLISHED: dict[str, Published] = {
    "plain18": Published("1.8"),
    "plain34": Published("3.6"),
    "resnet18": Published("1.8", shortcut="A"),
    "resnet34": Published("3.6", shortcut="A"),
    "resnet50": Published("3.8", shortcut="B", stride_in_1x1=True),
    "resnet101": Published("7.6", shortcut="B", stride_in_1x1=True),
    "resnet152": Published("11.3", shortcut="B", stride_in_1x1=True),
    "vgg16": Published("15.3", source="He et al., section 4.1"),
    "vgg19": Published("19.6", source="He et al., section 4.1"),
    "googlenet": Published(
        "1.5",
        source="Szegedy et al., Going deeper with convolutions, section 1",
        remark="torchvision's net has BatchNorm and 3x3 filters where the published one has 5x5",
    ),
    **{
        f"cifar_resnet{depth}": Published(mparams=text, shortcut="A", source="He et al., Table 6")
        for depth, text in ((20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7"), (1202, "19.4"))
    },
}
"""The figures that the papers print. GoogLeNet's is from its own paper; He et al. compare with its error only."""


def _as_printed(value: int, unit: int, printed: str, rounding: str = ROUND_HALF_UP) -> bool:
    """Return whether ``value``, in multiples of ``unit`` and rounded to the digits of ``printed``, equals it."""
    return (Decimal(value) / unit).quantize(Decimal(printed), rounding) == Decimal(printed)


@dataclass(frozen=True)
class ComparedNet:
    """The counts of one net for one image, and its published figure.

    Attributes:
        conv_macs: multiply-adds without fully connected layers.
        published, source: the figure as printed and where; None without one.
        note: how the count relates to the published figure; empty if they are equal.
    """

    name: str
    variant: str
    image: int
    params: int
    macs: int
    conv_macs: int
    published: str | None
    source: str | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def _row(
    name: str, shortcut: str | None, stride_in_1x1: bool, image: int, model: nn.Module, layers: Sequence[Layer]
) -> ComparedNet:
    """Compare traced layers with the published figure, which applies to the net's own image size only."""
    batch = layers[0].spec.n
    params = sum(p.numel() for p in model.parameters())
    macs = sum(layer.spec.macs() for layer in layers) // batch
    conv_macs = sum(layer.spec.macs() for layer in layers if not layer.linear) // batch
    text = variant(name, shortcut, stride_in_1x1)
    figure = PUBLISHED.get(name) if image == registry.image_size(name) else None
    if figure is None:
        return ComparedNet(name, text, image, params, macs, conv_macs, None, None, "")
    printed = f"{figure.gmacs} G" if figure.gmacs else f"{figure.mparams} M parameters"
    theirs = variant(name, figure.shortcut, figure.stride_in_1x1)
    note = "; ".join(part for part in (_relation(figure, theirs, text, params, macs, conv_macs), figure.remark) if part)
    return ComparedNet(name, text, image, params, macs, conv_macs, printed, figure.source, note)


def _relation(figure: Published, theirs: str, ours: str, params: int, macs: int, conv_macs: int) -> str:
    """Return how the count relates to the published figure; empty if it rounds to the printed one."""
    value, unit, letter = (macs, 10**9, "G") if figure.gmacs else (params, 10**6, "M")
    printed = figure.gmacs or figure.mparams or "0"
    exact = f"{value / unit:.3f} {letter}"
    if ours != theirs:
        return f"the published {printed} is for another variant ({theirs}); this one ({ours}) has {exact}"
    if _as_printed(value, unit, printed):
        return ""
    if figure.gmacs and _as_printed(conv_macs, unit, printed):
        return f"{printed} counts the convolutions alone ({conv_macs / unit:.3f} G); with the fc layers it is {exact}"
    if _as_printed(value, unit, printed, ROUND_DOWN):
        return f"{exact} is counted here; the published {printed} is that cut off, not rounded"
    return f"{exact} is counted here, {printed} published"


def compare(
    names: Sequence[str] = (),
    image: int | None = None,
    shortcut: str | None = None,
    stride_in_1x1: bool = False,
) -> list[ComparedNet]:
    """Count several nets and compare them with published figures.

    Args:
        names: nets; by default all with a published figure, each in its published variant.
        image: side in pixels; by default each net's own.
        shortcut, stride_in_1x1: the variant of all named nets.

    Raises:
        UserError: a net lacks the variant, or a variant was given without names.
    """
    if not names and (shortcut is not None or stride_in_1x1):
        raise UserError("the names of nets whose variant to show", "none", "name them, e.g. resnet50 resnet101")
    wanted = [(name, shortcut, stride_in_1x1) for name in names] or [
        (name, figure.shortcut, figure.stride_in_1x1) for name, figure in PUBLISHED.items()
    ]
    rows = []
    for name, option, v1 in wanted:
        size = registry.image_size(name) if image is None else image
        model = build_meta(name, option, v1)
        rows.append(_row(name, option, v1, size, model, trace(model, 1, size)))
    return rows
