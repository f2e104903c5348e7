"""Concepts and atlases in a store: put there, listed, read again, and refused where they do not belong."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import convscope
from convscope import Atlas, Concepts, ConvscopeError, Store
from convscope.cli import app
from convscope.store.saved_results import ids_by_name
from tests.oracles.colours import MODEL, SETTINGS, colours, loaded, pictures

ASKED: dict[str, Any] = {"count": 3, "crop": 1 / 4, "sobol_points": 8, "patches": 4}


def first_two(vectors: np.ndarray) -> np.ndarray:
    return vectors[:, :2]


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return loaded()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    where = tmp_path_factory.mktemp("data")
    for i, picture in enumerate(pictures(8)):
        Image.fromarray(picture).save(where / f"{i}.png")
    return sorted(str(path) for path in where.iterdir())


@pytest.fixture(scope="module")
def store(model: convscope.Model, files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Store:
    where = tmp_path_factory.mktemp("store")
    return convscope.scan(model, Path(files[0]).parent, where, layers=["relu"], k=3, workers=0)


@pytest.fixture(scope="module")
def found(model: convscope.Model, files: list[str]) -> Concepts:
    return convscope.concepts(model, files, "warm", **ASKED)


@pytest.fixture(scope="module")
def drawn(model: convscope.Model, files: list[str]) -> Atlas:
    return convscope.atlas(model, files, layer="relu", grid=3, min_count=1, reducer=first_two, size=16, steps=1)


def copy(store: Store, where: Path) -> Store:
    """The store without what was kept in it."""
    where.mkdir()
    for path in Path(store.address).iterdir():
        if path.is_file():
            (where / path.name).write_bytes(path.read_bytes())
    return convscope.open_store(where)


def test_what_is_kept_is_what_was_found(store: Store, found: Concepts, drawn: Atlas, tmp_path: Path) -> None:
    home = copy(store, tmp_path / "store")
    assert home.concepts() == home.atlases() == []
    assert home.save_result(found) == tmp_path / "store" / "concepts" / "0-relu"
    assert home.save_result(drawn) == tmp_path / "store" / "atlas" / "relu"
    again = convscope.open_store(tmp_path / "store")
    (one,), (other,) = again.concepts(), again.atlases()
    assert (one.kind, one.layer, one.target, one.image_names) == ("concepts", "relu", 0, list(found.image_names))
    assert (other.kind, other.layer, other.target, other.image_names) == (
        "atlas",
        "relu",
        None,
        list(drawn.image_names),
    )
    for kept, result in ((one, found), (other, drawn)):
        arrays = kept.arrays()
        assert arrays.keys() == result.arrays().keys()
        for name, values in result.arrays().items():
            assert arrays[name].dtype == values.dtype
            assert (arrays[name] == values).all(), name
        with np.load(io.BytesIO(kept.archive())) as archive:
            assert set(archive.files) == set(arrays)
    assert (tmp_path / "store" / "concepts" / "0-relu" / "concepts.png").exists()


def test_each_class_and_layer_has_its_place_and_the_last_one_stays(
    store: Store, model: convscope.Model, found: Concepts, drawn: Atlas, files: list[str], tmp_path: Path
) -> None:
    home = copy(store, tmp_path / "store")
    settings = {**ASKED, "only_predicted": False}
    home.save_result(convscope.concepts(model, files, "cold", **settings))
    home.save_result(found)
    home.save_result(convscope.concepts(model, files, "warm", layer="shrink", **settings))
    asked: dict[str, Any] = {"grid": 2, "min_count": 1, "reducer": first_two, "size": 16, "steps": 1, "layer": "relu"}
    home.save_result(convscope.atlas(model, files, target="warm", top_k=2, **asked))
    home.save_result(drawn)
    assert [(one.target, one.layer) for one in home.concepts()] == [(0, "relu"), (0, "shrink"), (1, "relu")]
    assert [(one.name, one.target) for one in home.atlases()] == [("relu", None), ("relu-class0", 0)]
    before = home.concepts()
    assert home.concepts()[0] is before[0]  # not read again
    replaced = convscope.concepts(model, files[:3], "warm", **ASKED)
    home.save_result(replaced)
    after = home.concepts()
    assert len(after) == 3
    assert after[0].version != before[0].version
    assert after[2] is before[2]
    assert (after[0].arrays()["heatmaps"] == replaced.heatmaps).all()


def test_results_of_other_weights_are_refused(store: Store, files: list[str], tmp_path: Path) -> None:
    home = copy(store, tmp_path / "store")
    net = colours()
    net.get_parameter("fc.bias").data += 1
    result = convscope.concepts(loaded(net), files, "warm", **ASKED)
    with pytest.raises(ConvscopeError, match="other weights than this model"):
        home.save_result(result)
    assert home.concepts() == []
    assert not (tmp_path / "store" / "concepts").exists()


def test_a_store_that_is_not_on_a_disk_is_refused(store: Store, found: Concepts) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in Path(store.address).iterdir():
        if path.is_file():
            memory.pipe_file(f"/kept/{path.name}", path.read_bytes())
    elsewhere = convscope.open_store("memory://kept")
    assert elsewhere.concepts() == []
    with pytest.raises(ConvscopeError, match="on a disk"):
        elsewhere.save_result(found)


def test_a_store_elsewhere_is_read(store: Store, found: Concepts, tmp_path: Path) -> None:
    import fsspec

    home = copy(store, tmp_path / "store")
    home.save_result(found)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "store"), "/whole", recursive=True)
    (one,) = convscope.open_store("memory://whole").concepts()
    assert (one.arrays()["bank"] == found.bank).all()


# --- what is damaged -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(store: Store, found: Concepts, tmp_path: Path) -> Path:
    return copy(store, tmp_path / "store").save_result(found)


def opened(folder: Path) -> Store:
    return convscope.open_store(folder.parents[1])


def test_what_was_not_finished_is_not_listed(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder.parent / "note.txt").write_text("mine")
    assert opened(folder).concepts() == []


@pytest.mark.parametrize("change", [{"kind": "atlas"}, {"parameters": {}}, {"parameters": {"layer": 3}}])
def test_a_manifest_of_something_else_is_named(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConvscopeError, match=r"concepts/0-relu/manifest\.json .* is no manifest of concepts"):
        opened(folder).concepts()


def damaged(folder: Path, how: str) -> None:
    path = folder / "arrays.npz"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-200])
        return
    with np.load(path) as archive:
        arrays = dict(archive)
    if how == "missing":
        del arrays["heatmaps"]
    elif how == "shorter":
        arrays["importance"] = arrays["importance"][1:]
    else:
        arrays["bank"] = np.array([{}], object)  # a pickle, which is never opened
    np.savez(path, **arrays)


@pytest.mark.parametrize("how", ["cut", "missing", "shorter", "pickle"])
def test_damaged_arrays_are_named(folder: Path, how: str) -> None:
    damaged(folder, how)
    (one,) = opened(folder).concepts()
    with pytest.raises(ConvscopeError, match=r"concepts/0-relu/arrays\.npz in .* cannot be read"):
        one.arrays()


# --- names and views -------------------------------------------------------------------------------------------------


def test_pictures_are_found_by_name(store: Store, files: list[str]) -> None:
    relative = os.path.relpath(files[3])
    assert ids_by_name(store, [files[5], "no.png", relative, files[0], "s3://bucket/x.png"]) == [5, None, 3, 0, None]
    assert [store.image_rows([n])[0]["name"] for n in (5, 3)] == [files[5], files[3]]


def test_views_show_what_the_heats_lie_over(model: convscope.Model) -> None:
    """The whole picture, or the network's own crop: squashed to a square, its proportions told beside it."""
    wide = np.zeros((48, 96, 3), np.uint8)
    wide[:, :24], wide[:, 24:48], wide[:, 48:] = (255, 0, 0), (255, 255, 0), (0, 255, 0)
    whole = convscope.concepts(model, [wide], 0, count=2, crop=0.5, sobol_points=2)
    assert whole.shapes.tolist() == [[48, 96]]
    seen = np.asarray(Image.fromarray(whole.thumbnails[0]).resize((8, 1), Image.Resampling.BOX))[0]
    expected = [(255, 0, 0)] * 2 + [(255, 255, 0)] * 2 + [(0, 255, 0)] * 4
    assert np.abs(seen.astype(int) - expected).max() < 16
    assert whole.heatmaps.shape[2:] == (32, 32)
    cut = convscope.concepts(model, [wide], 0, count=2, crop=0.5, sobol_points=2, fit="crop")
    top, left, bottom, right = cut.geometry[0].box
    assert cut.shapes.tolist() == [[round(bottom - top), round(right - left)]]
    assert right - left < 60
    middle = np.asarray(Image.fromarray(wide).crop((round(left), round(top), round(right), round(bottom))))
    assert np.abs(cut.thumbnails[0].mean((0, 1)) - middle.mean((0, 1))).max() < 8


# --- the command line ------------------------------------------------------------------------------------------------


def asked_for(command: str, files: list[str], out: Path, *more: str) -> Any:
    given = [command, MODEL, *files, "-o", str(out), "--preprocessing", SETTINGS, *more]
    return CliRunner().invoke(app, given)


def test_concepts_go_into_a_store(store: Store, files: list[str], tmp_path: Path) -> None:
    home = copy(store, tmp_path / "store")
    manifest = (tmp_path / "store" / "manifest.json").read_bytes()
    done = asked_for("concepts", files, tmp_path / "store", "--target", "0", "--count", "2", "--masks", "2")
    assert done.exit_code == 0, done.output
    (one,) = home.concepts()
    assert (one.target, one.layer, len(one.arrays()["bank"])) == (0, "relu", 2)
    assert (tmp_path / "store" / "manifest.json").read_bytes() == manifest
    assert f"written to {tmp_path / 'store' / 'concepts' / '0-relu'}" in done.output


def test_an_atlas_goes_into_a_store(
    store: Store, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["convscope.decomposition.activation_atlas"], "umap", lambda seed: first_two)
    home = copy(store, tmp_path / "store")
    small = ("--layer", "relu", "--grid", "2", "--least", "1", "--size", "16", "--steps", "1")
    done = asked_for("atlas", files, tmp_path / "store", *small)
    assert done.exit_code == 0, done.output
    (one,) = home.atlases()
    maps = convscope.activations(loaded(), files, ["relu"])["relu"]
    n, row, column = one.arrays()["sources"].T
    assert one.arrays()["counts"].sum() == len(n)
    assert maps[n, :, row, column].any(1).all()
    assert f"{32 - len(n)} vectors were left out: all their channels are 0" in one.manifest["notes"]


@pytest.mark.parametrize("command", [["concepts", "--target", "0"], ["atlas"]])
def test_other_weights_are_refused_before_any_work(
    store: Store, files: list[str], tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(store, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    told = json.loads(path.read_text())
    told["model"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(told))
    worked: list[str] = []
    monkeypatch.setattr(convscope, command[0], lambda *_, **__: worked.append(command[0]), raising=False)
    done = asked_for(command[0], files, tmp_path / "store", *command[1:])
    assert isinstance(done.exception, ConvscopeError)
    assert "other weights than this model" in str(done.exception)
    assert worked == []
    assert not (tmp_path / "store" / command[0]).exists()
