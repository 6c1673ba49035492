"""Random crops and flips: a function of seed, epoch and image, and of nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from resnet_fast.training import loader
from resnet_fast.training.augment import Augment, seed_of
from resnet_fast.training.datasets import loading
from resnet_fast.training.recipe import Recipe


@pytest.fixture
def picture() -> Tensor:
    return torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)


@pytest.mark.parametrize("kind", ["crop", "imagenet"])
def test_the_same_item_has_the_same_pixels_in_any_order(
    kind: str, tiny: Callable[..., Recipe], picture: Tensor
) -> None:
    augment = Augment.training(tiny(augment=kind, flip=True))
    items = [(epoch, index) for epoch in range(3) for index in range(20)]
    first = {item: augment(picture, item) for item in items}
    random.Random(0).shuffle(items)
    torch.manual_seed(5)
    assert all(torch.equal(augment(picture, item), first[item]) for item in items)
    for fixed in (lambda i: (i, 0), lambda i: (0, i)):  # another epoch, another image
        assert len({augment(picture, fixed(i)).numpy().tobytes() for i in range(20)}) > 10


def test_another_seed_has_other_pixels(tiny: Callable[..., Recipe], picture: Tensor) -> None:
    ours, other = (Augment.training(tiny(seed=seed)) for seed in (0, 1))
    assert any(not torch.equal(ours(picture, (0, i)), other(picture, (0, i))) for i in range(5))


@pytest.mark.parametrize("kind", ["crop", "imagenet"])
def test_the_global_generator_is_left_alone(kind: str, tiny: Callable[..., Recipe], picture: Tensor) -> None:
    augment = Augment.training(tiny(augment=kind, flip=True))
    before = torch.get_rng_state()
    augment(picture, (3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError):
        augment("no picture", (0, 0))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


def test_worker_processes_change_no_pixel(tiny: Callable[..., Recipe]) -> None:
    found = loading.load_data(tiny(flip=True))
    plan = loader.BatchPlan(found.train_size, 16, 1, 0)

    def parts(workers: int) -> list[loader.Part]:
        sampler = loader.PartSampler(plan, 0, 1, 0, 6)
        return list(loader.data_loader(found.train, sampler, workers, torch.device("cpu")))

    before = torch.get_rng_state()
    here, there = parts(0), parts(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(here) == len(there) == 6
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_a_crop_is_the_padded_image_shifted_and_flipped(tiny: Callable[..., Recipe], picture: Tensor) -> None:
    augment = Augment.training(tiny(pad=2, flip=True))
    padded = torch.nn.functional.pad(picture, (2, 2, 2, 2))
    windows = [padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    possible = {w.contiguous().numpy().tobytes() for v in windows for w in (v, v.flip(-1))}
    drawn = {augment(picture, (0, i)).contiguous().numpy().tobytes() for i in range(400)}
    assert drawn <= possible and len(drawn) > 40  # of 50; the chance to miss 10 of them in 400 draws is below 1e-12


def test_none_and_validation(tiny: Callable[..., Recipe], picture: Tensor) -> None:
    assert Augment.training(tiny(augment="none", flip=True))(picture, (0, 0)) is picture
    wide = torch.zeros(3, 40, 60, dtype=torch.uint8)
    validation = Augment.validation(tiny(size=28))
    assert validation(wide, (0, 0)).shape == (3, 28, 28)
    files = tiny(data="folder", data_path="x", augment="none", size=28)
    assert Augment.training(files)(wide, (0, 0)).shape == (3, 28, 28)


def test_seeds_of_near_numbers_are_far_apart() -> None:
    seeds = {seed_of(a, b, c) for a in range(10) for b in range(10) for c in range(100)}
    assert len(seeds) == 10_000 and all(0 <= s < 2**63 for s in seeds)
    assert seed_of(1, 2) != seed_of(2, 1)
