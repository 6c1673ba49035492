"""List the competitors: how each one turns a model and its input into a callable, and what it does not support.

``INFERENCE`` and ``TRAINING`` are those of ``resnet-fast bench``, ``GPU_INFERENCE`` and ``GPU_TRAINING`` those of the
GPU commands; :mod:`.runtimes` has other libraries' runtimes for a GPU. A provider's model is a plain module in eval
mode, NCHW, on the input's device and in its dtype; the input is (N, C, H, W). It works on its own copy. Its verdict
carries a sentence in both cases: why not, or what to know about the number.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet

import resnet_fast
from resnet_fast.errors import UserError, install_command
from resnet_fast.paper_nets import CifarResNet
from resnet_fast.spec import Verdict

from .harness import graphed

OURS, OURS_FROZEN, OURS_GRAPH = "resnet_fast", "resnet_fast-frozen", "resnet_fast, CUDA graph"
OURS_INVARIANT = "resnet_fast-invariant"
BEST_STOCK = "cuDNN fused ops, CUDA graph"


@dataclass(frozen=True)
class PreparedCall:
    """Ready to run: ``call()`` gives the output. ``precision`` is what the convolutions really compute in."""

    call: Callable[[], Tensor]
    precision: str
    note: str = ""


Supports = Callable[[nn.Module, torch.dtype, int, str], Verdict]
"""``supports(model, dtype, batch, device type)``."""

Prepare = Callable[[nn.Module, Tensor], PreparedCall]


@dataclass(frozen=True)
class Provider:
    """One competitor.

    Attributes:
        name: as options and reports have it.
        stock: a path that PyTorch alone offers; the fastest of these is what ratios are relative to.
        supports: whether it can run a model, with a reason.
        prepare: makes a callable of a model and its input.
        plan: for a GPU's roofline, the byte model that its kernels come to; None for ours.
        compiles: it takes tens of seconds to prepare.
    """

    name: str
    stock: bool
    supports: Supports
    prepare: Prepare
    plan: str | None = None
    compiles: bool = False


@dataclass(frozen=True)
class Trainer:
    """One competitor in training. ``wrap`` takes the stock net, in training mode, on its device and in its layout."""

    name: str
    stock: bool
    channels_last: bool
    wrap: Callable[[nn.Module], nn.Module]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def cpu_has_bf16() -> bool:
    """Return whether oneDNN has bfloat16 kernels for this CPU (AVX-512 BF16, AMX or AVX-NE-CONVERT)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def torch_verdict(model: nn.Module, dtype: torch.dtype, batch: int, device: str) -> Verdict:
    """Accept whatever runs PyTorch's own layers, with a note where a dtype is emulated."""
    if device == "cpu" and dtype == torch.bfloat16 and not cpu_has_bf16():
        return Verdict.yes("emulated: this CPU has no bfloat16 instructions")
    return Verdict.yes()


def inference(module: nn.Module | Callable[..., Any], x: Tensor) -> Callable[[], Tensor]:
    """Return a call of the module on ``x`` in inference mode."""

    def call() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return call


def nhwc(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a copy of the model and ``x``, both in channels_last."""
    copied = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return copied, x.contiguous(memory_format=torch.channels_last)


def _eager_nchw(model: nn.Module, x: Tensor) -> PreparedCall:
    return PreparedCall(inference(copy.deepcopy(model), x.contiguous()), dtype_name(x.dtype))


def _eager_nhwc(model: nn.Module, x: Tensor) -> PreparedCall:
    return PreparedCall(inference(*nhwc(model, x)), dtype_name(x.dtype))


def _folded(model: nn.Module, x: Tensor) -> PreparedCall:
    """PyTorch's own conv-BN folding (``fuse_conv_bn_eval`` over an fx trace), channels_last."""
    from torch.fx.experimental.optimization import fuse

    return PreparedCall(inference(*nhwc(fuse(model), x)), dtype_name(x.dtype))


def _compiled(mode: str | None = None, freezing: bool = True, calls: int = 1) -> Prepare:
    """Inductor in a ``mode`` of torch.compile; frozen weights are the fastest stock setting.

    Args:
        calls: how many until it has compiled and, with a mode that does, recorded its graphs.
    """

    def prepare(model: nn.Module, x: Tensor) -> PreparedCall:
        import torch._dynamo
        import torch._inductor.config as inductor

        torch._dynamo.reset()  # cells compile the same code object again and again; the recompile limit is per object
        module, x = nhwc(model, x)
        compiled = torch.compile(module, mode=mode, dynamic=False)

        def call() -> Tensor:
            with torch.no_grad():  # freezing applies under no_grad only
                return compiled(x)

        with inductor.patch(freezing=freezing):
            for _ in range(calls):
                call()
        return PreparedCall(call, dtype_name(x.dtype))

    return prepare


def _ours(model: nn.Module, x: Tensor, frozen: bool = False) -> PreparedCall:
    from resnet_fast import packing_budget
    from resnet_fast.backends.onednn import net
    from resnet_fast.backends.onednn.conv_bn_act import compute_dtype

    module, x = nhwc(model, x)
    # A single op of the suites is no model that accelerate() knows; it brings its fused form along.
    own_form: Callable[[], nn.Module] | None = getattr(module, "accelerated", None)
    module = own_form() if own_form else resnet_fast.accelerate(module)
    with torch.inference_mode():
        chosen = Counter(row.backend for row in resnet_fast.explain(module, x).rows)
    note = ", ".join(f"{backend} x {n}" for backend, n in chosen.most_common())
    precision = compute_dtype(x.dtype) if "onednn" in chosen else x.dtype
    if precision != x.dtype:
        note += f"; ran in {dtype_name(precision)}: this CPU has no native {dtype_name(x.dtype)}"
    if frozen:  # the other runtimes' copies of the weights imply that promise
        resnet_fast.freeze(module)
    call = inference(module, x)
    # Compile now, as torch.compile did, and not once that pays.
    before, packing_budget.COMPILE = packing_budget.COMPILE, 0.0
    try:
        for _ in range(net.CALLS_BEFORE_COMPILING + 1):
            call()
    finally:
        packing_budget.COMPILE = before
    return PreparedCall(call, dtype_name(precision), note)


def _in_mode(prepare: Prepare) -> Prepare:
    """The same in batch-invariant mode, whose cost this shows."""

    def invariant(model: nn.Module, x: Tensor) -> PreparedCall:
        with resnet_fast.batch_invariant():
            prepared = prepare(model, x)

        def call() -> Tensor:
            with resnet_fast.batch_invariant():
                return prepared.call()

        return replace(prepared, call=call)

    return invariant


def _frozen_verdict(model: nn.Module, dtype: torch.dtype, batch: int, device: str) -> Verdict:
    if isinstance(model, (ResNet, CifarResNet)):
        return Verdict.yes()
    return Verdict.no("a whole net, which can be frozen", type(model).__name__, "use --suite models")


def _installed(packages: tuple[str, ...]) -> Verdict:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        return Verdict.no(" and ".join(packages), f"no {', '.join(missing)}", install_command(missing[0], "peers"))
    return Verdict.yes()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print progress and deprecation notices of their own into the middle of the table."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _onnxruntime_verdict(model: nn.Module, dtype: torch.dtype, batch: int, device: str) -> Verdict:
    if device != "cpu":
        return Verdict.no("device cpu", device, "ONNX Runtime is compared on the CPU only")
    if dtype != torch.float32:
        return Verdict.no("float32", dtype_name(dtype), "ONNX Runtime's CPU kernels convolve in float32 only")
    return _installed(("onnxruntime", "onnx", "onnxscript"))


def _onnxruntime(model: nn.Module, x: Tensor) -> PreparedCall:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(copy.deepcopy(model), (x,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return PreparedCall(lambda: torch.from_numpy(session.run(None, feed)[0]), "float32")


def _openvino_verdict(model: nn.Module, dtype: torch.dtype, batch: int, device: str) -> Verdict:
    if device != "cpu":
        return Verdict.no("device cpu", device, "OpenVINO is compared on the CPU only")
    if dtype not in (torch.float32, torch.bfloat16):
        return Verdict.no("float32 or bfloat16", dtype_name(dtype), "its CPU plugin has no such convolution")
    return _installed(("openvino",))


OPENVINO_PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def _openvino(model: nn.Module, x: Tensor) -> PreparedCall:
    """OpenVINO with static shapes and torch's thread count. A bf16 cell keeps the rounded weights and hints bf16."""
    import openvino as ov

    array = x.float().contiguous()
    with quiet():
        converted = ov.convert_model(copy.deepcopy(model).float(), example_input=array)
    converted.reshape(list(array.shape))
    hint = "bf16" if x.dtype == torch.bfloat16 else "f32"
    compiled = ov.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hint,
        },
    )
    # The property INFERENCE_PRECISION_HINT only repeats the wish; the executable graph says what each node runs in.
    ran: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) == "Convolution":
            ran[info["runtimePrecision"].astype(str)] += 1
    precision = ran.most_common(1)[0][0] if ran else hint
    note = "" if precision == hint else f"asked for {hint}, ran in {precision}: this CPU has no native {hint}"
    request, feed = compiled.create_infer_request(), [array.numpy()]

    def call() -> Tensor:
        return torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])

    return PreparedCall(call, OPENVINO_PRECISIONS.get(precision, precision), note)


class CudnnFused(nn.Module):
    """A ResNet of cuDNN calls for convolution, bias, (add) and ReLU, BatchNorm folded: the fastest stock kernels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        from torch.fx.experimental.optimization import fuse

        self.model = fuse(model)

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self.model
        x = m.maxpool(self.conv_relu(x, m.conv1))
        for layer in (m.layer1, m.layer2, m.layer3, m.layer4):
            for block in layer.children():
                parts = dict(block.named_children())
                shortcut = parts["downsample"].get_submodule("0")(x) if "downsample" in parts else x
                *inner, last = [parts[name] for name in ("conv1", "conv2", "conv3") if name in parts]
                for conv in inner:
                    x = self.conv_relu(x, conv)
                x = self.conv_add_relu(x, last, shortcut)
        out: Tensor = m.fc(torch.flatten(m.avgpool(x), 1))
        return out

    def conv_relu(self, x: Tensor, conv: Any) -> Tensor:
        """Return relu(conv(x))."""
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *_geometry(conv))

    def conv_add_relu(self, x: Tensor, conv: Any, added: Tensor) -> Tensor:
        """Return relu(conv(x) + added)."""
        return torch.cudnn_convolution_add_relu(x, conv.weight, added, 1.0, conv.bias, *_geometry(conv))


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _cudnn_fused(model: nn.Module, x: Tensor) -> PreparedCall:
    return PreparedCall(inference(*nhwc(CudnnFused(model), x)), dtype_name(x.dtype))


def _ours_on_triton(**options: Any) -> Prepare:
    """Ours on Triton's kernels; ``options`` of :func:`resnet_fast.accelerate`."""

    def prepare(model: nn.Module, x: Tensor) -> PreparedCall:
        module, x = nhwc(model, x)
        module = resnet_fast.accelerate(module, backend="triton", **options)
        return PreparedCall(inference(module, x), dtype_name(x.dtype))

    return prepare


def in_graph(prepare: Prepare) -> Prepare:
    """The same, recorded once as a CUDA graph."""

    def recorded(model: nn.Module, x: Tensor) -> PreparedCall:
        prepared = prepare(model, x)
        out: list[Tensor] = []

        def once() -> None:
            out[:] = [prepared.call()]

        replay = graphed(once)

        def again() -> Tensor:
            replay()
            return out[0]

        return replace(prepared, call=again)

    return recorded


def _on_gpu(reason: str) -> Supports:
    """Refuse every other device, with this reason."""
    return lambda model, dtype, batch, device: Verdict.yes() if device == "cuda" else Verdict(False, reason)


def _always(*_: object) -> Verdict:
    return Verdict.yes()


def accelerated(model: nn.Module) -> nn.Module:
    """Fuse the net's blocks, in place; dispatch chooses the backend."""
    return resnet_fast.accelerate(model)


def replayed(model: nn.Module) -> nn.Module:
    """Fuse the net's blocks, in place, and replay its passes from CUDA graphs."""
    return resnet_fast.accelerate(model, cuda_graph=True)


def compiled(model: nn.Module) -> Any:
    """Compile forward and backward with Inductor."""
    import torch._dynamo

    torch._dynamo.reset()  # see _compiled
    return torch.compile(model, dynamic=False)


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return a step under bfloat16 autocast: forward, backward and SGD with momentum. It returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=x.device.type == "cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _trained(wrap: Callable[[nn.Module], nn.Module]) -> Prepare:
    def prepare(model: nn.Module, x: Tensor) -> PreparedCall:
        module, x = nhwc(model, x)
        labels = torch.arange(x.shape[0], device=x.device) % 10
        return PreparedCall(training_step(wrap(module.train()), x, labels), "bfloat16")

    return prepare


INFERENCE = (
    Provider("eager-nchw", True, torch_verdict, _eager_nchw, "separate"),
    Provider("eager-nhwc", True, torch_verdict, _eager_nhwc, "separate"),
    Provider("folded-nhwc", True, torch_verdict, _folded, "separate"),
    Provider("compile", True, torch_verdict, _compiled(), compiles=True),
    Provider(OURS, False, _always, _ours),
    Provider(OURS_FROZEN, False, _frozen_verdict, functools.partial(_ours, frozen=True)),
    Provider(OURS_INVARIANT, False, _always, _in_mode(_ours)),
    Provider("onnxruntime", False, _onnxruntime_verdict, _onnxruntime),
    Provider("openvino", False, _openvino_verdict, _openvino),
)
NAMES = tuple(p.name for p in INFERENCE)
_NCHW, _NHWC, _FOLDED_NHWC = INFERENCE[:3]

_GRAPHS = _on_gpu("CUDA graphs need a GPU")
_COMPILE = _on_gpu("measured on a GPU only: resnet-fast bench compares it on the CPU")
GPU_INFERENCE = (
    replace(_NCHW, name="eager NCHW"),
    replace(_NHWC, name="eager NHWC"),
    replace(_FOLDED_NHWC, name="folded NHWC"),
    Provider("folded NHWC, CUDA graph", True, _GRAPHS, in_graph(_folded), "separate"),
    Provider("cuDNN fused ops", True, _on_gpu("cuDNN needs a GPU"), _cudnn_fused, "conv"),
    Provider(BEST_STOCK, True, _GRAPHS, in_graph(_cudnn_fused), "conv"),
    Provider(OURS, False, _always, _ours_on_triton()),
    Provider(OURS_GRAPH, False, _GRAPHS, _ours_on_triton(cuda_graph=True)),
    Provider(OURS_INVARIANT, False, _always, _in_mode(_ours_on_triton())),
    Provider("torch.compile", True, _COMPILE, _compiled(freezing=False, calls=3), "conv", compiles=True),
    Provider(
        "torch.compile reduce-overhead, frozen", True, _COMPILE, _compiled("reduce-overhead", calls=3), "conv",
        compiles=True,
    ),
)  # fmt: skip
"""Stock PyTorch in its fastest settings, and ours."""

ANCHORS = (BEST_STOCK, OURS_GRAPH)
"""Measured again together with the compiled ones, so that ratios come from one run."""

TRAINING = (
    Trainer("eager-nchw", True, False, lambda model: model),
    Trainer("eager-nhwc", True, True, lambda model: model),
    Trainer("compile", True, True, compiled),
    Trainer(OURS, False, True, accelerated),
)
"""Named as the providers of the inference suites that run in the same way."""

GPU_TRAINING = (
    Provider("eager NHWC, AMP bfloat16", True, _always, _trained(lambda model: model), "separate"),
    Provider("resnet_fast, AMP bfloat16", False, _always, _trained(accelerated), "separate"),
    Provider("resnet_fast, CUDA graph, AMP bfloat16", False, _GRAPHS, _trained(replayed), "separate"),
    Provider(
        "torch.compile, AMP bfloat16", True, _on_gpu("measured on a GPU only"), _trained(compiled), "separate",
        compiles=True,
    ),
)  # fmt: skip
"""A step each; ``prepare`` takes a net in eval mode too, and switches its copy to training."""


def select(names: tuple[str, ...]) -> tuple[Provider, ...]:
    """Return providers of ``INFERENCE`` by name, in its order.

    Raises:
        UserError: for an unknown name.
    """
    unknown = [n for n in names if n not in NAMES]
    if unknown:
        raise UserError(f"providers among {', '.join(NAMES)}", ", ".join(map(repr, unknown)), "correct --providers")
    return tuple(p for p in INFERENCE if p.name in names)
