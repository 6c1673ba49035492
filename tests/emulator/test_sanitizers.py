"""The emulator under AddressSanitizer and UndefinedBehaviorSanitizer: kernels as they are, and mistakes that its own
checks cannot see, because they bypass the vocabulary.

Each run is a process of its own: the sanitizer must be loaded from the start (LD_PRELOAD).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from resnet_fast import native
from resnet_fast.benchmarks import emulation
from resnet_fast.benchmarks.emulation import SANITIZED, Edit
from tests.support import ROOT
from tests.support.processes import run_python

pytestmark = pytest.mark.slow

PROGRAM = """
from pathlib import Path
import torch
from tests.support.bottleneck_cases import block
from resnet_fast.benchmarks.emulation import B200, H100, Emulator
for channels in ((256, 64, 256), (256, 128, 256), (64, 64, 256)):
    for device in (B200, H100):
        with Emulator(Path({module!r}), seed=1, **device | {{"sms": 2}}):
            y = block(1, 9, 8, *channels, torch.bfloat16).run()
        assert not y.isnan().any()
print("finished")
"""


def run(edits: tuple[Edit, ...] = ()) -> subprocess.CompletedProcess[str]:
    if not native.status():
        pytest.skip(native.status().reason)
    # libstdc++ too: Python itself does not have it, and the sanitizer looks for what throws at its start.
    found = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("the compiler has no libasan.so (Debian: it comes with g++)")
    module = emulation.build(SANITIZED, edits)
    program = PROGRAM.format(module=str(module))
    # Python and torch keep memory until the end: leaks are not what is looked for.
    options = {
        "LD_PRELOAD": ":".join(map(os.path.realpath, found)),
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
    }
    return run_python(program, cwd=ROOT, env={**os.environ, **options}, timeout=300)


def test_kernels_are_clean() -> None:
    done = run()
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr[-3000:]


def test_plain_read_past_the_end_of_a_tensor() -> None:
    """``bias3[co]``, read through the pointer itself: one element too far."""
    done = run(
        (
            Edit(
                "bottleneck_fwd.cu",
                "store_pixel<V::kCo>",
                "if (p.bias3[V::kCo] > 1e30f) out[0] = 0; store_pixel<V::kCo>",
            ),
        )
    )
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "bottleneck_fwd.cu" in done.stderr


def test_undefined_arithmetic() -> None:
    done = run((Edit("bottleneck_fwd.cu", "store_pixel<V::kCo>", "out[0] <<= p.n * 40; store_pixel<V::kCo>"),))
    assert done.returncode != 0
    assert "runtime error: shift exponent 40 is too large" in done.stderr
