"""Building any net by name."""

from __future__ import annotations

import pytest
import torch
import torchvision

from resnet_fast import paper_nets
from resnet_fast.errors import UserError
from resnet_fast.models import registry
from tests.support.processes import run_python


def test_names_cover_torchvision_the_paper_and_what_it_compares_with() -> None:
    names = registry.names()
    assert len(names) == len(set(names)) == 10 + 2 + 6 + 5 + 3
    in_torchvision = {n for n in torchvision.models.list_models(module=torchvision.models.resnet)}
    assert in_torchvision <= set(names)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.endswith("1202") else n for n in registry.names()]
)
def test_every_name_builds_and_runs(name: str) -> None:
    with torch.device("meta"):
        model = registry.build(name, num_classes=7).eval()
        side = registry.image_size(name)
        assert model(torch.empty(1, 3, side, side)).shape == (1, 7)


def test_torchvision_names_are_stock() -> None:
    torch.manual_seed(0)
    ours = registry.build("resnet18", num_classes=3)
    torch.manual_seed(0)
    stock = torchvision.models.resnet18(num_classes=3)
    assert type(ours) is type(stock)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))


def test_variants_reach_the_net() -> None:
    with torch.device("meta"):
        v1 = registry.build("resnet50", stride_in_1x1=True)
        a = registry.build("resnet50", shortcut="A")
        c = registry.build("cifar_resnet20", shortcut="C")
    assert (v1.layer2[0].conv1.stride, a.layer2[0].conv1.stride) == ((2, 2), (1, 1))
    assert isinstance(a.layer2[0].downsample, paper_nets.PadShortcut)
    assert isinstance(c.layer1[1].downsample, torch.nn.Sequential)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet5", {}, "did you mean .*resnet50"),
        ("RESNET", {}, "choose one of resnet18"),
        ("vgg16", {"shortcut": "A"}, "residual net .*got vgg16"),
        ("plain34", {"shortcut": "A"}, "got plain34"),
        ("googlenet", {"stride_in_1x1": True}, "got googlenet"),
        ("resnet50", {"shortcut": "X"}, "got 'X'"),
    ],
)
def test_bad_requests(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.build(name, **options)


def test_image_size_of_an_unknown_net() -> None:
    assert (registry.image_size("vgg19"), registry.image_size("cifar_plain20")) == (224, 32)
    with pytest.raises(UserError, match="cifar_plain2"):
        registry.image_size("cifar_plain2")


def test_importing_the_registry_imports_no_torchvision() -> None:
    code = "import sys, resnet_fast.models.registry as r; r.names(); print('torchvision' in sys.modules)"
    done = run_python(code, check=True)
    assert done.stdout.strip() == "False"
