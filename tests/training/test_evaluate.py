"""resnet_fast/training/evaluate.py: the run's own error again, to the image; classes matched by name, not by place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from resnet_fast.errors import UserError
from resnet_fast.io.weight_facts import Facts
from resnet_fast.models import registry
from resnet_fast.tools import trained
from resnet_fast.training import checkpoints, evaluate, loop, optim, restored, runlog
from resnet_fast.training.datasets import fashion_mnist, loading
from resnet_fast.training.distributed import World
from resnet_fast.training.options import RunOptions
from resnet_fast.training.recipe import Recipe

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}


def _pictures(root: Path, per_class: int, start: int = 0) -> None:
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(start, start + per_class):
            Image.new("RGB", (20 + i, 24), tuple(min(255, c + 9 * i) for c in colour)).save(root / name / f"{i}.png")


def _evaluate(path: Path, *where: Any, **options: Any) -> evaluate.Evaluation:
    found = restored.load_net(path)
    return evaluate.measure_accuracy(found, evaluate.evaluation_set(found, *where), workers=0, **options)


@pytest.fixture
def classifier(tmp_path: Path) -> Callable[..., Path]:
    """Weights that know their classes and answer by colour: fc's rows look for one channel each."""

    def make(*classes: str, facts: bool = True) -> Path:
        net = registry.build("cifar_resnet20", num_classes=len(classes)).eval()
        path = tmp_path / "weights.safetensors"
        told = Facts("cifar_resnet20", 16, classes, (0.5,) * 3, (0.25,) * 3, 1.0, data="folder")
        save_file(net.state_dict(), path, metadata={"resnet_fast": told.to_json()} if facts else None)
        return path

    return make


@pytest.mark.parametrize("changes", [{}, {"amp": "bfloat16", "ema": 0.5}])
def test_it_reproduces_what_the_run_logged(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions], changes: dict[str, Any], tmp_path: Path
) -> None:
    loop.train(tiny(shortcut="B", **changes), options(keep=9))
    epochs = {line["step"]: line for line in runlog.of_kind(tmp_path / "run", "epoch")}
    last = max(epochs)
    run = tmp_path / "run"
    ends = {place: int(place.name.partition("-")[2]) for place in checkpoints.found(run)}
    paths = {run: last, run / "model.safetensors": last} | {p: step for p, step in ends.items() if step in epochs}
    assert len(paths) == 2 + len(epochs)
    (best,) = checkpoints.bests(run)
    paths |= {best: checkpoints.step_of(best), run / "best.safetensors": checkpoints.step_of(best)}
    for path, step in paths.items():
        logged = epochs[step]
        result = _evaluate(path)
        assert result.error == logged["val_error"], path
        assert result.images == logged["val_images"]
        assert result.loss == pytest.approx(logged["val_loss"], rel=1e-5)
        assert sum(counts[0] for counts in result.per_class.values()) == result.images


@pytest.mark.slow
@pytest.mark.parametrize("halves", [True, False])
def test_it_reproduces_a_run_on_folders(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions], halves: bool, tmp_path: Path
) -> None:
    _pictures(tmp_path / "data" / ("train" if halves else ""), 10)
    if halves:
        _pictures(tmp_path / "data" / "val", 4, start=3)
    how = tiny(data="folder", data_path=str(tmp_path / "data"), subset=None, size=16, batch=8)
    loop.train(how, options(workers=0))
    logged = runlog.of_kind(tmp_path / "run", "epoch")[-1]
    assert _evaluate(tmp_path / "run").error == logged["val_error"]
    held = _evaluate(tmp_path / "run" / "model.safetensors", None, tmp_path / "data", not halves)
    assert (held.error, held.images) == (logged["val_error"], logged["val_images"])
    if not halves:
        assert _evaluate(tmp_path / "run" / "model.safetensors", None, tmp_path / "data").images == 30


def test_classes_are_matched_by_name(classifier: Callable[..., Path], tmp_path: Path) -> None:
    """The same pictures, with the weights' classes in three orders and one more that no folder has."""
    _pictures(tmp_path / "data", 4)
    path = classifier("red", "else", "blue", "green")
    found = restored.load_net(path)
    on = evaluate.evaluation_set(found, None, tmp_path / "data")
    result = evaluate.measure_accuracy(found, on, workers=0, batch=5)
    assert on.labels.tolist() == [2] * 4 + [3] * 4 + [0] * 4
    net = found.trained.net
    for i in range(len(on.images)):
        sample = on.images[(0, i)]
        assert sample.pixels is not None and sample.label == on.labels[i]
    answers = []
    with torch.no_grad():
        for name, _ in on.images.files:  # type: ignore[union-attr]
            from resnet_fast.io import images

            answers.append(int(net(found.trained.inputs(images.read(Path(name)).pixels)[None]).argmax()))
    assert result.wrong == sum(a != b for a, b in zip(answers, on.labels.tolist(), strict=True))
    assert result.top5 == 1.0 and result.images == 12 and set(result.per_class) == {0, 2, 3}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_known_set_is_matched_by_name_and_normalised_as_the_weights_ask(channels: int, tmp_path: Path) -> None:
    """Fashion-MNIST's files; weights with its classes in reverse order, of grey pictures or of colour."""
    drawn = torch.Generator().manual_seed(0)
    for stem, n in (("train", 12), ("t10k", 20)):
        pixels = torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=drawn)
        head = b"\0\0\x08" + b"".join(v.to_bytes(4, "big") for v in (n, 28, 28))
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(head[:3] + b"\x03" + head[3:] + pixels.numpy().tobytes())
        labels = bytes(i % 10 for i in range(n))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + n.to_bytes(4, "big") + labels)
    told = Facts(
        "cifar_resnet20", 16, fashion_mnist.NAMES[::-1], (0.4,) * channels, (0.3,) * channels, 1.0, data="fashion-mnist"
    )
    net = registry.build("cifar_resnet20", num_classes=10).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors", metadata={"resnet_fast": told.to_json()})
    found = restored.load_net(tmp_path / "w.safetensors")
    on = evaluate.evaluation_set(found, None, tmp_path)
    assert on.labels.tolist() == [9 - i % 10 for i in range(20)]
    seen: list[evaluate.Verdict] = []
    evaluate.measure_accuracy(found, on, workers=0, batch=7, tell=lambda verdicts, done, bad: seen.extend(verdicts))
    resized = torchvision.transforms.v2.functional.resize(pixels[:, None], [16, 16], antialias=True)
    with torch.no_grad():
        shares = net((resized.expand(-1, 3, -1, -1) / 255 - 0.4) / 0.3).softmax(1)
    assert [v.answer for v in seen] == shares.argmax(1).tolist()
    assert [v.probability for v in seen] == pytest.approx(shares.amax(1).tolist(), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_a_gpu_measures_what_a_cpu_does(classifier: Callable[..., Path], amp: str, tmp_path: Path) -> None:
    _pictures(tmp_path / "data", 8)
    path = classifier(*COLOURS)
    results = [_evaluate(path, None, tmp_path / "data", device=device, amp=amp) for device in ("cpu", "cuda")]
    assert abs(results[0].wrong - results[1].wrong) <= (1 if amp == "none" else 3)  # a near tie may turn
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-3 if amp == "none" else 0.05)


def test_wnids_and_imagenets_names_are_classes_of_imagenet(tmp_path: Path) -> None:
    net = torch.nn.Linear(1, 1)
    names, wnids = trained.imagenet()
    told = Facts("resnet18", 224, names, (0.5,) * 3, (0.25,) * 3, 1.0)
    of = trained.Trained(net, told, (), wnids)
    assert evaluate.match_classes(["n02123045", "n01440764"], of) == ([281, 0], "classes matched by wnid")
    assert evaluate.match_classes(["tabby", "crane bird"], of) == ([281, 134], "classes matched by name")
    assert evaluate.match_classes(sorted(wnids), of)[0] == list(range(1000))
    with pytest.raises(UserError, match="each class once, got tabby under two names"):
        evaluate.match_classes(["n02123045", "tabby"], of)
    with pytest.raises(UserError, match="got n99999999; rename"):
        evaluate.match_classes(["n02123045", "n99999999"], of)


def test_nameless_weights_take_classes_in_order(classifier: Callable[..., Path], tmp_path: Path) -> None:
    _pictures(tmp_path / "data", 2)
    found = restored.load_net(classifier("x", "y", "z", facts=False), "cifar_resnet20")
    on = evaluate.evaluation_set(found, "folder", tmp_path / "data")
    assert on.labels.tolist() == [0, 0, 1, 1, 2, 2] and any("by order (assumed" in text for text in on.said)
    few = restored.load_net(classifier("x", "y", facts=False), "cifar_resnet20")
    with pytest.raises(UserError, match="expected 2 classes, as many as the weights have, got 3"):
        evaluate.evaluation_set(few, "folder", tmp_path / "data")


def test_unreadable_images_are_counted_and_the_rest_measured(classifier: Callable[..., Path], tmp_path: Path) -> None:
    _pictures(tmp_path / "data", 4)
    (tmp_path / "data" / "red" / "2.png").write_bytes(b"no picture")
    heard: list[tuple[list[str], int, list[str]]] = []
    found = restored.load_net(classifier(*COLOURS))
    on = evaluate.evaluation_set(found, None, tmp_path / "data")
    result = evaluate.measure_accuracy(
        found, on, workers=0, batch=3, tell=lambda v, done, bad: heard.append(([x.name for x in v], done, bad))
    )
    assert result.images == 11 and len(result.unreadable) == 1 and "2.png" in result.unreadable[0]
    assert [done for _, done, _ in heard] == [3, 6, 9, 12]
    told = [name for names, _, _ in heard for name in names]
    assert told == [name for name, _ in on.images.files if "red/2.png" not in name]  # type: ignore[union-attr]
    for name in COLOURS:
        for picture in (tmp_path / "data" / name).iterdir():
            picture.write_bytes(b"")
    with pytest.raises(UserError, match="readable images among 12, got none"):
        evaluate.measure_accuracy(found, on, workers=0)


def test_outputs_that_are_no_numbers_are_wrong_answers(classifier: Callable[..., Path], tmp_path: Path) -> None:
    _pictures(tmp_path / "data", 2)
    path = classifier(*COLOURS)
    state = load_file(path)
    state["layer1.0.conv1.weight"] = 1e38 * torch.ones_like(state["layer1.0.conv1.weight"])
    told = Facts("cifar_resnet20", 16, tuple(COLOURS), (0.5,) * 3, (0.25,) * 3, 1.0)
    save_file(state, path, metadata={"resnet_fast": told.to_json()})
    result = _evaluate(path, "folder", tmp_path / "data")
    assert result.not_finite == 6 and result.top1 == 0.0 and result.to_dict()["loss"] is None
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ((None, None), "the folder of the images, got none"),
        (("folder", Path("none")), "which is no folder"),
        (("mnist", None), "data among digits"),
        (("digits", None), "classes of the weights"),
        (("digits", Path("photos")), "data that is in files, got photos with data digits, which needs no files"),
    ],
)
def test_data_that_do_not_fit(classifier: Callable[..., Path], where: tuple[Any, Any], message: str) -> None:
    found = restored.load_net(classifier(*COLOURS))
    with pytest.raises(UserError, match=message):
        evaluate.evaluation_set(found, *where)


def test_a_folder_is_measured_where_the_weights_are_of_data_without_files(tmp_path: Path) -> None:
    net = registry.build("cifar_resnet20", num_classes=3)
    told = Facts("cifar_resnet20", 16, tuple(COLOURS), (0.5,) * 3, (0.25,) * 3, 1.0, data="digits")
    save_file(net.state_dict(), tmp_path / "w.safetensors", metadata={"resnet_fast": told.to_json()})
    _pictures(tmp_path / "data" / "val", 2)
    found = evaluate.evaluation_set(restored.load_net(tmp_path / "w.safetensors"), None, tmp_path / "data")
    assert len(found.images) == 6


def test_weights_of_unknown_origin_need_to_be_told_the_data(classifier: Callable[..., Path]) -> None:
    found = restored.load_net(classifier("x", "y", facts=False), "cifar_resnet20")
    with pytest.raises(UserError, match="give --data or --data-path"):
        evaluate.evaluation_set(found)


def test_a_validation_half_alone_will_do(classifier: Callable[..., Path], tmp_path: Path) -> None:
    _pictures(tmp_path / "data" / "val", 2)
    found = restored.load_net(classifier(*COLOURS))
    assert len(evaluate.evaluation_set(found, None, tmp_path / "data").images) == 6
    _pictures(tmp_path / "data" / "train", 5)
    assert len(evaluate.evaluation_set(found, None, tmp_path / "data").images) == 6
    assert len(evaluate.evaluation_set(found, None, tmp_path / "data" / "train").images) == 15


@pytest.mark.parametrize("damage", ["empty", "meta", "weights"])
def test_a_folder_that_is_no_run(
    tiny: Callable[..., Recipe], options: Callable[..., RunOptions], minute: None, damage: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if damage == "empty":
        run.mkdir()
    else:
        loop.train(tiny(steps=2), options(stop_after=1))
        (place,) = checkpoints.found(run)
        victim = place / (checkpoints.META if damage == "meta" else "model.safetensors")
        victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(UserError, match=r"a good checkpoint in|or the folder of a run"):
        restored.load_net(run)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("averaged", [False, True])
def test_a_sharded_checkpoint(tiny: Callable[..., Recipe], averaged: bool, tmp_path: Path) -> None:
    how = tiny(ema=0.5 if averaged else 0.0)
    model = optim.build_net(how, 10)
    ema = optim.averaged(model, how)
    state = checkpoints.TrainingState(
        model, optim.build_optimizer(model, how), torch.amp.GradScaler("cpu", enabled=False), ema
    )
    if ema is not None:
        with torch.no_grad():
            ema.module.fc.bias += 1  # type: ignore[operator, union-attr]
    meta = {"step": 3, "classes": 10, "recipe": how.to_dict(), "sums": [0.0] * 3, "seconds": 0.0, "unreadable": []}
    meta |= {"run": "a", "facts": loading.load_data(how).facts(how).to_dict()}
    place = checkpoints.save_checkpoint(tmp_path, state, meta, World(), sharded=True, keep=1)
    found = restored.load_net(place)
    assert found.recipe == how and found.trained.facts.data == "digits"
    assert any(("averaged" in text) == averaged for text in found.trained.said if text.startswith("weights"))
    expected = (model if ema is None else ema.module).state_dict()  # type: ignore[union-attr]
    own = found.trained.net.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[k], expected[k]) for k in own)
