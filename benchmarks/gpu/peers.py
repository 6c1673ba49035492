"""Who is measured on a GPU: stock PyTorch in its fastest settings, and ours, for inference and for a training step.

Each maker takes a stock net in eval mode (or training) and an input on the device and returns a callable. The paths
that the CPU bench has too come from ``providers.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import providers, train
from ..providers import inference, nhwc
from .common import Skipped
from .timing import graphed

OURS, OURS_GRAPH = "resnet_fast", "resnet_fast, CUDA graph"
BEST_STOCK = "cuDNN fused ops, CUDA graph"
Maker = Callable[[nn.Module, Tensor], Callable[[], Tensor]]


@dataclass(frozen=True)
class Peer:
    """A competitor at inference. ``plan``: the plan of roofline/byte_model.py that its kernels come to, None for ours;
    ``compiles``: it takes tens of seconds to get ready."""

    name: str
    make: Maker
    plan: str | None
    compiles: bool = False


class CudnnFused(nn.Module):
    """BatchNorm folded, every convolution with bias, (add) and ReLU in one cuDNN call: the fastest stock kernels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        from torch.fx.experimental.optimization import fuse

        self.model = fuse(model)

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self.model
        x = m.maxpool(_conv_relu(x, m.conv1))
        for layer in (m.layer1, m.layer2, m.layer3, m.layer4):
            for block in layer.children():
                parts = dict(block.named_children())
                shortcut = parts["downsample"].get_submodule("0")(x) if "downsample" in parts else x
                *inner, last = [parts[name] for name in ("conv1", "conv2", "conv3") if name in parts]
                for conv in inner:
                    x = _conv_relu(x, conv)
                x = torch.cudnn_convolution_add_relu(x, last.weight, shortcut, 1.0, last.bias, *_geometry(last))
        out: Tensor = m.fc(torch.flatten(m.avgpool(x), 1))
        return out


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _conv_relu(x: Tensor, conv: Any) -> Tensor:
    return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *_geometry(conv))


def _provider(name: str) -> Maker:
    (provider,) = providers.select((name,))
    return lambda model, x: provider.prepare(model, x).call


def _cudnn_fused(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    if x.device.type != "cuda":
        raise Skipped("cuDNN needs a GPU")
    module, x = nhwc(CudnnFused(model), x)
    return inference(module, x)


def in_graph(make: Maker) -> Maker:
    """The same, recorded once as a CUDA graph."""

    def maker(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        if x.device.type != "cuda":
            raise Skipped("CUDA graphs need a GPU")
        call = make(model, x)
        out: list[Tensor] = []

        def once() -> None:
            out[:] = [call()]

        replay = graphed(once)

        def again() -> Tensor:
            replay()
            return out[0]

        return again

    return maker


def _compiled(mode: str | None) -> Maker:
    """Inductor with frozen weights; ``mode`` as torch.compile takes it."""

    def maker(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        import torch._dynamo
        import torch._inductor.config as inductor

        if x.device.type != "cuda":
            raise Skipped("measured on a GPU only: resnet-fast bench compares it on the CPU")
        torch._dynamo.reset()
        module, x = nhwc(model, x)
        compiled = torch.compile(module, mode=mode, dynamic=False) if mode else torch.compile(module, dynamic=False)

        def call() -> Tensor:
            with torch.no_grad():
                return compiled(x)

        with inductor.patch(freezing=mode is not None):
            for _ in range(3):  # compiles, then records its graphs
                call()
        return call

    return maker


def _ours(**options: Any) -> Maker:
    def maker(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        import resnet_fast

        module, x = nhwc(model, x)
        if options.get("cuda_graph") and x.device.type != "cuda":
            raise Skipped("CUDA graphs need a GPU")
        try:
            module = resnet_fast.accelerate(module, backend="triton", **options)
        except TypeError as error:
            raise Skipped(f"not available: {error}") from error
        return inference(module, x)

    return maker


INFERENCE = (
    Peer("eager NCHW", _provider("eager-nchw"), "separate"),
    Peer("eager NHWC", _provider("eager-nhwc"), "separate"),
    Peer("folded NHWC", _provider("folded-nhwc"), "separate"),
    Peer("folded NHWC, CUDA graph", in_graph(_provider("folded-nhwc")), "separate"),
    Peer("cuDNN fused ops", _cudnn_fused, "conv"),
    Peer(BEST_STOCK, in_graph(_cudnn_fused), "conv"),
    Peer(OURS, _ours(), None),
    Peer(OURS_GRAPH, _ours(cuda_graph=True), None),
    Peer("torch.compile", _compiled(None), "conv", compiles=True),
    Peer("torch.compile reduce-overhead, frozen", _compiled("reduce-overhead"), "conv", compiles=True),
)
ANCHORS = (BEST_STOCK, OURS_GRAPH)
"""Measured again beside the compiled ones, so that ratios come from one run."""


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Forward, backward and SGD with momentum under bfloat16 autocast."""
    on_gpu = x.device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=on_gpu)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _trained(wrap: Callable[[nn.Module], Any]) -> Maker:
    def maker(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        module, x = nhwc(model, x)
        labels = torch.arange(x.shape[0], device=x.device) % 10
        return training_step(wrap(module.train()), x, labels)

    return maker


def _compiled_training(model: nn.Module) -> Any:
    if next(model.parameters()).device.type != "cuda":
        raise Skipped("measured on a GPU only")
    return train.compiled(model)


TRAINING = (
    Peer("eager NHWC, AMP bfloat16", _trained(lambda model: model), "separate"),
    Peer("resnet_fast, AMP bfloat16", _trained(train.accelerated), "separate"),
    Peer("torch.compile, AMP bfloat16", _trained(_compiled_training), "separate", compiles=True),
)
