"""Prove configs on this GPU when a plan first wants them.

    hopeful plan ──► unproved configs? ──► run each once on a small random launch, compare with fp64 ──► keep verdicts
         ▲                                                                                                 │
         └───────────────── plan again: refused configs are gone, proved ones may run ◄────────────────────┘

A proof (:func:`prove`) takes milliseconds besides the compilation, which the launch itself needs too. It runs in a
thread of its own, which autocast, dispatch modes, autograd and streams of the caller do not reach, and draws from a
generator of its own. Where no proof can run now (:func:`obstacle`), the plan has proved configs only and says why.

tuning/proofs.py keeps the verdicts; tuning/launch_plan.py plans with them.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from ... import flags
from ...current_device import on_device
from ...errors import BackendError, named
from ...locks import ForkSafeLock
from ...spec import YES, LaunchSpec, Verdict
from ...tuning import proofs
from ...tuning.configs import Config
from ...tuning.tables import Table

_log = logging.getLogger("resnet_fast")
_lock = ForkSafeLock()

Plan = TypeVar("Plan")
Pair = tuple[LaunchSpec, Config]

THREADS = 16
"""Proofs that compile at the same time; compilers release the GIL."""


@cache
def versions() -> dict[str, str]:
    """Return what a verdict depends on: PyTorch with its cuDNN, compiler, driver, and the source of the kernels."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    own = source.hexdigest()[:16]
    return {"torch": torch.__version__, "triton": triton.__version__, "driver": _driver(), "kernels": own}


def _driver() -> str:
    """Return the CUDA version of the driver; ``none`` without one."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "none"
    return str(version.value)


def load(gpu_name: str) -> proofs.Proofs:
    """Return the verdicts of this user on a GPU, with this toolchain."""
    return proofs.read(proofs.user_file(gpu_name), gpu_name, versions())


def obstacle(device: torch.device) -> tuple[str, bool]:
    """Return why no proof can run now, empty if one can; and whether that lasts."""
    if device.type != "cuda":
        return "there is no GPU to prove it on", True
    if not flags.PROVE.enabled():
        return f"{flags.PROVE.name}=0", True
    if torch.compiler.is_compiling():
        return "PyTorch is tracing", False
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured", False
    return "", False


def failure(attempt: Callable[[], Any]) -> str:
    """Return why an attempt to run or check a config failed; empty if it did not.

    Raises:
        torch.OutOfMemoryError: this is not the config's fault.
    """
    try:
        attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, a launch or a comparison: each makes a config unusable
        return named(error)
    return ""


def settled(
    plan: Callable[[bool], Plan],
    pairs: Callable[[Plan], Iterable[Pair]],
    problem: Callable[[LaunchSpec, torch.device], Any],
    device: torch.device,
    table: Table,
) -> tuple[Plan, str, bool]:
    """Return a plan of configs that are proved or need no proof, after proving those that it wants.

    Args:
        plan: returns a plan, hopeful or not, from ``table``.
        pairs: returns the launches of a plan with their configs.
        problem: returns the random tensors of a launch, whose ``check(config)`` raises if an output is wrong.
        device: where the plan runs.
        table: what is known of it; new verdicts are added.

    Returns:
        The plan; a note on configs that would have been faster, empty if there is none; and whether the plan lasts.
        Otherwise ask again at the next call.
    """
    refused: dict[str, None] = {}
    while True:
        best = plan(True)
        untried = [(launch, config) for launch, config in pairs(best) if table.proofs.verdict(launch, config) is None]
        for launch, _ in pairs(best):
            refused |= {f"{name} of {launch.kernel} refused: {why}": None for name, why in _refusals(table, launch)}
        reason, lasts = obstacle(device) if untried else ("", True)
        if not untried:
            return best, "; ".join(refused), True
        if not reason:
            try:
                _prove(untried, problem, device, table)
                continue
            except torch.OutOfMemoryError:
                reason, lasts = FULL, False
        names = dict.fromkeys(f"{config} of {launch.kernel}" for launch, config in untried)
        return plan(False), "; ".join([*refused, f"not proved, {reason}: {', '.join(names)}"]), lasts


def _refusals(table: Table, launch: LaunchSpec) -> Iterable[tuple[str, str]]:
    return table.proofs.refusals(launch).items()


def _prove(
    untried: list[Pair], problem: Callable[[LaunchSpec, torch.device], Any], device: torch.device, table: Table
) -> None:
    """Prove configs, and keep the verdicts in ``table`` and in the user's file.

    Raises:
        torch.OutOfMemoryError: the GPU's memory is full; nothing is kept.
        BackendError: a config left the GPU in a state in which nothing can run.
    """
    with _lock:  # another thread may have proved them meanwhile
        untried = [pair for pair in dict.fromkeys(untried) if table.proofs.verdict(*pair) is None]
        with ThreadPoolExecutor(min(THREADS, max(1, len(untried)))) as pool:
            running = [pool.submit(prove, launch, config, problem, device) for launch, config in untried]
            found = [one.result() for one in running]
        broken = _broken(device)
        keep(table, [(*pair, why or broken) for pair, why in zip(untried, found, strict=True)])
    if broken:
        names = ", ".join(str(config) for _, config in untried)
        raise BackendError(f"proving {names} broke the CUDA context ({broken}); start the process again without them")


HAND_OVER = "programs of one launch hand results over"
FULL = "the GPU's memory is full"


def hand_over(check: Callable[[torch.device], None], device: torch.device, table: Table) -> tuple[Verdict, bool]:
    """Return whether the programs of one launch hand results over to each other, proved once per GPU.

    Args:
        check: raises if they do not.
        device: where to prove it.
        table: what is known of the GPU; the verdict is added.

    Returns:
        The verdict, a yes with the reason where no proof can run now; and whether it lasts. Otherwise ask again at the
        next call.
    """
    if device.type != "cuda":  # interpreter and stand-in run one program after another
        return YES, True
    refusal = table.proofs.of_subject(HAND_OVER)
    if refusal is None:
        reason, lasts = obstacle(device)
        if not reason:
            try:
                refusal = _proved(check, device, table)
            except torch.OutOfMemoryError:
                reason, lasts = FULL, False
        if refusal is None:
            return Verdict.yes(f"not proved that {HAND_OVER}: {reason}"), lasts
    if not refusal:
        return YES, True
    expected, got = f"a GPU on which {HAND_OVER}", f"{table.gpu}, where the proof failed ({refusal})"
    return Verdict.no(expected, got, "train with backend 'reference'"), True


def _proved(check: Callable[[torch.device], None], device: torch.device, table: Table) -> str:
    """Return why the hand-over is refused, empty if it is proved, and keep the verdict.

    Raises:
        torch.OutOfMemoryError: the GPU's memory is full; nothing is kept.
        BackendError: the check left the GPU in a state in which nothing can run.
    """
    with _lock:  # another thread may have proved it meanwhile
        found = table.proofs.of_subject(HAND_OVER)
        if found is None:
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(_checked, check, device).result()
            broken = _broken(device)
            found = found or broken
            _keep_subject(table, HAND_OVER, found)
            if broken:
                raise BackendError(
                    f"proving that {HAND_OVER} broke the CUDA context ({broken}); start the process again, where "
                    "backend 'auto' trains with the reference"
                )
    return found


def _checked(check: Callable[[torch.device], None], device: torch.device) -> str:
    with on_device(device), torch.no_grad():
        return failure(lambda: check(device))


def _keep_subject(table: Table, subject: str, refusal: str) -> None:
    """Keep a verdict on what is no config, in ``table`` and in the user's file."""
    table.proofs.verdicts[subject] = {"": refusal}
    _add(table.gpu, proofs.Proofs(table.gpu, versions(), {subject: {"": refusal}}))


def keep(table: Table, found: Iterable[tuple[LaunchSpec, Config, str]]) -> None:
    """Keep verdicts in ``table`` and in the user's file.

    Args:
        table: what is known of a GPU.
        found: launch, config, and why it is refused; empty if it is proved.
    """
    new = proofs.Proofs(table.gpu, versions())
    for launch, config, why in found:
        if table.proofs.verdict(launch, config) == why:
            continue
        new.record(launch, config, why)
        table.proofs.record(launch, config, why)
        if why:
            _log.warning("%s of %s is refused on %s: %s; another config runs", config, launch, table.gpu, why)
        else:
            _log.info("%s of %s is proved on %s", config, launch, table.gpu)
    if new.verdicts:
        _add(table.gpu, new)


def _add(gpu: str, new: proofs.Proofs) -> None:
    """Add verdicts to the user's file; a file that cannot be written is no error."""
    try:
        proofs.add(proofs.user_file(gpu), new)
    except OSError as error:
        _log.warning("verdicts are not kept (%s); the next process proves them again", error)


def _broken(device: torch.device) -> str:
    """Return why nothing can run on ``device`` any more; empty if it works."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return named(error)
    return ""


def prove(
    launch: LaunchSpec, config: Config, problem: Callable[[LaunchSpec, torch.device], Any], device: torch.device
) -> str:
    """Run a small launch with ``config`` and compare it; return why it is refused, empty if it is proved.

    It is called in a thread without the caller's modes.
    """
    with on_device(device), torch.no_grad():
        random = problem(proofs.small(launch), device)
        return failure(lambda: random.check(config))
