"""Responses are the deviation of what BatchNorm after a 3x3 convolution puts out, over all images at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fast.models import registry
from resnet_fast.training.experiments import responses


@pytest.mark.parametrize(("net", "layers"), [("cifar_plain20", 19), ("cifar_resnet56", 55), ("resnet50", 16)])
def test_every_3x3_layer_is_found_in_order(net: str, layers: int) -> None:
    model = registry.build(net, num_classes=10)
    names = list(responses.norms_after_3x3(model))
    assert len(names) == layers
    assert names == [name for name, _ in model.named_modules() if name in set(names)]
    assert all(isinstance(dict(model.named_modules())[name], nn.BatchNorm2d) for name in names)


def test_deviation_is_that_of_all_images_together() -> None:
    torch.manual_seed(0)
    model = registry.build("cifar_resnet20", num_classes=10).eval()
    x = torch.randn(12, 3, 8, 8)
    x[:5] += 3  # batches of different means: the deviation of the whole is no mean of deviations
    seen: dict[str, torch.Tensor] = {}
    norms = {name: model.get_submodule(name) for name in ("bn1", "layer2.0.bn2")}
    hooks = [m.register_forward_hook(lambda m, i, o, n=n: seen.update({n: o.clone()})) for n, m in norms.items()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    found = responses.measure_responses(model, [x[:5], x[5:8], x[8:]])
    for name, out in seen.items():
        expected = out.double().std(unbiased=False).item()
        # eval mode: images do not see each other, but oneDNN may sum another batch size in another order
        assert found.std[found.names.index(name)] == pytest.approx(expected, rel=1e-5)


def test_response_is_before_relu_and_addition() -> None:
    model = registry.build("cifar_resnet20", num_classes=10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(2.0)
    model.train()
    with torch.no_grad():
        for _ in range(60):  # running statistics become those of this batch
            model(batch := torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    found = responses.measure_responses(model, [batch])
    # BatchNorm's output has the deviation of its weight, 2; after ReLU it would be 1.17, after the addition larger
    assert found.std[1] == pytest.approx(2.0, rel=0.05)
    assert found.mean == pytest.approx(sum(found.std) / len(found.std))
