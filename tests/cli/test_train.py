"""``resnet-fast train`` as a user types it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from resnet_fast.cli import main as cli
from resnet_fast.cli import train as command
from resnet_fast.training import checkpoints, optim, recipe, runlog
from resnet_fast.training.options import Tick, Watch
from tests.support.checkpoint_cases import reseal

pytestmark = pytest.mark.usefixtures("same_threads")

TINY = ["--size", "8", "--batch", "16", "--epochs", "0.75", "--set", "subset=64"]
TINY += ["--device", "cpu", "--threads", "1", "--no-tensorboard"]


def say(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["train", *arguments])
    done = capsys.readouterr()
    return code, done.out, done.err


def recipe_of(out: Path) -> recipe.Recipe:
    return recipe.from_dict(runlog.of_kind(out, "run")[0]["recipe"])


def test_list_has_a_line_per_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = say(["--list"], capsys)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == recipe.names()
    assert "digits             cifar_resnet20 on digits, batch 64, 20 epochs, lr 0.1 cosine" in out
    assert "cifar_resnet20 on cifar10, batch 128, 64000 steps, lr 0.1 step" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "digit"], "did you mean digits"),
        (["--set", "momentun=0.9"], "did you mean momentum"),
        (["--set", "lr"], "expected key=value, got 'lr'"),
        (["--set", "lr=fast"], "expected lr as float, got 'fast'"),
        (["--epochs", "1", "--set", "steps=3", "--set", "warmup=0"], "expected either epochs or steps"),
        (["--model", "cifar_resnet21"], "did you mean"),
        (["--data", "mnist"], "expected data among digits, "),
        (["--data", "folder"], "give --data-path FOLDER"),
        (["--device", "abacus"], "correct --device"),
        (["--batch", "1439"], "a batch of at most 1438"),
        (["--lr", "1e400"], "lr from 0 to 1e+30, got inf; correct lr"),
        (["--seed", "9" * 40], "seed from 0 to 9,223,372,036,854,775,807"),
        (["--seed", "-1"], "correct seed"),
        (["--set", "lr=0.1", "--set", "lr=0.2"], "expected lr once"),
        (["--lr", "0.1", "--set", "lr=0.2"], "one value of lr"),
        (["--set", "momentum=0", "--set", "nesterov=true"], "a momentum for nesterov"),
        (["--keep", "0"], "correct --keep"),
        (["--cuda-graph"], "a GPU for cuda_graph, got device cpu"),
        (["--epochs", "many"], "Invalid value"),
        (["--parallel", "fsdp"], "torchrun for --parallel fsdp"),
        (["--resume", "nowhere"], "a checkpoint folder with meta.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = say(["--out", str(tmp_path / "run"), "--device", "cpu", *arguments], capsys)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_run_says_what_it_reached_and_where(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = say([*TINY, "--out", str(run), "--set", "weight_decay=1e-3", "--lr", "0.05"], capsys)
    assert code == 0 and out.count("\n") == 1
    best = min(line["val_error"] for line in runlog.of_kind(run, "epoch"))
    assert f"(best {100 - 100 * best:.2f} %) after epoch 0.75, " in out
    assert f"curves, log, checkpoints and model.safetensors in {run}" in out
    assert err.count("validation loss") == 1 and "a fifth of the 1,797 images" in err
    chosen = recipe_of(run)
    assert (chosen.weight_decay, chosen.lr, chosen.batch, chosen.subset, chosen.data) == (1e-3, 0.05, 16, 64, "digits")


def test_without_a_recipe_it_is_the_shipped_one_for_digits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = say(["--device", "cpu", "--stop-after", "1", "--threads", "1"], capsys)
    run = Path("out/train/cifar_resnet20-digits")
    assert code == 0 and recipe_of(run) == recipe.load_recipe("digits") and list((run / "tensorboard").iterdir())
    assert "stopped by --stop-after after step 1, saved; go on with --resume auto" in err
    assert "model.safetensors" not in out


def test_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = say([*TINY, "--out", str(tmp_path), "--json"], capsys)
    found = json.loads(out)
    assert (code, err) == (0, "") and (found["out"], found["step"]) == (str(tmp_path), 3)
    assert found["epochs"] == runlog.of_kind(tmp_path, "epoch") and len(found["epochs"]) == 1


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_is_in_the_exit_code_and_resume_goes_on(
    name: str,
    exit_code: int,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def send(tick: Any) -> None:
        if tick.step == 2:
            signal.raise_signal(getattr(signal, name))

    with monkeypatch.context() as patched:
        patched.setattr(command, "watch", lambda *a, **b: Watch(step=send))
        code, _, err = say([*TINY, "--out", str(tmp_path)], capsys)
    assert code == exit_code
    assert err == f"stopped by {name} after step 2, saved; go on with --resume auto\n"
    assert checkpoints.read_meta(checkpoints.found(tmp_path)[0])["step"] == 2
    code, _, err = say([*TINY, "--out", str(tmp_path)], capsys)
    assert code == 2 and "go on with --resume auto" in err
    code, _, err = say([*TINY, "--out", str(tmp_path), "--resume", "auto"], capsys)
    assert code == 0 and "going on after step 2 of 3" in err


def test_an_update_that_overflows_at_the_end_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = optim.set_rate
    monkeypatch.setattr("resnet_fast.training.step.set_rate", lambda o, r: rate(o, 3e38 if r > 0.05 else r))
    arguments = [*TINY, "--out", str(tmp_path), "--set", "weight_decay=1000"]  # the last rate is over 0.05
    code, out, err = say(arguments, capsys)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert "expected weights that are numbers, got after the update of step 3 " in last and "lower lr" in last
    assert not (tmp_path / "model.safetensors").exists()
    assert all(checkpoints.step_of(place) < 3 for place in checkpoints.found(tmp_path))


def test_the_bar_says_nothing_before_it_is_measured() -> None:
    said: list[str] = []
    shown = command.watch(lambda done, total, text: said.append(text))
    nan = float("nan")
    shown.step(Tick(1, 30, 0.1, nan, nan, 0.0, 0.0))
    shown.step(Tick(10, 30, 1.0, 2.5, 0.5, 1234.0, 0.25))
    assert said == ["epoch 0.10", "epoch 1.00  1,234 img/s, waits for data 25%  loss 2.500"]


def test_nobody_at_the_other_end_does_not_end_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr("sys.stderr", Gone())
    assert cli.main(["train", *TINY, "--out", str(tmp_path), "--stop-after", "2"]) == 0
    assert checkpoints.read_meta(checkpoints.found(tmp_path)[0])["step"] == 2


def test_a_printed_recipe_can_be_given_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = say(["--steps", "9", "--lr", "1e-5", "--set", "milestones=[]", "--print-recipe"], capsys)
    assert code == 0 and err == "steps 9 for epochs 20, and in proportion: warmup 0.45\n"
    (tmp_path / "mine.yaml").write_text(out)
    assert say(["--recipe", str(tmp_path / "mine.yaml"), "--print-recipe"], capsys) == (0, out, "")
    assert recipe.load_recipe(tmp_path / "mine.yaml").lr == 1e-5


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = say([*TINY, "--optimizer", "adamw", "--dry-run"], capsys)
    assert (code, err) == (0, "") and list(tmp_path.iterdir()) == []
    said = dict(line.split(": ", 1) for line in out.splitlines())
    assert said["net"] == "cifar_resnet20, 269,722 parameters" and said["folder"] == "out/train/cifar_resnet20-digits"
    assert said["optimizer"] == "AdamW, betas (0.9, 0.999), weight_decay 0.0001"
    assert said["steps"] == "3 of 16 images, 4 per epoch, 0.75 epochs"
    assert said["note"].startswith("a fifth of the 1,797 images is the validation set")
    code, _, err = say([*TINY, "--dry-run", "--resume", "nowhere"], capsys)
    assert code == 2 and "a checkpoint folder with meta.json" in err


def test_a_dry_run_says_what_a_folder_leaves_out_and_obeys_no_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("a\nb", "\x1b[31mred"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "notes.txt").touch()
    place = ["--data", "folder", "--data-path", str(tmp_path), "--batch", "4", "--size", "8"]
    code, out, err = say([*place, "--model", "cifar_resnet20", "--epochs", "1", "--dry-run"], capsys)
    assert (code, err) == (0, "") and "\x1b" not in out
    said = dict(line.split(": ", 1) for line in out.splitlines())
    assert said["data"].endswith("of 2 classes (\\x1b[31mred, a\\nb)")
    assert "no train and val folders: a fifth" in said["note"] and "left out for their ending: 2 .txt" in said["note"]


def test_a_folder_is_not_passed_over_for_data_that_need_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = say([*TINY, "--data-path", str(tmp_path), "--dry-run"], capsys)
    assert code == 2 and f"got {tmp_path} with data digits, which needs no files; give --data folder" in err


def test_fine_tuning_from_a_runs_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = say([*TINY, "--out", str(tmp_path / "first")], capsys)
    assert code == 0, err
    more = ["--weights", str(tmp_path / "first" / "model.safetensors"), "--classes", "12", "--freeze", "layer2"]
    code, _, err = say([*TINY, *more, "--optimizer", "adamw", "--out", str(tmp_path / "second")], capsys)
    assert code == 0 and "but for its head: 10 classes there, a new layer for 12 here" in err
    chosen = recipe_of(tmp_path / "second")
    assert (chosen.classes, chosen.freeze, chosen.optimizer) == (12, "layer2", "adamw")


@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_resume_takes_a_runs_folder(named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert say([*TINY, "--out", str(run), "--set", "ema=0.5", "--stop-after", "2"], capsys)[0] == 0
    place = run if named == "run" else checkpoints.found(run)[0]
    code, out, err = say(["--resume", str(place), "--threads", "1", "--device", "cpu", "--no-tensorboard"], capsys)
    assert code == 0 and "going on after step 2 of 3" in err and f"in {run}" in out
    assert say(["--resume", "auto", "--out", str(run), "--print-recipe"], capsys)[1].count("ema: 0.5") == 1
    code, _, err = say(["--resume", str(run), "--lr", "1.0"], capsys)
    assert code == 2 and "lr: 1.0 (was 0.1)" in err


@pytest.mark.parametrize(
    "changes", [{"step": ...}, {"step": "2"}, {"recipe": {"lr": []}}, {"files": {}}, {"sums": [1]}]
)
def test_a_checkpoint_with_other_fields_is_one_line(
    changes: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert say([*TINY, "--out", str(tmp_path), "--stop-after", "1"], capsys)[0] == 0
    reseal(checkpoints.found(tmp_path)[0], **changes)
    code, out, err = say([*TINY, "--out", str(tmp_path), "--resume", "auto"], capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "meta.json" in err


def test_a_loss_that_is_no_number_is_the_recipes_fault(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [*TINY, "--out", str(tmp_path), "--lr", "1e30", "--set", "warmup=0", "--set", "schedule=constant"]
    code, out, err = say(arguments, capsys)
    assert (code, out) == (2, "")
    assert "expected a loss that is a number, got the loss is nan: " in err.splitlines()[-1]
    assert "lower lr" in err and "Traceback" not in err


def test_names_of_folders_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("cat\x1b[2J", "dog\n"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "set" / name / f"{i}.png")
    data = ["--size", "8", "--batch", "8", "--device", "cpu", "--threads", "1", "--workers", "0", "--no-tensorboard"]
    data += ["--epochs", "1", "--data", "folder", "--data-path"]
    code, _, err = say([*data, str(tmp_path / "set"), "--out", str(tmp_path / "run")], capsys)
    assert code == 0 and r"(cat\x1b[2J, dog\n)" in err and "\x1b" not in err
    code, _, err = say([*data, "no\x1b[2J", "--out", str(tmp_path / "other")], capsys)
    assert code == 2 and "\x1b" not in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["log.jsonl", "curves.png", "model.safetensors"])
def test_files_that_no_run_wrote_are_left(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("mine")
    code, out, err = say([*TINY, "--out", str(tmp_path)], capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"where {name} would be lost" in err and "name another with --out" in err
    assert (tmp_path / name).read_text() == "mine"
