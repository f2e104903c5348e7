"""What a store answers, against slow re-derivations; what it reads for that; and what it refuses."""

from __future__ import annotations

import io
import json
import time
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest

import convscope
import tests.oracles.stores as stores
from convscope.errors import ConvscopeError
from convscope.store import queries
from convscope.store.io import Folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A store with labels and a failed picture, and the maxima it was made from."""
    folder = tmp_path_factory.mktemp("scan") / "store"
    values = stores.small(folder, classes=3, failed=[4], seed=7)
    return convscope.open_store(folder), values


def same(found, expected):
    """Units and r: in this order, r to rounding."""
    assert [(one.layer, one.unit) for one in found] == [one[:2] for one in expected]
    np.testing.assert_allclose([one.r for one in found], [one[2] for one in expected], atol=1e-6)


# --- units -----------------------------------------------------------------------------------------------------------


def test_a_store_tells_what_it_holds(shared):
    store, _ = shared
    assert (store.layers, store.num_images, store.input_size) == (["layer 0", "layer 1"], 40, (64, 80))
    assert (store.classes[6], store.labels) == ("class 6", ["label 0", "label 1", "label 2"])
    assert "2 layers, 75 units, 40 images" in repr(store)


def test_examples_are_the_best_pictures_in_order(shared):
    store, (first, _) = shared
    for unit in (0, 63, 64, 69):  # on both sides of where the row groups part
        best = sorted((p for p in range(40) if p != 4), key=lambda p: (-first[unit, p], p))[:5]
        found = store.unit("layer 0", unit).examples()
        assert [(e.image, e.value, e.name) for e in found] == [(p, first[unit, p], f"folder/{p:05d}.png") for p in best]
        worst = sorted((p for p in range(40) if p != 4), key=lambda p: (first[unit, p], p))[:3]
        assert [e.image for e in store.unit("layer 0", unit).examples(3, "bottom")] == worst
        assert len(store.unit("layer 0", unit).examples(None, "decile")) == 10


def test_a_box_in_the_original_is_the_box_stretched(shared):
    store, _ = shared
    for e in store.unit("layer 1", 3).examples():
        expected = [e.box[0] * 100 / 64, e.box[1] * 120 / 80, e.box[2] * 100 / 64, e.box[3] * 120 / 80]
        np.testing.assert_allclose(e.box_in_original, expected, rtol=1e-12)


def test_statistics_and_classes_of_a_unit(shared):
    store, (first, second) = shared
    page = store.unit("layer 1", 2)
    assert page.row == 72
    assert page.statistics["maximum"] == np.nanmax(second[2])
    labels = np.arange(40) % 4 - 1
    direct = {c: np.nanmean(second[2][labels == c]) / 2 for c in range(3)}
    order = sorted(direct, key=lambda c: -direct[c])
    found = page.classes(2)
    assert [(c.name, c.label, c.images) for c in found] == [(f"label {c}", c, 10 if c != 3 else 9) for c in order[:2]]
    assert [c.mean for c in found] == pytest.approx([direct[c] for c in order[:2]], rel=1e-6)
    column = store.units(["maximum"])["maximum"].to_numpy()
    np.testing.assert_array_equal(column, np.nanmax(np.concatenate([first, second]), 1))


def test_similar_units_are_those_of_the_formula_over_all_layers(shared, monkeypatch):
    store, values = shared
    monkeypatch.setattr(queries, "BLOCK_SIZE", 16)
    every = np.concatenate(values)[:, store.sample_images]
    r = np.corrcoef(every[:, ~np.isnan(every[0])].astype(float))
    for layer, unit, row in (("layer 0", 5, 5), ("layer 1", 4, 74)):
        order = [i for i in sorted(range(75), key=lambda i: (-np.float32(r[row, i]), i)) if i != row][:12]
        expected = [("layer 0", i, r[row, i]) if i < 70 else ("layer 1", i - 70, r[row, i]) for i in order]
        same(store.unit(layer, unit).similar(12), expected)
        inside = [one for one in expected if one[0] == layer]
        same(store.unit(layer, unit).coactive(len(inside))[: len(inside)], inside[:10])


def test_the_units_of_a_picture_are_all_that_have_it_among_their_best(shared):
    store, values = shared
    for picture in (0, 11, 39):
        expected = []
        for layer, maxima in zip(store.layers, values, strict=True):
            for unit, one in enumerate(maxima):
                best = sorted((p for p in range(40) if p != 4), key=lambda p: (-one[p], p))[:5]
                if picture in best:
                    expected.append((best.index(picture), layer, unit, one[picture]))
        expected.sort(key=lambda row: row[0])
        found = store.image(picture).units(None)
        assert [(s.rank, s.layer, s.unit, s.value) for s in found] == expected
        assert store.image(picture).units(3) == found[:3]
        example = store.unit(found[0].layer, found[0].unit).examples()[found[0].rank]
        assert (example.image, example.box) == (picture, found[0].box)


def test_a_picture_tells_what_is_known_of_it(shared):
    store, _ = shared
    page = store.image(6)
    rows = stores.picture_rows(40, labels=np.arange(40) % 4 - 1)
    assert [p.target for p in page.predictions] == rows.classes[6].tolist()
    assert page.predictions[0].name == f"class {rows.classes[6][0]}"
    assert page.predictions[0].probability == pytest.approx(rows.probabilities[6][0])
    assert (page.label, page.failed, page.name) == ("label 1", None, "folder/00006.png")
    assert page.loss == pytest.approx(-np.log(rows.probabilities[6][0]))
    assert (store.image(8).label, store.image(8).loss) == (None, None)
    assert (store.image(4).failed, store.image(4).predictions) == ("is damaged", [])
    assert store.image(4).units() == []


# --- all units -------------------------------------------------------------------------------------------------------


def test_dead_units(tmp_path):
    def kill(values):
        values[0][[3, 65]] = 0
        values[1][2] = 2.5

    stores.small(tmp_path, change=kill)
    found = convscope.open_store(tmp_path).dead()
    rows = [(r["layer"], r["unit"], r["maximum"]) for r in found.table.to_pylist()]
    assert rows == [("layer 0", 3, 0), ("layer 0", 65, 0), ("layer 1", 2, 2.5)]
    assert found.fractions == {"layer 0": 2 / 70, "layer 1": 1 / 5}


def test_duplicates_are_all_pairs_above_the_threshold(tmp_path, monkeypatch):
    monkeypatch.setattr(queries, "BLOCK_SIZE", 16)

    def double(values):
        values[0][[40, 69]] = values[0][2] * 3
        values[1][1] = values[1][4]
        values[0][[8, 9]] = 1.0  # constant: no double of anything

    values = stores.small(tmp_path, change=double)
    store = convscope.open_store(tmp_path)
    exact = store.duplicates(1.0)
    triples = [("layer 0", 2, 40, 1.0), ("layer 0", 2, 69, 1.0), ("layer 0", 40, 69, 1.0), ("layer 1", 1, 4, 1.0)]
    assert list(exact) == triples
    assert exact.counts == {"layer 0": 3, "layer 1": 2}
    loose = {tuple(pair[:3]) for pair in store.duplicates(0.4)}
    expected = set()
    for layer, maxima in zip(store.layers, values, strict=True):
        sample = maxima[:, ::2].astype(float)
        for i in range(len(sample)):
            for j in range(i + 1, len(sample)):
                if np.ptp(sample[i]) and np.ptp(sample[j]) and np.corrcoef(sample[i], sample[j])[0, 1] >= 0.4:
                    expected.add((layer, i, j))
    assert loose == expected
    assert len(loose) > 10
    rs = [pair.r for pair in store.duplicates(0.4)]
    assert rs == sorted(rs, reverse=True)


def test_comparing_finds_the_units_that_changed(tmp_path):
    def later(values):
        values[0][12] = values[0][12].max() - values[0][12]  # turned over
        values[0][30] = 0  # died
        values[1][3] = values[1][3] * 2 + 1  # the same but for its scale

    before = stores.small(tmp_path / "a", units=(70, 5))
    after = stores.small(tmp_path / "b", units=(70, 5), change=later, k=9)
    a, b = (convscope.open_store(tmp_path / name) for name in "ab")
    changes = a.compare(b)
    assert len(changes) == 75
    turned, dead = changes.largest(2)
    assert (turned.layer, turned.unit, turned.r) == ("layer 0", 12, -1)
    best = [set(np.argsort(-one[0][12], kind="stable")[:5].tolist()) for one in (before, after)]
    assert turned.overlap == pytest.approx(len(best[0] & best[1]) / 5)
    assert (dead.unit, np.isnan(dead.r)) == (30, True)
    assert changes[73].r == 1
    assert changes[73].overlap == 1
    others = [c for c in changes.largest(100) if (c.layer, c.unit) not in {("layer 0", 12), ("layer 0", 30)}]
    assert len(others) == 73
    assert all(c.r == 1 and c.overlap == 1 for c in others)


def test_shared_counts_pictures_and_not_empty_slots():
    a = np.array([[1, 2, 3], [5, -1, -1], [-1, -1, -1], [1, 2, -1]])
    b = np.array([[3, 9, 1], [5, -1, -1], [-1, -1, -1], [2, -1, -1]])
    np.testing.assert_allclose(queries.overlap(a, b), [2 / 3, 1, np.nan, 1 / 2], rtol=1e-6)


DIFFERS = r"the data \(folder, 40 images; elsewhere, 42\); the layers \(layer 1\); the sample \(20 and 21 images\)"


def test_stores_that_cannot_be_compared_say_what_differs(tmp_path):
    stores.small(tmp_path / "a")
    stores.small(tmp_path / "b", units=(70, 6), pictures=42)
    told = json.loads((tmp_path / "b" / "manifest.json").read_text())
    told["data"] |= {"fingerprint": "0" * 64, "name": "elsewhere"}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(told))
    a, b = (convscope.open_store(tmp_path / name) for name in "ab")
    with pytest.raises(ConvscopeError, match=DIFFERS):
        a.compare(b)


# --- reading as little as need be ------------------------------------------------------------------------------------


class Counted(io.RawIOBase):
    """A file that counts what is read from it."""

    def __init__(self, file, tally: dict[str, int], name: str) -> None:
        self.file, self.tally, self.name = file, tally, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *where):
        return self.file.seek(*where)

    def tell(self):
        return self.file.tell()

    def read(self, count=-1):
        data = self.file.read(count)
        self.tally[self.name] = self.tally.get(self.name, 0) + len(data)
        return data


@pytest.fixture
def tally(monkeypatch):
    """Bytes read of each file of any store."""
    found: dict[str, int] = {}
    plain = Folder.open

    @contextmanager
    def counting(self, name):
        with plain(self, name) as file:
            yield Counted(file, found, name)

    monkeypatch.setattr(Folder, "open", counting)
    return found


def test_opening_a_large_store_reads_its_manifest_and_a_unit_a_few_row_groups(tmp_path, tally):
    stores.large(tmp_path, units=2000, pictures=200_000, k=50)
    sizes = {name: len(content) for name, content in stores.files(tmp_path).items()}
    assert sizes["topk.parquet"] > 1_000_000
    assert sizes["images.parquet"] > 4_000_000
    store = convscope.open_store(tmp_path)
    assert tally == {"manifest.json": sizes["manifest.json"]}
    store.unit("layer 0", 1).examples()  # the footers are read now
    tally.clear()
    start = time.perf_counter()
    for unit in range(100, 2000, 200):
        assert len(store.unit("layer 0", unit).examples(9)) == 9
    later = (time.perf_counter() - start) / 10
    assert set(tally) == {"topk.parquet", "images.parquet"}
    assert tally["topk.parquet"] / 10 < sizes["topk.parquet"] / 20
    assert tally["images.parquet"] / 10 < sizes["images.parquet"] / 4
    assert later < 0.5
    tally.clear()
    assert store.image(123_456).predictions
    assert tally["images.parquet"] < sizes["images.parquet"] / 20


def test_columns_of_units_are_read_once(shared, tally):
    store = convscope.open_store(shared[0].address)
    store.units(["unit", "maximum"])
    before = dict(tally)
    assert store.units(["maximum", "unit"]).column_names == ["maximum", "unit"]
    assert tally == before
    assert store.units().num_columns == 16


def test_a_store_at_an_address_answers_as_one_in_a_folder(shared):
    here, _ = shared
    memory = fsspec.filesystem("memory")
    for name, content in stores.files(Path(here.address)).items():
        memory.pipe_file(f"/far/store/{name}", content)
    there = convscope.open_store("memory://far/store")
    ours, theirs = (one.unit("layer 0", 65) for one in (here, there))
    assert ours.statistics == theirs.statistics
    assert ours.similar() == theirs.similar()
    assert ours.classes() == theirs.classes()
    assert [e.box for e in ours.examples()] == [e.box for e in theirs.examples()]
    assert here.image(9).units(None) == there.image(9).units(None)
    assert {c.r for c in here.compare(there)} == {1.0}


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
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
def test_what_is_not_there_is_refused(shared, ask, message):
    with pytest.raises(ConvscopeError, match=message):
        ask(shared[0])


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(ConvscopeError, match=r"has no manifest\.json: no finished scan"):
        convscope.open_store(tmp_path)
    with pytest.raises(ConvscopeError, match="'nowhere://x' cannot be opened"):
        convscope.open_store("nowhere://x")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConvscopeError, match="is no JSON"):
        convscope.open_store(tmp_path)
    for told in ("[]", '{"kind": "scan", "format": 1}', '{"kind": "patterns"}', '{"kind": "scan", "format": 99}'):
        (tmp_path / "manifest.json").write_text(told)
        with pytest.raises(ConvscopeError, match="is no store that can be read"):
            convscope.open_store(tmp_path)


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("topk.parquet", lambda s: s.unit("layer 0", 3).examples()),
        ("units.parquet", lambda s: s.unit("layer 0", 3).statistics),
        ("images.parquet", lambda s: s.image(3).name),
        ("sample.npy", lambda s: s.unit("layer 0", 3).similar()),
        ("sample_images.npy", lambda s: s.sample_images),
        ("thumbnails/00000.webp", lambda s: s.image(3).thumbnail()),
    ],
)
def test_damaged_files_are_named(tmp_path, name, ask):
    stores.small(tmp_path)
    stores.thumbnails(tmp_path, np.zeros((40, 96, 96, 3), np.uint8))
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x00" * 200):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConvscopeError, match=name):
            ask(convscope.open_store(tmp_path))
    (tmp_path / name).unlink()
    with pytest.raises(ConvscopeError, match=f"has no {name}"):
        ask(convscope.open_store(tmp_path))


def test_a_pickle_is_not_opened(tmp_path):
    stores.small(tmp_path)
    for name, ask in (
        ("sample.npy", lambda s: s.samples("layer 0")),
        ("sample_images.npy", lambda s: s.sample_images),
    ):
        np.save(tmp_path / name, np.array([[print]], object), allow_pickle=True)
        with pytest.raises(ConvscopeError, match=f"{name} in"):
            ask(convscope.open_store(tmp_path))
