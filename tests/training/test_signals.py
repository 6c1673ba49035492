"""A run that gets a signal, or is killed, ends bit for bit where one that did not does."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_fast.training import checkpoints
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunResult, Tick, Watch
from tests.support.runs import AHEAD, Make, assert_log_is_whole, steps, train_until_killed

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_the_run_after_its_step(name: str, tiny: Make, options: Make) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def send(tick: Tick) -> None:
        if tick.step == 3:
            signal.raise_signal(number)

    done = train(tiny(), options(save_steps=100), Watch(step=send))
    assert (done.finished, done.step, done.stopped_by) == (False, 3, name)
    assert checkpoints.read_meta(checkpoints.found(done.out)[0])["step"] == 3 and steps(done.out) == [1, 2, 3]
    assert signal.getsignal(number) == before
    assert train(tiny(), options(resume="auto")).finished


def test_a_second_signal_ends_it_at_once(tiny: Make, options: Make) -> None:
    def send(tick: Tick) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), options(), Watch(step=send))
    assert train(tiny(), options(resume="auto")).finished  # the lock is free


def test_a_run_in_a_thread_leaves_signals_alone(tiny: Make, options: Make) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        done: RunResult = pool.submit(train, tiny(steps=1), options()).result()
    assert done.finished


def child(target: Callable[..., Any], *arguments: Any) -> Any:
    """A process that trains; its torch is imported already, once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resnet_fast.training.loop", "resnet_fast.models.registry", "sklearn.datasets"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def wait_for(out: Path, step: int, process: Any, seconds: float = 120) -> None:
    """Until ``step`` is in the log, or the process has ended."""
    end = time.monotonic() + seconds
    while process.is_alive() and (not steps(out) or steps(out)[-1] < step):
        assert time.monotonic() < end, f"no step {step} in {seconds} s"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "length", "times"), [(0, 64, 7), (1, 32, 3)])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
    workers: int, length: int, times: int, tiny: Make, options: Make, left: Make, same: Make
) -> None:
    chosen = tiny(steps=length, subset=320, ema=0.9, mixup=0.4)
    whole = train(chosen, options("whole"))
    run = options("killed", save_steps=1, resume="auto", workers=workers)
    reached, kills = 0, 0
    for seed in range(times):
        chance = random.Random(seed)
        wanted = reached + chance.randint(1, 3)
        process = child(train_until_killed, chosen, run, wanted + AHEAD)
        wait_for(run.out, wanted, process)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        reached = steps(run.out)[-1]
        place, meta, complaints = checkpoints.resume_point(run.out, "auto")
        assert place is not None and complaints == [] and 0 <= reached - meta["step"] <= 1
    assert kills == times and reached < length
    process = child(train, chosen, run)
    process.join()
    assert process.exitcode == 0
    same(left(run.out), left(whole.out))
    assert_log_is_whole(run.out, length)
    assert not list(checkpoints.folder_of(run.out).glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_the_command_and_its_workers(number: int, code: int, options: Make) -> None:
    run = options()
    command = [sys.executable, "-m", "resnet_fast.cli.main", "train", "--out", str(run.out), "--log-every", "1"]
    command += ["--size", "8", "--batch", "16", "--epochs", "500", "--set", "subset=64", "--save-steps", "100000"]
    command += ["--workers", "1", "--threads", "1", "--device", "cpu", "--no-tensorboard"]
    # In a group of its own, all of which gets the signal, as a terminal or a scheduler sends it; and with the signal
    # heeded, which whoever runs the tests in the background may have this process ignore.
    heed = functools.partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed)
    try:
        end = time.monotonic() + 120
        while process.poll() is None and len(steps(run.out)) < 3:
            assert time.monotonic() < end
            time.sleep(0.02)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, said
    last = steps(run.out)[-1]
    assert checkpoints.read_meta(checkpoints.found(run.out)[0])["step"] == last
    name = signal.Signals(number).name
    assert said.splitlines()[-1] == f"stopped by {name} after step {last}, saved; go on with --resume auto"
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_terminal_that_closes_leaves_a_saved_run(options: Make) -> None:
    """As a lost connection does: the kernel sends SIGHUP, and whatever is printed from then on fails."""
    run = options()
    own_terminal = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", own_terminal, "-m", "resnet_fast.cli.main", "train", "--out", str(run.out)]
    command += [
        "--log-every",
        "1",
        "--size",
        "8",
        "--batch",
        "16",
        "--epochs",
        "5000",
        "--set",
        "subset=64",
        "--save-steps",
        "100000",
    ]
    command += ["--threads", "1", "--device", "cpu", "--no-tensorboard"]
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    threading.Thread(target=_drain, args=(ours,), daemon=True).start()
    try:
        end = time.monotonic() + 120
        while process.poll() is None and len(steps(run.out)) < 5:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.close(ours)
    assert process.wait(60) == 129
    assert checkpoints.step_of(checkpoints.found(run.out)[0]) == steps(run.out)[-1]


def _drain(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 65536):
            pass
