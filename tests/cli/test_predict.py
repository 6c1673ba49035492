"""``resnet-fast predict``: the right classes with their names, one line for everything that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from resnet_fast import images
from resnet_fast.cli.predict import class_names, predict, top_classes
from resnet_fast.errors import UserError
from resnet_fast.models import registry

MODEL = "cifar_resnet20"


@pytest.fixture
def net(tmp_path: Path) -> nn.Module:
    torch.manual_seed(0)
    net = registry.build(MODEL, num_classes=7).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pth")
    for name, colour in (("red", (200, 30, 20)), ("blue", (10, 40, 220))):
        Image.new("RGB", (40, 50), colour).save(tmp_path / f"{name}.png")
    return net


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny nets on several threads wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(predict)
    return CliRunner().invoke(app, [str(a) for a in arguments])


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
        ({"backend": "turbo"}, "expected a backend among .* got 'turbo'"),
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


def test_names_of_imagenet_and_of_unknown_classes() -> None:
    assert class_names(1000, None)[281] == "tabby"
    assert class_names(3, None) == ["class 0", "class 1", "class 2"]


def test_top_classes_are_sorted_probabilities() -> None:
    top = top_classes(torch.tensor([0.0, 3.0, 1.0]), ["a", "b", "c"], 2)
    assert [t["name"] for t in top] == ["b", "c"]
    assert top[0]["probability"] == pytest.approx(0.8437947)


def test_a_training_runs_weights_know_their_net_classes_and_images(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from resnet_fast.training import data, loop, recipe
    from resnet_fast.training.step import Normalise

    small = {"data": "digits", "size": 8, "shortcut": "B", "subset": 64, "batch": 32, "steps": 2}
    chosen = recipe.load(None, small)
    loop.train(chosen, loop.Options(tmp_path / "run", probe=False, threads=1))
    found = data.load(chosen)
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
    assert sorted(entry["name"] for entry in told["top"]) == [str(i) for i in range(10)]
    for entry in told["top"]:  # grey to colour and back may round a pixel by 1 of 255
        assert entry["probability"] == pytest.approx(expected[entry["class"]].item(), rel=0.02)
