"""Launches whose programs wait for each other, with their programs in any order and taking turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast.backends.triton.launch import INTERPRETED
from resnet_fast.backends.triton.training import batch_norm, block_end, norm_gradient, pack, pool
from resnet_fast.backends.triton.training.vectors import SCALE
from resnet_fast.calls import Norm, Pool
from resnet_fast.tools.ptx_machine import PtxFault
from tests.support import batch_norm_cases as cases
from tests.support.interleaved import interleaved
from tests.support.launch_cases import conv

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_outputs")]

PLANTED = pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel keeps the functions that it was compiled with")

POOL = Pool(2, 2, 0)
CHANNELS, TILE = 96, 30


@triton.jit
def no_wait(counter_ptr, programs):
    pass


@triton.jit
def nothing_left(counter_ptr):
    return tl.atomic_add(counter_ptr, 1) + 1000


def statistics(y: Tensor) -> Tensor:
    """Return mean and M2 of tiles of ``TILE`` rows (2, tiles, C), as a convolution's epilogue computes them."""
    tiles = y.float().permute(0, 2, 3, 1).flatten(0, 2).split(TILE)
    return torch.stack([torch.stack([t.mean(0), t.var(0, False) * len(t)]) for t in tiles], 1)


class End:
    """The end of a block or of a stem: its norms have several chunks of tiles and 6 channel blocks each."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(3)
        monkeypatch.setattr(batch_norm, "chunks_of", lambda tiles: (-(-tiles // 2), 2))
        self.kind, c = kind, CHANNELS
        shape = (1, c, 8, 8) if kind == "stem" else (2, c, 13, 8)
        self.ys = [cases.raw(*shape, torch.float16) for _ in range(2 if kind == "projection" else 1)]
        self.partials = [statistics(y) for y in self.ys]
        self.norms = [Norm(*cases.affine(c), torch.zeros(c), torch.ones(c), True, 0.1, cases.EPS) for _ in self.ys]

    def copies(self) -> list[Norm]:
        return [n._replace(mean=n.mean.clone(), var=n.var.clone()) for n in self.norms]

    def in_one_launch(self) -> tuple[Tensor, list[Tensor], list[Norm]]:
        """Return z, the vectors, and the norms with their new running statistics."""
        norms, found = self.copies(), []
        rows = [batch_norm.outputs(CHANNELS, torch.float32, torch.device("cpu"))[0] for _ in self.ys]
        for y, partials, norm, out in zip(self.ys, self.partials, norms, rows, strict=True):
            found.append(
                batch_norm.finalization(partials, TILE, y.numel() // CHANNELS, norm, None, None, out, update=True)
            )
        return self.end(rows, found), rows, norms

    def end(self, rows: list[Tensor], finalizations: Any = ()) -> Tensor:
        if self.kind == "stem":
            return pool.pool_end(self.ys[0], rows[0], POOL, finalizations)
        shortcut = self.ys[1:] or [self.ys[0]]
        shortcut_rows = rows[1:] or [None]
        return block_end.block_end(self.ys[0], rows[0], shortcut[0], shortcut_rows[0], True, finalizations)

    def alone(self) -> tuple[list[Tensor], list[Norm]]:
        """Return the vectors of launches of their own, and the norms."""
        norms, rows = self.copies(), []
        for y, partials, norm in zip(self.ys, self.partials, norms, strict=True):
            out = batch_norm.outputs(CHANNELS, torch.float32, torch.device("cpu"))
            batch_norm.finalize(partials, TILE, y.numel() // CHANNELS, norm, None, None, out, update=True)
            rows.append(out[0])
        return rows, norms


KINDS = ["identity", "projection", "stem"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_block_finalizes_its_norms(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever programs come first: the vectors and running statistics of finalize, and bits that do not change."""
    end = End(kind, monkeypatch)
    wanted, wanted_norms = end.alone()
    z, rows, norms = end.in_one_launch()
    for found, want in zip(rows, wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(norms, wanted_norms, strict=True):
        torch.testing.assert_close((a.mean, a.var), (b.mean, b.var), rtol=1e-5, atol=1e-6)
        assert not torch.equal(a.mean, torch.zeros(CHANNELS))
    assert torch.equal(z, end.end(rows))
    for seed, resident in enumerate((1, 4)):
        with interleaved(seed, resident):
            again, again_rows, again_norms = end.in_one_launch()
        assert torch.equal(again, z) and all(map(torch.equal, again_rows, rows))
        assert all(torch.equal(a.mean, b.mean) for a, b in zip(again_norms, norms, strict=True))


@PLANTED
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_missing_wait_shows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end = End(kind, monkeypatch)
    z = end.in_one_launch()[0]
    monkeypatch.setattr(batch_norm, "wait", no_wait)
    found = []
    for seed in range(3):
        with interleaved(seed, 5):
            found.append(end.in_one_launch()[0])
    assert not all(torch.equal(one, z) for one in found)


@PLANTED
def test_programs_that_only_wait_show(monkeypatch: pytest.MonkeyPatch) -> None:
    end = End("projection", monkeypatch)
    monkeypatch.setattr(batch_norm, "draw", nothing_left)
    with interleaved(0, 1), pytest.raises(Exception, match="1 programs wait"):
        end.in_one_launch()


class BackwardEnd:
    """The end of a block or of a stem, backward: 3 channel blocks with several chunks of sums each."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(norm_gradient, "LEAST_CHUNK", 2)
        monkeypatch.setattr(block_end, "walk", cases.walks_of(1))
        self.kind, self.forward = kind, End(kind, monkeypatch)
        self.rows, _ = self.forward.alone()
        self.z = self.forward.end(self.rows)
        self.dz = cases.gradient(self.z)
        self.arrivals = torch.zeros(norm_gradient.arrivals_of(CHANNELS), dtype=torch.int32)
        self.like = [(torch.empty(CHANNELS), torch.empty(CHANNELS, dtype=torch.bfloat16), None) for _ in self.rows]
        self.conv = conv(40, CHANNELS, 1)
        self.weight = torch.randn(CHANNELS, 40, 1, 1)

    def run(self, together: bool) -> list[Tensor]:
        """Return g, coefficients and gradients of the parameters, and packed weights, of one launch or of several."""
        ys, rows = self.forward.ys, self.rows
        g = torch.empty_like(ys[0], memory_format=torch.channels_last)
        grads = [norm_gradient.gradient_of(g, y, True) for y in ys]
        finishes = [norm_gradient.finish_of(grad, like) for grad, like in zip(grads, self.like, strict=True)]
        packed = [pack.dgrad_passenger(self.weight, torch.float16, self.conv, v[SCALE]) for v in rows]
        more: Any = (None, g, finishes, self.arrivals) if together else (None, g)
        if self.kind == "stem":
            _, *sums = pool.pool_end_backward(self.dz, ys[0], rows[0], POOL, *more)
        else:
            yd, rows_d = (ys[1], rows[1]) if self.kind == "projection" else (None, None)
            packings = [p for _, p in packed] if together else []
            _, *sums = block_end.block_end_backward(
                self.dz, self.z, ys[0], rows[0], yd, rows_d, *more, **({"packings": packings} if together else {})
            )
        found = [finish.found for finish in finishes]
        if not together:
            parts = zip(grads, sums, rows, self.like, strict=False)
            found = [norm_gradient.coefficients(grad, own, v, like) for grad, own, v, like in parts]
        packed_weights = [w for w, _ in packed] if together and self.kind != "stem" else []
        results = [t for f in found for t in f if t is not None]
        return [g, *(t for grad in grads for t in (grad.coefficients, grad.packed)), *results, *packed_weights]


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_block_writes_coefficients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever programs come first: the results of launches of their own, the same bits, and zeros left behind."""
    end = BackwardEnd(kind, monkeypatch)
    once, wanted = end.run(True), end.run(False)
    assert torch.equal(once[0], wanted[0])
    for a, b in zip(once, wanted, strict=False):
        eps = 1e-5 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=eps, atol=1e-5)
    for w, rows in zip(once[len(wanted) :], end.rows, strict=False):
        assert torch.equal(w, pack.pack_dgrad(end.weight, torch.float16, end.conv, rows[SCALE]))
    for seed, resident in enumerate((1, 4)):
        with interleaved(seed, resident):
            again = end.run(True)
        assert all(map(torch.equal, again, once)) and not end.arrivals.any()


def test_counters_that_are_not_zero_show(monkeypatch: pytest.MonkeyPatch) -> None:
    end = BackwardEnd("projection", monkeypatch)
    end.arrivals[2] = 1
    if not INTERPRETED:  # the machine sees that programs read what others still write
        with pytest.raises(PtxFault, match="no release and acquire order the two"):
            end.run(True)
        return
    assert end.run(True)[1].isnan().any()
