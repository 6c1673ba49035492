"""A restored state is bit for bit the saved one; other content is refused, and no interruption leaves a half."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnet_fast.errors import UserError
from resnet_fast.training import checkpoints
from resnet_fast.training.checkpoints import Damaged
from resnet_fast.training.distributed import World
from resnet_fast.training.loop import train
from resnet_fast.training.options import RunOptions
from resnet_fast.training.recipe import Recipe
from tests.support.checkpoint_cases import META, advance, content, full, make, names, reseal, save, touching


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize(("amp", "ema"), [(False, False), (True, False), (False, True)])
def test_everything_comes_back_bit_for_bit(
    amp: bool, ema: bool, momentum: float, tmp_path: Path, same: Callable[[Any, Any], None]
) -> None:
    state = make(0, amp, ema, momentum=momentum)
    save(tmp_path, state, 2)
    place, meta, complaints = checkpoints.resume_point(tmp_path, "auto")
    advance(state, 3)
    drawn = (torch.randn(5), np.random.rand(5).tolist(), [random.random() for _ in range(5)])
    other = make(1, amp, ema, steps=0, momentum=momentum)
    assert place is not None and complaints == [] and {k: meta[k] for k in META} == META and meta["step"] == 2
    checkpoints.restore_checkpoint(place, meta, other, World())
    assert other.model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
    advance(other, 3)  # draws from all three generators
    same(content(other), content(state))
    same((torch.randn(5), np.random.rand(5).tolist(), [random.random() for _ in range(5)]), drawn)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_file_that_would_run_a_command_is_refused(name: str, tmp_path: Path) -> None:
    place, proof = save(tmp_path / "run", make(), 1), tmp_path / "proof"
    torch.save(touching(proof), place / name)
    reseal(place)
    with pytest.raises(Damaged, match="expected a checkpoint of this net") as error:
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1), World())
    assert not proof.exists() and "\n" not in str(error.value)
    (place / name).write_bytes(pickle.dumps(touching(proof)))
    reseal(place)
    with pytest.raises(Damaged, match="expected a checkpoint of this net"):
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1), World())
    assert not proof.exists()


def test_a_state_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 1)
    with zipfile.ZipFile(place / "state.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/more", bytes(10**7))
    reseal(place)
    with pytest.raises(Damaged, match=r"which unpacks to 10,\d+,\d+ bytes"):
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1), World())


def spoil_state(place: Path, path: str, value: Any) -> None:
    """Set the entry ``path`` of state.pt, or remove it."""
    state = torch.load(place / "state.pt", weights_only=True)
    *outer, last = path.split("/")
    inner = state
    for name in outer:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    torch.save(state, place / "state.pt")
    reseal(place)


OTHER_STATES = [
    ("optimizer", ...),
    ("optimizer", {}),
    ("optimizer", [1]),
    ("optimizer/state", {}),
    ("optimizer/state/0.weight/momentum_buffer", ...),
    ("optimizer/state/0.weight/momentum_buffer", torch.zeros(7)),
    ("optimizer/state/0.weight/momentum_buffer", "text"),
    ("optimizer/state/0.weight/momentum_buffer", torch.full((4, 3, 3, 3), torch.nan)),
    ("scaler", ...),
    ("scaler", {"scale": "large"}),
    ("scaler/scale", 0.0),
    ("scaler/scale", float("nan")),
    ("random", ...),
    ("random", [1, 2]),
    ("random/torch", torch.zeros(3)),
    ("random/numpy", ["MT19937", 3]),
    ("random/python", "text"),
]


@pytest.mark.parametrize(("path", "value"), OTHER_STATES)
def test_a_state_of_something_else_is_one_line(path: str, value: Any, tmp_path: Path) -> None:
    place = save(tmp_path, make(amp=True), 1)
    spoil_state(place, path, value)
    with pytest.raises(Damaged) as error:
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1, amp=True, steps=0), World())
    assert str(place) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["list", "text", "names", "shapes", "nan", "empty", "header"])
def test_weights_of_something_else_are_one_line(what: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = save(tmp_path, make(), 1)
    weights = load_file(place / "model.safetensors")
    if what == "names":
        save_file({"x": torch.zeros(2)}, place / "model.safetensors")
    elif what == "shapes":
        save_file({name: torch.zeros(1) for name in weights}, place / "model.safetensors")
    elif what == "nan":
        save_file({name: t * torch.nan for name, t in weights.items()}, place / "model.safetensors")
    else:
        body = {"list": b"[]", "text": b"hello", "empty": b"", "header": b"\xff" * 16}[what]
        (place / "model.safetensors").write_bytes(body)
    reseal(place)
    with pytest.raises(Damaged) as error:
        checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), make(1), World())
    assert str(place) in str(error.value) and "\n" not in str(error.value)


def test_hyperparameters_are_the_recipes(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 1)
    state = torch.load(place / "state.pt", weights_only=True)
    state["optimizer"]["param_groups"][0] |= {"momentum": "large", "weight_decay": -5.0}
    torch.save(state, place / "state.pt")
    reseal(place)
    other = make(1)
    checkpoints.restore_checkpoint(place, checkpoints.read_meta(place), other, World())
    (group,) = other.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.01)


@pytest.mark.parametrize("where", ["os.fsync", "os.rename", "pathlib.Path.write_bytes", "pathlib.Path.mkdir"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make()
    good = save(tmp_path, state, 1)
    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(UserError, match=r"No space left on device; the last good one, step-00000001, is untouched"):
            save(tmp_path, state, 2)
    assert names(tmp_path) == ["step-00000001"] and checkpoints.read_meta(good)["step"] == 1
    assert checkpoints.read_meta(save(tmp_path, state, 2))["step"] == 2


class Killed(BaseException):
    """What no handler of an error catches: here the process would be gone."""


def test_a_death_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make()
    save(tmp_path / "good", state, 1)
    calls = [(os, "fsync"), (os, "rename"), (Path, "write_bytes"), (Path, "write_text"), (Path, "mkdir")]
    calls += [(shutil, "rmtree"), (os, "open")]
    seen: set[int] = set()
    for fatal in range(1000):
        out, left = tmp_path / str(fatal), [fatal]
        shutil.copytree(tmp_path / "good", out)

        def dying(real: Any, left: list[int] = left) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patched:
            for place, name in calls:
                patched.setattr(place, name, dying(getattr(place, name)))
            try:
                save(out, state, 2, keep=1)
            except Killed:
                survived = True
            else:
                survived = False
        found, meta, complaints = checkpoints.resume_point(out, "auto")
        assert found is not None and complaints == [] and meta["step"] in (1, 2)
        seen.add(meta["step"])
        if not survived:
            break
    assert seen == {1, 2} and fatal > 10


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_said_in_one_line(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    run = options(save_steps=2, stop_after=2)
    train(tiny(), run)
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"  # log and curves fit, weights do not
        "from resnet_fast.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    chosen = [f"--set={key}={json.dumps(value)}" for key, value in tiny().to_dict().items() if key != "save"]
    command = [sys.executable, "-c", code, "train", "--out", str(run.out), "--resume", "auto", "--save-steps", "2"]
    done = subprocess.run([*command, "--no-tensorboard", *chosen], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "File too large; the last good one, step-00000002, is untouched" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and names(run.out) == ["step-00000002"]
    assert train(tiny(), options(resume="auto")).finished


def test_the_exported_weights_load_into_the_stock_net(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions]
) -> None:
    from safetensors import safe_open

    from resnet_fast.models import registry

    done = train(tiny(steps=1), options())
    with safe_open(done.out / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["resnet_fast"])
        assert (facts["model"], facts["classes"], facts["size"]) == ("cifar_resnet20", list("0123456789"), 8)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    registry.build("cifar_resnet20", num_classes=10).load_state_dict(weights, strict=True)
