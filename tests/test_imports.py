"""Importing the package is free: no torchvision, no backend, no device query, no warning, little time.

`make lint` checks which module may import which (import-linter's contracts in pyproject.toml).
"""

from __future__ import annotations

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
