"""The competitors: how each one turns a model and its input into a callable, and where it has to pass.

``model`` is a plain module in eval mode on the input's device, in the dtype of the cell, NCHW; ``x`` is (N, C, H, W) in
the same dtype. A provider works on its own copy. Its verdict carries a sentence in both cases: why not, or what to
know about the number.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.errors import UserError, install_command
from resnet_fast.spec import Verdict

OURS = "resnet_fast"


@dataclass(frozen=True)
class Prepared:
    """Ready to run: ``call()`` gives the output. ``precision`` is what the convolutions really compute in."""

    call: Callable[[], Tensor]
    precision: str
    note: str = ""


@dataclass(frozen=True)
class Provider:
    """One competitor. ``stock``: a path that PyTorch alone offers, the yardstick of every ratio."""

    name: str
    stock: bool
    supports: Callable[[nn.Module, torch.dtype, int, str], Verdict]
    prepare: Callable[[nn.Module, Tensor], Prepared]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether oneDNN has bfloat16 kernels for this CPU (AVX-512 BF16, AMX or AVX-NE-CONVERT)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def torch_verdict(model: nn.Module, dtype: torch.dtype, batch: int, device: str) -> Verdict:
    """For whatever runs PyTorch's own layers: yes, and a word where a dtype is emulated."""
    if device == "cpu" and dtype == torch.bfloat16 and not cpu_has_bf16():
        return Verdict.yes("emulated: this CPU has no bfloat16 instructions")
    return Verdict.yes()


def inference(module: nn.Module | Callable[..., Any], x: Tensor) -> Callable[[], Tensor]:
    """The module on ``x`` in inference mode."""

    def call() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return call


def nhwc(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of the model and ``x``, both in channels_last."""
    copied = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return copied, x.contiguous(memory_format=torch.channels_last)


def _eager_nchw(model: nn.Module, x: Tensor) -> Prepared:
    return Prepared(inference(copy.deepcopy(model), x.contiguous()), dtype_name(x.dtype))


def _eager_nhwc(model: nn.Module, x: Tensor) -> Prepared:
    return Prepared(inference(*nhwc(model, x)), dtype_name(x.dtype))


def _folded(model: nn.Module, x: Tensor) -> Prepared:
    """PyTorch's own conv-BN folding (``fuse_conv_bn_eval`` over an fx trace), channels_last."""
    from torch.fx.experimental.optimization import fuse

    return Prepared(inference(*nhwc(fuse(model), x)), dtype_name(x.dtype))


def _compiled(model: nn.Module, x: Tensor) -> Prepared:
    """Inductor with frozen weights, the fastest stock setting on a CPU. Freezing applies under no_grad only."""
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # cells compile the same code object again and again; the recompile limit is per object
    module, x = nhwc(model, x)
    compiled = torch.compile(module, dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():
            return compiled(x)

    with inductor.patch(freezing=True):
        call()  # compiles here, while the patch holds
    return Prepared(call, dtype_name(x.dtype))


def _ours(model: nn.Module, x: Tensor) -> Prepared:
    from resnet_fast import accelerate, explain, packing_budget
    from resnet_fast.backends.onednn.conv_bn_act import compute_dtype

    net = importlib.import_module("resnet_fast.backends.onednn.net")  # the package's attribute is the function

    module, x = nhwc(model, x)
    # A single op of the suites is no model that accelerate() knows; it brings its fused form along.
    own_form: Callable[[], nn.Module] | None = getattr(module, "accelerated", None)
    module = own_form() if own_form else accelerate(module)
    with torch.inference_mode():
        chosen = Counter(row.backend for row in explain(module, x).rows)
    note = ", ".join(f"{backend} x {n}" for backend, n in chosen.most_common())
    precision = compute_dtype(x.dtype) if "onednn" in chosen else x.dtype
    if precision != x.dtype:
        note += f"; ran in {dtype_name(precision)}: this CPU has no native {dtype_name(x.dtype)}"
    call = inference(module, x)
    # Compile now, as torch.compile did, and not once that pays.
    before, packing_budget.COMPILE = packing_budget.COMPILE, 0.0
    try:
        for _ in range(net.CALLS_BEFORE_COMPILING + 1):
            call()
    finally:
        packing_budget.COMPILE = before
    return Prepared(call, dtype_name(precision), note)


def _installed(packages: tuple[str, ...]) -> Verdict:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        return Verdict.no(" and ".join(packages), f"no {', '.join(missing)}", install_command(missing[0], "peers"))
    return Verdict.yes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def _onnxruntime(model: nn.Module, x: Tensor) -> Prepared:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(copy.deepcopy(model), (x,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return Prepared(lambda: torch.from_numpy(session.run(None, feed)[0]), "float32")


def _openvino_verdict(model: nn.Module, dtype: torch.dtype, batch: int, device: str) -> Verdict:
    if device != "cpu":
        return Verdict.no("device cpu", device, "OpenVINO is compared on the CPU only")
    if dtype not in (torch.float32, torch.bfloat16):
        return Verdict.no("float32 or bfloat16", dtype_name(dtype), "its CPU plugin has no such convolution")
    return _installed(("openvino",))


OPENVINO_PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def _openvino(model: nn.Module, x: Tensor) -> Prepared:
    """OpenVINO with static shapes and torch's thread count. A bf16 cell keeps the rounded weights and hints bf16."""
    import openvino as ov

    array = x.float().contiguous()
    with _quiet():
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

    return Prepared(call, OPENVINO_PRECISIONS.get(precision, precision), note)


PROVIDERS = (
    Provider("eager-nchw", True, torch_verdict, _eager_nchw),
    Provider("eager-nhwc", True, torch_verdict, _eager_nhwc),
    Provider("folded-nhwc", True, torch_verdict, _folded),
    Provider("compile", True, torch_verdict, _compiled),
    Provider(OURS, False, lambda *_: Verdict.yes(), _ours),
    Provider("onnxruntime", False, _onnxruntime_verdict, _onnxruntime),
    Provider("openvino", False, _openvino_verdict, _openvino),
)
NAMES = tuple(p.name for p in PROVIDERS)


def select(names: tuple[str, ...]) -> tuple[Provider, ...]:
    """Providers by name, in the order of ``PROVIDERS``; UserError for an unknown name."""
    unknown = [n for n in names if n not in NAMES]
    if unknown:
        raise UserError(f"providers among {', '.join(NAMES)}", ", ".join(map(repr, unknown)), "correct --providers")
    return tuple(p for p in PROVIDERS if p.name in names)
