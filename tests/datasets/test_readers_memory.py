"""Data in hand, at remote addresses, what is refused, and which class of the network a label means."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10, ImageFolder

from convscope.datasets import storage
from convscope.datasets.catalogue import catalogue, class_indices
from convscope.datasets.storage import expanded
from convscope.errors import ConvscopeError
from tests.datasets.test_catalogue import named, picture, pixels, png, put, rows, tar, truth


class Pairs:
    """The least that a data set needs: a length and items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


# In hand --------------------------------------------------------------------------------------------------------------


def test_arrays_images_bytes_and_paths_in_hand(tmp_path: Path) -> None:
    path = put(tmp_path / "a.png", png(0))
    found = catalogue([path, Image.fromarray(picture(1)), picture(2), png(3)])
    assert found.names.to_pylist() == [str(path), "image 1", "image 2", "image 3"]
    assert pixels(found) == truth(0, 1, 2, 3)
    many = catalogue(np.stack([picture(i) for i in range(4)]))
    assert pixels(many) == truth(0, 1, 2, 3)
    assert many.origin.held
    assert len(catalogue(picture(0))) == len(catalogue(Image.fromarray(picture(0)))) == len(catalogue(path)) == 1
    assert len(catalogue(np.zeros((5, 6, 7), np.uint8))) == 5


def test_the_fingerprint_tells_data_apart_and_only_data(tmp_path: Path) -> None:
    array = np.stack([picture(i) for i in range(2)])
    other = array.copy()
    other[1, 0, 0, 0] ^= 1
    assert catalogue(array).fingerprint == catalogue(array.copy()).fingerprint != catalogue(other).fingerprint
    put(tmp_path / "x" / "a.png", png(0))
    put(tmp_path / "x" / "b.png", png(1))
    prints = [catalogue(tmp_path / "x").fingerprint]
    put(tmp_path / "x" / "notes.txt", b"what else lies there does not matter")
    assert catalogue(tmp_path / "x").fingerprint == prints[0]
    put(tmp_path / "x" / "b.png", png(1) + b"0")
    prints.append(catalogue(tmp_path / "x").fingerprint)
    (tmp_path / "x" / "b.png").rename(tmp_path / "x" / "c.png")
    prints.append(catalogue(tmp_path / "x").fingerprint)
    listed = [f"x/a.png\t{label}\nx/c.png\tb\n" for label in ("a", "b")]
    prints += [catalogue(put(tmp_path / "list.txt", text.encode())).fingerprint for text in listed]
    assert len(set(prints)) == len(prints)


def test_data_sets_like_torchvisions(tmp_path: Path) -> None:
    for number, name in enumerate(["b/1.png", "a/2.png", "a/3.png"]):
        put(tmp_path / name, png(number))
    theirs = ImageFolder(tmp_path)
    found = catalogue(theirs)
    assert pixels(found) == truth(1, 2, 0)
    assert named(found) == ["a", "a", "b"]
    part = catalogue(Subset(theirs, [2, 0]))
    assert pixels(part) == truth(0, 1)
    assert named(part) == ["b", "a"]
    turned = catalogue(ImageFolder(tmp_path, target_transform=lambda label: 7 - label))
    assert named(turned) == ["7", "7", "6"]


def test_a_data_set_that_keeps_no_labels_is_asked_for_them() -> None:
    found = catalogue(Pairs((picture(0), "b"), (picture(1), np.int64(3)), OSError("broken\ndisk"), (picture(3), None)))
    assert named(found) == ["b", "3", None, None]
    assert "asked of every picture" in found.notes[0]
    with pytest.raises(ConvscopeError, match=r"cannot be read \(OSError: broken\\ndisk\)"):
        found.read(2)
    assert catalogue(Pairs(picture(0), picture(1))).labels is None
    assert catalogue(Pairs((picture(0), torch.zeros(3)))).labels is None


def test_tensors_are_not_pictures() -> None:
    with pytest.raises(ConvscopeError, match=r"gives \(Tensor, int\); .*leave its transform out"):
        catalogue(Pairs((torch.zeros(3, 4, 4), 1)))


def test_torchvisions_data_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    names = [f"class {i}" for i in range(10)]
    values = np.arange(6 * 3072, dtype=np.int64).reshape(6, 3072).astype(np.uint8)
    put(folder / "data_batch_1", pickle.dumps({"data": values, "labels": [3, 1, 4, 1, 5, 9]}))
    put(folder / "batches.meta", pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    found = catalogue(f"torchvision:CIFAR10:{tmp_path}")
    assert pixels(found) == [v.reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for v in values]
    assert named(found) == [names[i] for i in (3, 1, 4, 1, 5, 9)]
    for address, words in (
        (f"torchvision:MNIST:{tmp_path}", "cannot be opened"),
        ("torchvision:CIFAR11:x", "CIFAR10"),
        ("torchvision:CIFAR10", "a folder"),
        (f"torchvision:LSUN:{tmp_path}", "expected torchvision"),  # unpickles what lies beside the data
    ):
        with pytest.raises(ConvscopeError, match=words):
            catalogue(address)


# Remote ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_every_kind_at_a_remote_address(memory: Any, tmp_path: Path) -> None:
    table, packed = tmp_path / "x.parquet", tar(tmp_path / "x.tar", {"a.cls": b"5", "a.png": png(0), "b.png": png(1)})
    pq.write_table(pa.table(rows("struct", 40)), table, row_group_size=16)
    files = {f"/set/{name}": png(i) for i, name in enumerate(["b/2.png", "a/1.png", "a/.x.png"])}
    files |= {"/x.tar": packed.read_bytes(), "/x.parquet": table.read_bytes(), "/set/notes.txt": b"a/1.png\tx\n"}
    memory.pipe(files)

    found = catalogue("memory://set")
    assert found.names.to_pylist() == ["memory://set/a/1.png", "memory://set/b/2.png"]
    assert pixels(found) == truth(1, 0)
    assert named(found) == ["a", "b"]
    assert pixels(catalogue("memory://set/*/*.png")) == truth(1, 0)
    assert pixels(catalogue("memory://set/notes.txt")) == truth(1)
    assert pixels(catalogue("memory://x.tar")) == truth(0, 1)
    assert named(catalogue("memory://x.tar")) == ["5", None]
    assert pixels(catalogue("memory://x.parquet")) == truth(*range(40))
    assert catalogue("memory://x.parquet").labels.tolist() == list(range(40))  # type: ignore[union-attr]
    for missing in ("memory://gone", "memory://gone/*.png", "memory://p-{0..1}.tar"):
        with pytest.raises(ConvscopeError, match=r"is not there|names no file"):
            catalogue(missing)


def test_hugging_face_at_a_remote_address(memory: Any, tmp_path: Path) -> None:
    import datasets

    content = {"image": [{"bytes": png(i), "path": None} for i in range(5)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "set", num_shards=2)
    memory.put(str(tmp_path / "set"), "/hf", recursive=True)
    assert pixels(catalogue("memory://hf")) == truth(*range(5))


def test_file_addresses_are_local(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.png", png(0))
    put(tmp_path / "b" / "y.png", png(1))
    found = catalogue(f"file://{tmp_path}")
    assert found.names.to_pylist() == [f"file://{tmp_path}/a/x.png", f"file://{tmp_path}/b/y.png"]
    assert pixels(found) == truth(0, 1)


def test_passing_failures_are_retried_and_others_are_not(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe({"/set/a.png": png(0)})
    found = catalogue("memory://set")
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    failures = [OSError("reset"), TimeoutError("slow"), RuntimeError("502")]
    real = type(memory).cat_file

    def shaky(self: Any, *args: Any, **keywords: Any) -> bytes:
        if failures:
            raise failures.pop()
        return bytes(real(self, *args, **keywords))

    monkeypatch.setattr(type(memory), "cat_file", shaky)
    assert pixels(found) == truth(0)
    assert waits == pytest.approx([0.1, 0.4, 1.6])
    failures += [OSError("reset")] * 4
    with pytest.raises(ConvscopeError, match=r"cannot be read \(OSError: reset\)"):
        found.read(0)
    waits.clear()
    failures += [FileNotFoundError("gone")]
    with pytest.raises(ConvscopeError, match="gone"):
        found.read(0)
    assert waits == []


def test_storage_options_reach_the_address_and_stay_secret(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png(0))
    found = catalogue("dir://", storage={"path": str(tmp_path), "target_protocol": "file"})
    assert pixels(found) == truth(0)
    assert str(tmp_path) not in repr(found)
    assert pixels(pickle.loads(pickle.dumps(found))) == truth(0)


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("nowhere", "nowhere is not there; expected a folder"),
        ("nowhere/*.png", "names no file"),
        ("p-{3..1}.tar", "ends before it begins"),
        ("nosuch://x/y", "nosuch://x/y cannot be opened"),
        ("zip://*.png::x.zip", "unpack it"),
        ([], "there are no pictures"),
        ([1], "item 0 is a int"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), "shape"),
        (np.zeros((0, 4, 4, 3), np.uint8), "there are no pictures"),
        (Pairs(), "Pairs is empty"),
        (Pairs("what"), "gives str"),
        (3.5, "a float is no data set"),
        ({"a": 1}, "a dict is no data set"),
        (["x.png", "x.png"], "x.png 2 times"),
    ],
)
def test_what_is_not_known_is_refused_in_words(data: Any, words: str) -> None:
    with pytest.raises(ConvscopeError, match=words.replace("*", r"\*")):
        catalogue(data)


def test_folders_without_pictures_and_files_of_other_kinds(tmp_path: Path) -> None:
    put(tmp_path / "a" / "notes.md", b"x")
    with pytest.raises(ConvscopeError, match="there are no pictures in"):
        catalogue(tmp_path / "a")
    with pytest.raises(ConvscopeError, match=r"notes\.md is no data set"):
        catalogue(tmp_path / "a" / "notes.md")
    put(tmp_path / "b" / "x-0.parquet", b"x")
    with pytest.raises(ConvscopeError, match=r"it holds parquet files: give .*b/\*\.parquet"):
        catalogue(tmp_path / "b")


def test_a_name_that_is_no_text_is_left_out_and_told(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png(0))
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(png(1))
    found = catalogue(tmp_path)
    assert pixels(found) == truth(0)
    assert r"1 (\udcff.png)" in found.notes[0]


def test_files_that_are_no_pictures_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.png", png(0))
    found = catalogue([tmp_path / "a.png", tmp_path])
    monkeypatch.setattr(storage, "LARGEST", len(png(0)) - 1)
    with pytest.raises(ConvscopeError, match="no picture is that large"):
        found.read(0)
    with pytest.raises(ConvscopeError, match="is a directory"):
        found.read(1)
    with pytest.raises(ConvscopeError, match="out of range"):
        found.read(2)


def test_brace_ranges() -> None:
    assert expanded("a{08..10}b{0..1}") == ["a08b0", "a08b1", "a09b0", "a09b1", "a10b0", "a10b1"]
    assert expanded("plain{x}") == ["plain{x}"]


# Classes --------------------------------------------------------------------------------------------------------------


def means(names: list[str], classes: list[str] | None, outputs: int) -> list[int] | None:
    data = SimpleNamespace(label_names=tuple(names))
    found = class_indices(data, SimpleNamespace(classes=classes, outputs=outputs))  # type: ignore[arg-type]
    assert found is None or found.dtype == np.int32
    return None if found is None else found.tolist()


def test_classes_by_name() -> None:
    classes = ["tench", "red panda", "crane", "Crane"]
    assert means(["Red_Panda", "toad", "tench"], classes, 4) == [1, -1, 0]
    assert means(["tench, Tinca tinca", "lesser panda"], classes, 4) == [0, -1]
    assert means(["crane"], classes, 4) is None  # which of the two?
    assert means(["a"], classes, 4) is means(["a"], None, 4) is None


def test_classes_by_wordnet_id(lite0: Any) -> None:
    data = SimpleNamespace(label_names=("n02509815", "n01440764", "n99999999"))
    found = class_indices(data, lite0)  # type: ignore[arg-type]
    assert found is not None
    assert found.tolist() == [lite0.class_index("lesser panda"), lite0.class_index("tench"), -1] == [387, 0, -1]
    assert means(["n01440764"], None, 10) is None


def test_classes_by_number() -> None:
    assert means(["0", "1", "2"], ["a", "b", "c"], 3) == [0, 1, 2]
    assert means(["0", "2"], ["a", "b", "c"], 3) == [0, 2]  # the last one is there: they count the same classes
    assert means(["0", "1"], ["a", "b", "c"], 3) is None
    assert means(["0", "3"], ["a", "b", "c"], 3) is None
    assert means(["0", "x"], ["a", "b"], 2) is None


def test_no_labels_no_classes() -> None:
    assert class_indices(SimpleNamespace(label_names=None), SimpleNamespace()) is None  # type: ignore[arg-type]
