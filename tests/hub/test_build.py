"""What ``python -m resnet_fast.hub.build`` writes: modules that need neither this package nor torchvision."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from resnet_fast import UserError
from resnet_fast.hub import build
from tests.support import hub_package
from tests.support.processes import run_python

LOADED_ALONE = """
import copy, importlib.util, json, sys, types
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("resnet_fast", "torchvision", "filelock", "rich", "safetensors", "typer"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
folder = Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_bytes())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
package = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)

import torch
from torch import nn

class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.relu, self.downsample = nn.ReLU(), None

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y))))) + x)

model, x = Bottleneck().eval(), torch.randn(2, 16, 8, 8)
fused = copy.deepcopy(model)
fused.forward = types.MethodType(package.layers.Bottleneck.forward, fused)
with torch.no_grad(), package.strict():
    torch.testing.assert_close(fused(x), model(x))
print(sorted(package.stats()["calls"].items()))
"""


@pytest.mark.alone
def test_the_package_works_where_resnet_fast_and_torchvision_are_absent(tmp_path: Path) -> None:
    done = run_python(LOADED_ALONE, hub_package.built() / "build" / "torch-cuda", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ((call, count),) = eval(done.stdout)
    assert call.startswith("bottleneck/") and not call.endswith("/stock") and count == 1


def test_metadata_describes_the_folder() -> None:
    ids = set()
    for variant, backend in (("torch-cuda", "cuda"), ("torch-cpu", "cpu")):
        folder = hub_package.built() / "build" / variant
        metadata = json.loads((folder / "metadata.json").read_bytes())
        assert metadata["id"].isidentifier() and metadata["id"].startswith(f"_resnet_fast_{backend}_")
        assert metadata["backend"]["type"] == backend and metadata["license"] == "Apache-2.0"
        digest = {
            path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "metadata.json" and path.suffix != ".pyc"
        }
        assert metadata["digest"] == {"algorithm": "sha256", "files": digest}
        ids.add(metadata["id"])
    assert len(ids) == 2


def test_old_releases_find_the_package_in_a_folder_of_its_name() -> None:
    package = hub_package.loaded()
    file = hub_package.built() / "build" / "torch-cuda" / "resnet_fast" / "__init__.py"
    spec = importlib.util.spec_from_file_location("found_by_folder", file)
    assert spec is not None and spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    assert shim.layers is package.layers and shim.__all__ == package.__all__


def test_a_build_replaces_a_build_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([str(tmp_path)]) == 0
    cuda = tmp_path / "build" / "torch-cuda"
    first = json.loads((cuda / "metadata.json").read_bytes())
    (cuda / "left_over.py").touch()
    assert build.main([str(tmp_path)]) == 0
    assert json.loads((cuda / "metadata.json").read_bytes()) == first and not (cuda / "left_over.py").exists()
    (cuda / "metadata.json").write_text("{}")
    capsys.readouterr()
    assert build.main([str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "absent or built before, got something else; name another folder" in told
    assert (cuda / "metadata.json").read_text() == "{}"


@pytest.mark.parametrize("line", ["import resnet_fast.flags", "from timm import layers", "from .. import accelerate"])
def test_a_module_that_needs_what_kernels_does_not_install_stops_the_build(line: str) -> None:
    with pytest.raises(UserError, match=r"expected infer\.py to import"):
        list(build._imports(build.PACKAGE / "ops" / "infer.py", f"def f():\n    {line}\n"))
