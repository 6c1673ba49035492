"""A net that learns to read digits on our kernels, step by step beside stock nets.

Training is chaotic: two runs that differ by a rounding drift apart. So a run of ours in 16-bit autocast is held to what
precision alone does to a stock run of the same seed (fp32 against 16-bit autocast), and to what another seed does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from trainnets import cifar, fewest_programs, loss_of, twin

pytestmark = [pytest.mark.interpret, pytest.mark.slow]

STEPS, BATCH, SMOOTH = 60, 16, 10
IMAGES = 400
"""Of the 1,797: a net trained for so few steps sees each about twice."""


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images (N, 1, 8, 8) in -1 to 1, labels (N)."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    x = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    return x[:IMAGES], torch.from_numpy(found.target).long()[:IMAGES]


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    with fewest_programs():
        yield


def net_of(seed: int) -> nn.Module:
    """The small CIFAR net for one channel and ten classes, with a first convolution that strides; fresh norms."""
    torch.manual_seed(seed)
    net = cifar(channels=1, classes=10)
    net.conv1.stride = (2, 2)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
    return net


def train(net: nn.Module, digits: tuple[Tensor, Tensor], seed: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(smoothed losses, images read right at the end). ``seed`` orders the data."""
    x, labels = digits
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = net(x[batch])
        loss = loss_of(out, labels[batch])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    with torch.no_grad():  # the weights and statistics that this run learned, read by stock layers in every case
        reader = net_of(0)
        reader.load_state_dict(copy.deepcopy(net.state_dict()))
        right = int((reader.eval()(x).argmax(1) == labels).sum())
    return torch.stack(losses).unfold(0, SMOOTH, 1).mean(1), right


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().mean().item()


def test_loss_curves_overlap(digits: tuple[Tensor, Tensor]) -> None:
    stock, right = train(net_of(0), digits, 0, torch.float32)
    amp, right_amp = train(net_of(0), digits, 0, torch.float16)
    other, right_other = train(net_of(1), digits, 1, torch.float32)
    ours, right_ours = train(twin(net_of(0)), digits, 0, torch.float16)
    precision, seeds, found = distance(stock, amp), distance(stock, other), distance(stock, ours)
    print(
        f"{STEPS} steps; loss {stock[0]:.3f} to {stock[-1]:.3f} stock fp32, {amp[-1]:.3f} stock fp16, {ours[-1]:.3f} "
        f"ours fp16; mean distance from stock fp32: stock fp16 {precision:.4f}, another seed {seeds:.4f}, "
        f"ours {found:.4f}; read right of {IMAGES}: {right}, {right_amp}, {right_ours}, another seed {right_other}"
    )
    assert stock[-1] < 0.5 * stock[0], "the net does not learn"
    assert found <= max(2 * precision, 0.25 * seeds)
    assert abs(right_ours - right) <= max(4, 2 * abs(right_amp - right), abs(right_other - right))
