"""The choice of a backend: the order of backends, explicit requests, and the reasons it gives."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from resnet_fast import BackendError, UserError, reset_stats, stats, strict, use_backend
from resnet_fast.backends import refusals
from resnet_fast.backends.onednn import tiling
from resnet_fast.dispatch import catalog, record, select
from resnet_fast.ops.specs import spec_of
from resnet_fast.spec import ConvSpec, Epilogue
from tests.support.op_cases import OPS, make
from tests.support.processes import LIMIT_S, in_threads

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPEC = ConvSpec(2, 9, 7, 8, 8, 3, 3, padding=(1, 1), epilogue=Epilogue(relu=True))


def ran_on(fn: Callable[[], object]) -> str:
    """Return the backend that served the one conv_bn_act call made by ``fn``."""
    reset_stats()
    fn()
    ((name, count),) = stats()["calls"].items()
    assert count == 1
    return name.removeprefix("conv_bn_act/")


def test_auto_takes_the_highest_rank_that_accepts() -> None:
    p = make("conv_bn_act")
    assert ran_on(p.run) == "onednn"
    assert ran_on(p.copy(grad=True).run) == "reference"
    assert ran_on(make("conv_bn_act", batch_stats=True).run) == "reference"


def test_precedence_context_argument_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make("conv_bn_act")
    monkeypatch.setenv("RESNET_FAST_BACKEND", "reference")
    assert ran_on(p.run) == "reference"
    assert ran_on(lambda: p.run("onednn")) == "onednn"
    with use_backend("reference"):
        assert ran_on(lambda: p.run("onednn")) == "reference"
        with use_backend("onednn"):
            assert ran_on(p.run) == "onednn"
        assert ran_on(lambda: p.run("onednn")) == "reference"
        with use_backend("auto"):
            assert ran_on(p.run) == "onednn"
    assert ran_on(p.run) == "reference"


def test_use_backend_is_undone_by_an_exception_and_refuses_a_bad_name() -> None:
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert select.requested("auto") == "auto"
    with pytest.raises(UserError, match=r"expected a backend among .*, got 'tpu'"), use_backend("tpu"):
        pass


def test_threads_have_different_backends() -> None:
    both = threading.Barrier(2, timeout=LIMIT_S)

    def work(first: str, second: str) -> None:
        with use_backend(first):
            both.wait()
            assert select.requested("auto") == first
            both.wait()
            with use_backend(second):
                both.wait()
                assert select.requested("auto") == second
            both.wait()
            assert select.requested("auto") == first

    # each leaves while the other is inside, which would put back the wrong one if there were one for all
    in_threads(lambda: work("reference", "onednn"), lambda: work("onednn", "reference"))
    assert select.requested("auto") == "auto"


def test_a_backend_asked_for_in_one_thread_is_not_anothers() -> None:
    inside, outside = threading.Barrier(2, timeout=LIMIT_S), threading.Barrier(2, timeout=LIMIT_S)
    p = make("conv_bn_act")
    reset_stats()

    def reference() -> None:
        with use_backend("reference"), strict(), record.tape() as tape:
            inside.wait()
            outside.wait()
            p.run()
        assert len(tape) == 1

    def auto() -> None:
        inside.wait()
        p.run()
        make("conv_bn_act", dtype=torch.float64).run()  # a fallback, which the other thread alone refuses
        outside.wait()

    in_threads(reference, auto)
    assert stats()["calls"] == {"conv_bn_act/onednn": 1, "conv_bn_act/reference": 2}


def test_threads_lose_no_count() -> None:
    reset_stats()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(*[lambda: [record.count("net", "replay") for _ in range(5000)]] * 4)
    finally:
        sys.setswitchinterval(before)
    assert stats()["calls"] == {"net/replay": 20000}


@pytest.mark.parametrize("op", OPS)
def test_a_bad_name_in_argument_or_environment_is_an_error(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = make(op)
    with pytest.raises(UserError, match=r"expected a backend among auto, .*, got 'tpu'; "):
        p.run("tpu")
    monkeypatch.setenv("RESNET_FAST_BACKEND", "tpu")
    with pytest.raises(UserError, match=r"expected RESNET_FAST_BACKEND to be one of .*, got 'tpu'; unset it"):
        p.run()
    assert p.run("reference").shape == p.run("onednn").shape


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_absent_backend_is_an_error_with_its_reason(name: str) -> None:
    for ask in (lambda: select.choose(SPEC, CPU, name), lambda: make("conv_bn_act").run(name)):
        with pytest.raises(BackendError, match=f"{name!r} is not available: expected .*, got .*; use "):
            ask()


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_an_explicit_request_never_degrades(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = make("conv_bn_act").copy(grad=True)
    before = stats()
    with pytest.raises(BackendError, match=r"'onednn' cannot run conv_bn_act N2 9x7.*: expected .*, got .*; wrap"):
        if how == "argument":
            p.run("onednn")
        elif how == "context":
            with use_backend("onednn"):
                p.run()
        else:
            monkeypatch.setenv("RESNET_FAST_BACKEND", "onednn")
            p.run()
    assert stats() == before


def test_a_choice_gives_a_reason_for_every_other_backend() -> None:
    for spec, device, backend in (
        (SPEC, CPU, "auto"),
        (SPEC, CPU, "reference"),
        (SPEC.with_(grad=True), CPU, "auto"),
        (SPEC, CUDA, "auto"),
    ):
        choice = select.choose(spec, device, backend)
        reasons = dict(choice.refused)
        assert set(reasons) == set(catalog.availability()) - {choice.impl.backend}
        for name, reason in reasons.items():
            sentence = reason.startswith("expected ") and ", got " in reason and "; " in reason
            assert sentence or "ranks higher" in reason or "was asked for" in reason, (name, reason)
    assert dict(select.choose(SPEC, CPU).refused)["reference"] == "onednn ranks higher"


def test_each_gpu_of_a_machine_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU at index 1 is too old for the kernels, the one at index 0 is not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: [(9, 0), (7, 5)][torch.device(device).index]
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ["new", "old"][torch.device(device).index])
    refusals.recent_gpu.cache_clear()
    try:
        assert refusals.recent_gpus() and refusals.recent_gpu(CUDA)
        old = refusals.recent_gpu(torch.device("cuda", 1))
        assert not old and "expected a GPU of compute capability 8.0 or later, got old;" in old.reason
        for impl in catalog.impls("conv_bn_act"):
            there = impl.runs_on(torch.device("cuda", 1))
            assert impl.runs_on(CUDA).ok == (impl.backend != "onednn")
            assert there.ok == (impl.backend == "reference") and (there or impl.backend == "onednn" or there == old)
    finally:
        refusals.recent_gpu.cache_clear()


def test_a_fallback_is_told_from_a_choice() -> None:
    assert select.choose(SPEC, CPU).fell_back == ""
    assert select.choose(SPEC.with_(grad=True), CPU, "reference").fell_back == ""
    assert "onednn: expected a call without autograd" in select.choose(SPEC.with_(grad=True), CPU).fell_back
    with torch.backends.mkldnn.flags(enabled=False):
        assert select.choose(SPEC, CPU).fell_back == ""  # switched off by the user: nothing faster is at hand


def test_switching_a_backend_off_is_seen_at_the_next_call() -> None:
    p = make("conv_bn_act")
    assert ran_on(p.run) == "onednn"
    with torch.backends.mkldnn.flags(enabled=False):
        assert ran_on(p.run) == "reference"
    assert ran_on(p.run) == "onednn"


def test_a_fallback_is_counted_every_time_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    reset_stats()
    p = make("conv_bn_act", dtype=torch.float64)
    with caplog.at_level(logging.DEBUG, logger="resnet_fast"):
        for _ in range(3):
            p.run()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    ((reason, count),) = stats()["fallbacks"].items()
    assert count == 3 and reason == caplog.records[0].getMessage()
    assert reason.startswith("conv_bn_act runs on reference: onednn: expected ") and "got float64" in reason
    assert stats()["calls"] == {"conv_bn_act/reference": 3}
    reset_stats()
    assert stats() == {"calls": {}, "fallbacks": {}}
    with caplog.at_level(logging.DEBUG, logger="resnet_fast"):
        p.run()
    assert len(caplog.records) == 2


def test_training_on_the_reference_is_logged_quietly(caplog: pytest.LogCaptureFixture) -> None:
    reset_stats()
    with caplog.at_level(logging.DEBUG, logger="resnet_fast"):
        make("conv_bn_act", batch_stats=True).copy(grad=True).run()
    assert [r.levelname for r in caplog.records] == ["INFO"]


def test_strict_raises_where_auto_would_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    reset_stats()
    p = make("conv_bn_act", dtype=torch.float64)
    with strict():
        with pytest.raises(BackendError, match="strict mode: conv_bn_act runs on reference: onednn: expected"):
            p.run()
        assert p.run("reference").dtype == torch.float64  # asked for, not fallen back to
        make("conv_bn_act").run()
    assert stats() == {"calls": {"conv_bn_act/onednn": 1, "conv_bn_act/reference": 1}, "fallbacks": {}}
    p.run()
    monkeypatch.setenv("RESNET_FAST_STRICT", "1")
    with pytest.raises(BackendError, match="strict mode"):
        p.run()
    monkeypatch.setenv("RESNET_FAST_STRICT", "maybe")
    with pytest.raises(UserError, match="RESNET_FAST_STRICT"):
        p.run()


def test_strict_keeps_running_statistics_as_they_were() -> None:
    p = make("conv_bn_act", batch_stats=True)
    before = {k: t.clone() for k, t in p.statistics().items()}
    with strict(), pytest.raises(BackendError):
        p.run()
    assert all(torch.equal(t, before[k]) for k, t in p.statistics().items())


@pytest.mark.parametrize("op", OPS)
def test_the_tape_holds_call_spec_and_choice(op: str) -> None:
    p = make(op)
    with record.tape() as tape:
        p.run()
        p.run("reference")
    p.run()
    assert [(e.spec.op, e.choice.impl.backend) for e in tape] == [(op, "onednn"), (op, "reference")]
    assert tape[0].call.x is p.x and tape[0].call.op == op and tape[0].spec == spec_of(tape[0].call, grad=False)


def test_batch_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "last_level_cache", lambda: 32 << 20)
    largest = 64 * 112 * 112
    tile = select.batch_tile(64, largest, torch.float32, CPU, "auto")
    assert tile == 4 and 2 * tile * largest * 4 <= 32 << 20 < 4 * tile * largest * 4
    assert select.batch_tile(4, largest, torch.float32, CPU, "auto") == 4
    assert select.batch_tile(3, largest, torch.float32, CPU, "auto") == 3
    assert select.batch_tile(64, 1 << 40, torch.float32, CPU, "auto") == 1
    assert select.batch_tile(64, largest, torch.float32, CUDA, "auto") == 64
    assert select.batch_tile(64, largest, torch.float32, CPU, "reference") == 64
    monkeypatch.setenv("RESNET_FAST_BATCH_TILE", "0")
    assert select.batch_tile(64, largest, torch.float32, CPU, "auto") == 64


def test_last_level_cache_is_a_plausible_size() -> None:
    assert 1 << 18 <= tiling.last_level_cache() <= 1 << 31
