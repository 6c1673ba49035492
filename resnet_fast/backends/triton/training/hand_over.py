"""Check on a GPU that the programs of one launch hand results over to each other, as arrival.py arranges it.

No interpreter shows the order in which multiprocessors see each other's memory. So before the first training step on a
GPU, :func:`check` runs the kernels that depend on it, one for each way of waiting, at the size of ResNet-50's first
stage with a batch of 256:

    the last arrival goes on    finalize and coefficients: 49 chunks of tiles per channel block; the end of a block,
                                backward: 32 chunks of 32 walks, and counters that the next run finds at 0 again
    numbered                    a packing that waits for all channel blocks of finalize
    claimed                     a block's end that finalizes two norms first, in more programs than a GPU holds at once

Each run has other numbers, so that a result of an earlier run, left in memory, is wrong.

Where it fails, dispatch does not choose these kernels: ``auto`` trains with the reference and counts why, and a request
for ``triton`` by name raises (:func:`.chain.trains_on`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....calls import Norm
from ....spec import ConvSpec
from . import batch_norm, block_end, norm_gradient, pack
from .vectors import FOLD, MEAN, SCALE, SHIFT, THR

TILES, ROWS, CHANNELS, OUT = 6272, 128, 256, 512
RUNS = 50
PIXELS = 64 * 1024
"""Rows of the block's end: 2,048 programs, of which a GPU with 132 multiprocessors holds 1,056 at once."""


def check(device: torch.device, tiles: int = TILES, runs: int = RUNS, pixels: int = PIXELS) -> None:
    """Run the kernels and compare with fp64.

    Args:
        device: a GPU, or the CPU in Triton's interpreter.
        tiles: tiles of ``ROWS`` rows.
        runs: number of runs with other numbers each.
        pixels: rows of the block's end.

    Raises:
        AssertionError: a run gave a wrong result.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = random(OUT, CHANNELS, 1, 1)
    conv = ConvSpec(1, 8, 8, CHANNELS, OUT, 1, 1, (1, 1), (0, 0), (1, 1), 1, "float16", "nhwc")
    y = torch.zeros(1, CHANNELS, 1, 1, dtype=torch.float16, device=device)
    image = random(1, pixels, 1, CHANNELS).half().permute(0, 3, 1, 2)
    arrivals = torch.zeros(norm_gradient.arrivals_of(CHANNELS), dtype=torch.int32, device=device)
    for run in range(runs):
        norm = Norm(1 + random(CHANNELS).abs(), random(CHANNELS), None, None, True, 0.1, 1e-5)
        partials = torch.stack([random(tiles, CHANNELS) + run, ROWS * (1 + random(tiles, CHANNELS).abs())])
        out = vectors, _ = batch_norm.outputs(CHANNELS, torch.float16, device)
        vectors.fill_(float("nan"))
        w, const, passenger = pack.forward_passenger(weight, torch.float16, conv, vectors)
        batch_norm.finalize(partials, ROWS, tiles * ROWS, norm, None, None, out, passenger=passenger)
        _compare(f"mean of run {run}", vectors[MEAN], partials[0].double().mean(0))
        folded = (weight[:, :, 0, 0] * vectors[FOLD]).half()
        _compare(f"packed weight of run {run}", w.flatten(1), folded.double())
        assert const is not None
        _compare(f"constant of run {run}", const, -(folded.double() @ vectors[THR].double()))
        sums = torch.stack([random(tiles, CHANNELS), random(tiles, CHANNELS)])
        grad = norm_gradient.gradient_of(y, y, True)
        _, dbeta, _ = norm_gradient.coefficients(grad, sums, vectors, (norm.weight, norm.bias, None))
        assert dbeta is not None
        _compare(f"gradient of beta of run {run}", dbeta, sums[0].double().sum(0))
        _check_end(run, image, partials, norm, arrivals)


def _check_end(run: int, image: Tensor, partials: Tensor, norm: Norm, arrivals: Tensor) -> None:
    """Run a block's end with a projection: both branches are ``image``, their norms have other statistics each."""
    statistics = partials, torch.stack([partials[0] * -2, partials[1]])
    count = ROWS * partials.shape[1]
    rows = [torch.full((10, CHANNELS), float("nan"), device=image.device) for _ in statistics]
    finalizations = [
        batch_norm.finalization(own, ROWS, count, norm, None, None, vectors)
        for own, vectors in zip(statistics, rows, strict=True)
    ]
    z = block_end.block_end(image, rows[0], image, rows[1], True, finalizations)
    for own, vectors in zip(statistics, rows, strict=True):
        _compare(f"mean of a block's end of run {run}", vectors[MEAN], own[0].double().mean(0))
    scale, shift = ((rows[0][row] + rows[1][row])[None, :, None, None] for row in (SCALE, SHIFT))
    _compare(f"end of a block of run {run}", z, torch.relu(image * scale + shift).double())
    dz = image + (1 + run)
    g = block_end.gradient_memory(dz, z)
    finishes = [
        norm_gradient.finish_of(norm_gradient.gradient_of(g, image, True), (norm.weight, norm.bias, None)) for _ in rows
    ]
    block_end.block_end_backward(dz, z, image, rows[0], image, rows[1], None, g, finishes, arrivals)
    total = torch.where(z > 0, dz, 0).double().sum((0, 2, 3))
    for finish in finishes:
        assert finish.found[1] is not None
        _compare(f"gradient of beta at a block's end of run {run}", finish.found[1], total)


def _compare(what: str, found: Tensor, wanted: Tensor) -> None:
    """Raise AssertionError unless ``found`` is ``wanted`` up to rounding; a result of other numbers is far from it."""
    error = ((found.double() - wanted).norm() / wanted.norm()).item()
    if not error < 1e-3:
        raise AssertionError(f"expected the {what} within 1e-3 of fp64, got a relative error of {error:.2g}")
