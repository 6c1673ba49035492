"""Kernels of other projects' kinds in the PTX machine: right ones compute what PyTorch does, faulty ones are caught."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import native
from resnet_fast.tools.ptx_machine import PtxFault, mutants, ptx_machine
from resnet_fast.tools.ptx_machine.judgement import judge
from resnet_fast.tools.ptx_machine.recorded import RecordedLaunch, recorded
from tests.support import foreign_kernels as foreign

pytestmark = pytest.mark.skipif(not native.ptx_status(), reason=native.ptx_status().reason)

Results = list[tuple[Tensor, Tensor, float]]
"""What a kernel computed, what it should have, and by how much an element may differ."""


def softmax(rows: int, width: int) -> Results:
    x, y = torch.randn(rows, width), torch.empty(rows, width)
    foreign.softmax_rows[(3,)](x, y, rows, width, BLOCK=256)
    return [(y, x.double().softmax(1), 2.0**-20)]


def layer_norm(rows: int, width: int) -> Results:
    x, dy, gamma, beta = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width), torch.randn(width)
    y, dx, mean, scale = torch.empty_like(x), torch.empty_like(x), torch.empty(rows), torch.empty(rows)
    groups = 3
    sums, locks = torch.empty(groups, 2, width), torch.zeros(2, groups, dtype=torch.int32)
    foreign.norm_rows[(rows,)](x, gamma, beta, y, mean, scale, width, 1e-5, BLOCK=128)
    foreign.norm_rows_backward[(rows,)](dy, x, gamma, mean, scale, dx, sums, locks, width, GROUPS=groups, BLOCK=256)
    exact = [t.double().requires_grad_() for t in (x, gamma, beta)]
    wanted = F.layer_norm(exact[0], (width,), exact[1], exact[2], 1e-5)
    wanted.backward(dy.double())
    assert not locks[0].any(), "a lock that was left closed"
    dgamma, dbeta = sums.sum(0)
    pairs = ((y, wanted.detach()), (dx, exact[0].grad), (dgamma, exact[1].grad), (dbeta, exact[2].grad))
    return [(found, want, 2.0**-17) for found, want in pairs if want is not None]


def product(kernel: Callable[..., None], programs: int, m: int, n: int, k: int) -> Results:
    a, b, c = torch.randn(m, k).half(), torch.randn(k, n).half(), torch.empty(m, n).half()
    grid = (programs or -(-m // 64) * -(-n // 32),)
    kernel[grid](a, b, c, m, n, k, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, GROUP=2, num_stages=3)  # type: ignore[index]
    return [(c, F.leaky_relu(a.double() @ b.double()), k**0.5 * 2.0**-9)]


def grouped(m: int, n: int) -> Results:
    return product(foreign.grouped_product, 0, m, n, 72)


def lasting(m: int, n: int) -> Results:
    return product(foreign.lasting_product, 2, m, n, 72)


def philox(seed: int, n: int) -> np.ndarray:
    """Return the first word of Philox 4x32-10 (Salmon et al. 2011, section 3.3) of the counters 0 to n - 1."""
    c = [np.arange(n, dtype=np.uint64), *(np.zeros(n, np.uint64) for _ in range(3))]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        one, two = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(two >> np.uint64(32)) ^ c[1] ^ key[0], two & low, (one >> np.uint64(32)) ^ c[3] ^ key[1], one & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return c[0].astype(np.uint32)


def dropout(n: int, seed: int) -> Results:
    x, y, p = torch.randn(n), torch.empty(n), 0.3
    foreign.drop[(-(-n // 256),)](x, y, n, p, seed, BLOCK=256)
    word = philox(seed, n).view(np.int32).astype(np.int64)
    uniform = np.where(word < 0, -word - 1, word) * 2.0**-31
    wanted = torch.where(torch.from_numpy(uniform) > p, x.double() / (1 - p), 0.0)
    return [(y, wanted, 2.0**-20)]


def attention(length: int, width: int, causal: bool = True) -> Results:
    q, k, v = (torch.randn(2, length, width).half() for _ in range(3))
    o, factor = torch.empty_like(q), math.log2(math.e) / width**0.5
    grid = (-(-length // 64), 2)
    foreign.attend[grid](q, k, v, o, length, factor, CAUSAL=causal, WIDTH=width, BLOCK_Q=64, BLOCK_K=32)
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    return [(o, wanted, 2.0**-9)]


KERNELS: dict[str, tuple[Callable[..., Results], tuple[int, int], tuple[int, int]]] = {
    "softmax": (softmax, (7, 200), (4, 77)),
    "layer norm": (layer_norm, (7, 200), (5, 77)),
    "product": (grouped, (100, 72), (150, 40)),
    "lasting product": (lasting, (100, 72), (150, 40)),
    "dropout": (dropout, (700, 5), (300, 9)),
    "attention": (attention, (100, 32), (70, 32)),
}
"""Name -> what launches the kernels and returns their results, and its arguments for two launches."""


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_foreign_kernels_compute(name: str, arch: int) -> None:
    run, *sizes = KERNELS[name]
    bits = []
    for seed in (0, 1):
        torch.manual_seed(0)
        with ptx_machine(arch, seed=seed), torch.no_grad() if name != "layer norm" else torch.enable_grad():
            found = run(*sizes[0])
        for y, wanted, most in found:
            assert (y.double() - wanted).abs().max() <= most * max(1.0, float(wanted.abs().max()))
        bits.append([y for y, *_ in found])
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_a_flag_that_other_warps_still_read_is_set() -> None:
    """As in Triton's tutorial on layer norm: one thread sets it, and no barrier lies behind the others' loads."""
    x, gamma, kept = torch.randn(7, 200), torch.randn(200), torch.rand(7)
    dx, sums, locks = torch.empty_like(x), torch.zeros(3, 2, 200), torch.zeros(2, 3, dtype=torch.int32)
    with ptx_machine(80), pytest.raises(PtxFault, match=r"no barrier orders|race|ordered"):
        foreign.norm_rows_backward[(7,)](
            x, x, gamma, kept, kept, dx, sums, locks, 200, GROUPS=3, BLOCK=256, ORDERED=False
        )


def launches_of(name: str, arch: int) -> list[list[RecordedLaunch]]:
    """Return the launches of a kernel at two sizes, those of the same PTX together."""
    run, *sizes = KERNELS[name]
    found: dict[str, list[RecordedLaunch]] = {}
    for n, size in enumerate((*sizes, *sizes)):
        torch.manual_seed(n)
        with recorded(arch) as (_, launches):
            run(*size)
        for launch in launches:
            found.setdefault(launch.text, []).append(launch)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_faults_in_foreign_kernels_are_caught(name: str, arch: int) -> None:
    caught = []
    for launch, *relatives in launches_of(name, arch):
        for mutant in mutants.draw(launch, 5):
            verdict = judge(launch, mutant, relatives)
            assert not verdict.survived, mutant
            caught.append(bool(verdict.caught))
    assert sum(caught) > len(caught) / 2
