"""The catalog: every op on every backend, availability with reasons, nothing loaded before it is needed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from resnet_fast import flags
from resnet_fast.dispatch import catalog
from tests.support import ROOT
from tests.support.op_cases import OPS
from tests.support.processes import run_python


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_one_implementation_per_backend(op: str) -> None:
    impls = catalog.impls(op)
    assert [i.backend for i in impls] == ["reference", "onednn", "triton", "cuda"] and all(i.op == op for i in impls)
    reference, onednn, triton, cuda = (i.rank for i in impls)
    assert reference < onednn < triton and reference < cuda < triton


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


def test_fingerprint_follows_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    before = catalog.fingerprint()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert catalog.fingerprint() != before


def test_without_triton_there_is_a_reason_and_no_import_error() -> None:
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"  # import triton raises ImportError, as on Windows
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else found(name, *a)\n"
        "import resnet_fast\n"
        "net = resnet_fast.resnet18().eval()\n"
        "print(resnet_fast.explain(net, torch.ones(1, 3, 32, 32)))\n"
        "try:\n"
        "    resnet_fast.accelerate(net, backend='triton')(torch.ones(1, 3, 32, 32))\n"
        "except resnet_fast.BackendError as error:\n"
        "    print(error)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    sentence = "expected Triton, got none installed; pip install triton (Linux only), or use another backend"
    assert f"not triton: {sentence}" in done.stdout and f"is not available: {sentence}" in done.stdout


def test_the_first_call_loads_the_backends() -> None:
    code = (
        "import sys, torch, resnet_fast\n"
        "loaded = lambda: [m for m in sys.modules if m.startswith('resnet_fast.backends.onednn')]\n"
        "assert not loaded()\n"
        "x, conv = torch.ones(1, 1, 2, 2), (torch.ones(1, 1, 1, 1), None, [1, 1], [0, 0], [1, 1], 1)\n"
        "torch.ops.resnet_fast.conv_bn_act(x, *conv, None, None, None, None, False, 0.0, 0.0, True)\n"
        "assert loaded() and 'torchvision' not in sys.modules\n"
    )
    done = run_python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_what_a_backend_wants_is_asked_of_its_implementation() -> None:
    """Nothing above the backends names one. ``tune`` is Triton's; "cuda" is a device type, too."""
    package = Path(catalog.__file__).parents[1]
    files = [f for name in ("dispatch", "ops", "blocks", "models") for f in (package / name).rglob("*.py")]
    wrong = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in ("onednn", "triton") and path.name != "tune.py":
                wrong.append(f"{path.name}:{node.lineno}")
    assert len(files) > 30 and not wrong


def test_backends_never_import_dispatch() -> None:
    folder = Path(catalog.__file__).parents[1] / "backends"
    files = list(folder.rglob("*.py"))
    own = re.compile(r"\.dispatch\b|\bimport dispatch\b")
    assert files and not [f for f in files if own.search("\n".join(_imports(f)))]


def _imports(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
