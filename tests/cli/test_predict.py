"""``resnet-fast predict``: the right classes with their names, one line for everything that cannot be used."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from resnet_fast.cli import main as cli
from resnet_fast.cli.predict import predict
from resnet_fast.errors import UserError
from resnet_fast.io import images
from resnet_fast.models import registry
from resnet_fast.tools.classify import likeliest
from tests.support.cli import invoke

_run = partial(invoke, predict)

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "cifar_resnet20"


@pytest.fixture
def net(tmp_path: Path) -> nn.Module:
    torch.manual_seed(0)
    net = registry.build(MODEL, num_classes=7).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pth")
    for name, colour in (("red", (200, 30, 20)), ("blue", (10, 40, 220))):
        Image.new("RGB", (40, 50), colour).save(tmp_path / f"{name}.png")
    return net


def test_json_gives_the_nets_own_classes(net: nn.Module, tmp_path: Path) -> None:
    result = _run(tmp_path / "red.png", tmp_path / "blue.png", "--weights", tmp_path / "w.pth", "--model", MODEL,
                  "--top", 3, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [Path(f["image"]).name for f in found] == ["red.png", "blue.png"]
    for entry in found:
        with torch.no_grad():
            expected = net(images.preprocess(images.read(Path(entry["image"])).pixels, 32)[None])[0].softmax(0)
        assert [t["class"] for t in entry["top"]] == expected.topk(3).indices.tolist()
        assert [t["probability"] for t in entry["top"]] == pytest.approx(expected.topk(3).values.tolist(), rel=1e-3)
        assert entry["top"][0]["name"] == f"class {entry['top'][0]['class']}"


def test_table_shows_names_from_a_file(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"[animal] {i}\n" for i in range(7)))
    result = _run(tmp_path / "red.png", "--weights", tmp_path / "w.pth", "--model", MODEL, "--top", 9,
                  "--names", tmp_path / "names.txt", "--backend", "reference")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert all(f"[animal] {i}" in result.stdout for i in range(7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "none.png"}, "does not exist"),
        ({"weights": "none.pth"}, "not a file"),
        ({"model": "cifar_resnet32"}, "this model's names"),
        ({"model": "resnet5"}, "resnet5"),
        ({"top": 0}, "expected --top >= 1, got 0"),
        ({"backend": "turbo"}, "expected --backend among .* got 'turbo'"),
        ({"names": "red.png"}, "text file of class names"),
        ({"names": "short.txt"}, "expected 7 class names, one per line, got 2"),
    ],
)
def test_unusable_input(net: nn.Module, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    (tmp_path / "short.txt").write_text("a\nb\n")
    given: dict[str, object] = {"image": "red.png", "weights": "w.pth", "model": MODEL} | changes
    arguments = [tmp_path / str(given.pop("image"))]
    for name, value in given.items():
        arguments += [f"--{name}", tmp_path / str(value) if name in ("weights", "names") else value]  # type: ignore[list-item]
    result = _run(*arguments)
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception


@pytest.fixture
def folder(net: nn.Module, tmp_path: Path) -> Path:
    """Return a folder of nine pictures; the fourth is damaged."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(9):
        Image.new("RGB", (40, 50), (25 * i, 200, 20)).save(place / f"{i}.png")
    (place / "3.png").write_bytes((place / "3.png").read_bytes()[:60])
    return place


def _main(tmp_path: Path, *arguments: object) -> int:
    given = ["predict", *arguments, "--weights", tmp_path / "w.pth", "--model", MODEL, "--batch", 2]
    return cli.main([str(a) for a in given])


@pytest.mark.parametrize("form", ["tables", "json", "csv", "csv file"])
def test_a_damaged_picture_costs_its_own_answer_alone(
    form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"tables": [], "json": ["--json"], "csv": ["--csv", "-"], "csv file": ["--csv", tmp_path / "o.csv"]}[form]
    assert _main(tmp_path, folder, "--top", 2, *extra) == 2
    out, err = capsys.readouterr()
    good = [str(folder / f"{i}.png") for i in range(9) if i != 3]
    bad = str(folder / "3.png")
    if form == "tables":
        assert [line for line in out.splitlines() if line.endswith(".png")] == good
    elif form == "json":
        found = json.loads(out)
        assert [f["image"] for f in found if "top" in f] == good
        assert [f["image"] for f in found if "error" in f] == [bad]
    else:
        text = out if form == "csv" else (tmp_path / "o.csv").read_text()
        assert form == "csv" or out == ""
        lines = list(csv.DictReader(text.splitlines()))
        assert [line["image"] for line in lines if line["rank"] == "1"] == good
        assert [line["image"] for line in lines if line["error"]] == [bad]
        assert all(0 < float(line["probability"]) <= 1 for line in lines if line["rank"])
    assert err.count("3.png") == 1 and "got 1 that cannot" in err.splitlines()[-1]


def test_answers_are_printed_before_the_next_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C keeps the answers so far, and the JSON array is complete."""
    read = images.read

    def stopped_at_the_eighth(path: Path) -> images.Photo:
        if path.name == "7.png":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(images, "read", stopped_at_the_eighth)
    assert _main(tmp_path, folder, "--json") == 130
    out, err = capsys.readouterr()
    assert [Path(f["image"]).name for f in json.loads(out)] == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png"]
    assert "Traceback" not in err


def test_a_batch_changes_no_answer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "3.png").unlink()
    assert _main(tmp_path, folder, "--json") == 0
    together = json.loads(capsys.readouterr().out)
    alone = []
    for picture in sorted(folder.iterdir()):
        assert _main(tmp_path, picture, "--json", "--threads", 1, "--device", "cpu") == 0
        alone += json.loads(capsys.readouterr().out)
    for a, b in zip(together, alone, strict=True):
        assert a["image"] == b["image"]
        assert [t["class"] for t in a["top"]] == [t["class"] for t in b["top"]]
        assert [t["probability"] for t in a["top"]] == pytest.approx([t["probability"] for t in b["top"]], rel=1e-4)


@pytest.mark.gpu
def test_a_gpu_gives_a_cpus_answers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "3.png").unlink()
    found = []
    for device in ("cpu", "cuda"):
        assert _main(tmp_path, folder, "--json", "--device", device) == 0
        found.append(json.loads(capsys.readouterr().out))
    for a, b in zip(*found, strict=True):
        by_class = [{t["class"]: t["probability"] for t in answer["top"]} for answer in (a, b)]
        assert by_class[0] == pytest.approx(by_class[1], rel=1e-2, abs=1e-4)


def test_assumptions_are_said_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _main(tmp_path, folder)
    err = capsys.readouterr().err
    for said in (f"net: {MODEL} (as asked)", "(its state_dict)", "classes: 7, numbers", "centre 32x32, mean 0.485"):
        assert err.count(said) == 1


def test_folders_inside_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "3.png").unlink()
    (folder / "deep").mkdir()
    (folder / "0.png").rename(folder / "deep" / "0.png")
    assert _main(tmp_path, folder, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 8
    assert _main(tmp_path, folder, "--json", "--no-recursive") == 0
    assert len(json.loads(capsys.readouterr().out)) == 7


def test_a_csv_file_replaces_only_its_like(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tmp_path / "w.pth").read_bytes()
    assert _main(tmp_path, folder, "--csv", tmp_path / "w.pth") == 2
    assert "another" in capsys.readouterr().err and (tmp_path / "w.pth").read_bytes() == before
    for _ in range(2):
        assert _main(tmp_path, folder / "0.png", "--csv", tmp_path / "o.csv", "--top", 1) == 0
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 2
    assert _main(tmp_path, folder / "0.png", "--csv", tmp_path / "none" / "o.csv") == 2
    assert _main(tmp_path, folder / "0.png", "--csv", "-", "--json") == 2
    assert "one format on stdout" in capsys.readouterr().err


def test_what_overflows_inside_the_net_is_no_answer(
    net: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are finite, and the outputs are not."""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["layer1.0.conv1.weight"] = 1e38 * torch.randn_like(state["layer1.0.conv1.weight"]).abs().clamp(max=3)
    torch.save(state, tmp_path / "w.pth")
    assert _main(tmp_path, tmp_path / "red.png", tmp_path / "blue.png", "--json") == 2
    out, err = capsys.readouterr()
    assert [sorted(f) for f in json.loads(out)] == [["error", "image"]] * 2
    assert "red.png (NaN or infinity in the net's outputs)" in err and "blue.png (NaN" in err


def test_names_that_a_terminal_would_obey_are_escaped(
    net: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("\x1b[2Jclear\n" + "b\n" * 6)
    odd = tmp_path / "a\x1b[31m.png"
    (tmp_path / "red.png").rename(odd)
    assert _main(tmp_path, odd, "--names", tmp_path / "names.txt", "--top", 7) == 0
    out, err = capsys.readouterr()
    assert "\\x1b[2Jclear" in out and "\x1b" not in out + err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_progress_bar_leaves_stdout_alone_and_a_reader_may_leave(folder: Path, tmp_path: Path) -> None:
    import pty

    command = [sys.executable, "-m", "resnet_fast.cli.main", "predict", folder, "--weights", tmp_path / "w.pth"]
    command += ["--model", MODEL, "--batch", "2", "--json"]
    terminal, theirs = pty.openpty()
    # A slow run draws its bar often, and a terminal that nobody reads is full after 4 KiB.
    threading.Thread(target=_read_to_the_end, args=(terminal,), daemon=True).start()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=120, check=False)
    os.close(theirs)
    assert done.returncode == 2 and len(json.loads(done.stdout)) == 9
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close()
    told = run.stderr.read().decode()
    assert run.wait(timeout=120) != 0 and "Error" not in told and "Traceback" not in told, told


def _read_to_the_end(terminal: int) -> None:
    with contextlib.suppress(OSError):  # Linux ends a terminal whose other side is closed with an error
        while os.read(terminal, 65536):
            pass
    os.close(terminal)


def test_top_classes_are_sorted_probabilities() -> None:
    top = likeliest(torch.tensor([0.0, 3.0, 1.0]), ["a", "b", "c"], 2)
    assert [t.name for t in top] == ["b", "c"]
    assert top[0].probability == pytest.approx(0.8437947)


def test_a_training_runs_weights_know_their_net_classes_and_images(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from resnet_fast.training import loop, recipe
    from resnet_fast.training.datasets import loading
    from resnet_fast.training.options import RunOptions
    from resnet_fast.training.step import Normalise

    small = {"data": "digits", "size": 8, "shortcut": "B", "subset": 64, "batch": 32, "steps": 2}
    chosen = recipe.load_recipe(None, small)
    loop.train(chosen, RunOptions(tmp_path / "run", probe=False, threads=1))
    found = loading.load_data(chosen)
    sample = found.val[(0, 0)]
    assert sample.pixels is not None
    Image.fromarray(sample.pixels[0].numpy()).save(tmp_path / "digit.png")
    result = _run(tmp_path / "digit.png", "--weights", tmp_path / "run" / "model.safetensors", "--top", 10, "--json")
    assert result.exit_code == 0, result.output

    net = registry.build(chosen.model, shortcut="B", num_classes=10)
    net.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    normalise = Normalise(found.mean, found.std, torch.device("cpu"), True)
    with torch.no_grad():
        expected = net.eval()(normalise(sample.pixels[None]))[0].softmax(0)
    (told,) = json.loads(result.stdout)
    for other in (tmp_path / "run", max((tmp_path / "run" / "checkpoints").iterdir())):
        again = _run(tmp_path / "digit.png", "--weights", other, "--top", 10, "--json")
        assert json.loads(again.stdout) == [told], other
    assert sorted(entry["name"] for entry in told["top"]) == [str(i) for i in range(10)]
    for entry in told["top"]:  # grey to colour and back may round a pixel by 1 of 255
        assert entry["probability"] == pytest.approx(expected[entry["class"]].item(), rel=0.02)


def test_damaged_metadata_print_no_warning(
    net: nn.Module, tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    """An EXIF tag points to three doubles outside the file; Pillow would warn with a line of its source."""
    tag = b"\x32\x01\x0c\0\x03\0\0\0\xff\xff\xff\xff"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + tag + bytes(4)
    Image.new("RGB", (40, 50)).save(tmp_path / "odd.jpg", exif=exif)
    arguments = [str(tmp_path / "odd.jpg"), "--weights", str(tmp_path / "w.pth"), "--model", MODEL]
    assert cli.main(["predict", *arguments]) == 0
    assert not [str(w.message) for w in recwarn.list if "PIL" in w.filename]
    assert "Warning" not in capsys.readouterr().err
    images.read(tmp_path / "odd.jpg")
    assert [str(w.message) for w in recwarn.list if "PIL" in w.filename]  # so there was something to be silent about
