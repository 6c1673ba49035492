"""The paper's nets: structure, shortcuts, initialisation, and what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import paper_nets
from resnet_fast.errors import UserError

CIFAR = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}


def _randomise_norms(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("hw", [(8, 8), (7, 10), (1, 1)])
def test_pad_shortcut_strides_and_pads_with_zeros(stride: int, hw: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *hw)
    y = paper_nets.PadShortcut(stride, 3, 8)(x)
    assert torch.equal(y[:, :3], F.avg_pool2d(x, 1, stride))
    assert y.shape[1] == 8 and not y[:, 3:].any()


def test_pad_shortcut_has_no_parameters_and_cannot_drop_channels() -> None:
    assert not list(paper_nets.PadShortcut(2, 3, 8).parameters())
    with pytest.raises(UserError, match="8 -> 3"):
        paper_nets.PadShortcut(2, 8, 3)


def test_pad_shortcut_has_the_size_of_the_branch() -> None:
    for h in range(1, 12):
        branch = F.conv2d(torch.zeros(1, 1, h, h), torch.zeros(1, 1, 3, 3), stride=2, padding=1)
        assert paper_nets.PadShortcut(2, 1, 1)(torch.zeros(1, 1, h, h)).shape == branch.shape


def test_plain_block_is_a_basic_block_with_nothing_added() -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(())

    torch.manual_seed(0)
    plain, basic = paper_nets.PlainBlock(4, 6, 2).eval(), BasicBlock(4, 6, 2, Nothing()).eval()
    _randomise_norms(plain)
    basic.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(plain(x), basic(x))
    assert [name for name, _ in plain.named_children()] == ["conv1", "bn1", "relu", "conv2", "bn2"]


@pytest.mark.parametrize("options", [{"groups": 2}, {"base_width": 128}, {"dilation": 2}])
def test_plain_block_refuses_what_it_cannot_do(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        paper_nets.PlainBlock(4, 4, **options)


@pytest.mark.parametrize(("name", "depths"), [("plain18", [2, 2, 2, 2]), ("plain34", [3, 4, 6, 3])])
def test_plain_nets_are_torchvisions_without_shortcuts(name: str, depths: list[int]) -> None:
    with torch.device("meta"):
        model = getattr(paper_nets, name)(num_classes=7)
        stock = getattr(torchvision.models, name.replace("plain", "resnet"))(num_classes=7)
    assert type(model) is ResNet
    assert [len(getattr(model, f"layer{i}")) for i in range(1, 5)] == depths
    expected = {k: v.shape for k, v in stock.state_dict().items() if "downsample" not in k}
    assert {k: v.shape for k, v in model.state_dict().items()} == expected


@pytest.mark.parametrize("depth", CIFAR)
@pytest.mark.parametrize("kind", ["resnet", "plain"])
def test_cifar_nets_have_6n_plus_2_weighted_layers(depth: int, kind: str) -> None:
    with torch.device("meta"):
        model = getattr(paper_nets, f"cifar_{kind}{depth}")()
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth
    assert len(model.layer1) == len(model.layer2) == len(model.layer3) == CIFAR[depth]
    block = BasicBlock if kind == "resnet" else paper_nets.PlainBlock
    assert {type(b) for b in (*model.layer1, *model.layer2, *model.layer3)} == {block}
    assert [name for name, _ in model.named_children()] == [
        *("conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "fc")
    ]


def test_option_a_has_exactly_the_plain_nets_parameters() -> None:
    with torch.device("meta"):
        resnet, plain = paper_nets.cifar_resnet20(), paper_nets.cifar_plain20()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (resnet, plain)]
    assert shapes[0] == shapes[1]


def test_cifar_shortcut_options() -> None:
    with torch.device("meta"):
        kinds = {
            option: [type(b.downsample) for b in paper_nets._blocks(paper_nets.cifar_resnet20(shortcut=option))]
            for option in "ABC"
        }
    none = type(None)
    assert kinds["A"] == [none] * 3 + [paper_nets.PadShortcut, none, none] * 2
    assert kinds["B"] == [none] * 3 + [nn.Sequential, none, none] * 2
    assert kinds["C"] == [nn.Sequential] * 9


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_shortcut_options_run_and_differ_only_in_the_shortcut(name: str, shortcut: str) -> None:
    torch.manual_seed(0)
    model = paper_nets.imagenet_resnet(name, shortcut=shortcut, stride_in_1x1=False, num_classes=5).eval()
    stock = getattr(torchvision.models, name)(num_classes=5)
    theirs = {k for k in stock.state_dict() if "downsample" not in k}
    assert {k for k in model.state_dict() if "downsample" not in k} == theirs
    projections = sum(isinstance(b.downsample, nn.Sequential) for b in paper_nets._blocks(model))
    changing = 3 if name == "resnet18" else 4
    assert projections == {"A": 0, "B": changing, "C": len(paper_nets._blocks(model))}[shortcut]
    assert model(torch.randn(1, 3, 40, 33)).shape == (1, 5)


def test_option_a_block_adds_the_padded_input() -> None:
    torch.manual_seed(0)
    model = paper_nets.imagenet_resnet("resnet50", shortcut="A", num_classes=2).eval()
    _randomise_norms(model)
    block, x = model.layer2[0], torch.randn(1, 256, 9, 9)
    branch = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2)))
    branch = F.relu(block.bn2(F.conv2d(branch, block.conv2.weight, padding=1)))
    branch = block.bn3(F.conv2d(branch, block.conv3.weight))
    branch[:, :256] += x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), F.relu(branch))


def test_projections_take_the_norm_layer_and_its_initialisation() -> None:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(2, channels)

    for model in (
        paper_nets.imagenet_resnet("resnet18", shortcut="C", norm_layer=norm),
        paper_nets.cifar_resnet20(shortcut="C", norm_layer=norm),
    ):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert all(isinstance(b.downsample[1], nn.GroupNorm) for b in paper_nets._blocks(model))


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_v1_moves_the_stride_and_keeps_the_checkpoint(name: str) -> None:
    with torch.device("meta"):
        v1, stock = paper_nets.imagenet_resnet(name), getattr(torchvision.models, name)()
    assert [(k, v.shape) for k, v in v1.state_dict().items()] == [(k, v.shape) for k, v in stock.state_dict().items()]
    strides = [(b.conv1.stride[0], b.conv2.stride[0]) for b in v1.modules() if isinstance(b, Bottleneck)]
    assert strides == [(1, 1)] * 3 + [(2, 1)] + [(1, 1)] * 3 + [(2, 1)] + [(1, 1)] * 5 + [(2, 1)] + [(1, 1)] * 2


def test_default_options_leave_torchvisions_net_bit_equal() -> None:
    torch.manual_seed(0)
    ours = paper_nets.imagenet_resnet("resnet18", num_classes=3)
    torch.manual_seed(0)
    stock = torchvision.models.resnet18(num_classes=3)
    x = torch.randn(2, 3, 33, 33)
    assert torch.equal(ours(x), stock(x))


def test_convolutions_start_with_he_variance() -> None:
    torch.manual_seed(0)
    model = paper_nets.cifar_resnet20(shortcut="C")
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000:
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
    assert all(bool((m.weight == 1).all()) for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("build", [paper_nets.cifar_resnet20, paper_nets.cifar_plain20])
def test_cifar_nets_train_one_step_and_copy(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = build(num_classes=4)
    x, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    F.cross_entropy(model(x), target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(x), model.eval()(x))


@pytest.mark.parametrize("hw", [(32, 32), (31, 40), (1, 1)])
def test_cifar_nets_take_any_image_and_an_empty_batch(hw: tuple[int, int]) -> None:
    model = paper_nets.cifar_resnet20().eval()
    assert model(torch.randn(2, 3, *hw)).shape == (2, 10)
    assert model(torch.randn(0, 3, *hw)).shape == (0, 10)


def test_cifar_resnet1202_builds_runs_and_stays_finite() -> None:
    torch.manual_seed(0)
    model = paper_nets.cifar_resnet1202().eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 8, 8)).shape == (1, 10)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(19.4e6, rel=0.005)


@pytest.mark.parametrize("name", ["resnet19", "plain18", "cifar_resnet20"])
def test_imagenet_resnet_refuses_other_names(name: str) -> None:
    with pytest.raises(UserError, match=name):
        paper_nets.imagenet_resnet(name)


def test_unknown_shortcut() -> None:
    with pytest.raises(UserError, match="A, B or C, got 'a'"):
        paper_nets.cifar_resnet20(shortcut="a")
    with pytest.raises(UserError, match="A, B or C, got 'D'"):
        paper_nets.imagenet_resnet("resnet50", shortcut="D")
