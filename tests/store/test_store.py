"""Queries of a store against direct computations; the bytes they read; refused arguments and damaged files."""

from __future__ import annotations

import io
import json
import time
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import convscope
import tests.oracles.stores as stores
from convscope.errors import ConvscopeError
from convscope.store import queries
from convscope.store.io import Folder


@pytest.fixture(scope="module")
def store_and_maxima(tmp_path_factory):
    """A store with labels and a failed image, and the maxima it was made from."""
    folder = tmp_path_factory.mktemp("scan") / "store"
    values = stores.write_small_store(folder, classes=3, failed=[4], seed=7)
    return convscope.open_store(folder), values


def assert_same_correlations(units, expected):
    """Compare units in order, and r to rounding."""
    assert [(unit.layer, unit.unit) for unit in units] == [row[:2] for row in expected]
    np.testing.assert_allclose([unit.r for unit in units], [row[2] for row in expected], atol=1e-6)


# --- units -----------------------------------------------------------------------------------------------------------


def test_store_describes_its_content(store_and_maxima):
    store, _ = store_and_maxima
    assert (store.layers, store.num_images, store.input_size) == (["layer 0", "layer 1"], 40, (64, 80))
    assert (store.classes[6], store.labels) == ("class 6", ["label 0", "label 1", "label 2"])
    assert "2 layers, 75 units, 40 images" in repr(store)


def test_examples_are_the_top_images_in_order(store_and_maxima):
    store, (first, _) = store_and_maxima
    for unit in (0, 63, 64, 69):  # on both sides of the row groups' boundary
        best = sorted((p for p in range(40) if p != 4), key=lambda p: (-first[unit, p], p))[:5]
        examples = store.unit("layer 0", unit).examples()
        assert [(e.image, e.value, e.name) for e in examples] == [
            (p, first[unit, p], f"folder/{p:05d}.png") for p in best
        ]
        worst = sorted((p for p in range(40) if p != 4), key=lambda p: (first[unit, p], p))[:3]
        assert [e.image for e in store.unit("layer 0", unit).examples(3, "bottom")] == worst
        assert len(store.unit("layer 0", unit).examples(None, "decile")) == 10


def test_box_in_original_is_the_scaled_box(store_and_maxima):
    store, _ = store_and_maxima
    for e in store.unit("layer 1", 3).examples():
        expected = [e.box[0] * 100 / 64, e.box[1] * 120 / 80, e.box[2] * 100 / 64, e.box[3] * 120 / 80]
        np.testing.assert_allclose(e.box_in_original, expected, rtol=1e-12)


def test_statistics_and_classes_of_a_unit(store_and_maxima):
    store, (first, second) = store_and_maxima
    record = store.unit("layer 1", 2)
    assert record.row == 72
    assert record.statistics["maximum"] == np.nanmax(second[2])
    labels = np.arange(40) % 4 - 1
    direct = {c: np.nanmean(second[2][labels == c]) / 2 for c in range(3)}
    order = sorted(direct, key=lambda c: -direct[c])
    classes = record.classes(2)
    assert [(c.name, c.label, c.images) for c in classes] == [(f"label {c}", c, 10 if c != 3 else 9) for c in order[:2]]
    assert [c.mean for c in classes] == pytest.approx([direct[c] for c in order[:2]], rel=1e-6)
    column = store.units(["maximum"])["maximum"].to_numpy()
    np.testing.assert_array_equal(column, np.nanmax(np.concatenate([first, second]), 1))


def test_similar_units_are_the_most_correlated_of_all_layers(store_and_maxima, monkeypatch):
    store, values = store_and_maxima
    monkeypatch.setattr(queries, "BLOCK_SIZE", 16)
    sample = np.concatenate(values)[:, store.sample_images]
    r = np.corrcoef(sample[:, ~np.isnan(sample[0])].astype(float))
    for layer, unit, row in (("layer 0", 5, 5), ("layer 1", 4, 74)):
        order = [i for i in sorted(range(75), key=lambda i: (-np.float32(r[row, i]), i)) if i != row][:12]
        expected = [("layer 0", i, r[row, i]) if i < 70 else ("layer 1", i - 70, r[row, i]) for i in order]
        assert_same_correlations(store.unit(layer, unit).similar(12), expected)
        same_layer = [row for row in expected if row[0] == layer]
        assert_same_correlations(store.unit(layer, unit).coactive(len(same_layer)), same_layer[:10])


def test_units_of_an_image_are_those_with_it_among_their_top_examples(store_and_maxima):
    store, values = store_and_maxima
    for image in (0, 11, 39):
        expected = []
        for layer, maxima in zip(store.layers, values, strict=True):
            for unit, row in enumerate(maxima):
                best = sorted((p for p in range(40) if p != 4), key=lambda p: (-row[p], p))[:5]
                if image in best:
                    expected.append((best.index(image), layer, unit, row[image]))
        expected.sort(key=lambda entry: entry[0])
        ranks = store.image(image).units(None)
        assert [(s.rank, s.layer, s.unit, s.value) for s in ranks] == expected
        assert store.image(image).units(3) == ranks[:3]
        example = store.unit(ranks[0].layer, ranks[0].unit).examples()[ranks[0].rank]
        assert (example.image, example.box) == (image, ranks[0].box)


def test_image_record_holds_predictions_label_and_loss(store_and_maxima):
    store, _ = store_and_maxima
    record = store.image(6)
    rows = stores.image_rows(40, labels=np.arange(40) % 4 - 1)
    assert [p.target for p in record.predictions] == rows.classes[6].tolist()
    assert record.predictions[0].name == f"class {rows.classes[6][0]}"
    assert record.predictions[0].probability == pytest.approx(rows.probabilities[6][0])
    assert (record.label, record.failed, record.name) == ("label 1", None, "folder/00006.png")
    assert record.loss == pytest.approx(-np.log(rows.probabilities[6][0]))
    assert (store.image(8).label, store.image(8).loss) == (None, None)
    assert (store.image(4).failed, store.image(4).predictions) == ("is damaged", [])
    assert store.image(4).units() == []


# --- all units -------------------------------------------------------------------------------------------------------


def test_dead_units(tmp_path):
    def set_constant(values):
        values[0][[3, 65]] = 0
        values[1][2] = 2.5

    stores.write_small_store(tmp_path, change=set_constant)
    dead = convscope.open_store(tmp_path).dead()
    rows = [(r["layer"], r["unit"], r["maximum"]) for r in dead.table.to_pylist()]
    assert rows == [("layer 0", 3, 0), ("layer 0", 65, 0), ("layer 1", 2, 2.5)]
    assert dead.fractions == {"layer 0": 2 / 70, "layer 1": 1 / 5}


def test_duplicates_are_all_pairs_above_the_threshold(tmp_path, monkeypatch):
    monkeypatch.setattr(queries, "BLOCK_SIZE", 16)

    def duplicate(values):
        values[0][[40, 69]] = values[0][2] * 3
        values[1][1] = values[1][4]
        values[0][[8, 9]] = 1.0  # constant: no duplicate

    values = stores.write_small_store(tmp_path, change=duplicate)
    store = convscope.open_store(tmp_path)
    exact = store.duplicates(1.0)
    triples = [("layer 0", 2, 40, 1.0), ("layer 0", 2, 69, 1.0), ("layer 0", 40, 69, 1.0), ("layer 1", 1, 4, 1.0)]
    assert list(exact) == triples
    assert exact.counts == {"layer 0": 3, "layer 1": 2}
    correlated = {tuple(pair[:3]) for pair in store.duplicates(0.4)}
    expected = set()
    for layer, maxima in zip(store.layers, values, strict=True):
        sample = maxima[:, ::2].astype(float)
        for i in range(len(sample)):
            for j in range(i + 1, len(sample)):
                if np.ptp(sample[i]) and np.ptp(sample[j]) and np.corrcoef(sample[i], sample[j])[0, 1] >= 0.4:
                    expected.add((layer, i, j))
    assert correlated == expected
    assert len(correlated) > 10
    rs = [pair.r for pair in store.duplicates(0.4)]
    assert rs == sorted(rs, reverse=True)


def test_compare_finds_the_units_that_changed(tmp_path):
    def retrain(values):
        values[0][12] = values[0][12].max() - values[0][12]  # reversed
        values[0][30] = 0  # died
        values[1][3] = values[1][3] * 2 + 1  # the same but for its scale

    before = stores.write_small_store(tmp_path / "a", units=(70, 5))
    after = stores.write_small_store(tmp_path / "b", units=(70, 5), change=retrain, k=9)
    a, b = (convscope.open_store(tmp_path / name) for name in "ab")
    changes = a.compare(b)
    assert len(changes) == 75
    reversed_unit, dead = changes.largest(2)
    assert (reversed_unit.layer, reversed_unit.unit, reversed_unit.r) == ("layer 0", 12, -1)
    best = [set(np.argsort(-maxima[0][12], kind="stable")[:5].tolist()) for maxima in (before, after)]
    assert reversed_unit.overlap == pytest.approx(len(best[0] & best[1]) / 5)
    assert (dead.unit, np.isnan(dead.r)) == (30, True)
    assert changes[73].r == 1
    assert changes[73].overlap == 1
    others = [c for c in changes.largest(100) if (c.layer, c.unit) not in {("layer 0", 12), ("layer 0", 30)}]
    assert len(others) == 73
    assert all(c.r == 1 and c.overlap == 1 for c in others)


def test_overlap_ignores_empty_slots():
    a = np.array([[1, 2, 3], [5, -1, -1], [-1, -1, -1], [1, 2, -1]])
    b = np.array([[3, 9, 1], [5, -1, -1], [-1, -1, -1], [2, -1, -1]])
    np.testing.assert_allclose(queries.overlap(a, b), [2 / 3, 1, np.nan, 1 / 2], rtol=1e-6)


DIFFERENCES = r"the data \(folder, 40 images; elsewhere, 42\); the layers \(layer 1\); the sample \(20 and 21 images\)"


def test_compare_of_different_scans_names_the_differences(tmp_path):
    stores.write_small_store(tmp_path / "a")
    stores.write_small_store(tmp_path / "b", units=(70, 6), images=42)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["data"] |= {"fingerprint": "0" * 64, "name": "elsewhere"}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    a, b = (convscope.open_store(tmp_path / name) for name in "ab")
    with pytest.raises(ConvscopeError, match=DIFFERENCES):
        a.compare(b)


# --- bytes read ------------------------------------------------------------------------------------------------------


class CountingFile(io.RawIOBase):
    """A file that counts the bytes read from it."""

    def __init__(self, file, bytes_read: dict[str, int], name: str) -> None:
        self.file, self.bytes_read, self.name = file, bytes_read, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *args):
        return self.file.seek(*args)

    def tell(self):
        return self.file.tell()

    def read(self, count=-1):
        data = self.file.read(count)
        self.bytes_read[self.name] = self.bytes_read.get(self.name, 0) + len(data)
        return data


@pytest.fixture
def bytes_read(monkeypatch):
    """Count the bytes read of each file of any store."""
    bytes_read: dict[str, int] = {}
    open_file = Folder.open

    @contextmanager
    def counting(self, name):
        with open_file(self, name) as file:
            yield CountingFile(file, bytes_read, name)

    monkeypatch.setattr(Folder, "open", counting)
    return bytes_read


def test_large_store_is_read_by_row_groups(tmp_path, bytes_read):
    stores.write_large_store(tmp_path, units=2000, images=200_000, k=50)
    sizes = {name: len(content) for name, content in stores.read_files(tmp_path).items()}
    assert sizes["topk.parquet"] > 1_000_000
    assert sizes["images.parquet"] > 4_000_000
    store = convscope.open_store(tmp_path)
    assert bytes_read == {"manifest.json": sizes["manifest.json"]}
    store.unit("layer 0", 1).examples()  # the footers are read now
    bytes_read.clear()
    start = time.perf_counter()
    for unit in range(100, 2000, 200):
        assert len(store.unit("layer 0", unit).examples(9)) == 9
    seconds_per_unit = (time.perf_counter() - start) / 10
    assert set(bytes_read) == {"topk.parquet", "images.parquet"}
    assert bytes_read["topk.parquet"] / 10 < sizes["topk.parquet"] / 20
    assert bytes_read["images.parquet"] / 10 < sizes["images.parquet"] / 4
    assert seconds_per_unit < 0.5
    bytes_read.clear()
    assert store.image(123_456).predictions
    assert bytes_read["images.parquet"] < sizes["images.parquet"] / 20


def test_columns_of_units_are_read_once(store_and_maxima, bytes_read):
    store = convscope.open_store(store_and_maxima[0].address)
    store.units(["unit", "maximum"])
    before = dict(bytes_read)
    assert store.units(["maximum", "unit"]).column_names == ["maximum", "unit"]
    assert bytes_read == before
    assert store.units().num_columns == 16


def test_store_at_an_address_equals_store_in_a_folder(store_and_maxima):
    local, _ = store_and_maxima
    memory = fsspec.filesystem("memory")
    for name, content in stores.read_files(Path(local.address)).items():
        memory.pipe_file(f"/far/store/{name}", content)
    remote = convscope.open_store("memory://far/store")
    local_unit, remote_unit = (store.unit("layer 0", 65) for store in (local, remote))
    assert local_unit.statistics == remote_unit.statistics
    assert local_unit.similar() == remote_unit.similar()
    assert local_unit.classes() == remote_unit.classes()
    assert [e.box for e in local_unit.examples()] == [e.box for e in remote_unit.examples()]
    assert local.image(9).units(None) == remote.image(9).units(None)
    assert {c.r for c in local.compare(remote)} == {1.0}


# --- refused arguments, damaged files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (lambda s: s.unit("layer O", 0), "'layer O' is not in this store; nearest: layer"),
        (lambda s: s.unit("layer 1", 5), "unit 5 is out of range: layer 1 has 5 units, 0 to 4"),
        (lambda s: s.unit("layer 1", -1), "unit -1 is out of range"),
        (lambda s: s.image(40), "image 40 is out of range: there are 40, 0 to 39"),
        (lambda s: s.image(-1), "image -1 is out of range"),
        (lambda s: s.unit("layer 1", 0).examples(3, "best"), "kind is 'best'; expected top, bottom, decile"),
        (lambda s: s.unit("layer 1", 0).examples(0), "n is 0; expected a whole number, 1 or more"),
        (lambda s: s.units(["maximun"]), "column 'maximun' is not in units.parquet; nearest: maximum"),
        (lambda s: s.duplicates(7), "threshold is 7; expected a correlation"),
    ],
)
def test_unknown_names_and_values_are_refused(store_and_maxima, query, message):
    with pytest.raises(ConvscopeError, match=message):
        query(store_and_maxima[0])


def test_folders_without_a_store_are_refused(tmp_path):
    with pytest.raises(ConvscopeError, match=r"has no manifest\.json: the scan is not finished"):
        convscope.open_store(tmp_path)
    with pytest.raises(ConvscopeError, match="'nowhere://x' cannot be opened"):
        convscope.open_store("nowhere://x")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConvscopeError, match="is not JSON"):
        convscope.open_store(tmp_path)
    for content, message in [
        ("[]", "is not a store: its manifest is of kind None, expected 'scan'"),
        ('{"kind": "patterns"}', "is not a store: its manifest is of kind 'patterns'"),
        ('{"kind": "scan", "format": 99}', "has store format 99, expected 2"),
        ('{"kind": "scan", "format": 2}', "is not a readable store: manifest.json lacks 'layers'"),
    ]:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ConvscopeError, match=message):
            convscope.open_store(tmp_path)


def test_older_store_is_refused_with_the_command_that_makes_it_anew(tmp_path):
    (tmp_path / "manifest.json").write_text('{"kind": "scan", "format": 1}')
    message = r"has store format 1, expected 2; rerun `convscope scan MODEL DATA -o OUT` with a new folder$"
    with pytest.raises(ConvscopeError, match=message) as error:
        convscope.open_store(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("topk.parquet", lambda s: s.unit("layer 0", 3).examples()),
        ("units.parquet", lambda s: s.unit("layer 0", 3).statistics),
        ("images.parquet", lambda s: s.image(3).name),
        ("sample.npy", lambda s: s.unit("layer 0", 3).similar()),
        ("sample_images.npy", lambda s: s.sample_images),
        ("thumbnails/00000.webp", lambda s: s.image(3).thumbnail()),
    ],
)
def test_error_names_the_damaged_file(tmp_path, name, query):
    stores.write_small_store(tmp_path)
    stores.write_thumbnails(tmp_path, np.zeros((40, 96, 96, 3), np.uint8))
    complete = (tmp_path / name).read_bytes()
    for content in (complete[: len(complete) // 2], b"", b"\x00" * 200):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConvscopeError, match=name):
            query(convscope.open_store(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(ConvscopeError, match=f"has no {name}"):
        query(convscope.open_store(tmp_path))


def test_pickles_are_not_loaded(tmp_path):
    stores.write_small_store(tmp_path)
    for name, query in (
        ("sample.npy", lambda s: s.samples("layer 0")),
        ("sample_images.npy", lambda s: s.sample_images),
    ):
        np.save(tmp_path / name, np.array([[print]], object), allow_pickle=True)
        with pytest.raises(ConvscopeError, match=f"{name} in"):
            query(convscope.open_store(tmp_path))


# --- units by name ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def animal_store(tmp_path_factory):
    """A scan of two images by a small network with three classes, and its model."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    classes = ["giant panda", "lesser panda", "sandal"]
    model = convscope.load(net, preprocessing={"size": 8}, classes=classes)
    images = [np.full((8, 8, 3), value, np.uint8) for value in (0, 200)]
    return convscope.scan(model, images, tmp_path_factory.mktemp("animals") / "store", "0", k=1, workers=0), model


def test_unit_of_the_logits_by_class_name(animal_store):
    store, model = animal_store
    record = store.unit("logits", "Lesser_Panda")
    assert record.unit == 1
    assert record.statistics == store.unit("logits", 1).statistics
    assert store.unit(model.layers["0"], 3).statistics == store.unit("0", 3).statistics


def test_units_of_the_logits_are_printed_by_class_name(animal_store):
    store, _ = animal_store
    duplicates, changes = store.duplicates(-1), store.compare(store)
    assert any(pair.layer == "logits" for pair in duplicates)
    for result in (duplicates, changes):
        lines = [line for line in str(result).splitlines() if line.startswith("logits")]
        assert lines
        assert all("panda" in line or "sandal" in line for line in lines)
    record = str(store.unit("logits", 1))
    assert record.startswith("Unit record: logits, lesser panda, in ")
    names = [name for name in store.classes if name in record.partition("coactive")[2]]
    assert len(names) == len(store.unit("logits", 1).coactive(3)) > 0
    assert "unit " not in record.partition("\n")[2]


@pytest.mark.parametrize(
    ("layer", "unit", "message"),
    [
        ("logits", "panda", "class 'panda' is not in this model; nearest: giant panda, lesser panda"),
        ("0", "panda", "unit 'panda' of '0' has no name; give its number"),
        ("logits", 3, "unit 3 is out of range: logits has 3 units, 0 to 2"),
        (torch.nn.ReLU(), 3, "layer is a ReLU; a store has layers by name, as in store.layers"),
    ],
)
def test_unit_by_a_wrong_name(animal_store, layer, unit, message):
    with pytest.raises(ConvscopeError, match=f"^{message}$"):
        animal_store[0].unit(layer, unit)


def test_values_of_a_regression(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    paths = [str(tmp_path / "images" / f"{i}.png") for i in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(path)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))
    net[-1].bias.data.fill_(40)
    model = convscope.load(net, preprocessing={"size": 8}, task="regression")
    store = convscope.scan(model, tmp_path / "images", tmp_path / "store", k=1)
    expected = convscope.predict(model, paths).probabilities
    for i in range(3):
        (row,) = store.image(i).rows()
        assert row == {"class": "output 0", "value": pytest.approx(expected[i, 0], rel=1e-5)}
    (axes,) = [axes for axes in store.image(0).figure().axes if axes.get_title(loc="left") == "predictions"]
    assert [text.get_text().strip() for text in axes.texts] == [f"{expected[0, 0]:.4g}"]
