"""The tables of a store against direct computations, and their bytes."""

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
    """Compute Pearson's r by its formula, in plain Python."""
    x, y = [float(v) for v in a], [float(v) for v in b]
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    cov = math.fsum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return cov / math.sqrt(math.fsum((p - mx) ** 2 for p in x) * math.fsum((q - my) ** 2 for q in y))


def write_one_layer(folder, values, positions=None, sample=None, count=None, **geometry):
    """Write a store with one layer of these maxima; return the rows of units.parquet and topk.parquet."""
    positions = np.zeros(values.shape, np.int32) if positions is None else positions
    sample = np.arange(values.shape[1]) if sample is None else sample
    write_store(
        folder,
        [stores.layer_summary("only", values, positions, sample, **geometry)],
        [stores.image_rows(values.shape[1])],
        sample_images=sample,
        class_counts=None,
        input_size=stores.SIZE,
        shards=[],
        manifest=stores.scan_manifest(values.shape[1] if count is None else count),
    )
    return [pq.read_table(Path(folder) / f"{name}.parquet").to_pylist() for name in ("units", "topk")]


# --- examples --------------------------------------------------------------------------------------------------------


def test_examples_are_those_of_a_plain_sort(tmp_path):
    values, positions = stores.random_maxima(70, 33, seed=3)
    sample = np.arange(1, 33, 2)
    _, rows = write_one_layer(tmp_path, values, positions, sample)
    expected = []
    for unit in range(70):
        pairs = [(float(values[unit, p]), p) for p in range(33)]
        worst = sorted(pairs)[:5]
        best = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:5]
        sample_values = sorted((value, p) for value, p in pairs if p in sample)
        medians = [sample_values[(2 * t + 1) * len(sample_values) // 20] for t in range(10)]
        for kind, examples in (("bottom", worst), ("decile", medians), ("top", best)):
            expected += [(unit, kind, rank, value, p) for rank, (value, p) in enumerate(examples)]
    assert [(r["unit"], r["kind"], r["rank"], r["value"], r["image"]) for r in rows] == expected
    for r in rows:
        position = positions[r["unit"], r["image"]]
        assert (r["row"], r["column"]) == (position // 6, position % 6)
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
def test_patches_of_a_layer_with_global_context_are_the_whole_input(tmp_path, geometry):
    _, rows = write_one_layer(tmp_path, stores.random_maxima(3, 8)[0], **geometry)
    assert {(r["top"], r["left"], r["bottom"], r["right"]) for r in rows} == {(0, 0, 64, 80)}
    assert {(r["row"], r["column"]) for r in rows} == {(0, 0)}


def test_patch_boxes_are_whole_pixels_and_padding_maps_to_the_border():
    positions = np.array([0, 1, 9])
    boxes = queries.patch_boxes(positions, positions, (2.0, 2.0), (2.5, 2.5), (-4.5, 0.25), (10, 12))
    assert boxes.tolist() == [[0, 0, 1, 3], [0, 2, 1, 5], [9, 11, 10, 12]]


def test_empty_slots_and_failed_images_are_left_out(tmp_path):
    values, positions = stores.random_maxima(2, 4)
    values[:, 2] = np.nan
    _, rows = write_one_layer(tmp_path, values, positions)
    assert [r["kind"] for r in rows if r["unit"] == 0] == ["bottom"] * 3 + ["decile"] * 10 + ["top"] * 3
    assert {r["image"] for r in rows} == {0, 1, 3}


def test_minus_zero_is_written_as_zero(tmp_path):
    units, rows = write_one_layer(tmp_path, np.full((1, 4), -0.0, np.float32))
    assert all(math.copysign(1, r["value"]) == 1 for r in rows)
    assert math.copysign(1, units[0]["minimum"]) == math.copysign(1, units[0]["maximum"]) == 1


# --- units -----------------------------------------------------------------------------------------------------------


def test_deciles_agree_with_pandas_and_statistics_with_numpy(tmp_path):
    values, positions = stores.random_maxima(5, 40)
    values[:, [3, 8]] = np.nan
    sample = np.arange(0, 40, 3)
    units, _ = write_one_layer(tmp_path, values, positions, sample)
    for row, maxima in zip(units, values, strict=True):
        valid = maxima[~np.isnan(maxima)].astype(float)
        expected = pandas.Series(maxima[sample].astype(float)).dropna().quantile(np.linspace(0, 1, 11))
        np.testing.assert_allclose(row["deciles"], expected, rtol=1e-6)
        assert (row["maximum"], row["minimum"], row["fires"]) == (valid.max(), valid.min(), (valid > 0).mean())
        assert row["variance"] == pytest.approx(valid.var())
        assert sum(row["histogram"]) == 38
        assert row["selectivity"] is row["classes"] is row["class_means"] is None


def test_coactive_units_are_the_most_correlated_ties_by_index(tmp_path, monkeypatch):
    monkeypatch.setattr(queries, "BLOCK_SIZE", 7)  # several blocks, the last one shorter
    values, positions = stores.random_maxima(30, 25, seed=5)
    values[9] = 1.5 * values[4] + 2  # r is 1 with both of these
    values[21] = values[4]
    values[13] = 0.3  # constant, and its mean is not exactly 0.3
    units, _ = write_one_layer(tmp_path, values, positions)
    assert units[13]["coactive"] == units[13]["coactivation"] == []
    assert units[4]["coactive"][:2] == [9, 21]
    for i, row in enumerate(units):
        others = [j for j in range(30) if j not in (i, 13)] if i != 13 else []
        r = {j: pearson(values[i], values[j]) for j in others}
        best = sorted(others, key=lambda j: (-np.float32(r[j]), j))[:10]
        assert row["coactive"] == best
        np.testing.assert_allclose(row["coactivation"], [r[j] for j in best], atol=1e-6)


def test_dead_units_are_never_positive_or_constant(tmp_path):
    values = np.array([[0, 0, 0], [-2, -1, 0], [0, 1, 0], [3, 3, 3]], np.float32)
    units, _ = write_one_layer(tmp_path, values)
    assert [row["dead"] for row in units] == [True, True, False, True]


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([4, 0, 0], 1.0),  # one class alone
        ([2, 2, 2], 0.0),
        ([3, 1, 1], 0.5),
        ([6, 1, 3], 0.5),
        ([3, math.nan, 1], 0.5),  # a class without images is ignored
        ([0, 0, 0], None),  # 0 / 0
        ([3, -1, 1], None),  # both signs: (3 - 0) / (3 + 0) would be fully selective
        ([5], None),
        ([5, math.nan], None),
    ],
)
def test_selectivity(means, expected):
    assert queries.selectivity(np.array(means, np.float32)) == expected


def test_classes_are_sorted_by_mean(tmp_path):
    values = stores.write_small_store(tmp_path, images=60, classes=13, failed=[7])
    means = np.load(tmp_path / "class_means.npy")
    assert means.shape == (75, 13)
    assert np.load(tmp_path / "class_counts.npy").tolist() == [5] * 3 + [4] * 3 + [3] + [4] * 6  # 7 has label 6
    units = pq.read_table(tmp_path / "units.parquet").to_pylist()
    labels = np.arange(60) % 14 - 1
    for row, maxima in zip(units, np.concatenate(values), strict=True):
        direct = [np.nanmean(maxima[labels == c]) / 2 for c in range(13)]
        order = sorted(range(13), key=lambda c: (-np.float32(direct[c]), c))
        assert row["classes"] == order[:10]
        np.testing.assert_allclose(row["class_means"], [direct[c] for c in order[:10]], rtol=1e-6)
        rest = np.mean([direct[c] for c in order[1:]])
        expected = (direct[order[0]] - rest) / (direct[order[0]] + rest)
        assert row["selectivity"] == pytest.approx(expected, rel=1e-5)


# --- files -----------------------------------------------------------------------------------------------------------


def test_row_groups_hold_whole_units_and_have_statistics(tmp_path):
    stores.write_small_store(tmp_path, units=(130, 3))
    for name in ("units", "topk"):
        meta = pq.read_metadata(tmp_path / f"{name}.parquet")
        groups = []
        for g in range(meta.num_row_groups):
            layer, unit = (meta.row_group(g).column(i).statistics for i in (0, 1))
            assert layer.min == layer.max
            groups.append((layer.min, unit.min, unit.max))
        assert groups == [("layer 0", 0, 63), ("layer 0", 64, 127), ("layer 0", 128, 129), ("layer 1", 0, 2)]
    assert {meta.row_group(0).column(i).compression for i in range(meta.num_columns)} == {"ZSTD"}


def test_sample_holds_the_maxima_in_the_order_of_units(tmp_path):
    values = stores.write_small_store(tmp_path, failed=[4])
    sample = np.load(tmp_path / "sample.npy", mmap_mode="r")
    images = np.load(tmp_path / "sample_images.npy")
    np.testing.assert_array_equal(sample, np.concatenate(values)[:, images])
    assert sample.dtype == np.float32
    assert np.isnan(sample[:, 2]).all()


def test_unknown_values_of_an_image_are_null(tmp_path):
    stores.write_small_store(tmp_path, classes=2, failed=[4])
    rows = pq.read_table(tmp_path / "images.parquet").to_pylist()
    assert [r["image"] for r in rows] == list(range(40))
    failed, valid = rows[4], rows[5]
    assert (failed["failed"], failed["name"], failed["label"]) == ("is damaged", "folder/00004.png", 0)
    assert all(failed[name] is None for name in ("height", "width", "box_top", "classes", "probabilities", "loss"))
    assert (valid["failed"], valid["height"], valid["width"], valid["box_right"]) == (None, 100, 120, 120)
    assert len(valid["classes"]) == len(valid["probabilities"]) == 5
    assert (rows[3]["label"], rows[3]["loss"]) == (None, None)  # its label is -1
    assert valid["loss"] == pytest.approx(-math.log(valid["probabilities"][0]), rel=1e-5)


def test_bytes_do_not_depend_on_parts_or_file_system(tmp_path):
    settings = {"images": 5000, "units": (3,), "classes": 3}
    stores.write_small_store(tmp_path / "a", **settings)
    stores.write_small_store(tmp_path / "b", **settings, parts=[1, 4095, 1, 903])
    stores.write_small_store("memory://bytes/c", **settings, parts=[4999, 1])
    expected = stores.read_files(tmp_path / "a")
    assert expected == stores.read_files(tmp_path / "b")
    memory = fsspec.filesystem("memory")
    assert expected == {path.removeprefix("/bytes/c/"): memory.cat_file(path) for path in memory.find("/bytes/c")}
    meta = pq.read_metadata(tmp_path / "a" / "images.parquet")
    assert [meta.row_group(g).num_rows for g in range(meta.num_row_groups)] == [4096, 904]


def test_manifest_describes_the_layers(tmp_path):
    stores.write_small_store(tmp_path)
    manifest = Folder(tmp_path).read_json("manifest.json")
    assert manifest["input_size"] == [64, 80]
    assert [layer["units"] for layer in manifest["layers"]] == [70, 5]
    assert manifest["layers"][0]["receptive_field"] == [15, 15]
    assert manifest["layers"][0]["shape"] == [70, 6, 6]


def test_error_leaves_no_manifest_and_no_partial_file(tmp_path):
    stores.write_small_store(tmp_path)
    assert (tmp_path / "manifest.json").exists()

    def failing_layers():
        yield stores.layer_summary("first", *stores.random_maxima(3, 40), np.arange(4))
        raise RuntimeError("the second layer is lost")

    with pytest.raises(RuntimeError, match="the second layer"):
        write_store(
            tmp_path,
            failing_layers(),
            [],
            sample_images=np.arange(4),
            class_counts=None,
            input_size=(8, 8),
            shards=[],
            manifest=stores.scan_manifest(0),
        )
    assert not (tmp_path / "manifest.json").exists()
    assert not [name for name in stores.read_files(tmp_path) if name.startswith(".")]


def test_wrong_number_of_images_is_refused(tmp_path):
    with pytest.raises(ConvscopeError, match="8 images were given; expected 9"):
        write_one_layer(tmp_path, stores.random_maxima(3, 8)[0], count=9)
    assert not (tmp_path / "manifest.json").exists()


def test_full_disk_is_reported(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    def raise_no_space(self, path, mode="rb", **_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "open", raise_no_space)
    with pytest.raises(ConvscopeError, match=r"cannot write units\.parquet into .*: No space left on device"):
        stores.write_small_store(tmp_path)


# --- other tools -----------------------------------------------------------------------------------------------------


def test_lines_in_the_docs_read_the_same_unit(tmp_path, monkeypatch):
    """Run the lines of docs/store.md next to a store."""
    stores.write_small_store(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^(\w+) = (.*store/topk\.parquet.*)$", DOCS.read_text(), re.M)
    assert len(lines) == 3
    tools = {"pandas": pandas, "polars": polars, "duckdb": duckdb}
    tables = {name: eval(line, tools) for name, line in lines}
    frames = [
        tables["with_pandas"],
        pandas.DataFrame(tables["with_polars"].to_dicts()),
        tables["with_duckdb"].df(),
    ]
    expected = pq.read_table("store/topk.parquet").to_pandas()
    expected = expected[(expected.layer == "layer 0") & (expected.unit == 3)]
    assert len(expected) == 20
    for frame in frames:
        for column in expected:
            assert frame[column].tolist() == expected[column].tolist()


def test_docs_describe_every_column_in_order(tmp_path):
    stores.write_small_store(tmp_path, classes=2)
    text = DOCS.read_text()
    for name in ("units", "topk", "images", "shards"):
        section = text.split(f"## {name}.parquet")[1].split("\n## ")[0]
        documented = [
            column for row in re.findall(r"^\| (`.*?) \|", section, re.M) for column in re.findall(r"`(\w+)`", row)
        ]
        assert documented == pq.read_schema(tmp_path / f"{name}.parquet").names
