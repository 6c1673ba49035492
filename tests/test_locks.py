"""Locks are open in a forked child, whoever held them, and so is everything that they guard."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import BasicBlock, ResNet

import resnet_fast
from resnet_fast import parameter_cache
from resnet_fast.backends.onednn import net as _  # noqa: F401 (its lock takes part)
from resnet_fast.locks import ForkSafeLock, _all, load
from tests.support.processes import LIMIT_S

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    # OpenMP's own pool does not survive a fork, in stock PyTorch neither; a DataLoader's workers use one thread.
    pytest.mark.usefixtures("one_thread"),
]


def in_child(work: Callable[[], object], seconds: float = LIMIT_S) -> None:
    """Run ``work`` in a forked child; it must end well and in time."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


@contextmanager
def held(locks: list[ForkSafeLock]) -> Iterator[None]:
    """Another thread holds all of ``locks``."""
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        ready.set()
        done.wait()
        for lock in locks:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return resnet_fast.accelerate(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).eval())


def test_every_lock_of_the_package_is_renewed() -> None:
    """Nothing in the package makes a lock of another kind."""
    package = Path(resnet_fast.__file__).parent
    made = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"threading\.R?Lock\(|threading\.Condition\(|multiprocessing\.R?Lock\(", path.read_text())
    }
    assert made == {"locks.py"}


def test_a_child_finds_held_locks_open_and_a_net_runs_there() -> None:
    net, x = small_net(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = net(x)

        def work() -> None:
            for _ in range(6):  # the fifth may compile
                torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
            small_net()(torch.ones(2, 3, 32, 32))
            assert resnet_fast.stats()["calls"]

        with held(list(_all)):
            in_child(work)
    parameter_cache.clear()


def test_the_parent_keeps_its_locks() -> None:
    lock = ForkSafeLock()
    with held([lock]):
        in_child(lambda: None)
        assert not lock.acquire(blocking=False)
    assert lock.acquire(blocking=False)
    lock.release()


def test_a_fork_waits_for_an_import_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the child waits for ever for the thread that imports, which it does not have."""
    (tmp_path / "imported_late.py").write_text("import time\nstarted = True\ntime.sleep(0.5)\ndone = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    thread = threading.Thread(target=load, args=("imported_late",))
    thread.start()
    while not hasattr(sys.modules.get("imported_late"), "started"):
        time.sleep(0.001)
    in_child(lambda: load("imported_late").done, seconds=60)
    thread.join()


@pytest.mark.slow
def test_children_of_a_serving_process_run_nets() -> None:
    """The images are drawn before: PyTorch's generator has a lock of its own, which a child would find held."""
    net, stop, x = small_net(), threading.Event(), torch.randn(1, 3, 32, 32)

    def serve() -> None:
        with torch.inference_mode():
            while not stop.is_set():
                net(x)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with torch.inference_mode():
            for _ in range(12):
                in_child(lambda: net(x))
    finally:
        stop.set()
        thread.join()


class Features(Dataset):
    """What a frozen net makes of images, computed by the loader's workers."""

    def __init__(self, net: nn.Module):
        self.net = net

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.net(torch.full((1, 3, 32, 32), float(i)))[0]


@pytest.mark.slow
def test_workers_of_a_data_loader_run_a_net() -> None:
    net = small_net()
    with torch.no_grad():
        expected = torch.stack([net(torch.full((1, 3, 32, 32), float(i)))[0] for i in range(4)])
    with held(list(_all)):
        loader = DataLoader(Features(net), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=LIMIT_S)
        (found,) = list(loader)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
