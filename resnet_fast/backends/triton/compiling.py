"""Compile the kernels of recorded launches, several at a time, before the first launch is made.

    recorded launches --bind--> jobs, each once --not in Triton's cache--> threads --> Triton's cache --> launch

What a kernel looks like depends on its launch: arguments that are None or 1 are compiled in, and sizes and pointers
that 16 divides are known to be so. Triton's own binder decides it here, as at every launch, so the key of a job is the
key that its launch looks up: the launch finds the kernel on disk, in this process and in the next (TRITON_CACHE_DIR).
The key holds Triton's version and the kernel's source, so what another version has left there is never found.

Threads are enough. A tenth of a compilation is Python; MLIR, LLVM and ptxas run without the interpreter's lock. A
process would first import torch, for as long as eight kernels take.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ... import flags
from ...errors import named
from ...progress import OnProgress, announced, is_off
from .fences import with_fences
from .launch import Launched

WORKER_BYTES = 256 << 20
"""Memory to leave for each kernel that is in the compiler and its assembler."""


@dataclass(frozen=True, eq=False)
class KernelJob:
    """One kernel to compile, as Triton's compiler takes it.

    Attributes:
        kernel: a ``triton.jit`` function.
        arch: compute capability times ten.
        signature: type of each argument.
        constants: values of the compile-time arguments, by place.
        hints: what is known of an argument's value, by place.
        options: number of warps and stages, and every other option of the compiler.
    """

    kernel: Any
    arch: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    hints: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's function, without the mark of a private name."""
        name: str = self.kernel.fn.__name__
        return name.strip("_")

    @cached_property
    def text(self) -> str:
        """Everything that tells two jobs apart."""
        place = f"{self.kernel.fn.__module__}:{self.name} sm_{self.arch}"
        return f"{place} {self.signature} {self.constants} {self.hints} {self.options}"

    def source(self) -> Any:
        """Return what ``triton.compile`` compiles."""
        from triton.compiler import ASTSource

        return ASTSource(fn=self.kernel, signature=self.signature, constexprs=self.constants, attrs=self.hints)

    def target(self) -> Any:
        """Return what ``triton.compile`` compiles for."""
        return _target(self.arch)


def _target(arch: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", arch, 32)


@cache
def _binder(kernel: Any, arch: int) -> tuple[Any, Any]:
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(_target(arch))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def job_of(launched: Launched, arch: int) -> KernelJob:
    """Return what a GPU of this architecture compiles for a launch."""
    from triton import knobs

    kernel = launched.kernel
    backend, binder = _binder(kernel, arch)
    given = {
        **launched.constants,
        "debug": kernel.debug or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    bound, specialization, options = binder(*launched.arguments, **given)
    options, signature, constants, hints = kernel._pack_args(backend, given, bound, specialization, options)
    return KernelJob(kernel, arch, signature, constants, hints, options.__dict__)


def jobs_of(launches: Iterable[Launched], arch: int) -> list[tuple[KernelJob, list[Launched]]]:
    """Return every job of ``launches`` once, with the launches that need it.

    Kernels with products come first, because they take the longest to compile.
    """
    found: dict[str, tuple[KernelJob, list[Launched]]] = {}
    for launched in launches:
        job = job_of(launched, arch)
        found.setdefault(job.text, (job, []))[1].append(launched)
    return sorted(found.values(), key=lambda item: item[1][0].tile is None)


@with_fences
def is_stored(job: KernelJob) -> bool:
    """Return whether Triton's cache holds the kernel, so that its launch compiles nothing."""
    from triton import knobs
    from triton.compiler.compiler import get_cache_invalidating_env_vars, get_cache_key, make_backend
    from triton.runtime.cache import get_cache_manager

    if knobs.compilation.always_compile or knobs.runtime.add_stages_inspection_hook is not None:
        return False
    source, backend = job.source(), make_backend(job.target())
    options = backend.parse_options({**job.options, **source.parse_options()})
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    stored = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    name = f"{source.name[:150]}.json"
    try:
        return name in (stored.get_group(name) or {})
    except ValueError:
        # Until Triton 3.6, a broken list of files raises here, in its compiler and in every launch; later versions
        # compile again, as happens once the list is gone.
        broken = stored.get_file(f"__grp__{name}")
        if broken is not None:  # else another process has removed it
            Path(broken).unlink(missing_ok=True)
        return False


@with_fences
def compile_job(job: KernelJob) -> str:
    """Compile a kernel into Triton's cache. Returns why it failed; empty if it did not."""
    import triton

    try:
        triton.compile(job.source(), target=job.target(), options=job.options)
    except Exception as error:  # of any stage of the compiler, or of the disk
        return named(error)
    return ""


def worker_count(jobs: int) -> int:
    """Return how many of ``jobs`` kernels to compile at a time: at least one.

    RESNET_FAST_COMPILE_WORKERS, else one per CPU of this process (divided by the processes that torchrun started on
    this machine); fewer if the memory is short.
    """
    asked = flags.COMPILE_WORKERS.read()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = int(asked) if asked.isdigit() else cpus // _processes()
    room = _available_bytes()
    if room is not None:
        most = min(most, room // WORKER_BYTES)
    return max(1, min(most, jobs))


def _processes() -> int:
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _available_bytes() -> int | None:
    """Return the memory that can be had without swapping; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return None


def compile_all(jobs: list[KernelJob], workers: int, on_progress: OnProgress | None = None) -> dict[str, str]:
    """Compile distinct jobs and return the reason of each that failed, by its text. Call it without holding a lock.

    On Ctrl-C, kernels that are in the compiler are finished and kept, and no other begins.

    Args:
        jobs: distinct jobs.
        workers: how many to compile at a time.
        on_progress: called in this thread before the first and after each.
    """
    failed: dict[str, str] = {}
    if not jobs:
        return failed
    pool = ThreadPoolExecutor(workers, thread_name_prefix="resnet-fast-compile")
    try:
        if on_progress is not None:
            on_progress(0, len(jobs), jobs[0].name)
        running = {pool.submit(compile_job, job): job for job in _from_own_place(jobs)}
        for done, future in enumerate(as_completed(running), 1):
            job, error = running[future], future.result()
            if error:
                failed[job.text] = error
            if on_progress is not None:
                on_progress(done, len(jobs), job.name)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


_looked_up: set[str] = set()
"""Texts of the jobs that were looked up in Triton's cache by :func:`ready`."""


def ready(launches: Iterable[Launched], arch: int) -> None:
    """Compile what launches need and Triton's cache lacks, several at a time, and say so.

    A kernel that fails is left to its launch, which raises what the compiler says; so is every kernel where launches
    shall compile their own.
    """
    from triton import knobs

    if is_off() or knobs.compilation.always_compile:
        return
    jobs = [job for job, _ in jobs_of(launches, arch) if job.text not in _looked_up]
    missing = [job for job in jobs if not is_stored(job)]
    with announced() as progress:
        compile_all(missing, worker_count(len(missing)), progress)
    _looked_up.update(job.text for job in jobs)


def _from_own_place(jobs: list[KernelJob]) -> list[KernelJob]:
    """Rotate the jobs, so that the processes of one machine, which need the same kernels, begin at different ones.

    A thread finds what another process has compiled meanwhile in the cache.
    """
    first = len(jobs) * int(os.environ.get("LOCAL_RANK") or 0) // _processes() % len(jobs)
    return jobs[first:] + jobs[:first]
