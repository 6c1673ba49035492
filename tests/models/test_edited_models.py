"""Edits of an accelerated net: weights written in place, loaded, averaged, pruned, reparametrized; layers replaced."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import resnet_fast
from tests.support import nets
from tests.support.nets import twin

Edit = Callable[[nn.Module], object]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def check(x: Tensor, edit: Edit, train: bool = True) -> nn.Module:
    """Run eval, edit, eval (and a training step): after an edit nothing derived from the old weights may be used."""
    stock, fused = twin()
    with torch.no_grad():
        before = fused(x)
        for model in (stock, fused):
            torch.manual_seed(5)
            edit(model)
        after = fused(x)
    assert not torch.allclose(after, before, rtol=1e-3), "the edit must matter"
    nets.assert_close_to_eager(fused, stock, x)
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(fused(x), stock(x))
        if train:
            nets.assert_equal(nets.train_step(fused.train(), x), nets.train_step(stock.train(), x))
    return fused.eval()


def no_grad_edit(model: nn.Module) -> None:
    with torch.no_grad():
        model.layer2[0].conv1.weight.mul_(1.5)


def data_edit(model: nn.Module) -> None:
    model.layer2[0].conv1.weight.data.mul_(1.5)


def data_assignment(model: nn.Module) -> None:
    conv = model.layer2[0].conv1
    conv.weight.data = conv.weight.data * 1.5


def data_one_filter(model: nn.Module) -> None:
    model.layer1[0].conv1.weight.data[3] += 1


def new_parameter(model: nn.Module) -> None:
    conv = model.layer1[0].conv2
    conv.weight = nn.Parameter(conv.weight.detach() * -1)


def norm_weight_data(model: nn.Module) -> None:
    model.layer1[0].bn1.weight.data[5] = 9.0


def norm_bias(model: nn.Module) -> None:
    with torch.no_grad():
        model.layer1[0].bn1.bias.add_(1)


def norm_mean(model: nn.Module) -> None:
    model.layer1[0].bn1.running_mean += 1


def norm_var_data(model: nn.Module) -> None:
    model.layer3[0].bn2.running_var.data[:100] *= 4


def reset_statistics(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()


def norm_eps(model: nn.Module) -> None:
    model.layer1[0].bn1.eps = 1.0


def stem_weight(model: nn.Module) -> None:
    model.conv1.weight.data.neg_()


def projection_weight(model: nn.Module) -> None:
    model.layer3[0].downsample[0].weight.data.mul_(3)  # type: ignore[index]


def through_numpy(model: nn.Module) -> None:
    model.layer2[0].conv1.weight.detach().numpy()[...] *= 1.5


def load_other_weights(model: nn.Module) -> None:
    state = {k: v * 1.3 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.clone() for k, v in state.items()}, strict=True)


def assign_other_weights(model: nn.Module) -> None:
    state = {k: v * 1.3 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(True)


@pytest.mark.parametrize(
    "edit",
    [
        no_grad_edit, data_edit, data_assignment, data_one_filter, new_parameter, norm_weight_data, norm_bias,
        norm_mean, norm_var_data, reset_statistics, norm_eps, stem_weight, projection_weight, through_numpy,
        load_other_weights, assign_other_weights,
    ],
)  # fmt: skip
def test_weights_written_in_place(edit: Edit, x: Tensor) -> None:
    check(x, edit)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("foreach", [True, False])
def test_an_optimizers_step_in_eval_mode(kind: str, foreach: bool, x: Tensor) -> None:
    """Fine-tuning with frozen statistics never leaves eval mode."""
    stock, fused = twin()
    optimizers = [getattr(torch.optim, kind)(m.parameters(), lr=0.01, foreach=foreach) for m in (stock, fused)]
    for _ in range(2):
        for model, optimizer in zip((stock, fused), optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        nets.assert_close_to_eager(fused, stock, x)
    nets.assert_equal(dict(fused.state_dict()), dict(stock.state_dict()))


def test_new_classifier_and_input_layer() -> None:
    """Transfers to five classes and one input channel."""
    stock, fused = twin()
    for model in (stock, fused):
        torch.manual_seed(5)
        model.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(512, 5))
        model.conv1 = nn.Conv2d(1, 64, 3, stride=1, padding=1, bias=True)
        model.maxpool = nn.Identity()
        model.eval()
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad(), resnet_fast.use_backend("reference"):
        nets.assert_equal(fused(x), stock(x))
    nets.assert_close_to_eager(fused, stock, x)
    resnet_fast.reset_stats()
    with torch.no_grad():
        fused(x)
    assert "expected maxpool to be a plain square MaxPool2d" in str(resnet_fast.stats()["fallbacks"])


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


def halve(model: nn.Module) -> None:
    parametrize.register_parametrization(model.layer1[0].conv1, "weight", Halved())


def halve_norm(model: nn.Module) -> None:
    parametrize.register_parametrization(model.layer1[0].bn1, "weight", Halved())


def halve_projection(model: nn.Module) -> None:
    parametrize.register_parametrization(model.layer2[0].downsample[0], "weight", Halved())  # type: ignore[index]


def halve_stem(model: nn.Module) -> None:
    parametrize.register_parametrization(model.conv1, "weight", Halved())


def spectral(model: nn.Module) -> None:
    parametrizations.spectral_norm(model.layer1[0].conv2)


@pytest.mark.parametrize("edit", [halve, halve_norm, halve_projection, halve_stem, spectral])
def test_parametrizations(edit: Edit, x: Tensor) -> None:
    fused = check(x, edit, train=edit is not spectral)
    resnet_fast.reset_stats()
    with torch.no_grad():
        fused(x)
    calls = resnet_fast.stats()["calls"]
    if edit is not halve_projection:  # there the shortcut runs by itself and the block stays fused
        assert sum(n for call, n in calls.items() if call.endswith("/stock")) == 1


def test_a_removed_parametrization_is_fused_again(x: Tensor) -> None:
    stock, fused = twin()
    for model in (stock, fused):
        halve(model)
        parametrize.remove_parametrizations(model.layer1[0].conv1, "weight")
    nets.assert_close_to_eager(fused, stock, x)
    with torch.no_grad(), resnet_fast.strict():
        fused(x)


def test_pruning(x: Tensor) -> None:
    def edit(model: nn.Module) -> None:
        prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)
        prune.ln_structured(model.layer2[0].conv2, "weight", 0.3, n=2, dim=0)

    stock, fused = twin()
    with torch.no_grad():
        before = fused(x)
    for model in (stock, fused):
        edit(model)
    with torch.no_grad():
        assert not torch.allclose(fused(x), before)
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=1e-4)
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(nets.train_step(fused.train(), x), nets.train_step(stock.train(), x))
    for model in (stock, fused):
        prune.remove(model.eval().layer1[0].conv1, "weight")
        prune.remove(model.layer2[0].conv2, "weight")
    nets.assert_close_to_eager(fused, stock, x)
    with torch.no_grad(), resnet_fast.strict():
        fused(x)


@pytest.mark.parametrize(
    "where",
    [
        "layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu", "layer2.0.downsample.0", "layer2.0.downsample", "conv1",
        "bn1", "relu", "maxpool", "layer1.0", "layer1", "avgpool", "fc",
    ],
)  # fmt: skip
def test_a_childs_forward_replaced(where: str, x: Tensor) -> None:
    def edit(model: nn.Module) -> None:
        child = model.get_submodule(where)
        stock_forward = child.forward
        child.forward = types.MethodType(lambda self, t: stock_forward(t) * 1.5 + 0.1, child)  # type: ignore[method-assign]

    check_edit_without_copy(x, edit)


def check_edit_without_copy(x: Tensor, edit: Edit) -> None:
    """Compare with stock directly: closures are not copied with the model, so there is no float64 twin."""
    stock, fused = twin()
    with torch.no_grad():
        before = fused(x)
        for model in (stock, fused):
            edit(model)
        want = stock(x)
        torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(want, before, rtol=1e-3)
        with resnet_fast.use_backend("reference"):
            nets.assert_equal(fused(x), want)


@pytest.mark.parametrize(
    ("where", "layer"),
    [
        ("layer1.0.relu", lambda: nn.LeakyReLU(0.1)),
        ("relu", lambda: nn.SiLU()),
        ("layer1.0.conv1", lambda: nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Tanh())),
        ("layer1.0.bn2", lambda: nn.Identity()),
        ("layer2.0.downsample", lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(64, 128, 1), nn.BatchNorm2d(128))),
        ("layer2.0.downsample", lambda: nn.Conv2d(64, 128, 1, stride=2)),
        ("maxpool", lambda: nn.AvgPool2d(2)),
        ("maxpool", lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        ("maxpool", lambda: nn.MaxPool2d(2)),
        ("layer3", lambda: nn.Conv2d(128, 256, 1)),
        ("avgpool", lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Tanh())),
        ("layer1", lambda: nn.Conv2d(64, 64, 3, padding=1)),
    ],
)
def test_layers_exchanged(where: str, layer: Callable[[], nn.Module], x: Tensor) -> None:
    def edit(model: nn.Module) -> None:
        model.set_submodule(where, layer().eval())

    check(x, edit)


def test_a_block_exchanged_for_a_stock_one_runs_stock(x: Tensor) -> None:
    from torchvision.models.resnet import BasicBlock

    fused = check(x, lambda model: model.set_submodule("layer1.1", BasicBlock(64, 64).eval()))
    assert type(fused.layer1[1]) is BasicBlock


def test_fuse_conv_bn_eval(x: Tensor) -> None:
    """PyTorch's own tool folds the norm and leaves Identity in its place."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    stock, fused = twin()
    for model in (stock, fused):
        for m in model.modules():
            for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):
                if isinstance(getattr(m, bn, None), nn.BatchNorm2d):
                    setattr(m, conv, fuse_conv_bn_eval(getattr(m, conv), getattr(m, bn)))
                    setattr(m, bn, nn.Identity())
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    resnet_fast.reset_stats()
    nets.assert_close_to_eager(fused, stock, x)
    assert not resnet_fast.stats()["fallbacks"]
    with resnet_fast.use_backend("reference"):
        nets.assert_equal(nets.train_step(fused.train(), x), nets.train_step(stock.train(), x))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model_and_update_bn(use_buffers: bool, x: Tensor) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    averages = []
    for model in twin():
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            with resnet_fast.use_backend("reference"):
                model.train()(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update_parameters(model)
            with torch.no_grad():
                ema.eval()(x)  # leaves packed weights of this average behind
        averages.append(ema)
    stock, fused = averages
    nets.assert_equal(dict(fused.state_dict()), dict(stock.state_dict()))
    nets.assert_close_to_eager(fused, stock, x)
    for ema in averages:
        with resnet_fast.use_backend("reference"):
            update_bn([x, x + 1, x - 1], ema)
    nets.assert_equal(dict(fused.state_dict()), dict(stock.state_dict()))
    nets.assert_close_to_eager(fused.eval(), stock.eval(), x)
