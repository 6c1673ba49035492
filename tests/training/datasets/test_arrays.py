"""Files of published data sets: what was published is read, and nothing that a crafted one asks for is done."""

from __future__ import annotations

import gzip
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnet_fast.errors import UserError
from resnet_fast.training.datasets import arrays


class Payload:
    """Creates the file ``path`` when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def cifar10(root: Path, protocol: int = 4) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    entry = {"data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), "labels": [3, 7]}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(entry, protocol))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol))
    return folder


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "genuine", lambda content, md5: True)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol_are_read(protocol: int, tmp_path: Path, unchecked: None) -> None:
    cifar10(tmp_path, protocol)
    (x, y), (x_val, y_val), names = arrays.read_cifar(tmp_path, hundred=False)
    assert x.shape == (10, 3, 32, 32) and y.tolist() == [3, 7] * 5 and names[9] == "class 9"
    assert x_val.flatten().tolist() == [i % 256 for i in range(2 * 3072)] and y_val.tolist() == [3, 7]


def test_a_batch_as_python_2_wrote_it(tmp_path: Path, unchecked: None) -> None:
    """The published files: protocol 2, byte strings for text and pixels, NumPy's modules under their old names."""
    folder = cifar10(tmp_path)
    pixels = bytes(range(256)) * 12
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tbU\x06labels](K\x06eu."
    )
    (folder / "test_batch").write_bytes(content)
    _, (x, y), _ = arrays.read_cifar(tmp_path, hundred=False)
    assert bytes(x.flatten().tolist()) == pixels and y.tolist() == [6]


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_payload_in_cifar_is_not_executed(name: str, protocol: int, tmp_path: Path, unchecked: None) -> None:
    path = cifar10(tmp_path) / name
    entry = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(entry | {"more": Payload(tmp_path / "executed")}, protocol))
    with pytest.raises(UserError, match=rf"CIFAR10 files below .*{name}: it refers to .* and could run code"):
        arrays.read_cifar(tmp_path, hundred=False)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "reference",
    [b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\ngetattr\n", b"cnumpy\nload\n", b"cnumpy\nndarray.dump\n"],
)
def test_no_other_name_is_looked_up(reference: bytes, tmp_path: Path, unchecked: None) -> None:
    (cifar10(tmp_path) / "test_batch").write_bytes(reference + b".")
    with pytest.raises(UserError, match="could run code"):
        arrays.read_cifar(tmp_path, hundred=False)


def test_a_payload_is_not_even_unpickled_under_another_sum(tmp_path: Path) -> None:
    path = cifar10(tmp_path) / "data_batch_1"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(UserError, match="its MD5 sum is not the published c99cafc152244af753f735de768cd75f"):
        arrays.read_cifar(tmp_path, hundred=False)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"data": b"", "labels": []},
        {"data": np.zeros((2, 3072)), "labels": [0, 1]},
        {"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1.5]},
        {"data": np.zeros((2, 3072), np.uint8)},
    ],
)
def test_a_batch_of_other_content_is_refused(entry: Any, tmp_path: Path, unchecked: None) -> None:
    (cifar10(tmp_path) / "test_batch").write_bytes(pickle.dumps(entry))
    with pytest.raises(UserError, match="CIFAR10 files below"):
        arrays.read_cifar(tmp_path, hundred=False)


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MOST_BYTES", 2**20)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(2**26), 1))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"idx3-ubyte\.gz \(more than 1,048,576 bytes\)"):
            arrays.read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (0, 28, 28), (2**31, 2, 1)])
def test_a_size_that_the_file_does_not_hold_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">HBB3I", 0, 8, 3, *shape) + bytes(5))
    with pytest.raises(UserError, match="expected an idx file of Fashion-MNIST"):
        arrays.read_idx(path)


def test_the_largest_published_file_is_within_the_limit() -> None:
    cifar_100_train = 155_249_918
    fashion_mnist_train = 16 + 60_000 * 28 * 28
    assert max(cifar_100_train, fashion_mnist_train) < arrays.MOST_BYTES
