"""Whole nets on the CUDA kernels, on CPU tensors in the emulator, as a user would run them: RESNET_FAST_EMULATE=1.

Each run is a process of its own because the switch is read when the backend is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from resnet_fast import native
from tests.support.processes import run_python

PROGRAM = """
import json, sys
import torch
import resnet_fast
from resnet_fast.io import weights
from resnet_fast.models import registry

name, dtype, size = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
net = registry.build(name, num_classes=10).eval()
with torch.no_grad():
    weights.calibrate(net, torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)))
net.to(dtype=dtype, memory_format=torch.channels_last)
x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
x = x.contiguous(memory_format=torch.channels_last)
with torch.inference_mode():
    with resnet_fast.use_backend("reference"):
        eager = net(x)
        double = net.double()(x.double())
    net.to(dtype)
    resnet_fast.accelerate(net, backend="cuda")
    y = net(x)
    again = net(x)
    told = resnet_fast.explain(net, x)
    def error(t):
        return float((t.double() - double).norm() / double.norm())
    print(json.dumps({
        "ours": error(y), "eager": error(eager), "same": torch.equal(y, again),
        "rows": [(r.layer, r.backend, r.detail) for r in told.rows],
        "calls": resnet_fast.stats()["calls"],
    }))
"""


def run(*arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    if not native.emulator_status():
        pytest.skip(native.emulator_status().reason)
    environment = {**os.environ, "RESNET_FAST_EMULATE": "1"}
    return run_python(program, *arguments, env=environment, timeout=600)


@pytest.mark.parametrize(("net", "dtype"), [("resnet50", "bfloat16"), ("resnet18", "float16")])
def test_a_net_through_the_emulator(net: str, dtype: str) -> None:
    done = run(net, dtype, "40")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ours"] <= 2 * told["eager"] and told["same"]
    assert {backend for _, backend, _ in told["rows"]} == {"cuda"}
    details = {layer: detail for layer, _, detail in told["rows"]}
    assert "stem_fwd" in details["conv1"] and "us predicted" in details["conv1"]
    if net == "resnet50":
        assert details["layer1.1"].startswith("bottleneck_fwd, the whole block")
        assert "not bottleneck_fwd: expected" in details["layer3.0"]
    assert not any("stock" in name or "reference" in name for name in told["calls"] if not name.endswith("/reference"))


def test_fp32_is_refused_before_any_launch() -> None:
    done = run("resnet18", "float32", "40")
    assert done.returncode != 0
    assert "BackendError: backend 'cuda' cannot run net" in done.stderr
    assert "expected one of float16, bfloat16, got float32; convert the model and its input" in done.stderr


def test_auto_never_chooses_the_emulator() -> None:
    program = """
import torch, resnet_fast
net = resnet_fast.accelerate(resnet_fast.resnet18().eval())
with torch.inference_mode():
    net(torch.randn(1, 3, 32, 32))
print(resnet_fast.stats()["calls"])
"""
    done = run(program=program)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cuda" not in done.stdout and "onednn" in done.stdout


def test_training_is_refused_with_a_sentence() -> None:
    program = """
import torch, resnet_fast
net = resnet_fast.accelerate(resnet_fast.resnet18().to(torch.bfloat16).train(), backend="cuda")
net(torch.randn(2, 3, 32, 32).to(torch.bfloat16))
"""
    done = run(program=program)
    assert "backend 'cuda' cannot run" in done.stderr and "expected a call without autograd" in done.stderr


INVARIANT = """
import torch
import resnet_fast
from resnet_fast.calls import Call, Conv, Norm
from torchvision.models.resnet import Bottleneck

def alike(run, x):
    with torch.inference_mode(), resnet_fast.batch_invariant(), resnet_fast.use_backend("cuda"):
        return torch.equal(run(x)[-2:], torch.cat([run(x[-2:-1].clone()), run(x[-1:].clone())]))

# 72 channels of 17 images of 32x32 pixels fill an H100 with wide tiles; one image gets narrow ones
weight = (torch.randn(72, 40, 1, 1) / 6).half()
conv = Conv(weight, None, (1, 1), (0, 0), (1, 1), 1)
wide = alike(lambda x: resnet_fast.ops.run(Call("conv_bn_act", x, (conv,), (Norm(),)), "cuda"),
             torch.randn(17, 40, 32, 32).half())
shortcut = torch.nn.Sequential(torch.nn.Conv2d(64, 256, 1, bias=False), torch.nn.BatchNorm2d(256))
block = Bottleneck(64, 64, downsample=shortcut).eval().half()
whole = alike(resnet_fast.accelerate(torch.nn.Sequential(block), "cuda"), torch.randn(3, 64, 9, 7).half())
print(wide, whole, resnet_fast.stats()["calls"])
"""


def test_images_are_computed_alike_in_any_batch() -> None:
    """Wide tiles and narrow ones add in one order, and a tile of pixels is within an image."""
    done = run(program=INVARIANT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("True True") and "reference" not in done.stdout
