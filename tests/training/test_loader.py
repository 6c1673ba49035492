"""The plan of batches: every image once per epoch, however it is shared out and wherever a run begins."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_fast.errors import UserError
from resnet_fast.training import loader
from resnet_fast.training.datasets import loading
from resnet_fast.training.datasets.samples import Sample
from resnet_fast.training.loader import LEAST_PART, BatchPlan, Part, PartSampler, ValidationSampler
from resnet_fast.training.recipe import Recipe


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    parts = draw(st.integers(1, 5))
    batch = draw(st.integers(LEAST_PART * parts, 40))
    return BatchPlan(draw(st.integers(batch, 150)), batch, parts, draw(st.integers(0, 3)))


@given(plans())
@settings(max_examples=150, deadline=None)
def test_every_epoch_holds_every_image_once(plan: BatchPlan) -> None:
    per_epoch = plan.steps_per_epoch
    for epoch in range(2):
        steps = list(plan.batches(epoch * per_epoch, (epoch + 1) * per_epoch))
        assert {e for e, _ in steps} == {epoch}
        for index, (_, parts) in enumerate(steps):
            sizes = [len(part) for part in parts]
            assert len(sizes) == plan.parts and min(sizes) >= LEAST_PART and max(sizes) - min(sizes) <= 1
            assert sum(sizes) == plan.batch_size(index)
        seen = torch.cat([part for _, parts in steps for part in parts]).tolist()
        assert len(seen) == len(set(seen)) == plan.size - plan.left_over and set(seen) <= set(range(plan.size))


@given(plans(), st.data())
@settings(max_examples=50, deadline=None)
def test_a_sampler_begun_later_yields_the_rest(plan: BatchPlan, draw: st.DataObject) -> None:
    steps = draw.draw(st.integers(1, 2 * plan.steps_per_epoch + 1))
    step = draw.draw(st.integers(0, steps))
    for accumulate in {1, plan.parts}:
        whole = list(PartSampler(plan, 0, accumulate, 0, steps))
        rest = PartSampler(plan, 0, accumulate, step, steps)
        assert list(rest) == whole[step * accumulate :] and len(rest) == len(whole) - step * accumulate


def test_two_processes_read_what_one_reads_in_two_parts() -> None:
    plan = BatchPlan(50, 16, 2, 0)
    alone = list(PartSampler(plan, 0, 2, 0, 8))
    first, second = (list(PartSampler(plan, rank, 1, 0, 8)) for rank in (0, 1))
    assert alone == [part for pair in zip(first, second, strict=True) for part in pair]


@pytest.mark.parametrize(
    ("size", "batch", "parts", "left_over", "steps"),
    [(64, 16, 1, 0, 4), (65, 16, 1, 1, 4), (66, 16, 1, 0, 5), (67, 16, 2, 3, 4), (68, 16, 2, 0, 5), (16, 16, 8, 0, 1)],
)
def test_a_last_batch_too_small_for_its_parts_is_left_out(
    size: int, batch: int, parts: int, left_over: int, steps: int
) -> None:
    plan = BatchPlan(size, batch, parts, 0)
    assert (plan.left_over, plan.steps_per_epoch) == (left_over, steps)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [BatchPlan(100, 10, 1, seed).permutation(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders) and len(set(map(tuple, orders))) == 4


def test_a_batch_that_cannot_be_filled_or_shared() -> None:
    with pytest.raises(UserError, match="expected a batch of at most 10, the training images, got 11"):
        BatchPlan(10, 11, 1, 0)
    with pytest.raises(UserError, match=r"2 images or more for each of 4 parts .*, got 7"):
        BatchPlan(10, 7, 4, 0)


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_validation_looks_at_every_image_once(size: int, batch: int, world: int) -> None:
    samplers = [ValidationSampler(size, batch, rank, world) for rank in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(found) for found in batches]
    assert sorted(index for found in batches for part in found for _, index in part) == list(range(size))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_holds_the_images_that_the_plan_names(workers: int, tiny: Callable[..., Recipe]) -> None:
    found = loading.load_data(tiny(augment="none"))
    sampler = PartSampler(BatchPlan(64, 16, 2, 0), 0, 2, 0, 4)
    parts = list(loader.data_loader(found.train, sampler, workers, torch.device("cpu")))
    for part, items in zip(parts, sampler, strict=True):
        wanted = [found.train[item] for item in items]
        assert torch.equal(part.images, torch.stack([s.pixels for s in wanted if s.pixels is not None]))
        assert part.labels.tolist() == [s.label for s in wanted]


def test_a_part_without_its_unreadable_images(tmp_path: Path) -> None:
    good = Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), 5, "good.jpg")
    part = loader.collate([good, Sample(None, 1, "bad.jpg"), good])
    assert part.images.shape == (2, 3, 4, 4) and part.labels.tolist() == [5, 5] and part.unreadable == ("bad.jpg",)
    nothing = loader.collate([Sample(None, 1, "bad.jpg")])
    assert len(nothing.images) == len(nothing.labels) == 0 and nothing.unreadable == ("bad.jpg",)


def test_the_prefetcher_counts_the_time_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(loader.time, "perf_counter", lambda: now)

    def slow() -> Iterator[Part]:
        nonlocal now
        for i in range(3):
            now += 0.25
            yield Part(torch.full((1, 1, 1, 1), i, dtype=torch.uint8), torch.tensor([i]))

    parts = loader.Prefetcher(slow(), torch.device("cpu"))
    seen = []
    for part in parts:
        seen.append(int(part.labels))
        now += 1.0  # a step
    assert seen == [0, 1, 2] and parts.waited_s == 3 * 0.25


@pytest.mark.parametrize("batch", [16, 64])
def test_the_throughput_of_the_pipeline_alone(batch: int, tiny: Callable[..., Recipe]) -> None:
    found = loading.load_data(tiny())
    start = time.process_time()
    assert loader.throughput(found.train, BatchPlan(64, batch, 1, 0), 0, seconds=0.1) > 0
    assert time.process_time() - start < 5  # of one core, whatever else the machine does


def test_data_in_memory_needs_no_workers_beside_a_cpu(tiny: Callable[..., Recipe]) -> None:
    found = loading.load_data(tiny())
    assert loader.workers_for(found, torch.device("cpu"), 1) == 0
    assert 1 <= loader.workers_for(found, torch.device("cuda"), 1) <= 8
    assert loader.workers_for(found, torch.device("cuda"), 10_000) == 1


STARTED_UNDER_SIGTERM = """
import os, signal, torch
from resnet_fast.training import loader

parent = os.getpid()
os.register_at_fork(after_in_child=lambda: os.getppid() == parent and os.kill(os.getpid(), signal.SIGTERM))
torch.multiprocessing.set_start_method("fork")
data = [torch.tensor(i) for i in range(3)]
loader.collate = lambda samples: samples
parts = loader.data_loader(data, [[0, 1], [2]], 1, torch.device("cpu"))
print(*(int(i) for part in parts for i in part))
"""


def test_a_worker_outlives_a_signal_that_comes_before_it_left_the_group() -> None:
    """A scheduler's SIGTERM goes to the whole group. The run heeds it, and still needs the worker to end its step."""
    done = subprocess.run([sys.executable, "-c", STARTED_UNDER_SIGTERM], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "0 1 2\n"), done.stderr
