"""Every kind of data set gives the same catalogue: images in a fixed order, with their labels."""

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
from convscope.datasets.catalogue import Catalogue, build_catalogue
from convscope.errors import ConvscopeError

NAMES = ("cats/b.png", "cats/a.png", "dogs/z.PNG", "dogs/deep/y.png")  # not sorted


def random_image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_image(number)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for number, name in enumerate(NAMES):
        write(root / name, png(number))
    write(root / "README.txt", b"hello")
    write(root / "cats" / "labels.csv", b"hello")
    write(root / ".hidden" / "x.png", png(9))
    write(root / "cats" / "._a.png", png(9))
    return root


def read_pixels(catalogue: Catalogue) -> list[bytes]:
    """Read and decode all images."""
    return [_pixels(catalogue.read(i)) for i in range(len(catalogue))]


def _pixels(item: Any) -> bytes:
    image = Image.open(io.BytesIO(item)) if isinstance(item, bytes) else item
    return np.asarray(image).tobytes()


def expected_pixels(*numbers: int) -> list[bytes]:
    return [random_image(number).tobytes() for number in numbers]


def label_names(catalogue: Catalogue) -> list[str | None]:
    """The name of each image's label."""
    assert catalogue.labels is not None
    assert catalogue.labels.dtype == np.int32
    assert catalogue.label_names is not None
    return [None if label < 0 else catalogue.label_names[label] for label in catalogue.labels]


# Folders, globs, lists ------------------------------------------------------------------------------------------------


def test_a_folder_is_sorted_and_labelled_and_other_files_are_noted(folder: Path) -> None:
    catalogue = build_catalogue(folder)
    order = ["cats/a.png", "cats/b.png", "dogs/deep/y.png", "dogs/z.PNG"]
    assert catalogue.names.to_pylist() == [f"{folder}/{name}" for name in order]
    assert read_pixels(catalogue) == expected_pixels(1, 0, 3, 2)
    assert label_names(catalogue) == ["cats", "cats", "dogs", "dogs"]
    assert catalogue.notes == (f"{folder}: 2 files left out, not images by their names (README.txt, cats/labels.csv)",)
    assert catalogue.name == str(folder)


def test_a_folder_agrees_with_torchvision(tmp_path: Path) -> None:
    for number, name in enumerate(["b/1.png", "a-b/2.png", "a/3.png", "a/10.png", "B/x.png"]):
        write(tmp_path / name, png(number))
    catalogue, reference = build_catalogue(tmp_path), ImageFolder(tmp_path)
    assert catalogue.names.to_pylist() == [path for path, _ in reference.samples]
    assert catalogue.labels is not None
    assert catalogue.labels.tolist() == reference.targets
    assert catalogue.label_names == tuple(reference.classes)


def test_a_flat_folder_has_no_labels_and_a_mixed_one_some(folder: Path) -> None:
    assert build_catalogue(folder / "cats").labels is None
    write(folder / "loose.png", png(5))
    assert label_names(build_catalogue(folder)) == ["cats", "cats", "dogs", "dogs", None]


def test_links_are_followed_but_cycles_are_not(folder: Path) -> None:
    (folder / "linked").symlink_to(folder / "cats")
    (folder / "cats" / "up").symlink_to(folder)
    write(folder / "pipes" / "x.png", png(1)).unlink()
    os.mkfifo(folder / "pipes" / "x.png")
    catalogue = build_catalogue(folder)
    assert [name.removeprefix(f"{folder}/") for name in catalogue.names.to_pylist()][-2:] == [
        "linked/a.png",
        "linked/b.png",
    ]
    assert len(catalogue) == 6


@pytest.mark.parametrize("pattern", ["*/*", "**/*.[pP][nN][gG]", "cats/?.png"])
def test_globs(folder: Path, pattern: str) -> None:
    expected = {"*/*": (1, 0, 2), "cats/?.png": (1, 0)}.get(pattern, (1, 0, 3, 2))
    catalogue = build_catalogue(f"{folder}/{pattern}")
    assert read_pixels(catalogue) == expected_pixels(*expected)
    assert catalogue.labels is None
    assert bool(catalogue.notes) == (pattern == "*/*")


def test_text_lists(folder: Path) -> None:
    text = f"cats/a.png\ttabby\n\n{folder}/dogs/z.PNG\tred panda\r\ncats/b.png\ngone.png\ttabby\n"
    catalogue = build_catalogue(write(folder / "list.txt", text.encode()))
    assert label_names(catalogue) == ["tabby", "red panda", None, "tabby"]
    assert catalogue.label_names == ("red panda", "tabby")
    assert [_pixels(catalogue.read(i)) for i in range(3)] == expected_pixels(1, 2, 0)
    with pytest.raises(ConvscopeError, match="No such file"):
        catalogue.read(3)
    assert build_catalogue(write(folder / "plain.txt", b"cats/a.png\n")).labels is None


def test_csv_lists(folder: Path, tmp_path: Path) -> None:
    text = 'split,File_Name,label\nval,cats/a.png,"house, cat"\nval,"' + str(tmp_path) + '/b, c.png",\n\n,,x\n'
    catalogue = build_catalogue(write(folder / "list.csv", text.encode("utf-8-sig")))
    assert catalogue.names.to_pylist() == [f"{folder}/cats/a.png", f"{tmp_path}/b, c.png"]
    assert catalogue.label_names == ("house, cat",)
    assert catalogue.labels is not None
    assert catalogue.labels.tolist() == [0, -1]
    assert build_catalogue(write(folder / "plain.csv", b"image\ncats/a.png\n")).labels is None
    with pytest.raises(ConvscopeError, match="has the columns a, b; expected a heading with image and label"):
        build_catalogue(write(tmp_path / "other.csv", b"a,b\n1,2\n"))
    with pytest.raises(ConvscopeError, match=r"has the columns \(none\)"):
        build_catalogue(write(tmp_path / "empty.csv", b"\n"))
    with pytest.raises(ConvscopeError, match="is not UTF-8 text"):
        build_catalogue(write(tmp_path / "bytes.csv", b"image\n\xff\xfe"))


def test_relative_paths_start_from_the_working_folder_of_the_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    catalogues = [
        build_catalogue("cats"),
        build_catalogue("cats/*.png"),
        build_catalogue(["cats/a.png", Path("cats/b.png")]),
    ]
    names = [str(folder / "cats" / name) for name in ("a.png", "b.png")]
    assert all(one.names.to_pylist() == names for one in catalogues)
    monkeypatch.chdir("/")
    assert all(read_pixels(one) == expected_pixels(1, 0) for one in catalogues)


def test_every_way_to_write_a_path_names_the_same_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ways = ["cats", "cats/", "./cats", "../" + folder.name + "/cats", str(folder / "cats"), Path("cats")]
    catalogues = [build_catalogue(way) for way in ways]
    assert len({(one.name, one.fingerprint) for one in catalogues}) == 1
    assert catalogues[0].name == str(folder / "cats")
    lists = [build_catalogue(["cats/a.png"]), build_catalogue([folder / "cats" / "a.png"])]
    assert len({(one.name, one.fingerprint) for one in lists}) == 1


def test_numbers_as_labels_keep_their_order(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.png", png(i))
    catalogue = build_catalogue(write(tmp_path / "list.txt", b"0.png\t10\n1.png\t9\n2.png\t-1\n"))
    assert label_names(catalogue) == ["10", "9", None]
    assert catalogue.label_names == ("9", "10")


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
    catalogue = build_catalogue(f"{tmp_path}/p-{{00..01}}.tar")
    assert catalogue.names.to_pylist() == [f"{one}!a.PNG", f"{one}!b.png", f"{two}!d/{long}.png", f"{two}!d/c.png"]
    assert read_pixels(catalogue) == expected_pixels(0, 1, 2, 3)
    assert label_names(catalogue) == ["7", "3", None, None]
    assert "b.seg.png" in catalogue.notes[0]
    for equivalent in (f"{tmp_path}/*.tar", [one, str(two)]):
        assert build_catalogue(equivalent).fingerprint == catalogue.fingerprint


def test_labels_in_tars_may_be_names_and_cls_takes_precedence(tmp_path: Path) -> None:
    members = {
        "a.json": b'{"label": "no"}',
        "a.cls": b"tench",
        "a.png": png(0),
        "b.png": png(1),
        "b.json": b'{"label": 4}',
    }
    assert label_names(build_catalogue(tar(tmp_path / "x.tar", members))) == ["tench", "4"]


def test_tars_that_cannot_be_read_by_offset_are_refused(tmp_path: Path) -> None:
    packed = tar(tmp_path / "x.tar", {"a.png": png(0)}, "w:gz")
    damaged = write(tmp_path / "y.tar", tar(tmp_path / "z.tar", {"a.png": png(0) * 50}).read_bytes()[:2000])
    for path in (packed, damaged, write(tmp_path / "n.tar", b"no tar"), write(tmp_path / "e.tar", b"")):
        with pytest.raises(ConvscopeError, match=path.name):
            build_catalogue(path)
    with pytest.raises(ConvscopeError, match="unpack"):
        build_catalogue(write(tmp_path / "x.tar.gz", b"x"))


def test_a_tar_that_is_truncated_later_loses_only_the_missing_images(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a.png": png(0), "b.png": png(1)})
    catalogue = build_catalogue(path)
    os.truncate(path, 1600)
    assert _pixels(catalogue.read(0)) == expected_pixels(0)[0]
    with pytest.raises(ConvscopeError, match="cut off"):
        catalogue.read(1)


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
    catalogue = pickle.loads(pickle.dumps(build_catalogue(f"{tmp_path}/*.parquet")))
    assert catalogue.names[112].as_py() == f"{tmp_path}/1.parquet#12"
    assert label_names(catalogue)[150:153] == (
        [f"n{i % 3}" for i in range(50, 53)] if kind == "binary" else ["50", "51", "52"]
    )
    indices = {"forward": range(200), "backward": range(199, -1, -7), "jumping": (5, 150, 6, 99, 100, 0, 199, 69, 70)}[
        order
    ]
    assert [_pixels(catalogue.read(i)) for i in indices] == expected_pixels(*(i % 100 for i in indices))


def test_reading_one_row_of_parquet_does_not_read_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = [np.random.default_rng(i).bytes(1 << 16) for i in range(200)]  # 13 MB in one row group
    small = {"data_page_size": 1 << 16, "write_batch_size": 8, "use_dictionary": False}
    pq.write_table(pa.table({"image": noise}), tmp_path / "x.parquet", **small)
    catalogue = build_catalogue(tmp_path / "x.parquet")
    sizes: list[int] = []

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            sizes.append(len(data))
            return data

    monkeypatch.setattr(storage, "open_checked", lambda file: Counting(io.FileIO(file)))
    assert catalogue.read(3) == noise[3]
    assert 0 < sum(sizes) < 4_000_000


def test_tables_without_one_image_column_are_refused(tmp_path: Path) -> None:
    for table, message in (({"a": [1]}, "no columns of binary"), ({"a": [b"1"], "b": [b"2"]}, "2 columns of binary")):
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
        with pytest.raises(ConvscopeError, match=message):
            build_catalogue(tmp_path / "x.parquet")
    with pytest.raises(ConvscopeError, match="damaged"):
        build_catalogue(write(tmp_path / "y.parquet", b"PAR1 but no more"))


def test_a_row_without_bytes_fails_when_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(0), None], "label": [None, 2]}), tmp_path / "x.parquet")
    catalogue = build_catalogue(tmp_path / "x.parquet")
    assert label_names(catalogue) == [None, "2"]
    assert _pixels(catalogue.read(0)) == expected_pixels(0)[0]
    with pytest.raises(ConvscopeError, match="holds no bytes"):
        catalogue.read(1)


def test_hugging_face_data_sets_on_disk_and_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    names = ["tabby", "tench", "toad"]
    features = datasets.Features({"label": datasets.ClassLabel(names=names), "image": datasets.Image()})
    content = {"label": [2, 0, -1, 1] * 3, "image": [{"bytes": png(i), "path": None} for i in range(12)]}
    dataset = datasets.Dataset.from_dict(content, features=features)
    labels = ["toad", "tabby", None, "tench"] * 3

    dataset.save_to_disk(tmp_path / "set", num_shards=2)
    dataset.to_parquet(tmp_path / "set.parquet")
    catalogues = {kind: build_catalogue(tmp_path / kind) for kind in ("set", "set.parquet")}
    catalogues["memory"] = build_catalogue(dataset.with_format("torch"))
    for one in catalogues.values():
        assert one.label_names == tuple(names)
        assert label_names(one) == labels
        assert all(isinstance(one.read(i), bytes) for i in range(12))
        assert read_pixels(pickle.loads(pickle.dumps(one))) == expected_pixels(*range(12))
    assert catalogues["set"].names[7].as_py() == f"{tmp_path}/set#7"

    selection = build_catalogue(dataset.select([5, 3, 11]))
    assert read_pixels(selection) == expected_pixels(5, 3, 11)
    assert label_names(selection) == [labels[i] for i in (5, 3, 11)]
    assert selection.fingerprint != build_catalogue(dataset.select([5, 3, 10])).fingerprint

    both = datasets.DatasetDict(train=dataset, test=dataset)
    both.save_to_disk(tmp_path / "both")
    for data in (both, tmp_path / "both"):
        with pytest.raises(ConvscopeError, match="splits train, test"):
            build_catalogue(data)
    with pytest.raises(ConvscopeError, match="no fixed order"):
        build_catalogue(dataset.to_iterable_dataset())
