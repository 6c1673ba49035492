"""The generated tables against the real nets: every convolution, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.errors import UserError
from resnet_fast.models import registry
from resnet_fast.spec import ConvSpec
from resnet_fast.tuning import shapes
from tests.support.processes import run_python

TORCHVISION = [n for n, a in shapes.ARCHS.items() if a.stem == "imagenet" and a.shortcut]
BOTTLENECK = [n for n in TORCHVISION if shapes.ARCHS[n].block == "bottleneck"]


def _geometry(spec: ConvSpec) -> tuple[Any, ...]:
    return (
        *((spec.n, spec.ci, spec.h, spec.w), (spec.n, spec.co, spec.ho, spec.wo), (spec.r, spec.s)),
        *(spec.stride, spec.padding, spec.dilation, spec.groups),
    )


def _seen(model: nn.Module, batch: int, hw: tuple[int, int]) -> dict[str, tuple[Any, ...]]:
    """Return what plain forward hooks see at every convolution of ``model``, in order of execution."""
    seen: dict[str, tuple[Any, ...]] = {}

    def hook(name: str) -> Any:
        def record(m: nn.Conv2d, x: tuple[torch.Tensor], y: torch.Tensor) -> None:
            seen[name] = (
                *(tuple(x[0].shape), tuple(y.shape), m.kernel_size),
                *(m.stride, m.padding, m.dilation, m.groups),
            )

        return record

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        model.eval()(torch.empty(batch, 3, *hw, device="meta"))
    return seen


def _assert_equal_to_net(name: str, batch: int, hw: tuple[int, int], build: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = registry.build(name, **build)
    expected = {f"{shapes.ARCHS[name].key}.{k}": v for k, v in _seen(model, batch, hw).items()}
    got = {k: _geometry(v) for k, v in shapes.problems(name, batch, hw, **build).items()}
    assert list(got.items()) == list(expected.items())


@pytest.mark.parametrize("name", [n for n in shapes.ARCHS if n != "cifar_resnet1202"])
def test_every_convolution_is_the_nets(name: str) -> None:
    side = shapes.ARCHS[name].image
    _assert_equal_to_net(name, 2, (side, side), {})


@pytest.mark.slow
def test_every_convolution_of_1202_layers() -> None:
    _assert_equal_to_net("cifar_resnet1202", 1, (32, 32), {})
    assert len(shapes.problems("cifar_resnet1202")) == 1201  # and the fc layer makes 1202


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
@pytest.mark.parametrize("stride_in_1x1", [False, True])
@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_variants_of_imagenet_nets(name: str, shortcut: str, stride_in_1x1: bool) -> None:
    _assert_equal_to_net(name, 1, (97, 130), {"shortcut": shortcut, "stride_in_1x1": stride_in_1x1})


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_variants_of_cifar_nets(shortcut: str) -> None:
    _assert_equal_to_net("cifar_resnet20", 3, (33, 29), {"shortcut": shortcut})


@pytest.mark.parametrize("dilate", [(False, False, True), (False, True, True), (True, True, True), (True, False, True)])
def test_dilation_in_place_of_stride(dilate: tuple[bool, ...]) -> None:
    _assert_equal_to_net("resnet50", 1, (65, 65), {"replace_stride_with_dilation": dilate})


@pytest.mark.parametrize("name", BOTTLENECK)
def test_every_bottleneck_net_dilates(name: str) -> None:
    _assert_equal_to_net(name, 1, (64, 64), {"replace_stride_with_dilation": (False, True, True)})


def test_dilation_leaves_the_v1_stride_where_nothing_is_dilated() -> None:
    options = {"replace_stride_with_dilation": (False, False, True), "stride_in_1x1": True}
    _assert_equal_to_net("resnet50", 1, (64, 64), options)


@pytest.mark.parametrize("side", [1, 2, 17])
def test_tiny_images_fit_as_in_torch(side: int) -> None:
    _assert_equal_to_net("resnet50", 1, (side, side), {})


def test_epilogues_are_those_of_fused_inference() -> None:
    r50 = shapes.problems("resnet50")
    assert str(r50["r50.conv1"].epilogue) == "bn+relu+maxpool3/2"
    assert [str(r50[f"r50.layer1.0.{c}"].epilogue) for c in ("conv1", "conv2", "conv3", "downsample.0")] == [
        *("bn+relu", "bn+relu", "bn+add+relu", "bn"),
    ]
    c20, p18 = shapes.problems("cifar_resnet20"), shapes.problems("plain18")
    assert str(c20["c20.conv1"].epilogue) == "bn+relu"
    assert str(c20["c20.layer2.0.conv2"].epilogue) == "bn+add+relu"
    assert str(p18["p18.layer2.0.conv2"].epilogue) == "bn+relu"


def test_named_problem_is_the_papers() -> None:
    spec = shapes.problems("resnet50", batch=8, dtype="bfloat16", grad=True, batch_stats=True)["r50.layer3.0.conv2"]
    assert (spec.n, spec.h, spec.ci, spec.co, spec.r, spec.stride, spec.dtype) == (
        8,
        28,
        256,
        256,
        3,
        (2, 2),
        "bfloat16",
    )
    assert spec.grad and spec.batch_stats


@pytest.mark.parametrize(
    ("option", "first", "later"),
    [("A", "given", "identity"), ("B", "projection", "identity"), ("C", "projection", "projection")],
)
def test_blocks_name_their_shortcut(option: str, first: str, later: str) -> None:
    found = shapes.blocks("resnet50", shortcut=option)
    assert len(found) == 16
    assert found["r50.layer2.0"].shortcut == first
    assert found["r50.layer2.1"].shortcut == later
    assert {b.op for b in found.values()} == {"bottleneck"}


@pytest.mark.parametrize("name", TORCHVISION)
def test_blocks_hold_the_same_convolutions(name: str) -> None:
    convs = [c for b in shapes.blocks(name, batch=2).values() for c in b.convs]
    assert convs == list(shapes.problems(name, batch=2).values())[1:]


def test_plain_nets_have_no_residual_blocks() -> None:
    assert shapes.blocks("cifar_plain20") == {}


def test_keys_are_unique() -> None:
    assert len({a.key for a in shapes.ARCHS.values()}) == len(shapes.ARCHS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "resnet51"}, r"got 'resnet51'; did you mean .*resnet50"),
        ({"name": "zzz"}, r"choose one of resnet18, "),
        ({"name": "resnet50", "image": 0}, r"at least 1x1 pixels, got 0"),
        ({"name": "resnet50", "image": (3, -1)}, r"got \(3, -1\)"),
        ({"name": "resnet50", "batch": -1}, r"0 or more images, got -1"),
        ({"name": "resnet50", "dtype": "float31"}, r"did you mean float32"),
        ({"name": "resnet50", "shortcut": "D"}, r"expected shortcut A, B or C, got 'D'"),
        ({"name": "plain18", "shortcut": "A"}, r"expected a residual net .*got plain18"),
        ({"name": "cifar_resnet20", "stride_in_1x1": True}, r"got cifar_resnet20"),
        ({"name": "resnet18", "replace_stride_with_dilation": (False, False, True)}, r"basic blocks of resnet18"),
        ({"name": "resnet50", "replace_stride_with_dilation": (True,)}, r"with 3 values, got 1"),
    ],
)
def test_bad_input_says_what_to_do(call: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shapes.problems(**call)


def test_empty_batch_is_a_problem_without_work() -> None:
    assert {c.macs() for c in shapes.problems("resnet18", batch=0).values()} == {0}


def test_needs_no_torch() -> None:
    # The package's own __init__ imports torch for its ops, so a bare package of the same path stands in for it.
    code = (
        f"import sys, types; p = types.ModuleType('resnet_fast'); p.__path__ = {list(resnet_fast.__path__)!r};"
        "sys.modules.update(resnet_fast=p, torch=None); import resnet_fast.roofline.prediction;"
        "from resnet_fast.devices import H100; from resnet_fast.tuning import shapes;"
        "print(len(shapes.problems('resnet50')), H100.name)"
    )
    done = run_python(code)
    assert done.stdout.split()[:1] == ["53"], done.stderr
