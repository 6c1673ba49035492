"""Run inside an environment that is checked, with its interpreter alone: ``python -I probe.py native|pure``.

Prints versions and findings as one line of JSON; ends with an error if the package does not do what it should.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

import resnet_fast
from resnet_fast import native, numerics

TERMS = 9 * 512
"""Products per output of the largest convolution of ResNet-18."""


def randomize(net: nn.Module) -> nn.Module:
    """Give norms statistics that are not those of a new net: folding them must change something."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def equal_to_stock(stock: nn.Module, x: torch.Tensor, backend: str = "auto") -> float:
    """Return the error of the accelerated net in units of stock's own; raises if it is above its budget."""
    fused = resnet_fast.accelerate(copy.deepcopy(stock), backend=backend)
    with torch.inference_mode():
        reference = copy.deepcopy(stock).double()(x.double())
        report = numerics.compare(fused(x), reference, stock(x))
    budget = numerics.budget(report, torch.float32, TERMS)
    assert not report.mismatched and report.rel <= budget.rel and report.max_abs <= budget.max_abs, str(report)
    assert report.ratio is not None
    return round(report.ratio, 2)


def main() -> None:
    expected = sys.argv[1]
    here = Path(resnet_fast.__file__)
    assert here.is_relative_to(sys.prefix), f"expected the package of this environment, got {here}"
    torch.manual_seed(0)
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "torchvision": torchvision.__version__,
        "triton": metadata.version("triton"),
        "pip": metadata.version("pip"),
    }
    if expected == "interpret":  # TRITON_INTERPRET=1: Triton's kernels, on a CPU
        blocks = randomize(nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16)))
        found["error"] = equal_to_stock(blocks, torch.rand(1, 16, 8, 8), "triton")
        assert resnet_fast.stats()["calls"] == {"basic_block/triton": 2}, resnet_fast.stats()
    else:
        status = native.status()
        assert bool(status) == (expected == "native"), f"expected a {expected} package: {status}"
        found["error"] = equal_to_stock(randomize(torchvision.models.resnet18()), torch.rand(2, 3, 64, 64))
        calls = resnet_fast.stats()
        assert calls == {"calls": {"basic_block/onednn": 8, "stem/onednn": 1}, "fallbacks": {}}, calls
    print(json.dumps(found))


if __name__ == "__main__":
    main()
