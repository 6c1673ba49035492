"""``meta.json``: every damaged field and file is named, and nothing outside the checkpoint is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from resnet_fast.training import checkpoints
from resnet_fast.training.checkpoints import Damaged
from tests.support.checkpoint_cases import damage, make, names, reseal, save


def test_a_pipe_in_place_of_meta_json_is_not_waited_for(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 10)
    save(tmp_path, make(), 20)
    (place / "meta.json").unlink()
    os.mkfifo(place / "meta.json")
    with pytest.raises(Damaged, match="No plain file"):
        checkpoints.read_meta(place)
    assert checkpoints.resume_point(tmp_path, "auto")[0] == checkpoints.found(tmp_path)[0]
    save(tmp_path, make(), 30, keep=1)
    assert names(tmp_path) == ["step-00000010", "step-00000030"]  # not known to be the run's: it stays


def test_a_checkpoint_is_of_the_step_that_it_is_named_by(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 10)
    shutil.copytree(place, place.with_name("step-99999999"))
    with pytest.raises(Damaged, match=r"a checkpoint of step 99999999, got .* of step 10; rename the folder"):
        checkpoints.read_meta(place.with_name("step-99999999"))
    found, meta, complaints = checkpoints.resume_point(tmp_path, "auto")
    assert (found, meta["step"], len(complaints)) == (place, 10, 1)
    shutil.copytree(place, tmp_path / "copy")
    assert checkpoints.read_meta(tmp_path / "copy")["step"] == 10


def test_a_link_in_place_of_meta_json_is_not_followed(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 10)
    (place / "meta.json").rename(tmp_path / "outside.json")
    (place / "meta.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(Damaged, match=r"files inside .*, got a link meta\.json"):
        checkpoints.read_meta(place)


HARM = [f"{name}: {what}" for name in ("model.safetensors", "state.pt", "meta.json") for what in ("gone", "truncated")]


HARM += [
    "model.safetensors: flipped",
    "state.pt: flipped",
    "meta.json: empty",
    "meta.json: []",
    'meta.json: {"step": 3}',
]


@pytest.mark.parametrize("how", HARM)
def test_a_damaged_checkpoint_is_named_and_passed_over(how: str, tmp_path: Path) -> None:
    state = make()
    good, bad = save(tmp_path, state, 1), save(tmp_path, state, 2)
    name = damage(bad, how)
    with pytest.raises(Damaged) as error:
        checkpoints.resume_point(tmp_path, str(bad))
    assert str(bad) in str(error.value) and (name in str(error.value) or name == "meta.json")
    place, meta, complaints = checkpoints.resume_point(tmp_path, "auto")
    assert place == good and meta["step"] == 1
    assert len(complaints) == 1 and str(bad) in complaints[0]


def test_no_flipped_bit_of_meta_goes_unnoticed(tmp_path: Path) -> None:
    path = save(tmp_path, make(), 1) / "meta.json"
    body, good = path.read_bytes(), checkpoints.read_meta(path.parent)
    for position in range(len(body)):
        path.write_bytes(body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :])
        try:
            meta = checkpoints.read_meta(path.parent)
        except Damaged:
            continue
        assert {key: meta.get(key) for key in good} == good  # the name of its digest, say, is no content
    path.write_bytes(body)
    assert checkpoints.read_meta(path.parent) == good


@pytest.mark.parametrize("name", ["../secret", "link/../../secret", "link", "absolute"])
def test_a_listed_file_outside_the_checkpoint_is_not_read(name: str, tmp_path: Path) -> None:
    place, secret = save(tmp_path, make(), 1), checkpoints.folder_of(tmp_path) / "secret"
    secret.write_bytes(b"x")
    if name == "link":
        (place / "link").symlink_to(secret)
    name = str(secret) if name == "absolute" else name
    listed = checkpoints.read_meta(place)["files"] | {name: [1, checkpoints.digest_of(secret)]}
    reseal(place, files=listed)
    with pytest.raises(Damaged, match=r"expected files inside .*step-00000001, got '.*' in its meta\.json"):
        checkpoints.resume_point(tmp_path, str(place))


WRONG = [
    ("step", ...),
    ("step", -1),
    ("step", "3"),
    ("step", True),
    ("step", 2.5),
    ("classes", ...),
    ("classes", 0),
    ("classes", [3]),
    ("recipe", ...),
    ("recipe", []),
    ("recipe", {"lr": "fast"}),
    ("recipe", {"another": 1}),
    ("seconds", ...),
    ("seconds", "long"),
    ("sums", ...),
    ("sums", [1.0, 2.0]),
    ("sums", [1.0, 2.0, None]),
    ("layout", ...),
    ("layout", "another"),
    ("layout", ["full"]),
    ("layout", "sharded"),
    ("files", ...),
    ("files", []),
    ("files", {}),
    ("files", {"state.pt": 3}),
    ("files", {"state.pt": [3]}),
    ("files", {"state\0": [3, "x"]}),
    ("files", {"model.safetensors": ["3", "x"]}),
    ("unreadable", 3),
    ("unreadable", [3]),
    ("run", 3),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_sealed_meta_with_a_wrong_field_is_damaged(field: str, value: Any, tmp_path: Path) -> None:
    place = save(tmp_path, make(), 1, unreadable=[])
    reseal(place, **{field: value})
    with pytest.raises(Damaged) as error:
        checkpoints.resume_point(tmp_path, str(place))
    assert str(place / "meta.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": NaN}', '{"step": Infinity}', "\xff", '"' + "9" * 5000])
def test_a_meta_that_is_no_json_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Damaged, match=r"expected a checkpoint folder with meta\.json"):
        checkpoints.resume_point(tmp_path, str(tmp_path))


def test_a_listed_file_that_cannot_be_looked_at_is_damage(tmp_path: Path) -> None:
    place = save(tmp_path, make(), 1)
    listed = checkpoints.read_meta(place)["files"]
    (place / "ring").symlink_to("ring")
    for name in ("ring", "a" * 300, "state.pt/inner", "shards"):
        reseal(place, files=listed | {name: [1, "x"]})
        with pytest.raises(Damaged, match=r"expected a whole checkpoint, got .*step-00000001"):
            checkpoints.read_meta(place)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"a checkpoint folder with meta\.json, got .*absent"):
        checkpoints.resume_point(tmp_path, str(tmp_path / "absent"))
    (tmp_path / "meta.json").write_text('{"format": "another", "files": {}}')
    with pytest.raises(Damaged, match="expected a checkpoint of the format 'resnet_fast training checkpoint 1'"):
        checkpoints.resume_point(tmp_path, str(tmp_path))
