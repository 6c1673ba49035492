"""Measure the way of a new user: from no environment to the first image through a fused net, phase by phase.

    .venv/bin/python -m tests.release.first_image build/release/files/*-abi3-*.whl

pip runs with this machine's settings and without its cache, as it would for the first time. The environment is made in
a temporary folder and removed. Times are wall-clock seconds: run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from resnet_fast.benchmarks.markdown import RIGHT, table
from tests.release.artifacts import ReleaseError, run

FIRST = """
import json, time
at = [time.perf_counter()]
import torch, torchvision, resnet_fast
at.append(time.perf_counter())
model = torchvision.models.get_model(NET, weights=None).eval()
at.append(time.perf_counter())
resnet_fast.accelerate(model)
images = torch.rand(1, 3, 224, 224)
with torch.inference_mode():
    model(images)
at.append(time.perf_counter())
calls, fallbacks = resnet_fast.stats().values()
assert calls and not fallbacks and not any(name.endswith("/stock") for name in calls), resnet_fast.stats()
phases = ["import torch, torchvision, resnet_fast", "build the stock net", "accelerate it, one image of 224x224"]
print(json.dumps([dict(zip(phases, (b - a for a, b in zip(at, at[1:])))), torch.__version__]))
"""


def measure(wheel: Path, python: Path, torch: str, net: str) -> tuple[dict[str, float], str]:
    """Return seconds by phase, and the version of torch that was installed.

    Raises:
        ReleaseError: a phase failed; the image did not run fused.
    """
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="resnet_fast_first_image_") as folder:
        inside = Path(folder) / "venv" / "bin" / "python"
        pip = [inside, "-m", "pip", "install", "--no-cache-dir"]
        phases: dict[str, list[object]] = {
            "create the environment": [python, "-m", "venv", inside.parents[1]],
            f"pip install {torch} torchvision": [*pip, torch, "torchvision"],
            f"pip install {wheel.name}": [*pip, wheel.resolve()],
        }
        for phase, command in phases.items():
            started = time.perf_counter()
            run(command, env=own, cwd=folder)
            seconds[phase] = time.perf_counter() - started
        started = time.perf_counter()
        said = run([inside, "-I", "-c", FIRST.replace("NET", repr(net))], env=own, cwd=folder)
        whole = time.perf_counter() - started
    first, version = json.loads(said.splitlines()[-1])
    return {**seconds, **first, "start and end Python": whole - sum(first.values())}, version


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.release.first_image", description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="of this package; make release builds it")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter of the environment")
    parser.add_argument("--torch", default="torch", help="requirement, for example torch==2.14.1")
    parser.add_argument("--net", default="resnet50", help="torchvision's name of the net")
    given = parser.parse_args(arguments)
    if not given.wheel.is_file():
        print(f"expected a wheel, got {given.wheel}; build it with make release", file=sys.stderr)
        return 1
    try:
        seconds, version = measure(given.wheel, given.python, given.torch, given.net)
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1
    rows = [(phase, f"{value:.1f}") for phase, value in seconds.items()]
    print(f"measured: {platform.platform()}, {os.cpu_count()} CPUs, torch {version}, {given.net}\n")
    print(table(["phase", "seconds"], [*rows, ("all", f"{sum(seconds.values()):.1f}")], ["---", RIGHT]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
