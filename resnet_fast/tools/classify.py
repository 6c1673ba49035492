"""Classify pictures batch by batch; each batch is answered before the next is read.

A picture that cannot be used (unreadable, or with NaN in the outputs) gets an answer with the reason, and does not
affect the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import limits
from ..errors import UserError
from ..io import images
from .trained import Trained

READERS = 8
"""Most threads that decode; Pillow releases Python's lock while it decodes."""


@dataclass(frozen=True)
class Likely:
    """One class of one picture: its number, its name, and its probability (softmax of the logits)."""

    number: int
    name: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """The most likely classes of ``image``, most likely first. ``top`` is None where ``refused`` gives a reason."""

    image: Path
    top: tuple[Likely, ...] | None
    refused: str = ""


def likeliest(logits: Tensor, names: Sequence[str], top: int) -> tuple[Likely, ...]:
    """Return the ``top`` most likely classes of one picture, most likely first.

    Args:
        logits: (classes,).
        names: one name per class.
        top: how many classes to return.
    """
    best = logits.double().softmax(0).topk(min(top, len(names)))
    return tuple(Likely(int(i), names[int(i)], float(p)) for p, i in zip(best.values, best.indices, strict=True))


def stream(
    trained: Trained,
    files: Sequence[Path],
    *,
    top: int = 5,
    batch: int = 16,
    device: str = "cpu",
    backend: str = "auto",
) -> Iterator[list[Answer]]:
    """Yield lists of answers for ``files``, in their order.

    Args:
        trained: the classifier; its net is accelerated in place.
        files: pictures.
        top: how many classes to return for each.
        batch: most pictures per list and per forward pass.
        device: where the net runs, such as ``cuda:0``.
        backend: the backend of fused blocks.

    Raises:
        UserError: ``top`` or ``batch`` is below 1.
    """
    for name, value in (("top", top), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name} >= 1", str(value), f"correct --{name}")
    target = torch.device(device)
    trained.net.to(target)
    net = trained.accelerated(backend)
    with _reading(trained, files, 2 * batch) as pictures:
        while True:
            group = list(islice(pictures, batch))
            if not group:
                return
            inputs = [x for _, x in group if isinstance(x, Tensor)]
            logits = iter(())
            if inputs:
                x = torch.stack(inputs).to(device=target, memory_format=torch.channels_last)
                with torch.inference_mode():
                    logits = iter(net(x).float().cpu())
            yield [_answer(path, x, logits, trained.facts.classes, top) for path, x in group]


def _answer(path: Path, x: Tensor | UserError, logits: Iterator[Tensor], names: Sequence[str], top: int) -> Answer:
    if isinstance(x, UserError):
        return Answer(path, None, x.got)
    row = next(logits)
    if not bool(torch.isfinite(row).all()):
        return Answer(path, None, f"{path} (NaN or infinity in the net's outputs)")
    return Answer(path, likeliest(row, names, top))


@contextmanager
def _reading(trained: Trained, files: Sequence[Path], ahead: int) -> Iterator[Iterator[tuple[Path, Any]]]:
    """Read pictures in threads: gives (file, input or error) in order, with at most ``ahead`` in memory.

    Leaving the ``with`` stops the reading.
    """

    def one(path: Path) -> Tensor | UserError:
        try:
            return trained.inputs(images.read(path).pixels)
        except UserError as error:
            return error

    pool = ThreadPoolExecutor(min(READERS, limits.cores()))

    def ordered() -> Iterator[tuple[Path, Any]]:
        waiting: deque[tuple[Path, Future[Any]]] = deque()
        rest = iter(files)
        while True:
            while len(waiting) < ahead and (path := next(rest, None)) is not None:
                waiting.append((path, pool.submit(one, path)))
            if not waiting:
                return
            path, future = waiting.popleft()
            yield path, future.result()

    try:
        yield ordered()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
