"""Several processes compute what one does, and a run survives the loss of any of them.

A batch is cut into processes x ``accumulate`` parts, and a part is all that BatchNorm sees: two processes and one with
``accumulate=2`` do the same arithmetic on the same images, and differ by the order in which float32 gradients are
summed: DDP adds the halves of two processes, autograd adds the second part onto the first. All talk over gloo.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from resnet_fast.errors import UserError
from resnet_fast.models import registry
from resnet_fast.training import checkpoints, distributed, loader, optim, recipe, runlog
from resnet_fast.training.distributed import World
from resnet_fast.training.step import Normalise, TrainingStep
from tests.support import distributed_worker as worker

TOLERANCE = 1e-4
"""Of losses, relatively, and of weights and statistics by norm. One sum in another order is wrong by some 2**-24 = 6e-8
of it, and eight steps with rate 0.01 pass that on as it is; but now and then such an error turns a ReLU on or off, and
its gradient appears or vanishes. One process whose weights are multiplied by 1 + 6e-8 * noise after its first step
shows how much that is: of five seeds, four end 2e-5 from the undisturbed loss (with rate 0.05: 7e-3, hence 0.01)."""

VALIDATION = 359
"""Images: a fifth of 1,797, which two, three and four processes cannot share evenly."""

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)


def start(processes: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    """torchrun with one thread per process; stderr goes into stdout."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end(job: subprocess.Popen[str], seconds: float = 300) -> str:
    """What ``job`` printed, when it has ended by itself."""
    try:
        return job.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        job.terminate()
        pytest.fail(f"still at work after {seconds} s: {job.communicate(timeout=60)[0][-3000:]}")


def spread(processes: int, folder: Path, runs: list[dict[str, Any]]) -> tuple[int, str]:
    """Exit code and output of the worker's ``runs`` in that many processes."""
    file = folder / f"jobs-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(runs, default=str))
    job = start(processes, worker.__file__, str(file))
    said = end(job)
    return job.returncode, said


def command_line(out: Path, *more: str) -> list[str]:
    """``resnet-fast train`` as the help text has it under torchrun, with 43 steps an epoch."""
    base = ["--data=digits", "--size=8", "--batch=32", "--lr=0.001", "--set=subset=1400", "--set=schedule=constant"]
    how = ["--threads=1", "--log-every=1", "--device=cpu", "--no-tensorboard"]
    return ["-m", "resnet_fast.cli.main", "train", f"--out={out}", *base, *how, *more]


def losses(out: Path) -> list[float]:
    """Of every step, each exactly once."""
    lines = runlog.of_kind(out, "train")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def state_of(out: Path) -> dict[str, torch.Tensor]:
    """The exported net; batches are counted per process and used by nothing."""
    tensors = load_file(out / "model.safetensors")
    return {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}


def assert_same(one: Path, other: Path) -> None:
    """The same losses in training and validation, the same exported weights and running statistics."""
    pairs = list(zip(losses(one), losses(other), strict=True))
    epochs, others = runlog.of_kind(one, "epoch"), runlog.of_kind(other, "epoch")
    assert [e["val_images"] for e in epochs] == [e["val_images"] for e in others] == [VALIDATION] * len(epochs)
    pairs += [(e["val_loss"], o["val_loss"]) for e, o in zip(epochs, others, strict=True)]
    loss = max(abs(a - b) / abs(b) for a, b in pairs)
    mine, theirs = state_of(one), state_of(other)
    assert mine.keys() == theirs.keys()
    weights = max(((mine[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-3)).item() for n in mine)
    print(f"{one.name} against {other.name}: losses {loss:.1e}, weights and statistics {weights:.1e}")
    assert loss <= TOLERANCE and weights <= TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[..., Path]:
    """The uninterrupted run of one process with that many parts and changes, trained once."""

    def train(parts: int, name: str = "", **changes: Any) -> Path:
        out = folder / f"alone-{parts}{name}"
        if not out.exists():
            worker.run(out, {"accumulate": parts} | changes, {})
        return out

    return train


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Path]:
    """Runs of two processes: finished ones, and some that were stopped after three steps."""
    halves = {"accumulate": 2, "steps": 6}
    early = {"stop_after": 3}
    runs: dict[str, dict[str, Any]] = {
        "ddp": {"recipe": {"ema": 0.5}},
        "fsdp": {"recipe": {"ema": 0.5}, "options": {"parallel": "fsdp"}},
        "ddp-4-parts": {"recipe": halves, "options": {"stop_after": 2}},
        "fsdp-4-parts": {"recipe": halves | {"ema": 0.5}, "options": early | {"parallel": "fsdp"}},
        "ddp-to-fsdp": {"recipe": halves | {"ema": 0.5}, "options": early},
        "fsdp-to-one": {"recipe": {"ema": 0.5}, "options": early | {"parallel": "fsdp"}},
    }
    code, said = spread(2, folder, [{"out": folder / name} | run for name, run in runs.items()])
    assert code == 0, said
    return {name: folder / name for name in runs}


@pytest.fixture(scope="module")
def four(folder: Path, two: dict[str, Path]) -> dict[str, Path]:
    """Runs that four processes go on with, where two of them (and once in between, one) left off."""
    worker.run(two["ddp-4-parts"], {"accumulate": 4, "steps": 6}, {"resume": "auto", "stop_after": 2})
    on = {"resume": "auto"}
    short = {"steps": 6}
    runs: dict[str, dict[str, Any]] = {
        "ddp-4-parts": {"recipe": short, "options": on},
        "fsdp-4-parts": {"recipe": short | {"ema": 0.5}, "options": on | {"parallel": "fsdp"}},
        "ddp-to-fsdp": {"recipe": short | {"ema": 0.5}, "options": on | {"parallel": "fsdp"}},
    }
    code, said = spread(4, folder, [{"out": folder / name} | run for name, run in runs.items()])
    assert code == 0, said
    return {name: folder / name for name in runs}


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one_that_accumulates(
    parallel: str, two: dict[str, Path], alone: Callable[..., Path]
) -> None:
    """Averaged weights and a last batch of three and two images included."""
    assert_same(two[parallel], alone(2, ema=0.5))


@needs_gloo
@pytest.mark.slow
def test_sharded_checkpoint_is_one_file_per_process(two: dict[str, Path]) -> None:
    newest = checkpoints.found(two["fsdp"])[0]
    meta = checkpoints.read_meta(newest)
    assert (meta["layout"], meta["processes"], meta["step"]) == ("sharded", 2, 8)
    assert len([name for name in meta["files"] if name.endswith(".distcp")]) == 2
    next((newest / "shards").glob("*.distcp")).write_bytes(b"cut short")
    with pytest.raises(checkpoints.Damaged, match="or other content"):
        checkpoints.read_meta(newest)


@needs_gloo
@pytest.mark.slow
def test_sharded_run_goes_on_in_one_plain_process(two: dict[str, Path], alone: Callable[..., Path]) -> None:
    worker.run(two["fsdp-to-one"], {"accumulate": 2, "ema": 0.5}, {"resume": "auto"})
    assert_same(two["fsdp-to-one"], alone(2, ema=0.5))


@needs_gloo
@pytest.mark.slow
def test_two_processes_then_one_then_four_equal_one_run(four: dict[str, Path], alone: Callable[..., Path]) -> None:
    """With accumulate 2, 4 and 1: four parts throughout."""
    assert_same(four["ddp-4-parts"], alone(4, "-short", steps=6))


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp-4-parts", "ddp-to-fsdp"])
def test_four_shards_go_on_from_two_processes(name: str, four: dict[str, Path], alone: Callable[..., Path]) -> None:
    """From a sharded checkpoint, and from the whole one that DDP writes."""
    assert_same(four[name], alone(4, "-short-ema", steps=6, ema=0.5))


@needs_gloo
@pytest.mark.slow
def test_frozen_stages_stay_as_they_came_however_a_net_is_spread(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """With averaged weights, under DDP and FSDP, where frozen parameters are not sharded; stopped and gone on with."""
    torch.manual_seed(1)
    weights = dict(registry.build("cifar_resnet20", num_classes=7).state_dict())
    save_file(weights, tmp_path / "weights.safetensors")
    tuned = {"weights": str(tmp_path / "weights.safetensors"), "freeze": "layer1", "ema": 0.5, "steps": 4}
    runs: list[dict[str, Any]] = [{"out": tmp_path / "ddp", "recipe": tuned}]
    fsdp = {"out": tmp_path / "fsdp", "recipe": tuned}
    runs += [fsdp | {"options": {"parallel": "fsdp"} | more} for more in ({"stop_after": 2}, {"resume": "auto"})]
    code, said = spread(2, tmp_path, runs)
    assert code == 0, said
    for name in ("ddp", "fsdp"):
        assert_same(tmp_path / name, alone(2, "-frozen", **tuned))
        found = load_file(tmp_path / name / "model.safetensors")
        kept = [n for n in found if n.startswith(("conv1", "bn1", "layer1"))]
        assert len(kept) > 20 and all(torch.equal(found[n], weights[n]) for n in kept)


@needs_gloo
@pytest.mark.slow
def test_three_processes_leave_out_a_batch_that_is_too_small(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """Batches of 32 are cut into 11, 11 and 10 images; five images are too few for three BatchNorms."""
    code, said = spread(3, tmp_path, [{"out": tmp_path / "three"}])
    assert code == 0, said
    assert runlog.of_kind(tmp_path / "three", "run")[0]["left_out_per_epoch"] == 5
    assert [line["step"] for line in runlog.of_kind(tmp_path / "three", "epoch")] == [3, 6, 8]
    assert_same(tmp_path / "three", alone(3))


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "kind", "reason"),
    [
        ("ddp", "error", "RuntimeError: planted: this process has had enough"),
        ("ddp", "nan", "conv1.weight was broken already"),
        ("fsdp", "nan", "conv1.weight was broken already"),
    ],
)
def test_failure_of_one_process_ends_the_job_with_its_reason(
    parallel: str, kind: str, reason: str, tmp_path: Path
) -> None:
    """The other one, which finds the connection closed, must be neither the cause that is named nor waited for."""
    began = time.monotonic()
    job = {"out": tmp_path / "run", "options": {"parallel": parallel}, "fails": [1, 3, kind]}
    code, said = spread(2, tmp_path, [job])
    took = time.monotonic() - began
    assert code != 0
    cause = said.partition("Root Cause")[2]
    if parallel == "ddp":  # in fsdp the other one gathers the broken weights, and both have the error
        assert "rank      : 1" in cause and reason in cause, said
    assert reason in said
    assert took < distributed.TIMEOUT.total_seconds() / 2, f"{took} s"


def processes_of(job: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of torchrun's present workers."""
    found = {}
    for task in Path(f"/proc/{job.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [e.partition(b"=")[2] for e in environment if e.startswith(b"RANK=")]
            if ranks:
                found[int(ranks[0])] = int(child)
    return found


def wait_for_step(out: Path, step: int, job: subprocess.Popen[str], seconds: float = 300) -> None:
    """Until ``job`` has logged ``step``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and job.poll() is None:
        lines = runlog.of_kind(out, "train")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    job.terminate()
    pytest.fail(f"step {step} was not reached: {job.communicate(timeout=60)[0][-3000:]}")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are found in /proc")


@needs_gloo
@needs_proc
@pytest.mark.slow
def test_killed_process_restarts_the_job_from_its_checkpoint(tmp_path: Path, alone: Callable[..., Path]) -> None:
    """Process 1 gets SIGKILL; torchrun starts both again, and the result is that of a run in which nothing happened."""
    out = tmp_path / "killed"
    job = start(2, *command_line(out, "--steps=30", "--save-steps=1", "--resume=auto"), restarts=2)
    wait_for_step(out, 5, job)
    os.kill(processes_of(job)[1], signal.SIGKILL)
    said = end(job)
    assert job.returncode == 0, said
    runs = runlog.of_kind(out, "run")
    assert len(runs) == 2 and 0 < runs[1]["step"] < 30, "it did not go on from a checkpoint"
    assert said.count("validation accuracy") == 1, said  # the first process alone prints
    assert_same(out, alone(2, "-long", steps=30, lr=0.001, subset=1400, schedule="constant"))


@needs_gloo
@pytest.mark.slow
def test_sigterm_to_torchrun_saves_one_step_of_all_processes(tmp_path: Path) -> None:
    """As a scheduler ends a job. The same command goes on from there."""
    out = tmp_path / "stopped"
    job = start(2, *command_line(out, "--steps=100000"))
    wait_for_step(out, 5, job)
    job.send_signal(signal.SIGTERM)
    said = end(job)
    assert job.returncode != 0
    assert said.count("stopped by SIGTERM after step") == 1, said
    newest = checkpoints.found(out)[0]
    step = checkpoints.read_meta(newest)["step"]
    assert f"after step {step}, saved" in said
    assert losses(out)[-1] > 0 and len(losses(out)) == step

    on = start(2, *command_line(out, f"--steps={step + 3}", "--resume=auto"))
    said = end(on)
    assert on.returncode == 0, said
    assert len(losses(out)) == step + 3


@needs_gloo
@pytest.mark.slow
def test_mistake_ends_all_processes_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    job = start(2, *command_line(tmp_path, "--steps=3"))
    said = end(job)
    assert job.returncode != 0
    message = "resnet-fast: expected an output folder without checkpoints"
    assert said.count(message) == 1 and said.count("resnet-fast: ") == 1, said


LATE_FIRST = """
import os, sys, time
from resnet_fast.cli.main import main
from resnet_fast.training import distributed

distributed.HOLD_S = 0.0
if os.environ["RANK"] == "0":
    time.sleep(3)
    print("the first process begins", flush=True)
sys.exit(main())
"""


@needs_gloo
@pytest.mark.slow
def test_a_mistake_of_all_is_reported_by_the_first_one_however_late_it_starts(tmp_path: Path) -> None:
    """The other one finds it before, holds it back, and is ended once the first one has said it."""
    (tmp_path / "late.py").write_text(LATE_FIRST)
    job = start(2, str(tmp_path / "late.py"), *command_line(tmp_path / "run", "--set=augment=crops")[2:])
    said = end(job)
    assert job.returncode != 0
    before, _, after = said.partition("the first process begins")
    assert "resnet-fast: " not in before and after.count("resnet-fast: expected augment among") == 1, said
    assert said.count("resnet-fast: ") == 1, said


THREADS_AFTER = """
import os, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from resnet_fast.training.distributed import process_group

def threads():
    return [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]

with process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1):
    net = DistributedDataParallel(torch.nn.Linear(3, 3))
    net(torch.ones(2, 3)).sum().backward()
    del net
    print(*threads())
print(*threads())
"""


@needs_gloo
@needs_proc
@pytest.mark.slow
def test_no_thread_of_gloo_outlives_its_group(tmp_path: Path) -> None:
    """One that still held a tensor when Python shut down would abort the process."""
    command = [sys.executable, "-c", THREADS_AFTER, str(tmp_path / "store")]
    inside, after = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    assert "gloo" in inside and "gloo" not in after


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_validation_shares_hold_each_image_once(processes: int) -> None:
    shares = [loader.ValidationSampler(VALIDATION, 16, rank, processes) for rank in range(processes)]
    seen = [index for share in shares for batch in share for _, index in batch]
    assert sorted(seen) == list(range(VALIDATION))


def test_running_statistics_of_parts_equal_those_of_processes() -> None:
    """(1 - m) r + m mean(b) over the parts' statistics b, in whatever order they came; the momentum is m again."""
    chosen = recipe.load_recipe(None, worker.BASE | {"accumulate": 3, "lr": 0.0, "backend": "reference"})
    model = optim.build_net(chosen, 10)
    norm = model.bn1
    norm.running_mean.fill_(0.5)
    step = TrainingStep(
        chosen,
        model,
        optim.build_optimizer(model, chosen),
        Normalise((0.5,), (0.5,), torch.device("cpu"), True),
        World(),
        10,
    )
    pixels = torch.randint(256, (3, 4, 1, 8, 8), dtype=torch.uint8)
    parts = [loader.Part(p, torch.arange(4)) for p in pixels]
    means = torch.stack([model.conv1(step.normalise(p)).mean((0, 2, 3)) for p in pixels]).detach()
    step(iter(parts), 12, 0.0)
    want = 0.9 * 0.5 + 0.1 * means.mean(0)
    torch.testing.assert_close(norm.running_mean, want, rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1


@pytest.mark.parametrize(
    ("rank", "error", "held"),
    [
        (0, RuntimeError("my own"), []),
        (1, RuntimeError("my own"), [distributed.HOLD_S]),
        (0, distributed.ElsewhereError("a", "b", "c"), [distributed.HOLD_ELSEWHERE_S]),
        (1, RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), [distributed.HOLD_ELSEWHERE_S]),
    ],
)
def test_error_is_kept_back_where_another_process_says_it(
    rank: int, error: Exception, held: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And handed to torchrun in its format, before this process ends."""
    file = tmp_path / "error.json"
    for name, value in {"RANK": str(rank), "TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_ERROR_FILE": str(file)}.items():
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    with pytest.raises(type(error)), distributed.reported():
        raise error
    assert slept == held
    assert str(error) in json.loads(file.read_text())["message"]["message"]


def test_fsdp_without_torchrun_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="expected torchrun for --parallel fsdp"), distributed.world("cpu", "fsdp"):
        pass


def test_sync_bn_on_a_plain_cpu_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a GPU for sync_bn"):
        worker.run(tmp_path / "run", {"sync_bn": True}, {})
