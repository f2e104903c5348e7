"""Data in memory and at remote locations, errors, and the match of labels to the classes of a network."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
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
from convscope.datasets.catalogue import build_catalogue, match_classes
from convscope.datasets.storage import expand_ranges
from convscope.errors import ConvscopeError
from tests.datasets.test_catalogue import expected_pixels, label_names, png, random_image, read_pixels, rows, tar, write


class Pairs:
    """A data set with the least that it needs: a length and items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


# In memory ------------------------------------------------------------------------------------------------------------


def test_arrays_images_bytes_and_paths(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", png(0))
    catalogue = build_catalogue([path, Image.fromarray(random_image(1)), random_image(2), png(3)])
    assert catalogue.names.to_pylist() == [str(path), "image 1", "image 2", "image 3"]
    assert read_pixels(catalogue) == expected_pixels(0, 1, 2, 3)
    stack = build_catalogue(np.stack([random_image(i) for i in range(4)]))
    assert read_pixels(stack) == expected_pixels(0, 1, 2, 3)
    assert stack.reader.in_memory
    assert (
        len(build_catalogue(random_image(0)))
        == len(build_catalogue(Image.fromarray(random_image(0))))
        == len(build_catalogue(path))
        == 1
    )
    assert len(build_catalogue(np.zeros((5, 6, 7), np.uint8))) == 5


def test_the_fingerprint_depends_on_the_data_alone(tmp_path: Path) -> None:
    array = np.stack([random_image(i) for i in range(2)])
    other = array.copy()
    other[1, 0, 0, 0] ^= 1
    assert (
        build_catalogue(array).fingerprint
        == build_catalogue(array.copy()).fingerprint
        != build_catalogue(other).fingerprint
    )
    write(tmp_path / "x" / "a.png", png(0))
    write(tmp_path / "x" / "b.png", png(1))
    fingerprints = [build_catalogue(tmp_path / "x").fingerprint]
    write(tmp_path / "x" / "notes.txt", b"other files do not matter")
    assert build_catalogue(tmp_path / "x").fingerprint == fingerprints[0]
    write(tmp_path / "x" / "b.png", png(1) + b"0")
    fingerprints.append(build_catalogue(tmp_path / "x").fingerprint)
    (tmp_path / "x" / "b.png").rename(tmp_path / "x" / "c.png")
    fingerprints.append(build_catalogue(tmp_path / "x").fingerprint)
    listed = [f"x/a.png\t{label}\nx/c.png\tb\n" for label in ("a", "b")]
    fingerprints += [build_catalogue(write(tmp_path / "list.txt", text.encode())).fingerprint for text in listed]
    assert len(set(fingerprints)) == len(fingerprints)


def test_torchvision_style_data_sets(tmp_path: Path) -> None:
    for number, name in enumerate(["b/1.png", "a/2.png", "a/3.png"]):
        write(tmp_path / name, png(number))
    reference = ImageFolder(tmp_path)
    catalogue = build_catalogue(reference)
    assert read_pixels(catalogue) == expected_pixels(1, 2, 0)
    assert label_names(catalogue) == ["a", "a", "b"]
    subset = build_catalogue(Subset(reference, [2, 0]))
    assert read_pixels(subset) == expected_pixels(0, 1)
    assert label_names(subset) == ["b", "a"]
    transformed = build_catalogue(ImageFolder(tmp_path, target_transform=lambda label: 7 - label))
    assert label_names(transformed) == ["7", "7", "6"]


def test_labels_are_read_from_items_if_they_are_not_stored() -> None:
    catalogue = build_catalogue(
        Pairs((random_image(0), "b"), (random_image(1), np.int64(3)), OSError("broken\ndisk"), (random_image(3), None))
    )
    assert label_names(catalogue) == ["b", "3", None, None]
    assert "every item was read once for its label" in catalogue.notes[0]
    with pytest.raises(ConvscopeError, match=r"cannot be read \(OSError: broken\\ndisk\)"):
        catalogue.read(2)
    assert build_catalogue(Pairs(random_image(0), random_image(1))).labels is None
    assert build_catalogue(Pairs((random_image(0), torch.zeros(3)))).labels is None


def test_tensors_are_refused() -> None:
    with pytest.raises(ConvscopeError, match=r"gives \(Tensor, int\); .*leave its transform out"):
        build_catalogue(Pairs((torch.zeros(3, 4, 4), 1)))


def test_torchvision_data_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    names = [f"class {i}" for i in range(10)]
    values = np.arange(6 * 3072, dtype=np.int64).reshape(6, 3072).astype(np.uint8)
    write(folder / "data_batch_1", pickle.dumps({"data": values, "labels": [3, 1, 4, 1, 5, 9]}))
    write(folder / "batches.meta", pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    catalogue = build_catalogue(f"torchvision:CIFAR10:{tmp_path}")
    assert read_pixels(catalogue) == [v.reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for v in values]
    assert label_names(catalogue) == [names[i] for i in (3, 1, 4, 1, 5, 9)]
    for address, message in (
        (f"torchvision:MNIST:{tmp_path}", "cannot be opened"),
        ("torchvision:CIFAR11:x", "CIFAR10"),
        ("torchvision:CIFAR10", "a folder"),
        (f"torchvision:LSUN:{tmp_path}", "expected torchvision"),  # would unpickle a file next to the data
    ):
        with pytest.raises(ConvscopeError, match=message):
            build_catalogue(address)


# Remote ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_every_kind_of_data_at_a_remote_location(memory: Any, tmp_path: Path) -> None:
    table, packed = tmp_path / "x.parquet", tar(tmp_path / "x.tar", {"a.cls": b"5", "a.png": png(0), "b.png": png(1)})
    pq.write_table(pa.table(rows("struct", 40)), table, row_group_size=16)
    files = {f"/set/{name}": png(i) for i, name in enumerate(["b/2.png", "a/1.png", "a/.x.png"])}
    files |= {"/x.tar": packed.read_bytes(), "/x.parquet": table.read_bytes(), "/set/notes.txt": b"a/1.png\tx\n"}
    memory.pipe(files)

    catalogue = build_catalogue("memory://set")
    assert catalogue.names.to_pylist() == ["memory://set/a/1.png", "memory://set/b/2.png"]
    assert read_pixels(catalogue) == expected_pixels(1, 0)
    assert label_names(catalogue) == ["a", "b"]
    assert read_pixels(build_catalogue("memory://set/*/*.png")) == expected_pixels(1, 0)
    assert read_pixels(build_catalogue("memory://set/notes.txt")) == expected_pixels(1)
    assert read_pixels(build_catalogue("memory://x.tar")) == expected_pixels(0, 1)
    assert label_names(build_catalogue("memory://x.tar")) == ["5", None]
    assert read_pixels(build_catalogue("memory://x.parquet")) == expected_pixels(*range(40))
    assert build_catalogue("memory://x.parquet").labels.tolist() == list(range(40))  # type: ignore[union-attr]
    for missing in ("memory://gone", "memory://gone/*.png", "memory://p-{0..1}.tar"):
        with pytest.raises(ConvscopeError, match=r"does not exist|matches no file"):
            build_catalogue(missing)


def test_a_hugging_face_data_set_at_a_remote_location(memory: Any, tmp_path: Path) -> None:
    import datasets

    content = {"image": [{"bytes": png(i), "path": None} for i in range(5)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "set", num_shards=2)
    memory.put(str(tmp_path / "set"), "/hf", recursive=True)
    assert read_pixels(build_catalogue("memory://hf")) == expected_pixels(*range(5))


def test_file_urls_are_local(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.png", png(0))
    write(tmp_path / "b" / "y.png", png(1))
    catalogue = build_catalogue(f"file://{tmp_path}")
    assert catalogue.names.to_pylist() == [f"file://{tmp_path}/a/x.png", f"file://{tmp_path}/b/y.png"]
    assert read_pixels(catalogue) == expected_pixels(0, 1)


def test_temporary_errors_are_retried_and_permanent_ones_are_not(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe({"/set/a.png": png(0)})
    catalogue = build_catalogue("memory://set")
    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    failures = [OSError("reset"), TimeoutError("slow"), RuntimeError("502")]
    cat_file = type(memory).cat_file

    def flaky(self: Any, *args: Any, **keywords: Any) -> bytes:
        if failures:
            raise failures.pop()
        return bytes(cat_file(self, *args, **keywords))

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert read_pixels(catalogue) == expected_pixels(0)
    assert pauses == pytest.approx([0.1, 0.4, 1.6])
    failures += [OSError("reset")] * 4
    with pytest.raises(ConvscopeError, match=r"cannot be read \(OSError: reset\)"):
        catalogue.read(0)
    pauses.clear()
    failures += [FileNotFoundError("gone")]
    with pytest.raises(ConvscopeError, match="gone"):
        catalogue.read(0)
    assert pauses == []


def test_storage_options_are_passed_on_and_stay_secret(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(0))
    catalogue = build_catalogue("dir://", storage={"path": str(tmp_path), "target_protocol": "file"})
    assert read_pixels(catalogue) == expected_pixels(0)
    assert str(tmp_path) not in repr(catalogue)
    assert read_pixels(pickle.loads(pickle.dumps(catalogue))) == expected_pixels(0)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "nowhere does not exist; expected a folder"),
        ("nowhere/*.png", "matches no file"),
        ("p-{3..1}.tar", "ends before it begins"),
        ("nosuch://x/y", "nosuch://x/y cannot be opened"),
        ("zip://*.png::x.zip", "unpack the archive"),
        ([], "there are no images"),
        ([1], "item 0 is a int"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), "shape"),
        (np.zeros((0, 4, 4, 3), np.uint8), "there are no images"),
        (Pairs(), "Pairs is empty"),
        (Pairs("text"), "gives str"),
        (3.5, "a float is not a known kind of data set"),
        ({"a": 1}, "a dict is not a known kind of data set"),
        (["x.png", "x.png"], "x.png 2 times"),
    ],
)
def test_unknown_data_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ConvscopeError, match=message.replace("*", r"\*")):
        build_catalogue(data)


def test_folders_without_images_and_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "notes.md", b"x")
    with pytest.raises(ConvscopeError, match="there are no images in"):
        build_catalogue(tmp_path / "a")
    with pytest.raises(ConvscopeError, match=r"notes\.md is not a known kind of data set"):
        build_catalogue(tmp_path / "a" / "notes.md")
    write(tmp_path / "b" / "x-0.parquet", b"x")
    with pytest.raises(ConvscopeError, match=r"it holds parquet files: give .*b/\*\.parquet"):
        build_catalogue(tmp_path / "b")


def test_a_file_name_that_is_not_unicode_is_left_out_and_noted(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(0))
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(png(1))
    catalogue = build_catalogue(tmp_path)
    assert read_pixels(catalogue) == expected_pixels(0)
    assert r"1 files left out, not images by their names (\udcff.png)" in catalogue.notes[0]


def test_files_that_are_too_large_fail_when_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", png(0))
    catalogue = build_catalogue([tmp_path / "a.png", tmp_path])
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", len(png(0)) - 1)
    with pytest.raises(ConvscopeError, match="this one is larger"):
        catalogue.read(0)
    with pytest.raises(ConvscopeError, match="is a directory"):
        catalogue.read(1)
    with pytest.raises(ConvscopeError, match="out of range"):
        catalogue.read(2)


def test_brace_ranges_are_expanded() -> None:
    assert expand_ranges("a{08..10}b{0..1}") == ["a08b0", "a08b1", "a09b0", "a09b1", "a10b0", "a10b1"]
    assert expand_ranges("plain{x}") == ["plain{x}"]


# Classes --------------------------------------------------------------------------------------------------------------


def match(names: list[str], classes: list[str] | None, num_outputs: int) -> list[int] | None:
    indices = match_classes(names, classes, num_outputs)
    assert indices is None or indices.dtype == np.int32
    return None if indices is None else indices.tolist()


def test_classes_match_by_name() -> None:
    classes = ["tench", "red panda", "crane", "Crane"]
    assert match(["Red_Panda", "toad", "tench"], classes, 4) == [1, -1, 0]
    assert match(["tench, Tinca tinca", "lesser panda"], classes, 4) == [0, -1]
    assert match(["crane"], classes, 4) is None  # ambiguous
    assert match(["a"], classes, 4) is match(["a"], None, 4) is None


def test_classes_match_by_wordnet_id(lite0: Any) -> None:
    indices = match_classes(["n02509815", "n01440764", "n99999999"], lite0.classes, lite0.num_outputs)
    assert indices is not None
    assert indices.tolist() == [lite0.class_index("lesser panda"), lite0.class_index("tench"), -1] == [387, 0, -1]
    assert match(["n01440764"], None, 10) is None


def test_classes_match_by_number() -> None:
    assert match(["0", "1", "2"], ["a", "b", "c"], 3) == [0, 1, 2]
    assert match(["0", "2"], ["a", "b", "c"], 3) == [0, 2]  # the last class occurs, so the numbering is the same
    assert match(["0", "1"], ["a", "b", "c"], 3) is None
    assert match(["0", "3"], ["a", "b", "c"], 3) is None
    assert match(["0", "x"], ["a", "b"], 2) is None


def test_data_without_labels_match_no_classes() -> None:
    assert match_classes(None, ["a"], 1) is None
