"""The tables of a store, against slow re-derivations, and their bytes."""

from __future__ import annotations

import errno
import math
import re
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq
import pytest

import tests.oracles.stores as stores
from convscope.errors import ConvscopeError
from convscope.store import queries
from convscope.store.io import Folder
from convscope.store.schema import write_store

DOCS = Path(__file__).parents[2] / "docs" / "store.md"


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """By the textbook's formula, in plain Python."""
    x, y = [float(v) for v in a], [float(v) for v in b]
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    cov = math.fsum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return cov / math.sqrt(math.fsum((p - mx) ** 2 for p in x) * math.fsum((q - my) ** 2 for q in y))


def one_layer(folder, values, positions=None, sample=None, count=None, **geometry):
    """A store with one layer of these maxima; its units and its places as lists of rows."""
    positions = np.zeros(values.shape, np.int32) if positions is None else positions
    sample = np.arange(values.shape[1]) if sample is None else sample
    write_store(
        folder,
        [stores.summary("only", values, positions, sample, **geometry)],
        [stores.picture_rows(values.shape[1])],
        sample_images=sample,
        class_counts=None,
        input_size=stores.SIZE,
        shards=[],
        manifest=stores.manifest(values.shape[1] if count is None else count),
    )
    return [pq.read_table(Path(folder) / f"{name}.parquet").to_pylist() for name in ("units", "topk")]


# --- places ----------------------------------------------------------------------------------------------------------


def test_best_worst_and_tenths_are_those_of_a_plain_sort(tmp_path):
    values, positions = stores.draw(70, 33, seed=3)
    sample = np.arange(1, 33, 2)
    _, rows = one_layer(tmp_path, values, positions, sample)
    expected = []
    for unit in range(70):
        pairs = [(float(values[unit, p]), p) for p in range(33)]
        worst = sorted(pairs)[:5]
        best = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:5]
        seen = sorted((value, p) for value, p in pairs if p in sample)
        tenths = [seen[(2 * t + 1) * len(seen) // 20] for t in range(10)]
        for kind, found in (("bottom", worst), ("decile", tenths), ("top", best)):
            expected += [(unit, kind, rank, value, p) for rank, (value, p) in enumerate(found)]
    assert [(r["unit"], r["kind"], r["rank"], r["value"], r["image"]) for r in rows] == expected
    for r in rows:
        place = positions[r["unit"], r["image"]]
        assert (r["row"], r["column"]) == (place // 6, place % 6)
        top, left = -3 + 10 * r["row"], -3 + 13 * r["column"]
        box = (max(top, 0), max(left, 0), min(top + 15, 64), min(left + 15, 80))
        assert (r["top"], r["left"], r["bottom"], r["right"]) == box


@pytest.mark.parametrize(
    "geometry",
    [
        {"has_global_context": True},
        {"receptive_field": None, "stride": None, "origin": None},
        {"shape": (3,), "receptive_field": None, "stride": None, "origin": None, "has_global_context": True},
    ],
)
def test_a_layer_that_sees_everything_shows_the_whole_input(tmp_path, geometry):
    _, rows = one_layer(tmp_path, stores.draw(3, 8)[0], **geometry)
    assert {(r["top"], r["left"], r["bottom"], r["right"]) for r in rows} == {(0, 0, 64, 80)}
    assert {(r["row"], r["column"]) for r in rows} == {(0, 0)}


def test_fractions_of_pixels_are_shown_whole_and_padding_shows_the_rim():
    at = np.array([0, 1, 9])
    boxes = queries.patch_boxes(at, at, (2.0, 2.0), (2.5, 2.5), (-4.5, 0.25), (10, 12))
    assert boxes.tolist() == [[0, 0, 1, 3], [0, 2, 1, 5], [9, 11, 10, 12]]


def test_few_pictures_leave_no_empty_rows_and_failed_ones_are_nowhere(tmp_path):
    values, positions = stores.draw(2, 4)
    values[:, 2] = np.nan
    _, rows = one_layer(tmp_path, values, positions)
    assert [r["kind"] for r in rows if r["unit"] == 0] == ["bottom"] * 3 + ["decile"] * 10 + ["top"] * 3
    assert {r["image"] for r in rows} == {0, 1, 3}


def test_minus_zero_is_zero(tmp_path):
    units, rows = one_layer(tmp_path, np.full((1, 4), -0.0, np.float32))
    assert all(math.copysign(1, r["value"]) == 1 for r in rows)
    assert math.copysign(1, units[0]["minimum"]) == math.copysign(1, units[0]["maximum"]) == 1


# --- units -----------------------------------------------------------------------------------------------------------


def test_deciles_are_those_of_pandas_and_statistics_are_handed_on(tmp_path):
    values, positions = stores.draw(5, 40)
    values[:, [3, 8]] = np.nan
    sample = np.arange(0, 40, 3)
    units, _ = one_layer(tmp_path, values, positions, sample)
    for row, one in zip(units, values, strict=True):
        seen = one[~np.isnan(one)].astype(float)
        expected = pandas.Series(one[sample].astype(float)).dropna().quantile(np.linspace(0, 1, 11))
        np.testing.assert_allclose(row["deciles"], expected, rtol=1e-6)
        assert (row["maximum"], row["minimum"], row["fires"]) == (seen.max(), seen.min(), (seen > 0).mean())
        assert row["variance"] == pytest.approx(seen.var())
        assert sum(row["histogram"]) == 38
        assert row["selectivity"] is row["classes"] is row["class_means"] is None


def test_units_that_fire_together_are_those_of_the_formula_ties_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(queries, "BLOCK_SIZE", 7)  # so that several blocks, the last one short, are joined
    values, positions = stores.draw(30, 25, seed=5)
    values[9] = 1.5 * values[4] + 2  # r is 1 with both of these
    values[21] = values[4]
    values[13] = 0.3  # constant, and its mean is not exactly 0.3
    units, _ = one_layer(tmp_path, values, positions)
    assert units[13]["coactive"] == units[13]["coactivation"] == []
    assert units[4]["coactive"][:2] == [9, 21]
    for i, row in enumerate(units):
        others = [j for j in range(30) if j not in (i, 13)] if i != 13 else []
        r = {j: pearson(values[i], values[j]) for j in others}
        best = sorted(others, key=lambda j: (-np.float32(r[j]), j))[:10]
        assert row["coactive"] == best
        np.testing.assert_allclose(row["coactivation"], [r[j] for j in best], atol=1e-6)


def test_dead_units_are_never_above_zero_or_constant(tmp_path):
    values = np.array([[0, 0, 0], [-2, -1, 0], [0, 1, 0], [3, 3, 3]], np.float32)
    units, _ = one_layer(tmp_path, values)
    assert [row["dead"] for row in units] == [True, True, False, True]


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([4, 0, 0], 1.0),  # one class alone
        ([2, 2, 2], 0.0),
        ([3, 1, 1], 0.5),
        ([6, 1, 3], 0.5),
        ([3, math.nan, 1], 0.5),  # a class without pictures is no class
        ([0, 0, 0], None),  # says nothing: 0 / 0
        ([3, -1, 1], None),  # both signs: (3 - 0) / (3 + 0) would call it wholly selective
        ([5], None),
        ([5, math.nan], None),
    ],
)
def test_selectivity(means, expected):
    assert queries.selectivity(np.array(means, np.float32)) == expected


def test_the_most_telling_classes_come_first(tmp_path):
    values = stores.small(tmp_path, pictures=60, classes=13, failed=[7])
    means = np.load(tmp_path / "class_means.npy")
    assert means.shape == (75, 13)
    assert np.load(tmp_path / "class_counts.npy").tolist() == [5] * 3 + [4] * 3 + [3] + [4] * 6  # 7 has label 6
    units = pq.read_table(tmp_path / "units.parquet").to_pylist()
    labels = np.arange(60) % 14 - 1
    for row, one in zip(units, np.concatenate(values), strict=True):
        direct = [np.nanmean(one[labels == c]) / 2 for c in range(13)]
        order = sorted(range(13), key=lambda c: (-np.float32(direct[c]), c))
        assert row["classes"] == order[:10]
        np.testing.assert_allclose(row["class_means"], [direct[c] for c in order[:10]], rtol=1e-6)
        rest = np.mean([direct[c] for c in order[1:]])
        expected = (direct[order[0]] - rest) / (direct[order[0]] + rest)
        assert row["selectivity"] == pytest.approx(expected, rel=1e-5)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_unit_is_in_one_row_group_and_the_statistics_tell_which(tmp_path):
    stores.small(tmp_path, units=(130, 3))
    for name in ("units", "topk"):
        meta = pq.read_metadata(tmp_path / f"{name}.parquet")
        told = []
        for g in range(meta.num_row_groups):
            layer, unit = (meta.row_group(g).column(i).statistics for i in (0, 1))
            assert layer.min == layer.max
            told.append((layer.min, unit.min, unit.max))
        assert told == [("layer 0", 0, 63), ("layer 0", 64, 127), ("layer 0", 128, 129), ("layer 1", 0, 2)]
    assert {meta.row_group(0).column(i).compression for i in range(meta.num_columns)} == {"ZSTD"}


def test_samples_are_kept_as_they_are_in_the_order_of_the_units(tmp_path):
    values = stores.small(tmp_path, failed=[4])
    sample = np.load(tmp_path / "sample.npy", mmap_mode="r")
    pictures = np.load(tmp_path / "sample_images.npy")
    np.testing.assert_array_equal(sample, np.concatenate(values)[:, pictures])
    assert sample.dtype == np.float32
    assert np.isnan(sample[:, 2]).all()


def test_what_is_not_known_of_a_picture_is_null(tmp_path):
    stores.small(tmp_path, classes=2, failed=[4])
    rows = pq.read_table(tmp_path / "images.parquet").to_pylist()
    assert [r["image"] for r in rows] == list(range(40))
    bad, fine = rows[4], rows[5]
    assert (bad["failed"], bad["name"], bad["label"]) == ("is damaged", "folder/00004.png", 0)
    assert all(bad[name] is None for name in ("height", "width", "box_top", "classes", "probabilities", "loss"))
    assert (fine["failed"], fine["height"], fine["width"], fine["box_right"]) == (None, 100, 120, 120)
    assert len(fine["classes"]) == len(fine["probabilities"]) == 5
    assert (rows[3]["label"], rows[3]["loss"]) == (None, None)  # its label is -1
    assert fine["loss"] == pytest.approx(-math.log(fine["probabilities"][0]), rel=1e-5)


def test_the_same_input_gives_the_same_bytes_however_it_is_parted_and_wherever_it_goes(tmp_path):
    given = {"pictures": 5000, "units": (3,), "classes": 3}
    stores.small(tmp_path / "a", **given)
    stores.small(tmp_path / "b", **given, parts=[1, 4095, 1, 903])
    stores.small("memory://bytes/c", **given, parts=[4999, 1])
    ours = stores.files(tmp_path / "a")
    assert ours == stores.files(tmp_path / "b")
    memory = fsspec.filesystem("memory")
    assert ours == {path.removeprefix("/bytes/c/"): memory.cat_file(path) for path in memory.find("/bytes/c")}
    meta = pq.read_metadata(tmp_path / "a" / "images.parquet")
    assert [meta.row_group(g).num_rows for g in range(meta.num_row_groups)] == [4096, 904]


def test_the_manifest_tells_of_the_layers(tmp_path):
    stores.small(tmp_path)
    told = Folder(tmp_path).read_json("manifest.json")
    assert told["input_size"] == [64, 80]
    assert [layer["units"] for layer in told["layers"]] == [70, 5]
    assert told["layers"][0]["receptive_field"] == [15, 15]
    assert told["layers"][0]["shape"] == [70, 6, 6]


def test_an_error_leaves_no_manifest_and_no_half_written_file(tmp_path):
    stores.small(tmp_path)
    assert (tmp_path / "manifest.json").exists()

    def breaks():
        yield stores.summary("first", *stores.draw(3, 40), np.arange(4))
        raise RuntimeError("the second layer is lost")

    with pytest.raises(RuntimeError, match="the second layer"):
        write_store(
            tmp_path,
            breaks(),
            [],
            sample_images=np.arange(4),
            class_counts=None,
            input_size=(8, 8),
            shards=[],
            manifest=stores.manifest(0),
        )
    assert not (tmp_path / "manifest.json").exists()
    assert not [name for name in stores.files(tmp_path) if name.startswith(".")]


def test_other_pictures_than_the_manifest_tells_of_are_refused(tmp_path):
    with pytest.raises(ConvscopeError, match="8 images were given; expected 9"):
        one_layer(tmp_path, stores.draw(3, 8)[0], count=9)
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    def full(self, path, mode="rb", **_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "open", full)
    with pytest.raises(ConvscopeError, match=r"cannot write units\.parquet into .*: No space left on device"):
        stores.small(tmp_path)


# --- other tools -----------------------------------------------------------------------------------------------------


def test_the_lines_of_the_docs_read_the_same_unit(tmp_path, monkeypatch):
    """The lines in docs/store.md, as they are there, in a folder with a store."""
    stores.small(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^(\w+) = (.*store/topk\.parquet.*)$", DOCS.read_text(), re.M)
    assert len(lines) == 3
    tools = {"pandas": pandas, "polars": polars, "duckdb": duckdb}
    found = {name: eval(line, tools) for name, line in lines}
    frames = [
        found["with_pandas"],
        pandas.DataFrame(found["with_polars"].to_dicts()),
        found["with_duckdb"].df(),
    ]
    expected = pq.read_table("store/topk.parquet").to_pandas()
    expected = expected[(expected.layer == "layer 0") & (expected.unit == 3)]
    assert len(expected) == 20
    for frame in frames:
        for column in expected:
            assert frame[column].tolist() == expected[column].tolist()


def test_the_docs_describe_every_column_in_its_order(tmp_path):
    stores.small(tmp_path, classes=2)
    text = DOCS.read_text()
    for name in ("units", "topk", "images", "shards"):
        section = text.split(f"## {name}.parquet")[1].split("\n## ")[0]
        told = [column for row in re.findall(r"^\| (`.*?) \|", section, re.M) for column in re.findall(r"`(\w+)`", row)]
        assert told == pq.read_schema(tmp_path / f"{name}.parquet").names
