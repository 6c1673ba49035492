"""Run the Python code and the commands of the pages, with what each page leaves to its reader.

A Python block that cannot run everywhere says so in its first line, where a reader sees it: ``# needs a GPU``. A
command that is not run has its reason in :data:`NOT_RUN`.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

import resnet_fast
from resnet_fast import native
from resnet_fast.benchmarks import emulation
from resnet_fast.cli import main as cli
from resnet_fast.io.weight_facts import Facts
from resnet_fast.models import registry
from resnet_fast.simulation import MemoryRange
from resnet_fast.tools import exporting
from resnet_fast.tools.ptx_machine.recorded import recorded
from tests.support.bottleneck_cases import block
from tests.support.toy_kernels import copy_kernel

NEEDS = re.compile(r"# needs (.*)")
GPU = "a GPU"
GPU_AND_NETWORK = "a GPU and a network"
Names = dict[str, Any]


def needs(code: str) -> str:
    """Return what the first line of a block says that it needs, empty for nothing."""
    found = NEEDS.match(code)
    return found[1] if found else ""


def is_here(need: str) -> bool:
    """Return whether a test has it. None has a network."""
    return need == GPU and torch.cuda.is_available()


def a_net_in_training() -> Names:
    images, labels = torch.randn(2, 3, 64, 64, device="cuda"), torch.tensor([0, 1], device="cuda")
    return {
        "resnet_fast": resnet_fast, "torch": torch, "model": resnet18(), "images": images, "labels": labels,
        "criterion": torch.nn.CrossEntropyLoss(),
    }  # fmt: skip


def a_bottleneck() -> Names:
    if not native.status():
        pytest.skip(native.status().reason)
    made = block(1, 8, 8, 256, 64, 256, torch.bfloat16)
    b1, b2, b3 = made.biases
    return {"x": made.x, "weights": made.packed(), "b1": b1, "b2": b2, "b3": b3, "emulation": emulation}


def a_launch_and_a_block() -> Names:
    if not native.ptx_status():
        pytest.skip(native.ptx_status().reason)
    photo = torch.randn(1, 32, 6, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    net = resnet_fast.accelerate(BasicBlock(32, 32).to(photo.dtype).eval().requires_grad_(False))
    made = block(1, 8, 8, 256, 64, 256, torch.bfloat16)
    b1, b2, b3 = made.biases
    return {
        "kernel": copy_kernel, "grid": (2,), "x": torch.randn(1500), "y": torch.empty(1500), "n": 1500, "block": net,
        "photo": photo, "use_backend": resnet_fast.use_backend, "images": made.x, "weights": made.packed(), "b1": b1,
        "b2": b2, "b3": b3,
    }  # fmt: skip


def a_kernel_and_its_walk() -> Names:
    for module in ("_sm", "_sass", "_ptx"):
        pytest.importorskip(f"resnet_fast.{module}", reason="built with RESNET_FAST_BUILD_HOST=1", exc_type=ImportError)
    n = 264 * 1024
    with recorded(90) as (machine, launches):
        copy_kernel[(264,)](torch.randn(n), torch.empty(n), n, BLOCK=1024)
    ranges = tuple(MemoryRange(at, len(content), name) for at, content, name, _, _ in launches[0].ranges)
    compiled = types.SimpleNamespace(asm={"cubin": machine.launches[0].binary})
    images = torch.randn(1, 32, 6, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    net = resnet_fast.accelerate(BasicBlock(32, 32).to(images.dtype).eval())
    return {
        "compiled": compiled, "parameters": tuple(launches[0].given[3]), "memory": ranges, "net": net, "images": images
    }  # fmt: skip


def exported_files() -> Names:
    """Write net.pt2 and net.onnx to the current folder."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    facts = Facts("cifar_resnet20", 16, ("cat", "dog"), (0.5,) * 3, (0.25,) * 3, 1.0)
    net = registry.build("cifar_resnet20", num_classes=2).eval()
    for name in ("net.pt2", "net.onnx"):
        exporting.export(net, facts, Path(name))
    return {"json": json, "onnxruntime": onnxruntime, "torch": torch, "x": torch.randn(1, 3, 16, 16).numpy()}


GIVEN: dict[str, Callable[[], Names]] = {
    "docs/training.md": a_net_in_training,
    "docs/cuda-kernels.md": a_bottleneck,
    "docs/cycle-model.md": a_kernel_and_its_walk,
    "docs/ptx-machine.md": a_launch_and_a_block,
    "docs/trained-weights.md": exported_files,
}
"""Page -> the names that its text takes as known."""


NOT_RUN = {
    r"make [\w-]+( ARGS=\".*\")?": "installs, or runs other tests; that the target exists is tested",
    r"\.ci/run": "runs everything, these tests included",
    r"pip install .+": "changes the environment; tests/test_packaging.py builds and installs the package",
    r"(TRITON_INTERPRET=1 )?\.venv/bin/python -m pytest .+": "runs other tests; that its files exist is tested",
    r"(\.venv/bin/)?python -m resnet_fast\.benchmarks\..+": "takes minutes; that the module exists is tested",
    r"\.venv/bin/python -m tests\.release\..+": "downloads torch; tests/test_release.py tests its parts",
    r"resnet-fast bench .+": "takes minutes; tests/cli/test_bench.py runs it on a small net",
    r"resnet-fast train( .+)?": "takes minutes or needs data; tests/training trains, also to the end",
    r"torchrun .+": "needs eight GPUs; tests/training/test_distributed.py runs several processes",
    r"resnet-fast reproduce all .+": "takes hours; tests/cli/test_reproduce.py runs a shorter one",
    r"resnet-fast validate .+ --data-path /data/imagenet": "needs ImageNet",
}
"""Commands of ``bash`` blocks that no test runs as printed, and why."""


def reasons(command: str) -> list[str]:
    """Return why a command is not run; empty for one that is."""
    return [why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)]


def a_trained_run() -> None:
    """Write what the commands of trained-weights.md read: photos/ and a run in out/train/run."""
    from resnet_fast.io import images

    Path("photos").mkdir()
    for photo in images.load((), limit=2):
        small = Image.fromarray(photo.pixels[:, ::8, ::8].permute(1, 2, 0).numpy())
        small.save(f"photos/{Path(photo.name).stem}.png")
    assert cli.main(["train", "--steps", "2", "--out", "out/train/run"]) == 0


FILES: dict[str, Callable[[], None]] = {"docs/trained-weights.md": a_trained_run}
"""Page -> what writes the files that its commands read, into the current folder."""


def run(page: str, blocks: list[str]) -> Names:
    """Run the blocks of a page in order, as one program, and return the names that they defined.

    They run inside a module, as a reader's program does: classes that they define belong to it.
    """
    module = types.ModuleType(re.sub(r"\W", "_", page))
    names = vars(module)
    names.update(GIVEN.get(page, dict)())
    sys.modules[module.__name__] = module
    try:
        for code in blocks:
            exec(compile(code, page, "exec"), names)
    finally:
        del sys.modules[module.__name__]
    return names
