"""Importing the package is free: no torchvision, no backend, no device query, no warning, little time."""

from __future__ import annotations

import ast

import pytest

from tests.support import ROOT
from tests.support.processes import run_python

PROBE = """
import sys, time, warnings
import torch
warnings.simplefilter("error")
asked = []
for module, names in ((torch.cuda, ("is_available", "device_count", "get_device_capability", "_lazy_init")),
                      (torch._C, ("_get_mkldnn_enabled", "_cuda_getDeviceCount"))):
    for name in names:
        if hasattr(module, name):
            setattr(module, name, lambda *a, name=name, **k: asked.append(name))
before = set(sys.modules)
start = time.perf_counter()
import resnet_fast
spent = time.perf_counter() - start
new = set(sys.modules) - before
print(sorted(m for m in new if m.split(".")[0] in ("torchvision", "timm", "matplotlib", "typer", "rich")))
print(sorted(m for m in new if m.startswith("resnet_fast.backends.")))
print(asked)
print(spent)
"""


def run(code: str) -> list[str]:
    done = run_python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.alone
def test_import_loads_no_backend_and_asks_no_device() -> None:
    foreign, backends, asked, spent = run(PROBE)
    assert foreign == "[]" and backends == "[]" and asked == "[]"
    assert float(spent) < 2.0  # generous for a busy machine; about a tenth of it on an idle one


OPS_FOLLOW_TORCH = """
import sys
import resnet_fast
assert "torch" not in sys.modules
import torch
assert "resnet_fast.ops" in sys.modules and torch.ops.resnet_fast.conv_bn_act.default is not None
assert type(torch.__loader__).__module__ != "resnet_fast.with_torch" and torch.__spec__.loader is torch.__loader__
assert resnet_fast.ops is sys.modules["resnet_fast.ops"]
"""


def test_torch_comes_later_and_the_ops_with_it() -> None:
    """``import resnet_fast`` does not import torch; a later import of torch brings the ops."""
    run(OPS_FOLLOW_TORCH)
    run("import resnet_fast; resnet_fast.ops.conv_bn_act; import torch; torch.ops.resnet_fast.stem.default")
    run("import resnet_fast, importlib.util as u; spec = u.find_spec('torch'); assert spec.loader.is_package('torch')")
    run("import resnet_fast, copy, importlib.util as u; copy.deepcopy(u.find_spec('torch')).loader.is_package('torch')")


BROKEN = """
import sys, warnings
import resnet_fast
sys.modules["resnet_fast.ops"] = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
assert any("the ops of resnet_fast are not defined" in str(w.message) for w in said), said
assert torch.ones(2).sum() == 2
"""


def test_ops_that_cannot_be_defined_leave_torch_usable() -> None:
    run(BROKEN)


def test_imports_point_down() -> None:
    """models > blocks > ops > dispatch > backends; the leaves import none of them."""
    ranks = {"models": 5, "blocks": 4, "ops": 3, "dispatch": 2, "backends": 1}
    wrong = []
    for path in (ROOT / "resnet_fast").rglob("*.py"):
        parts = path.relative_to(ROOT / "resnet_fast").parts
        if parts[0] not in ranks:
            continue
        for line in path.read_text().splitlines():
            if not line.startswith(("from .", "import resnet_fast", "from resnet_fast")):
                continue
            words = line.split()[1].removeprefix("resnet_fast").strip(".").split(".")
            level = len(line.split()[1]) - len(line.split()[1].lstrip("."))
            if line.startswith("from resnet_fast") or level == len(parts):
                target = words[0] or line.split()[3].strip("(,")
                if ranks.get(target, 0) > ranks[parts[0]]:
                    wrong.append(f"{path.name}: {line}")
    assert not wrong


def test_the_leaves_import_no_layer() -> None:
    shared = ("parameter_cache", "packing_budget", "paper_nets")
    for leaf in ("spec", "folding", "flags", "errors", "calls", "locks", *shared):
        layers = [name for name in ("models", "blocks", "ops", "dispatch", "backends")]
        text = (ROOT / "resnet_fast" / f"{leaf}.py").read_text()
        assert not [n for n in layers if f"from .{n}" in text or f"from resnet_fast.{n}" in text], leaf


def test_nothing_below_imports_the_training_program() -> None:
    """``training/`` is a program on top: the command line and the benchmarks alone know it."""
    package = ROOT / "resnet_fast"
    below = [p for p in package.rglob("*.py") if not {package / "training", package / "cli"} & set(p.parents)]
    wrong = []
    for path in below:
        where = ("resnet_fast", *path.relative_to(package).parent.parts)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                base = where[: len(where) - node.level + 1] if node.level else ()
                names = [".".join([*base, *filter(None, [node.module]), name]) for name in names]
            wrong += [f"{path.name}: {name}" for name in names if name.startswith("resnet_fast.training")]
    assert len(below) > 100 and not wrong
