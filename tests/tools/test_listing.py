"""The list of nets: counted without torch, equal to what a run on the meta device counts."""

from __future__ import annotations

import pytest

from resnet_fast.errors import UserError
from resnet_fast.models import registry
from resnet_fast.tools import listing
from resnet_fast.tools.summary import compare
from tests.support.processes import run_python

SMALL = ("resnet18", "resnext50_32x4d", "wide_resnet50_2", "plain18", "cifar_resnet20", "cifar_plain20", "vgg16")
LARGE = tuple(name for name in registry.names() if name not in (*SMALL, "cifar_resnet1202"))


def check(names: tuple[str, ...]) -> None:
    listed = {entry.name: entry for entry in listing.entries()}
    for row in compare(names):
        entry = listed[row.name]
        assert (entry.params, entry.macs, entry.image) == (row.params, row.macs, row.image), row.name


def test_every_net_is_listed_with_its_source() -> None:
    found = {entry.name: entry for entry in listing.entries()}
    assert tuple(found) == registry.names()
    assert {entry.source for entry in found.values()} == {"torchvision", "paper", "compared"}
    assert set(listing.COMPARED) == set(registry.COMPARED)
    assert found["resnet50"].source == "torchvision" and found["plain34"].source == "paper"
    assert (found["resnet50"].blocks, found["resnet50"].fused) == (16, 16) and found["vgg16"].blocks == 0


def test_counts_are_those_of_the_summary() -> None:
    check(SMALL)


@pytest.mark.slow
def test_counts_are_those_of_the_summary_for_the_large_nets() -> None:
    check(LARGE)


def test_listing_imports_no_torch() -> None:
    code = "import sys; from resnet_fast.tools import listing; listing.entries(); sys.exit('torch' in sys.modules)"
    assert run_python(code).returncode == 0


def test_parts_and_patterns() -> None:
    names = ("resnet18", "resnet50", "cifar_resnet20", "wide_resnet50_2")
    assert listing.matching(names, ()) == list(names)
    assert listing.matching(names, ("50",)) == ["resnet50", "wide_resnet50_2"]
    assert listing.matching(names, ("RESNET*",)) == ["resnet18", "resnet50"]
    assert listing.matching(names, ("*resnet2?", "18")) == ["resnet18", "cifar_resnet20"]
    with pytest.raises(UserError, match="did you mean resnet50"):
        listing.matching(names, ("rsnet50",))
    with pytest.raises(UserError, match="lists them all"):
        listing.matching(names, ("18", "xyz"))


def test_timm_nets_say_how_many_blocks_run_fused() -> None:
    pytest.importorskip("timm")
    names = listing.timm_names(("resnet18",))
    assert "resnet18" in names and "seresnet18" in listing.timm_names(("seresnet18",))
    (plain,) = listing.timm_entries(["resnet18"])
    assert (plain.params, plain.macs, plain.blocks, plain.fused) == (11_689_512, 1_814_073_344, 8, 8)
    (excited,) = listing.timm_entries(["seresnet18"])  # its blocks run fused around squeeze-and-excitation
    assert (excited.blocks, excited.fused) == (8, 8)
    assert list(listing.timm_entries(["resnet50_gn"])) == []  # GroupNorm in every block
