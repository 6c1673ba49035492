"""Fixtures of every test: no switches from the caller's shell, a fixed seed, and no GPU test without a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Kineto reads it when a process profiles for the first time, whichever test that is in; benchmarks/memory.py says why.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# A shell that starts the tests in the background has them ignore Ctrl-C, and nohup has them ignore a hang-up. The tests
# of signals send both.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for measurements of this machine, in place of the user's cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    """A developer's RESNET_FAST_BACKEND must not decide what a test sees."""
    for name in [name for name in os.environ if name.startswith("RESNET_FAST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RESNET_FAST_CACHE", str(cache_folder))


@pytest.fixture
def same_threads() -> Iterator[None]:
    """Restore the number of torch's threads after the test."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(same_threads: None) -> None:
    """Run on one thread: tiny nets on several wait for each other more than they compute."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "run the tests marked interpret on kernels compiled for sm_80 or sm_90, in the PTX machine"
    parser.addoption("--compiled-for", type=int, choices=(80, 90), help=what)
    other = "and each of their launches under two other schedules, which must leave the same bytes"
    parser.addoption("--other-schedules", action="store_true", help=other)
    parser.addoption("--schedule-seed", type=int, default=0, help="of the order of warps in the PTX machine")


@pytest.fixture(autouse=True)
def _compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    arch = request.config.getoption("--compiled-for")
    if arch is None or not request.node.get_closest_marker("interpret"):
        yield
        return
    from resnet_fast.tools.ptx_machine import ptx_machine, recorded

    seed = request.config.getoption("--schedule-seed")
    if not request.config.getoption("--other-schedules"):
        with ptx_machine(arch, seed=seed):
            yield
        return
    with recorded.recorded(arch, seed) as (_, launches):
        yield
    recorded.expect_same_on_every_schedule(launches)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip, on compiled kernels, a test that looks into Triton's interpreter, as one does that counts bytes."""
    try:
        return (yield)
    except RuntimeError as error:
        if item.config.getoption("--compiled-for") is None or type(error).__name__ != "NotInterpreted":
            raise
        pytest.skip(str(error))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" and config.getoption("--compiled-for") is None:
        for item in items:
            if item.get_closest_marker("interpret"):
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 before triton is imported"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
