"""Other libraries' runtimes on a GPU: TensorRT, Torch-TensorRT, and cuDNN's own frontend.

None comes with PyTorch. One that is absent, or that does not load, is skipped with the reason; a net that it cannot
convert is an error with the library's words. All run in the model's dtype, replayed from a CUDA graph as our fastest
path is. TensorRT types a network by its tensors ("strongly typed", since 11 the only kind), so an fp16 or bf16 model
stays one.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast.spec import Verdict

from .harness import first_line
from .providers import CudnnFused, PreparedCall, Provider, dtype_name, in_graph, inference, nhwc, quiet

INSTALL = {
    "tensorrt": "pip install tensorrt (its libraries come from NVIDIA's index)",
    "torch_tensorrt": "pip install torch-tensorrt of torch's version (TensorRT's libraries come from NVIDIA's index)",
    "cudnn": "pip install nvidia-cudnn-frontend",
    "onnx": "pip install onnx onnxscript",
    "onnxscript": "pip install onnx onnxscript",
}
"""Package -> how to have it."""

DTYPES = (torch.float16, torch.bfloat16)


def loads(*packages: str) -> Verdict:
    """Return whether these packages can be imported, or which one is not installed or why it does not load."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            return Verdict(False, f"{name} is not installed; {INSTALL[name]}")
    for name in packages:
        try:
            importlib.import_module(name)
        except Exception as error:  # TensorRT's bindings without its libraries, or built for another torch
            return Verdict(False, f"{name} is installed and does not load: {first_line(error)}; {INSTALL[name]}")
    return Verdict.yes()


def _supports(*packages: str) -> Callable[[nn.Module, torch.dtype, int, str], Verdict]:
    def supports(model: nn.Module, dtype: torch.dtype, batch: int, device: str) -> Verdict:
        if torch.device(device).type == "cuda" and dtype not in DTYPES:
            return Verdict.no("float16 or bfloat16", dtype_name(dtype), "TensorRT and cuDNN are compared in these")
        verdict = loads(*packages)  # asked first: without a GPU too, a report says what is not installed
        if verdict and torch.device(device).type != "cuda":
            return Verdict.no("device cuda", device, "it runs on a GPU only")
        return verdict

    return supports


def onnx_bytes(model: nn.Module, x: Tensor) -> bytes:
    """Return a copy of the model as an ONNX program of this input's shape and dtype."""
    with quiet():
        program: Any = torch.onnx.export(copy.deepcopy(model), (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    return file.getvalue()


def tensorrt(model: nn.Module, x: Tensor) -> PreparedCall:
    """Build a TensorRT engine of the model through ONNX.

    Raises:
        RuntimeError: TensorRT cannot read the network or build an engine of it; with its own words.
    """
    import tensorrt as trt

    x = x.contiguous()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # Before 11 a network had to ask for its tensors' types to be kept.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_bytes(model, x)):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"TensorRT's parser refuses the network: {reasons}")
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise RuntimeError("TensorRT builds no engine of the network; its log says why")
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    if len(inputs) != 1 or len(outputs) != 1:
        raise RuntimeError(f"expected an engine with one input and one output, got {', '.join(names)}")
    y = torch.empty(tuple(engine.get_tensor_shape(outputs[0])), dtype=x.dtype, device=x.device)
    kept = runtime, engine, x  # a context keeps neither of the first alive, and reads the memory of the last
    context.set_tensor_address(inputs[0], x.data_ptr())
    context.set_tensor_address(outputs[0], y.data_ptr())

    def call() -> Tensor:
        if not context.execute_async_v3(_stream(kept[-1])):
            raise RuntimeError("TensorRT's engine does not run; its log says why")
        return y

    return PreparedCall(call, dtype_name(x.dtype), f"TensorRT {trt.__version__}")


def _stream(x: Tensor) -> int:
    """Return the address of the stream that work on this tensor belongs to; 0 on a CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def torch_tensorrt(model: nn.Module, x: Tensor) -> PreparedCall:
    """Convert the model by Torch-TensorRT as a whole: a layer that it cannot convert is an error, not eager code."""
    import torch_tensorrt as converter

    x = x.contiguous()
    with quiet():
        made = converter.compile(copy.deepcopy(model), ir="dynamo", arg_inputs=[x], require_full_compilation=True)
    return PreparedCall(inference(made, x), dtype_name(x.dtype), f"Torch-TensorRT {converter.__version__}")


class FrontendPlan(NamedTuple):
    """A convolution's graph in cuDNN's frontend.

    Attributes:
        graph: convolution, bias, (sum) and ReLU in one.
        tensors: its inputs in the order x, weight, bias, (added), then its output.
        workspace: memory that it needs.
    """

    graph: Any
    tensors: tuple[Any, ...]
    workspace: Tensor


class FrontendFused(CudnnFused):
    """The net of :class:`~.providers.CudnnFused` by cuDNN's frontend, which chooses among more engines."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.handle: Any = None
        self.plans: dict[Any, FrontendPlan] = {}

    def forward(self, x: Tensor) -> Tensor:
        import cudnn

        cudnn.set_stream(handle=self.handle, stream=_stream(x))
        return super().forward(x)

    def conv_relu(self, x: Tensor, conv: Any) -> Tensor:
        return self._run(x, conv, ())

    def conv_add_relu(self, x: Tensor, conv: Any, added: Tensor) -> Tensor:
        return self._run(x, conv, (added,))

    def _run(self, x: Tensor, conv: Any, added: tuple[Tensor, ...]) -> Tensor:
        inputs = (x, conv.weight, conv.bias.view(1, -1, 1, 1), *added)
        sides = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
            )
        ]
        shape = (x.shape[0], conv.out_channels, *sides)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        key = conv, x.shape
        if key not in self.plans:
            self.plans[key] = frontend_plan(self.handle, inputs, y, conv)
        plan = self.plans[key]
        plan.graph.execute(dict(zip(plan.tensors, (*inputs, y), strict=True)), plan.workspace, handle=self.handle)
        return y


def frontend_plan(handle: Any, inputs: tuple[Tensor, ...], y: Tensor, conv: Any) -> FrontendPlan:
    """Build the graph of a convolution with its bias, the sum if a fourth input is given, and ReLU."""
    import cudnn

    dtype = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[y.dtype]
    wide = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        handle=handle, io_data_type=dtype, intermediate_data_type=wide, compute_data_type=wide
    )  # fmt: skip
    x, weight, bias, *added = made = [graph.tensor_like(t) for t in inputs]
    out = graph.conv_fprop(
        image=x, weight=weight, padding=list(conv.padding), stride=list(conv.stride), dilation=list(conv.dilation)
    )
    out = graph.bias(input=out, bias=bias)
    for each in added:
        out = graph.add(a=out, b=each)
    out = graph.relu(input=out)
    out.set_output(True).set_data_type(dtype).set_dim(list(y.shape)).set_stride(list(y.stride()))
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=y.device)
    return FrontendPlan(graph, (*made, out), workspace)


def cudnn_frontend(model: nn.Module, x: Tensor) -> PreparedCall:
    """Run the net's convolutions by cuDNN's frontend, BatchNorm folded, channels_last."""
    import cudnn

    note = f"cuDNN frontend {cudnn.__version__}, cuDNN {cudnn.backend_version()}"
    module, x = nhwc(FrontendFused(model), x)
    module.handle = cudnn.create_handle()  # no part of a copy
    return PreparedCall(inference(module, x), dtype_name(x.dtype), note)


RUNTIMES = (
    Provider(
        "TensorRT, CUDA graph", False, _supports("tensorrt", "onnx", "onnxscript"), in_graph(tensorrt), "conv",
        compiles=True,
    ),
    Provider(
        "Torch-TensorRT, CUDA graph", False, _supports("torch_tensorrt"), in_graph(torch_tensorrt), "conv",
        compiles=True,
    ),
    Provider("cuDNN frontend, CUDA graph", False, _supports("cudnn"), in_graph(cudnn_frontend), "conv", compiles=True),
)  # fmt: skip
"""In the order of their rows."""


def any_installed() -> bool:
    """Return whether one of them may be there: whether it loads is for its row to say."""
    return any(importlib.util.find_spec(name) is not None for name in ("tensorrt", "torch_tensorrt", "cudnn"))
