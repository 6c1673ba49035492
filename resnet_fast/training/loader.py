"""From the plan of batches to tensors on the device: which process reads which image in which step.

::

    epoch e's permutation of the N training images, drawn from (seed, e)
    |------- batch 0 -------|------- batch 1 -------| … |-- last batch --|
    | part 0 | part 1 | … | |                           every part has its share of it
      rank 0   rank 0   rank 1 …                        parts = processes x accumulate

A part is what one process sees at once. The parts of a batch depend only on the recipe and the number of parts: two
processes read what one process reads with ``accumulate=2``. The plan is arithmetic, so a run that resumes at step s
reads batch s first.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import limits
from ..errors import UserError
from . import stopping
from .augment import seed_of
from .datasets.samples import Data, Item, Sample

LEAST_PART = 2
"""Images that a part must have: BatchNorm has no variance for one image of 1x1 pixels."""


@dataclass(frozen=True)
class BatchPlan:
    """``size`` images in batches of ``batch``, each divided into ``parts`` parts.

    Raises:
        UserError: There are fewer images than a batch has, or fewer in a part than BatchNorm needs.
    """

    size: int
    batch: int
    parts: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch > self.size:
            raise UserError(
                f"a batch of at most {self.size}, the training images", str(self.batch), "lower batch, or add images"
            )
        if self.batch < LEAST_PART * self.parts:
            raise UserError(
                f"a batch of {LEAST_PART} images or more for each of {self.parts} parts (processes x accumulate)",
                str(self.batch),
                "raise batch, or lower accumulate or the number of processes",
            )

    @property
    def left_over(self) -> int:
        """Images per epoch that are in no batch, because the last batch would be too small for its parts."""
        rest = self.size % self.batch
        return rest if rest < LEAST_PART * self.parts else 0

    @property
    def steps_per_epoch(self) -> int:
        rest = self.size % self.batch
        return self.size // self.batch + (rest >= LEAST_PART * self.parts)

    def permutation(self, epoch: int) -> Tensor:
        """Return the order of the images in epoch ``epoch``, (size,) int64."""
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(seed_of(self.seed, epoch)))

    def batch_size(self, index: int) -> int:
        """Return the number of images in batch ``index`` of an epoch, over all parts."""
        return min(self.batch, self.size - index * self.batch)

    def batches(self, step: int, steps: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield (epoch, indices of each part) for the steps from ``step`` up to, not including, ``steps``."""
        order, held = torch.empty(0), -1
        for number in range(step, steps):
            epoch, index = divmod(number, self.steps_per_epoch)
            if epoch != held:
                order, held = self.permutation(epoch), epoch
            chosen = order[index * self.batch : (index + 1) * self.batch]
            yield epoch, list(chosen.tensor_split(self.parts))


class PartSampler(Sampler[list[Item]]):
    """Yields the parts of process ``rank`` in their order, as lists of items of the data set."""

    def __init__(self, plan: BatchPlan, rank: int, accumulate: int, step: int, steps: int):
        self.plan, self.rank, self.accumulate, self.step, self.steps = plan, rank, accumulate, step, steps

    def __len__(self) -> int:
        return (self.steps - self.step) * self.accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        first = self.rank * self.accumulate
        for epoch, parts in self.plan.batches(self.step, self.steps):
            for part in parts[first : first + self.accumulate]:
                yield [(epoch, index) for index in part.tolist()]


class ValidationSampler(Sampler[list[Item]]):
    """Yields every ``world``-th image from ``rank`` on, in batches."""

    def __init__(self, size: int, batch: int, rank: int, world: int):
        self.indices, self.batch = range(rank, size, world), batch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __iter__(self) -> Iterator[list[Item]]:
        for start in range(0, len(self.indices), self.batch):
            yield [(0, index) for index in self.indices[start : start + self.batch]]


@dataclass
class Part:
    """Images (n, C, H, W) uint8, labels (n) int64, and the names of images left out because they cannot be read."""

    images: Tensor
    labels: Tensor
    unreadable: tuple[str, ...] = ()

    def pin_memory(self) -> Part:
        """Return a copy in pinned memory; DataLoader calls this with ``pin_memory=True``."""
        return Part(self.images.pin_memory(), self.labels.pin_memory(), self.unreadable)

    def to(self, device: torch.device) -> Part:
        """Return a copy on ``device``. From pinned memory this does not wait for the copy."""
        if device.type == "cpu":
            return self
        return Part(
            self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.unreadable
        )


def collate(samples: list[Sample]) -> Part:
    """Return a part of the samples that could be read, which may be none."""
    unreadable = tuple(s.name for s in samples if s.pixels is None)
    pixels = [s.pixels for s in samples if s.pixels is not None]
    labels = torch.tensor([s.label for s in samples if s.pixels is not None], dtype=torch.int64)
    images = torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return Part(images, labels, unreadable)


STOPS = {getattr(signal, name) for name in stopping.NAMES if hasattr(signal, name)}


def workers_for(data: Data, device: torch.device, world: int) -> int:
    """Return the number of worker processes for ``data``; see :func:`workers_of`."""
    return workers_of(data.in_memory, device, world)


def workers_of(in_memory: bool, device: torch.device, world: int) -> int:
    """Return the number of worker processes: 0 for data in memory on a CPU, else the cores per process, at most 8."""
    if in_memory and device.type == "cpu":
        return 0
    return max(1, min(8, limits.cores() // world))


def data_loader(dataset: Dataset[Sample], sampler: Sampler[list[Item]], workers: int, device: torch.device) -> Any:
    """Return torch's DataLoader over ``sampler``, pinning memory for a GPU. It does not use the global generator."""
    return _ShieldedLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
        worker_init_fn=_apart,
    )


class _ShieldedLoader(DataLoader[Any]):
    """Holds back the signals that stop a run while it starts workers.

    A worker is in the run's process group at first. A signal to the group would end it, and with it the run, by an
    error. Held back, the signal reaches the run a moment later, and the worker in :func:`_apart`.
    """

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _apart(worker: int) -> None:
    """Leave the process group, to which torchrun and terminals send signals: the run stops first, then its workers."""
    os.setpgid(0, 0)
    while sent := signal.sigpending() & STOPS:
        signal.sigwait(sent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


class Prefetcher:
    """Iterates over parts on ``device`` and copies the next one while the current one is used.

    ``waited_s`` counts the seconds that the caller had to wait for the input pipeline.
    """

    def __init__(self, parts: Any, device: torch.device):
        self.source, self.device, self.waited_s = iter(parts), device, 0.0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.next: Part | None = None
        if self.stream is not None:
            self._fetch()

    def _fetch(self) -> None:
        start = time.perf_counter()
        part = next(self.source, None)
        self.waited_s += time.perf_counter() - start
        if part is not None and self.stream is not None:
            with torch.cuda.stream(self.stream):
                part = part.to(self.device)
        self.next = part

    def __iter__(self) -> Iterator[Part]:
        return self

    def __next__(self) -> Part:
        if self.stream is None:
            self._fetch()
        part, self.next = self.next, None
        if part is None:
            raise StopIteration
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            for tensor in (part.images, part.labels):
                tensor.record_stream(torch.cuda.current_stream(self.device))
            self._fetch()
        return part


def throughput(dataset: Dataset[Sample], plan: BatchPlan, workers: int, seconds: float = 1.0) -> float:
    """Measure the images per second of the input pipeline alone, for about ``seconds``.

    The clock starts at the first part, because starting the workers does not limit a run.
    """
    steps = plan.steps_per_epoch
    part_plan = BatchPlan(plan.size, plan.batch, 1, plan.seed)
    parts = iter(data_loader(dataset, PartSampler(part_plan, 0, 1, 0, steps), workers, torch.device("cpu")))
    first = next(parts)
    start, count = time.perf_counter(), 0
    for part in parts:
        count += len(part.labels)
        if time.perf_counter() - start > seconds:
            break
    if not count:  # an epoch of one batch
        return len(first.labels) / max(time.perf_counter() - start, 1e-6)
    return count / (time.perf_counter() - start)
