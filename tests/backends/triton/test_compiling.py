"""Jobs of recorded launches, Triton's cache, the number of workers, and a config that cannot be compiled."""

from __future__ import annotations

import importlib
import pkgutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from resnet_fast import devices
from resnet_fast.backends import triton as backend
from resnet_fast.backends.triton import ahead, compiling, device, launch
from resnet_fast.backends.triton.compiling import KernelJob
from resnet_fast.backends.triton.device import Target
from resnet_fast.backends.triton.training import chain, pack
from resnet_fast.calls import Call, Conv, Norm
from resnet_fast.errors import BackendError
from resnet_fast.impl import PlannedCall
from resnet_fast.ops.specs import spec_of
from resnet_fast.spec import ConvSpec
from resnet_fast.tuning import tables

if launch.INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

H100 = devices.gpu("h100")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


def call_of(n: int = 4, channels: int = 64, training: bool = False, side: int = 14) -> PlannedCall:
    """Return a 3x3 convolution, norm and ReLU to plan."""
    vector = meta(channels, dtype=torch.float32)
    norm = Norm(vector, vector, vector, vector, training, 0.1, 1e-5)
    conv = Conv(meta(channels, channels, 3, 3, dtype=torch.float32), None, (1, 1), (1, 1), (1, 1), 1)
    call = Call("conv_bn_act", meta(n, channels, side, side), (conv,), (norm,))
    needs = (True, False, True, False, True, True) if training else None
    return PlannedCall(call, spec_of(call, training), needs=needs)


def target() -> Target:
    return Target(H100, tables.load("a GPU of this test"))


def jobs(*calls: PlannedCall) -> list[KernelJob]:
    with device.planned_for(target()):
        made = [one for call in calls for one in ahead.launches_of(call)]
    return [job for job, _ in compiling.jobs_of(made, 90)]


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test an empty cache of kernels and of tables, and no refusals."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "tables"))
    monkeypatch.setattr(tables, "_refused", {})


def test_launches_that_need_the_same_kernel_are_one_job() -> None:
    assert len(jobs(call_of(4), call_of(8))) == len(jobs(call_of(4)))
    assert len(jobs(call_of(4), call_of(4, channels=128))) > len(jobs(call_of(4)))


def test_a_programs_kernels_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def compile_all(jobs: list[KernelJob], workers: int, on_progress: Any) -> dict[str, str]:
        given.extend(job.name for job in jobs)
        return {job.text: "no" for job in jobs}  # which their launches will say

    monkeypatch.setattr(compiling, "_looked_up", set())
    monkeypatch.setattr(compiling, "compile_all", compile_all)
    with device.planned_for(target()):
        made = ahead.launches_of(call_of(training=True))
    monkeypatch.setenv("RESNET_FAST_COMPILE_WORKERS", "0")
    compiling.ready(made, 90)
    assert not given
    monkeypatch.setenv("RESNET_FAST_COMPILE_WORKERS", "2")
    for _ in range(2):
        compiling.ready(made, 90)
    assert len(given) == len(jobs(call_of(training=True)))


def test_a_training_step_includes_its_backward_pass() -> None:
    names = [job.name for job in jobs(call_of(training=True))]
    assert {"conv_fwd_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel", "block_end_bwd_kernel"} <= set(names)
    products = [name.startswith("conv_") for name in names]
    assert products == sorted(products, reverse=True)  # the longest to compile come first


def test_a_compiled_kernel_is_found_by_its_launch(tmp_path: Path) -> None:
    """The cache's key is the launch's own: test_warm.py counts what a process compiles after another has warmed."""
    conv = ConvSpec(1, 8, 8, 16, 16, 1, 1, dtype="bfloat16")
    with launch.recording() as made:
        pack.pack_dgrad(meta(16, 16, 1, 1, dtype=torch.float32), torch.bfloat16, conv, None)
    job = compiling.job_of(made[0], 90)
    assert not compiling.is_stored(job)
    assert compiling.compile_job(job) == ""
    assert compiling.is_stored(job)
    assert not compiling.is_stored(compiling.job_of(made[0], 80))
    (group,) = tmp_path.glob("kernels/*/__grp__*.json")
    group.write_text("{ what another version left")
    assert not compiling.is_stored(job)  # it is compiled again, and no error
    assert compiling.compile_job(job) == "" and compiling.is_stored(job)


def test_workers_are_limited_by_switch_cpus_ranks_memory_and_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(compiling, "_available_bytes", lambda: 64 << 30)
    assert (compiling.worker_count(100), compiling.worker_count(3), compiling.worker_count(0)) == (16, 3, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert compiling.worker_count(100) == 2
    monkeypatch.setenv("RESNET_FAST_COMPILE_WORKERS", "4")
    assert compiling.worker_count(100) == 4
    monkeypatch.setattr(compiling, "_available_bytes", lambda: 3 * compiling.WORKER_BYTES)
    assert compiling.worker_count(100) == 3
    monkeypatch.setattr(compiling, "_available_bytes", lambda: 0)
    assert compiling.worker_count(100) == 1


def test_ranks_of_one_machine_begin_at_different_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    monkeypatch.setattr(compiling, "compile_job", lambda job: order.append(job) or "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    every = jobs(call_of(training=True))
    compiling.compile_all(every, 1)
    half = len(every) // 2
    assert order == [*every[half:], *every[:half]]


def test_after_an_interrupt_no_kernel_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the compiler is finished, and no thread is left."""
    begun: list[str] = []

    interrupted = threading.Event()

    def stop(done: int, total: int, name: str) -> None:
        if done == 0:
            return
        interrupted.set()
        raise KeyboardInterrupt

    every = jobs(call_of(training=True))

    def compiled(job: KernelJob) -> str:
        begun.append(job.name)
        if len(begun) > 1:  # until the interrupt; then so long that no other begins while the main thread waits
            interrupted.wait(60)
            time.sleep(0.5)
        return ""

    monkeypatch.setattr(compiling, "compile_job", compiled)
    with pytest.raises(KeyboardInterrupt):
        compiling.compile_all(every, 1, stop)
    assert 1 <= len(begun) <= 2 < len(every)
    assert not [t for t in threading.enumerate() if t.name.startswith("resnet-fast-compile")]


def fail(monkeypatch: pytest.MonkeyPatch, kernel: str, times: int = 1) -> list[str]:
    """Let the compiler fail on the first ``times`` jobs of a kernel. Returns the kernels that it was given."""
    given: list[str] = []

    def compiled(every: list[KernelJob], workers: int, on_progress: Any = None) -> dict[str, str]:
        bad = [job for job in every if job.name == kernel][: max(0, times - given.count(kernel))]
        given.extend(job.name for job in every)
        return {job.text: "PTXASError: out of registers" for job in bad}

    monkeypatch.setattr(ahead, "compile_all", compiled)
    return given


def test_a_config_that_does_not_compile_is_refused_and_the_next_one_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = call_of()
    with device.planned_for(target()):
        before = ahead.plan.prepare(planned.call, planned.spec, []).chosen
    first = str(before.configs[0])
    given = fail(monkeypatch, "conv_bn_act_3x3_fwd_kernel")
    report = ahead.compile_ahead([planned], target)
    assert report.failed == ((f"conv_bn_act_3x3_fwd_kernel {first}", "PTXASError: out of registers"),)
    assert len(given) == report.kernels == 2 and report.compiled == 1
    assert f"refused conv_bn_act_3x3_fwd_kernel {first}: PTXASError" in str(report)


def test_if_no_config_compiles_the_error_gives_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "conv_bn_act_3x3_fwd_kernel", times=100)
    with pytest.raises(BackendError, match=r"no kernel for .* PTXASError: out of registers"):
        ahead.compile_ahead([call_of()], target)


def test_the_plan_names_the_refused_config(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = call_of()
    with device.planned_for(target()):
        before = ahead.plan.prepare(planned.call, planned.spec, []).chosen
    tables.refuse("a GPU of this test", before.route.launches[0], before.configs[0], "PTXASError: out of registers")
    with device.planned_for(target()):
        after = ahead.plan.prepare(planned.call, planned.spec, []).chosen
    assert after.configs[0] != before.configs[0]
    assert f"refused {before.configs[0]}: PTXASError: out of registers" in str(after)


def test_a_training_config_that_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = call_of(training=True)
    with device.planned_for(target()):
        before = chain.plan_of(planned.spec, torch.device("meta"))
    fail(monkeypatch, "conv_wgrad_kernel")
    report = ahead.compile_ahead([planned], target)
    assert str(before.chosen[0].wgrad) in report.failed[0][0]
    with device.planned_for(target()):
        after = chain.plan_of(planned.spec, torch.device("meta"))
    assert after.chosen[0].wgrad != before.chosen[0].wgrad and after.chosen[0].fwd == before.chosen[0].fwd
    assert "refused" in str(after) and "PTXASError" in str(after)


def test_a_pass_that_does_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no other config: planning again would end in the same kernel."""
    given = fail(monkeypatch, "block_end_fwd_kernel")
    report = ahead.compile_ahead([call_of(training=True)], target)
    assert [what for what, _ in report.failed] == ["block_end_fwd_kernel"]
    assert given.count("block_end_fwd_kernel") == 1


def test_batch_and_image_size_multiply_no_kernel() -> None:
    """Kernels with the same constants are one kernel; only pointers that are absent tell others apart.

    Sizes that 16 divides, sizes that it does not, and 1 would be three kernels if Triton specialised on them.
    """
    found: dict[tuple[str, ...], set[str]] = {}
    for training in (False, True):
        for n, side in ((1, 7), (4, 14), (7, 9), (16, 16), (33, 14)):
            planned = call_of(n, training=training, side=side)
            for job in jobs(planned):
                names = job.kernel.arg_names
                absent = [names[place] for (place, *_), value in job.constants.items() if value is None]
                constants = {names[place]: value for (place, *_), value in job.constants.items()}
                key = (job.name, str(sorted(constants.items())), str(absent), str(job.options))
                found.setdefault(key, set()).add(job.text)
                assert not [n for n in ("gemm_m", "H", "W", "Ho", "Wo", "M", "tiles") if n in constants]
    assert len(found) > 10
    assert {len(texts) for texts in found.values()} == {1}


def test_no_default_of_a_kernel_is_a_plain_string() -> None:
    """Triton 3.6 makes constants of numbers alone, so a call that leaves a plain string out does not compile."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(backend.__path__, f"{backend.__name__}.")]
    kernels = {f for module in modules for f in vars(module).values() if isinstance(f, triton.JITFunction)}
    assert len(kernels) > 60
    assert [f for f in kernels for p in f.params if p.has_default and isinstance(p.default, str)] == []
