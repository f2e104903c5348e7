"""Data as catalogues: every kind gives the same pictures, in a fixed order, with their labels."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from convscope.datasets import storage
from convscope.datasets.catalogue import Catalogue, catalogue
from convscope.errors import ConvscopeError

NAMES = ("cats/b.png", "cats/a.png", "dogs/z.PNG", "dogs/deep/y.png")  # not in their order


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, format="PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for number, name in enumerate(NAMES):
        put(root / name, png(number))
    put(root / "README.txt", b"hello")
    put(root / "cats" / "labels.csv", b"hello")
    put(root / ".hidden" / "x.png", png(9))
    put(root / "cats" / "._a.png", png(9))
    return root


def pixels(found: Catalogue) -> list[bytes]:
    """What the pictures show."""
    return [_shown(found.read(i)) for i in range(len(found))]


def _shown(item: Any) -> bytes:
    image = Image.open(io.BytesIO(item)) if isinstance(item, bytes) else item
    return np.asarray(image).tobytes()


def truth(*numbers: int) -> list[bytes]:
    return [picture(number).tobytes() for number in numbers]


def named(found: Catalogue) -> list[str | None]:
    """The name of each picture's label."""
    assert found.labels is not None
    assert found.labels.dtype == np.int32
    assert found.label_names is not None
    return [None if label < 0 else found.label_names[label] for label in found.labels]


# Folders, globs, lists ------------------------------------------------------------------------------------------------


def test_a_folder_is_sorted_labelled_and_the_rest_is_told(folder: Path) -> None:
    found = catalogue(folder)
    order = ["cats/a.png", "cats/b.png", "dogs/deep/y.png", "dogs/z.PNG"]
    assert found.names.to_pylist() == [f"{folder}/{name}" for name in order]
    assert pixels(found) == truth(1, 0, 3, 2)
    assert named(found) == ["cats", "cats", "dogs", "dogs"]
    assert found.notes == (f"{folder}: left out as no pictures by their names: 2 (README.txt, cats/labels.csv)",)
    assert found.name == str(folder)


def test_a_folder_agrees_with_torchvision(tmp_path: Path) -> None:
    for number, name in enumerate(["b/1.png", "a-b/2.png", "a/3.png", "a/10.png", "B/x.png"]):
        put(tmp_path / name, png(number))
    found, theirs = catalogue(tmp_path), ImageFolder(tmp_path)
    assert found.names.to_pylist() == [path for path, _ in theirs.samples]
    assert found.labels is not None
    assert found.labels.tolist() == theirs.targets
    assert found.label_names == tuple(theirs.classes)


def test_a_flat_folder_has_no_labels_and_a_mixed_one_some(folder: Path) -> None:
    assert catalogue(folder / "cats").labels is None
    put(folder / "loose.png", png(5))
    assert named(catalogue(folder)) == ["cats", "cats", "dogs", "dogs", None]


def test_links_are_followed_but_not_round_and_round(folder: Path) -> None:
    (folder / "linked").symlink_to(folder / "cats")
    (folder / "cats" / "up").symlink_to(folder)
    put(folder / "pipes" / "x.png", png(1)).unlink()
    os.mkfifo(folder / "pipes" / "x.png")
    found = catalogue(folder)
    assert [name.removeprefix(f"{folder}/") for name in found.names.to_pylist()][-2:] == [
        "linked/a.png",
        "linked/b.png",
    ]
    assert len(found) == 6


@pytest.mark.parametrize("pattern", ["*/*", "**/*.[pP][nN][gG]", "cats/?.png"])
def test_globs(folder: Path, pattern: str) -> None:
    expected = {"*/*": (1, 0, 2), "cats/?.png": (1, 0)}.get(pattern, (1, 0, 3, 2))
    found = catalogue(f"{folder}/{pattern}")
    assert pixels(found) == truth(*expected)
    assert found.labels is None
    assert bool(found.notes) == (pattern == "*/*")


def test_text_lists(folder: Path) -> None:
    text = f"cats/a.png\ttabby\n\n{folder}/dogs/z.PNG\tred panda\r\ncats/b.png\ngone.png\ttabby\n"
    found = catalogue(put(folder / "list.txt", text.encode()))
    assert named(found) == ["tabby", "red panda", None, "tabby"]
    assert found.label_names == ("red panda", "tabby")
    assert [_shown(found.read(i)) for i in range(3)] == truth(1, 2, 0)
    with pytest.raises(ConvscopeError, match="No such file"):
        found.read(3)
    assert catalogue(put(folder / "plain.txt", b"cats/a.png\n")).labels is None


def test_relative_addresses_count_from_where_they_were_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = [catalogue("cats"), catalogue("cats/*.png"), catalogue(["cats/a.png", Path("cats/b.png")])]
    assert all(one.names.to_pylist() == ["cats/a.png", "cats/b.png"] for one in found)
    monkeypatch.chdir("/")
    assert all(pixels(one) == truth(1, 0) for one in found)


def test_numbers_as_labels_keep_their_order(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / f"{i}.png", png(i))
    found = catalogue(put(tmp_path / "list.txt", b"0.png\t10\n1.png\t9\n2.png\t-1\n"))
    assert named(found) == ["10", "9", None]
    assert found.label_names == ("9", "10")


# Tars -----------------------------------------------------------------------------------------------------------------


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_webdataset_tars(tmp_path: Path) -> None:
    long = "x" * 150  # needs an extended header
    first = {
        "a.cls": b"7\n",
        "a.PNG": png(0),
        "b.png": png(1),
        "b.json": b'{"label": 3}',
        "b.seg.png": png(9),
        "._b.png": b"",
    }
    second = {f"d/{long}.png": png(2), f"d/{long}.json": b"{", "d/c.png": png(3), "c.cls": b"5"}
    one, two = tar(tmp_path / "p-00.tar", first), tar(tmp_path / "p-01.tar", second)
    found = catalogue(f"{tmp_path}/p-{{00..01}}.tar")
    assert found.names.to_pylist() == [f"{one}!a.PNG", f"{one}!b.png", f"{two}!d/{long}.png", f"{two}!d/c.png"]
    assert pixels(found) == truth(0, 1, 2, 3)
    assert named(found) == ["7", "3", None, None]
    assert "b.seg.png" in found.notes[0]
    for same in (f"{tmp_path}/*.tar", [one, str(two)]):
        assert catalogue(same).fingerprint == found.fingerprint


def test_labels_in_tars_may_be_names_and_cls_comes_first(tmp_path: Path) -> None:
    members = {
        "a.json": b'{"label": "no"}',
        "a.cls": b"tench",
        "a.png": png(0),
        "b.png": png(1),
        "b.json": b'{"label": 4}',
    }
    assert named(catalogue(tar(tmp_path / "x.tar", members))) == ["tench", "4"]


def test_tars_that_cannot_be_read_by_offset_are_refused(tmp_path: Path) -> None:
    packed = tar(tmp_path / "x.tar", {"a.png": png(0)}, "w:gz")
    damaged = put(tmp_path / "y.tar", tar(tmp_path / "z.tar", {"a.png": png(0) * 50}).read_bytes()[:2000])
    for path in (packed, damaged, put(tmp_path / "n.tar", b"no tar"), put(tmp_path / "e.tar", b"")):
        with pytest.raises(ConvscopeError, match=path.name):
            catalogue(path)
    with pytest.raises(ConvscopeError, match="unpack"):
        catalogue(put(tmp_path / "x.tar.gz", b"x"))


def test_a_tar_that_was_cut_off_later_costs_the_pictures_that_are_gone(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a.png": png(0), "b.png": png(1)})
    found = catalogue(path)
    os.truncate(path, 1600)
    assert _shown(found.read(0)) == truth(0)[0]
    with pytest.raises(ConvscopeError, match="cut off"):
        found.read(1)


# Columns --------------------------------------------------------------------------------------------------------------


def rows(kind: str, count: int) -> dict[str, Any]:
    content = [png(i) for i in range(count)]
    if kind == "binary":
        return {
            "id": list(range(count)),
            "photo": pa.array(content, pa.binary()),
            "label": [f"n{i % 3}" for i in range(count)],
        }
    struct = pa.StructArray.from_arrays(
        [pa.array(content), pa.array([f"{i}.png" for i in range(count)])], ["bytes", "path"]
    )
    return {"image": struct, "mask": pa.array(content, pa.large_binary()), "labels": list(range(count))}


@pytest.mark.parametrize("kind", ["binary", "struct"])
@pytest.mark.parametrize("order", ["forward", "backward", "jumping"])
def test_parquet(tmp_path: Path, kind: str, order: str) -> None:
    for part in range(2):
        pq.write_table(pa.table(rows(kind, 100)), tmp_path / f"{part}.parquet", row_group_size=70)
    found = pickle.loads(pickle.dumps(catalogue(f"{tmp_path}/*.parquet")))
    assert found.names[112].as_py() == f"{tmp_path}/1.parquet#12"
    assert named(found)[150:153] == ([f"n{i % 3}" for i in range(50, 53)] if kind == "binary" else ["50", "51", "52"])
    asked = {"forward": range(200), "backward": range(199, -1, -7), "jumping": (5, 150, 6, 99, 100, 0, 199, 69, 70)}[
        order
    ]
    assert [_shown(found.read(i)) for i in asked] == truth(*(i % 100 for i in asked))


def test_one_row_of_parquet_does_not_cost_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = [np.random.default_rng(i).bytes(1 << 16) for i in range(200)]  # 13 MB in one row group
    small = {"data_page_size": 1 << 16, "write_batch_size": 8, "use_dictionary": False}
    pq.write_table(pa.table({"image": noise}), tmp_path / "x.parquet", **small)
    found = catalogue(tmp_path / "x.parquet")
    asked: list[int] = []

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            asked.append(len(data))
            return data

    monkeypatch.setattr(storage, "opened", lambda file: Counting(io.FileIO(file)))
    assert found.read(3) == noise[3]
    assert 0 < sum(asked) < 4_000_000


def test_columns_without_pictures_or_with_too_many_are_refused(tmp_path: Path) -> None:
    for table, words in (({"a": [1]}, "no columns of binary"), ({"a": [b"1"], "b": [b"2"]}, "2 columns of binary")):
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
        with pytest.raises(ConvscopeError, match=words):
            catalogue(tmp_path / "x.parquet")
    with pytest.raises(ConvscopeError, match="damaged"):
        catalogue(put(tmp_path / "y.parquet", b"PAR1 but no more"))


def test_a_row_without_bytes_is_its_own_failure(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(0), None], "label": [None, 2]}), tmp_path / "x.parquet")
    found = catalogue(tmp_path / "x.parquet")
    assert named(found) == [None, "2"]
    assert _shown(found.read(0)) == truth(0)[0]
    with pytest.raises(ConvscopeError, match="holds no bytes"):
        found.read(1)


def test_hugging_face_on_disk_and_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    names = ["tabby", "tench", "toad"]
    features = datasets.Features({"label": datasets.ClassLabel(names=names), "image": datasets.Image()})
    content = {"label": [2, 0, -1, 1] * 3, "image": [{"bytes": png(i), "path": None} for i in range(12)]}
    whole = datasets.Dataset.from_dict(content, features=features)
    labels = ["toad", "tabby", None, "tench"] * 3

    whole.save_to_disk(tmp_path / "set", num_shards=2)
    whole.to_parquet(tmp_path / "set.parquet")
    found = {kind: catalogue(tmp_path / kind) for kind in ("set", "set.parquet")}
    found["hand"] = catalogue(whole.with_format("torch"))
    for one in found.values():
        assert one.label_names == tuple(names)
        assert named(one) == labels
        assert all(isinstance(one.read(i), bytes) for i in range(12))
        assert pixels(pickle.loads(pickle.dumps(one))) == truth(*range(12))
    assert found["set"].names[7].as_py() == f"{tmp_path}/set#7"

    chosen = catalogue(whole.select([5, 3, 11]))
    assert pixels(chosen) == truth(5, 3, 11)
    assert named(chosen) == [labels[i] for i in (5, 3, 11)]
    assert chosen.fingerprint != catalogue(whole.select([5, 3, 10])).fingerprint

    both = datasets.DatasetDict(train=whole, test=whole)
    both.save_to_disk(tmp_path / "both")
    for data in (both, tmp_path / "both"):
        with pytest.raises(ConvscopeError, match="splits train, test"):
            catalogue(data)
    with pytest.raises(ConvscopeError, match="no fixed order"):
        catalogue(whole.to_iterable_dataset())
