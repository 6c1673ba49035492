"""One optimizer step: the loss of a batch, its gradient, the options of a recipe, and what a thousand steps leave."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.errors import UserError
from resnet_fast.training import optim, runlog
from resnet_fast.training.distributed import World
from resnet_fast.training.loader import Part
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions
from resnet_fast.training.recipe import Recipe
from resnet_fast.training.step import Normalise, TrainingStep
from tests.support import memory_worker

CPU = torch.device("cpu")
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))


def batch(*sizes: int, unreadable: tuple[str, ...] = ()) -> list[Part]:
    """Parts of random images."""
    shapes = [(n, 3, 6, 6) for n in sizes]
    pixels = [torch.randint(256, shape, dtype=torch.uint8) for shape in shapes]
    return [Part(x, torch.randint(10, (len(x),)), unreadable) for x in pixels]


def stepper(recipe: Recipe, model: nn.Module, ema: Any = None) -> TrainingStep:
    return TrainingStep(
        recipe, model, optim.build_optimizer(model, recipe), Normalise(MEAN, STD, CPU, True), World(), 10, ema
    )


def wide(recipe: Recipe) -> TrainingStep:
    """A step in float64; its own float32 are the pixels' normalisation and the loss."""
    model = net().double()
    model(torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    step = stepper(recipe, model)
    narrow = step.normalise
    step.normalise = lambda x: narrow(x).double()  # type: ignore[assignment]
    return step


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(6,), (4, 4), (4, 3), (2, 2, 5)])
def test_the_gradient_is_that_of_the_mean_over_the_batch(
    sizes: tuple[int, ...], smoothing: float, tiny: Callable[..., Recipe]
) -> None:
    recipe = tiny(accumulate=len(sizes), lr=1.0, momentum=0.0, weight_decay=0.0, label_smoothing=smoothing)
    step, parts, count = wide(recipe), batch(*sizes), sum(sizes)
    before = [p.detach().clone() for p in step.model.parameters()]

    def loss_of(part: Part) -> Tensor:
        out = step.model(step.normalise(part.images))
        return F.cross_entropy(out, part.labels, reduction="sum", label_smoothing=smoothing)

    loss = torch.stack([loss_of(part) for part in parts]).sum() / count
    wanted = torch.autograd.grad(loss, list(step.model.parameters()))
    assert step(iter(parts), count, rate=1.0) == []
    # The step's logits pass through float32 once (2**-24 each way) and so do loss and softmax: below 32 roundings in
    # all, relative to the gradient at the logits. What the layers below do to it is linear; the tensors' largest
    # elements, thanks to which the bound is a relative one, are no cancellations of much more than 8 times their size.
    for start, parameter, gradient in zip(before, step.model.parameters(), wanted, strict=True):
        largest = max(gradient.abs().max().item(), 1e-3)
        assert (start - parameter.detach() - gradient).abs().max() < 2**-24 * 32 * 8 * largest
    mean, _, images = step.sums.read(World())
    assert images == count and mean == pytest.approx(loss.item(), rel=1e-6)


def test_two_parts_of_a_net_without_batchnorm_are_one_batch(tiny: Callable[..., Recipe]) -> None:
    (whole,) = batch(8)
    halves = [Part(whole.images[i : i + 4], whole.labels[i : i + 4]) for i in (0, 4)]
    weights = []
    for parts in ([whole], halves):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 10)).double()
        step = stepper(tiny(accumulate=len(parts)), model)
        narrow = step.normalise
        step.normalise = lambda x, narrow=narrow: narrow(x).double()  # type: ignore[assignment]
        for _ in range(3):
            step(iter(parts), 8, rate=0.1)
        weights.append(model[1].weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=2**-24 * 8)  # weights below 0.1, steps of about that size


def test_running_statistics_of_two_parts_are_those_of_their_mean(tiny: Callable[..., Recipe]) -> None:
    step, parts = wide(tiny(accumulate=2, lr=0.0)), batch(4, 4)
    norm = step.model[1]  # type: ignore[index]
    norm.running_mean.normal_()
    means = [step.model[0](step.normalise(p.images)).mean((0, 2, 3)) for p in parts]  # type: ignore[index]
    wanted = (1 - norm.momentum) * norm.running_mean + norm.momentum * (means[0] + means[1]) / 2
    step(iter(parts), 8, rate=0.0)
    torch.testing.assert_close(norm.running_mean, wanted.detach())
    assert norm.momentum == 0.1


def test_an_unreadable_image_is_reported_and_takes_no_weight(tiny: Callable[..., Recipe]) -> None:
    step, (part,) = wide(tiny(lr=1.0, momentum=0.0, weight_decay=0.0)), batch(3, unreadable=("bad.jpg",))
    before = step.model[0].weight.detach().clone()  # type: ignore[index]
    loss = F.cross_entropy(step.model(step.normalise(part.images)), part.labels)  # the mean over those there are
    (wanted,) = torch.autograd.grad(loss, [step.model[0].weight])  # type: ignore[index]
    assert step(iter([part]), 4, rate=1.0) == ["bad.jpg"]
    torch.testing.assert_close(before - step.model[0].weight.detach(), wanted, rtol=1e-4, atol=1e-6)  # type: ignore[index]
    with pytest.raises(UserError, match=r"2 readable images or more in every part of a batch, got 1 without bad\.jpg"):
        step(iter(batch(1, unreadable=("bad.jpg",))), 2, rate=1.0)


def test_pixels_are_normalised_and_grey_is_repeated() -> None:
    pixels = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    wanted = (pixels / 255.0 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for channels_last in (True, False):
        x = Normalise(MEAN, STD, CPU, channels_last)(pixels)
        torch.testing.assert_close(x, wanted)
        assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    grey = Normalise((0.5,), (0.25,), CPU, True)(pixels[:, :1])
    assert grey.shape == (2, 3, 5, 4) and torch.equal(grey[:, 0], grey[:, 2])


def test_averaged_weights_follow_the_weights(tiny: Callable[..., Recipe]) -> None:
    recipe, model = tiny(ema=0.75), net()
    model(torch.zeros(2, 3, 6, 6))
    ema = optim.averaged(model, recipe)
    assert ema is not None and optim.averaged(model, tiny()) is None
    step = stepper(recipe, model, ema)
    wanted: Tensor | None = None
    running: Tensor | None = None
    for _ in range(4):
        step(iter(batch(4)), 4, rate=0.1)
        weight, mean = model[0].weight.detach().clone(), model[1].running_mean.clone()  # type: ignore[index]
        wanted = weight if wanted is None else 0.75 * wanted + 0.25 * weight  # the first update copies
        running = mean if running is None else 0.75 * running + 0.25 * mean
    torch.testing.assert_close(ema.module[0].weight, wanted)  # type: ignore[index, union-attr]
    torch.testing.assert_close(ema.module[1].running_mean, running)  # type: ignore[index, union-attr]
    assert int(ema.module[1].num_batches_tracked) == int(model[1].num_batches_tracked)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("values", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_images_have_mixed_labels(values: dict[str, float], tiny: Callable[..., Recipe]) -> None:
    mix = optim.mixing(tiny(**values), 10)
    assert mix is not None and optim.mixing(tiny(), 10) is None
    x, y = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 6, 6), torch.arange(8)
    mixed, targets = mix(x, y)
    assert mixed.shape == x.shape and targets.shape == (8, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    # An image here is its label in every pixel, so that what is mixed into it can be read off it.
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(10.0))
    model = net()
    model(torch.zeros(2, 3, 6, 6))
    step = stepper(tiny(**values), model)
    step(iter(batch(8)), 8, rate=0.1)
    assert step.sums.read(World())[2] == 8


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_a_step_under_autocast_moves_float32_weights(amp: str, tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(amp=amp)
    model = optim.build_net(recipe, 10)
    step, before = stepper(recipe, model), [p.detach().clone() for p in model.parameters()]
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    for _ in range(8):  # the scaler of float16 begins too high, and skips steps until it is low enough
        step(iter(batch(4)), 4, rate=0.1)
    assert set(seen) == {getattr(torch, amp)} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.ndim > 1)
    assert all(p.isfinite().all() for p in model.parameters())


def test_no_weight_decay_on_norms_and_biases(tiny: Callable[..., Recipe]) -> None:
    model = optim.build_net(tiny(), 10)
    (everything,) = optim.parameter_groups(model, tiny(weight_decay=0.3))
    assert everything["weight_decay"] == 0.3 and len(everything["params"]) == len(list(model.parameters()))
    decayed, rest = optim.parameter_groups(model, tiny(weight_decay=0.3, norm_weight_decay=0.0))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in rest["params"]} == {
        id(p) for name, p in model.named_parameters() if "bn" in name or "downsample.1" in name or name == "fc.bias"
    }
    assert len(decayed["params"]) + len(rest["params"]) == len(everything["params"])


def test_the_net_is_a_function_of_the_seed(tiny: Callable[..., Recipe]) -> None:
    first, again, other = (optim.build_net(tiny(seed=seed), 10).conv1.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_options_that_a_net_does_not_have(tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match="torchvision ResNet for zero_init_residual"):
        optim.build_net(tiny(zero_init_residual=True), 10)
    with pytest.raises(UserError, match="did you mean"):
        optim.build_net(tiny(model="cifar_resnet21"), 10)
    assert optim.build_net(tiny(model="resnet18", zero_init_residual=True), 10).layer1[0].bn2.weight.abs().max() == 0


@pytest.mark.slow
def test_memory_is_constant_over_a_thousand_steps(tmp_path: Path) -> None:
    command = [sys.executable, memory_worker.__file__, str(tmp_path / "run")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    held = json.loads(done.stdout)
    assert held["tensors"]["300"] == held["tensors"]["1000"]
    # A leak of one batch of normalised images per step (16 x 3 x 8 x 8 floats, 12 KiB) would be 8.2 MiB in 700 steps;
    # one of a loss's autograd graph, more. The allocator's own wandering, with 11 drawings and 14 saves, is less.
    assert held["memory"]["1000"] - held["memory"]["300"] < 700 * 12 * 1024


def test_the_loop_adds_less_than_two_milliseconds_to_a_step(
    minute: None, tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    done = train(tiny(steps=60, subset=960), options(log_every=5))
    lines = runlog.of_kind(done.out, "train")
    # Means over five steps; the best of them is the one that other processes disturbed least.
    assert min(line["host_ms"] for line in lines) < 2, json.dumps(lines)
