"""Random raw outputs and norms for the tests of the BatchNorm, block end and pool passes; and one process of a group.

``python batch_norm_cases.py RANK FOLDER COUNT...`` runs process RANK of a group over FOLDER, with COUNT[RANK] images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from resnet_fast.backends.triton.problem import guarded
from resnet_fast.backends.triton.training import vectors as v
from resnet_fast.calls import Norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def raw(n: int, c: int, h: int, w: int, dtype: torch.dtype, mean: float = 1.0, std: float = 2.0) -> Tensor:
    """Return dense NHWC surrounded by NaN; every channel has its own mean (of size ``mean``) and deviation."""
    own = mean * std * torch.where(torch.rand(c) < 0.5, -1.0, 1.0)[None, :, None, None]
    spread = std * torch.empty(c).uniform_(0.5, 1.5)[None, :, None, None]
    return guarded((torch.randn(n, c, h, w) * spread + own).to(dtype))


def gradient(y: Tensor) -> Tensor:
    """Return random values with the shape and dtype of ``y``, dense NHWC surrounded by NaN."""
    return guarded(torch.randn(y.shape).to(y.dtype))


def guard(t: Tensor) -> Tensor:
    """Return the values of ``t``, dense, surrounded by NaN."""
    field = torch.full((t.numel() + 128,), float("nan"), dtype=t.dtype)
    return field[64 : 64 + t.numel()].view(t.shape).copy_(t)


def affine(c: int) -> tuple[Tensor, Tensor]:
    """Return gamma of both signs and beta; the first two gammas are 0, with a positive and a negative beta."""
    gamma = torch.empty(c).uniform_(0.5, 1.5) * torch.where(torch.rand(c) < 0.3, -1.0, 1.0)
    beta = torch.randn(c)
    gamma[:2], beta[:2] = 0.0, torch.tensor([0.7, -0.7])[: min(c, 2)]
    return gamma, beta


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel in fp64."""
    flat = y.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, unbiased=False)


def vectors(y: Tensor) -> tuple[Tensor, Norm]:
    """Return ``vectors`` of a random norm on the statistics of ``y``, rounded once from fp64, and the stock norm.

    Rows that only a batch norm's own kernels use are NaN.
    """
    mean, var = moments(y)
    gamma, beta = affine(y.shape[1])
    rows = torch.full((10, y.shape[1]), float("nan"), dtype=torch.float64)
    rows[v.MEAN], rows[v.INVSTD] = mean, (var + EPS).rsqrt()
    rows[v.SCALE] = gamma * rows[v.INVSTD]
    rows[v.SHIFT] = beta - mean * rows[v.SCALE]
    return guard(rows.float()), Norm(gamma, beta, mean.float(), var.float(), eps=EPS)


def per_channel(t: Tensor) -> Tensor:
    return t[None, :, None, None]


def mapped(y: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return SCALE * y + SHIFT, computed in ``dtype``."""
    return y.to(dtype) * per_channel(rows[v.SCALE].to(dtype)) + per_channel(rows[v.SHIFT].to(dtype))


def mapped_by_kernels(y: Tensor, rows: Tensor) -> Tensor:
    """Return SCALE * y + SHIFT in fp32, to the bit: compiled it is one fma, in the interpreter a product and a sum.

    An fma rounds once. So does fp64, which holds the product exactly, but for one sum in 2^29 that rounds twice.
    """
    from resnet_fast.backends.triton.launch import INTERPRETED

    return mapped(y, rows, torch.float32) if INTERPRETED else mapped(y, rows, torch.float64).float()


def sums(g: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Return (2, C) in fp64: sum g and sum g * (y - MEAN)."""
    away = y.double() - per_channel(rows[v.MEAN].double())
    return torch.stack([g.double().sum((0, 2, 3)), (g.double() * away).sum((0, 2, 3))])


def assert_sums(partials: Tensor, g: Tensor, y: Tensor, rows: Tensor) -> None:
    """Assert that partial sums (2, tiles, C) add up to those of ``g`` as stored, within the rounding of fp32 sums."""
    assert partials.dtype == torch.float32 and partials.shape[::2] == (2, y.shape[1])
    want = sums(g, y, rows)
    size = (
        sums(g.abs(), y, rows)[0],
        (g.double() * (y.double() - per_channel(rows[v.MEAN].double()))).abs().sum((0, 2, 3)),
    )
    error = (partials.double().sum(1) - want).abs()
    assert (error <= 1e-6 * torch.stack(size) + 1e-30).all(), error


def walks_of(steps: int) -> Callable[[Tensor, tuple[int, int]], tuple[int, int]]:
    """Replace passes.walk, which keeps the walks of small tensors short."""
    return lambda t, tile: (steps, -(-t.numel() // t.shape[1] // (tile[0] * steps)))


def step(y: Tensor, g: Tensor, norm: Norm, group: str = "") -> dict[str, Tensor]:
    """Return a process's part of a batch norm's training step on its images ``y`` and the gradient ``g``."""
    from resnet_fast.backends.triton.training import batch_norm, cudnn_passes, norm_gradient

    partials, rows = cudnn_passes.statistics(y)
    count = y.numel() // y.shape[1]
    rows_of, clamp = out = batch_norm.outputs(y.shape[1], y.dtype, y.device)
    batch_norm.finalize(partials, rows, count, norm, None, None, out, group)
    away = y.float() - per_channel(rows_of[v.MEAN])
    own = torch.stack([g.float().sum((0, 2, 3)), (g.float() * away).sum((0, 2, 3))])[:, None]
    grad = norm_gradient.gradient_of(g, y, True)
    dgamma, dbeta, _ = norm_gradient.coefficients(grad, own, rows_of, (norm.weight, norm.bias, None), group)
    assert dgamma is not None and dbeta is not None
    found = {"vectors": rows_of, "coefficients": grad.coefficients, "dgamma": dgamma, "dbeta": dbeta}
    return found | ({} if clamp is None or grad.packed is None else {"clamp": clamp, "packed": grad.packed})


def batch_of_group(images: int) -> tuple[Tensor, Tensor, Norm]:
    """Return the same tensors in every process of a test."""
    torch.manual_seed(5)
    y = raw(images, 20, 3, 5, torch.float16, mean=3.0)
    gamma, beta = affine(20)
    return y, gradient(y), Norm(gamma, beta, None, None, True, 0.1, EPS)


def main(rank: int, folder: Path, counts: list[int]) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(counts))
    y, g, norm = batch_of_group(sum(counts))
    first = sum(counts[:rank])
    mine = slice(first, first + counts[rank])
    group = dist.distributed_c10d._get_default_group().group_name
    torch.save(step(y[mine].contiguous(memory_format=torch.channels_last), g[mine], norm, group), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), [int(n) for n in sys.argv[3:]])
