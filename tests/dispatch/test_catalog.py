"""The catalog: every op on every backend, availability with reasons, nothing loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from opcases import OPS

from resnet_fast import flags
from resnet_fast.dispatch import catalog


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_one_implementation_per_backend(op: str) -> None:
    impls = catalog.impls(op)
    assert [i.backend for i in impls] == ["reference", "onednn"] and all(i.op == op for i in impls)
    assert impls[0].rank < impls[1].rank


def test_names_are_those_of_the_flag() -> None:
    assert {"auto", *catalog.availability()} == set(flags.BACKENDS)


def test_availability_gives_a_reason_for_each_no() -> None:
    for name, verdict in catalog.availability().items():
        assert bool(verdict) == (name in ("reference", "onednn"))
        assert verdict or (verdict.reason.startswith("expected ") and ", got " in verdict.reason)


def test_fingerprint_follows_the_switches() -> None:
    before = catalog.fingerprint()
    with torch.backends.mkldnn.flags(enabled=False):
        assert catalog.fingerprint() != before
    assert catalog.fingerprint() == before


def test_the_first_call_loads_the_backends() -> None:
    code = (
        "import sys, torch, resnet_fast\n"
        "loaded = lambda: [m for m in sys.modules if m.startswith('resnet_fast.backends.onednn')]\n"
        "assert not loaded()\n"
        "torch.ops.resnet_fast.bn_act(torch.ones(1, 1, 2, 2), None, None, None, None, False, 0.0, 0.0, True)\n"
        "assert loaded() and 'torchvision' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_backends_never_import_dispatch() -> None:
    folder = Path(catalog.__file__).parents[1] / "backends"
    files = list(folder.rglob("*.py"))
    assert files and not [f for f in files if "dispatch" in "".join(_imports(f))]


def _imports(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
