"""Modules that stand for TensorRT and cuDNN's frontend, neither of which runs without a GPU.

They have the functions that benchmarks/runtimes.py calls, and compute on a CPU: the engine by ONNX Runtime, from the
very program that was exported; the graphs by PyTorch, node by node. They cannot show what the libraries accept.
"""

from __future__ import annotations

import ctypes
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class _Engine:
    """An engine and its execution context in one."""

    def __init__(self, program: bytes) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = self.session.get_inputs(), self.session.get_outputs()
        self.names = [each.name for each in (*self.inputs, *self.outputs)]
        self.num_io_tensors = len(self.names)
        self.addresses: dict[str, int] = {}

    def create_execution_context(self) -> _Engine:
        return self

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in [each.name for each in self.inputs] else "output"

    def get_tensor_shape(self, name: str) -> list[int]:
        return next(each.shape for each in (*self.inputs, *self.outputs) if each.name == name)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        (given,), (wanted,) = self.inputs, self.outputs
        count = int(np.prod(given.shape))
        x = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[given.name]))
        (y,) = self.session.run(None, {given.name: x.reshape(given.shape)})
        ctypes.memmove(self.addresses[wanted.name], y.ctypes.data, y.nbytes)
        return True


def tensorrt(refusal: str = "") -> Any:
    """Return the module. ``refusal``: what its parser says of every network; empty for one that takes all."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = "0.fake"
    module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    module.TensorIOMode = SimpleNamespace(INPUT="input")

    class OnnxParser:
        num_errors = 1

        def __init__(self, network: dict[str, bytes], logger: Any) -> None:
            self.network = network

        def parse(self, program: bytes) -> bool:
            self.network["program"] = program
            return not refusal

        def get_error(self, i: int) -> str:
            return refusal

    class Builder:
        def __init__(self, logger: Any) -> None:
            pass

        def create_network(self, flags: int) -> dict[str, bytes]:
            assert flags == 1 << 1  # strongly typed
            return {}

        def create_builder_config(self) -> None:
            pass

        def build_serialized_network(self, network: dict[str, bytes], config: None) -> bytes:
            return network["program"]

    module.OnnxParser, module.Builder = OnnxParser, Builder
    module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=_Engine)
    return module


class _Node:
    """A tensor of a graph: its value is computed from the graph's inputs."""

    def __init__(self, value: Any) -> None:
        self.value, self.dim, self.stride = value, None, None

    def set_output(self, output: bool) -> _Node:
        return self

    def set_data_type(self, dtype: torch.dtype) -> _Node:
        self.dtype = dtype
        return self

    def set_dim(self, dim: list[int]) -> _Node:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> _Node:
        self.stride = stride
        return self


class _Graph:
    def __init__(self, **options: Any) -> None:
        assert options["handle"] == "handle" and options["compute_data_type"] == torch.float32
        self.built = False

    def tensor_like(self, t: Tensor) -> _Node:
        node = _Node(None)
        node.value = lambda given: given[node].float()
        node.dim, node.stride = list(t.shape), list(t.stride())
        return node

    def conv_fprop(self, image: _Node, weight: _Node, **geometry: list[int]) -> _Node:
        return _Node(lambda given: F.conv2d(image.value(given), weight.value(given), **geometry))

    def bias(self, input: _Node, bias: _Node) -> _Node:
        return _Node(lambda given: input.value(given) + bias.value(given))

    def add(self, a: _Node, b: _Node) -> _Node:
        return _Node(lambda given: a.value(given) + b.value(given))

    def relu(self, input: _Node) -> _Node:
        return _Node(lambda given: input.value(given).relu())

    def build(self, modes: list[str]) -> None:
        self.built = True

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, tensors: dict[_Node, Tensor], workspace: Tensor, handle: str) -> None:
        assert self.built and handle == "handle"
        *inputs, (out, y) = tensors.items()
        for node, t in (*inputs, (out, y)):
            assert node.dim == list(t.shape) and node.stride == list(t.stride())
        y.copy_(out.value(dict(inputs)))


def cudnn() -> Any:
    """Return the module."""
    module: Any = ModuleType("cudnn")
    module.__version__, module.backend_version = "0.fake", lambda: 0
    module.data_type = SimpleNamespace(HALF=torch.float16, BFLOAT16=torch.bfloat16, FLOAT=torch.float32)
    module.heur_mode = SimpleNamespace(A="a", FALLBACK="fallback")
    module.create_handle, module.set_stream, module.pygraph = lambda: "handle", lambda handle, stream: None, _Graph
    return module
