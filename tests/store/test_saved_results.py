"""Concepts and atlases in a store: saved, listed, read, and refused for other models."""

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
from tests.oracles.colors import MODEL, SETTINGS, load_model, make_network, random_images

CONCEPT_SETTINGS: dict[str, Any] = {"count": 3, "crop": 1 / 4, "crops": 8, "sobol_points": 4, "patches": 4}


def first_two(vectors: np.ndarray) -> np.ndarray:
    return vectors[:, :2]


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return load_model()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    for i, image in enumerate(random_images(8)):
        Image.fromarray(image).save(folder / f"{i}.png")
    return sorted(str(path) for path in folder.iterdir())


@pytest.fixture(scope="module")
def store(model: convscope.Model, files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    return convscope.scan(model, Path(files[0]).parent, folder, layers=["relu"], k=3, workers=0)


@pytest.fixture(scope="module")
def concepts_result(model: convscope.Model, files: list[str]) -> Concepts:
    return convscope.concepts(model, files, "warm", **CONCEPT_SETTINGS)


@pytest.fixture(scope="module")
def atlas_result(model: convscope.Model, files: list[str]) -> Atlas:
    return convscope.atlas(model, files, layer="relu", grid=3, min_count=1, reducer=first_two, size=16, steps=1)


def copy_store(store: Store, folder: Path) -> Store:
    """Copy a store without the results saved in it."""
    folder.mkdir()
    for path in Path(store.address).iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return convscope.open_store(folder)


def test_saved_results_equal_the_originals(
    store: Store, concepts_result: Concepts, atlas_result: Atlas, tmp_path: Path
) -> None:
    copy = copy_store(store, tmp_path / "store")
    assert copy.concepts() == copy.atlases() == []
    assert copy.save_result(concepts_result) == tmp_path / "store" / "concepts" / "0-relu"
    assert copy.save_result(atlas_result) == tmp_path / "store" / "atlas" / "relu"
    reopened = convscope.open_store(tmp_path / "store")
    (concepts,), (atlas,) = reopened.concepts(), reopened.atlases()
    assert (concepts.kind, concepts.layer, concepts.target, concepts.image_names) == (
        "concepts",
        "relu",
        0,
        list(concepts_result.image_names),
    )
    assert (atlas.kind, atlas.layer, atlas.target, atlas.image_names) == (
        "atlas",
        "relu",
        None,
        list(atlas_result.image_names),
    )
    for saved, result in ((concepts, concepts_result), (atlas, atlas_result)):
        arrays = saved.arrays()
        assert arrays.keys() == result.arrays().keys()
        for name, values in result.arrays().items():
            assert arrays[name].dtype == values.dtype
            assert (arrays[name] == values).all(), name
        with np.load(io.BytesIO(saved.archive())) as archive:
            assert set(archive.files) == set(arrays)
    assert (tmp_path / "store" / "concepts" / "0-relu" / "concepts.png").exists()


def test_one_result_per_class_and_layer_is_kept(
    store: Store,
    model: convscope.Model,
    concepts_result: Concepts,
    atlas_result: Atlas,
    files: list[str],
    tmp_path: Path,
) -> None:
    copy = copy_store(store, tmp_path / "store")
    settings = {**CONCEPT_SETTINGS, "only_predicted": False}
    copy.save_result(convscope.concepts(model, files, "cold", **settings))
    copy.save_result(concepts_result)
    copy.save_result(convscope.concepts(model, files, "warm", layer="shrink", **settings))
    atlas_settings: dict[str, Any] = {
        "grid": 2,
        "min_count": 1,
        "reducer": first_two,
        "size": 16,
        "steps": 1,
        "layer": "relu",
    }
    copy.save_result(convscope.atlas(model, files, target="warm", top_k=2, **atlas_settings))
    copy.save_result(atlas_result)
    assert [(saved.target, saved.layer) for saved in copy.concepts()] == [(0, "relu"), (0, "shrink"), (1, "relu")]
    assert [(saved.name, saved.target) for saved in copy.atlases()] == [("relu", None), ("relu-class0", 0)]
    before = copy.concepts()
    assert copy.concepts()[0] is before[0]  # cached
    replacement = convscope.concepts(model, files[:3], "warm", **CONCEPT_SETTINGS)
    copy.save_result(replacement)
    after = copy.concepts()
    assert len(after) == 3
    assert after[0].version != before[0].version
    assert after[2] is before[2]
    assert (after[0].arrays()["heatmaps"] == replacement.heatmaps).all()


def test_results_of_other_weights_are_refused(store: Store, files: list[str], tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path / "store")
    net = make_network()
    net.get_parameter("fc.bias").data += 1
    result = convscope.concepts(load_model(net), files, "warm", **CONCEPT_SETTINGS)
    with pytest.raises(ConvscopeError, match="other weights than this model"):
        copy.save_result(result)
    assert copy.concepts() == []
    assert not (tmp_path / "store" / "concepts").exists()


def test_saving_into_a_remote_store_is_refused(store: Store, concepts_result: Concepts) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in Path(store.address).iterdir():
        if path.is_file():
            memory.pipe_file(f"/remote/{path.name}", path.read_bytes())
    remote = convscope.open_store("memory://remote")
    assert remote.concepts() == []
    with pytest.raises(ConvscopeError, match="not on this machine's disk"):
        remote.save_result(concepts_result)


def test_results_in_a_remote_store_are_read(store: Store, concepts_result: Concepts, tmp_path: Path) -> None:
    import fsspec

    copy = copy_store(store, tmp_path / "store")
    copy.save_result(concepts_result)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "store"), "/copy", recursive=True)
    (saved,) = convscope.open_store("memory://copy").concepts()
    assert (saved.arrays()["bank"] == concepts_result.bank).all()


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(store: Store, concepts_result: Concepts, tmp_path: Path) -> Path:
    return copy_store(store, tmp_path / "store").save_result(concepts_result)


def open_copy(folder: Path) -> Store:
    return convscope.open_store(folder.parents[1])


def test_unfinished_results_are_not_listed(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder.parent / "note.txt").write_text("a note")
    assert open_copy(folder).concepts() == []


@pytest.mark.parametrize("change", [{"kind": "atlas"}, {"parameters": {}}, {"parameters": {"layer": 3}}])
def test_error_names_the_invalid_manifest(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConvscopeError, match=r"concepts/0-relu/manifest\.json .* is not a manifest of concepts"):
        open_copy(folder).concepts()


def damage_arrays(folder: Path, kind: str) -> None:
    path = folder / "arrays.npz"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
        return
    with np.load(path) as archive:
        arrays = dict(archive)
    if kind == "missing":
        del arrays["heatmaps"]
    elif kind == "shorter":
        arrays["importance"] = arrays["importance"][1:]
    else:
        arrays["bank"] = np.array([{}], object)  # a pickle
    np.savez(path, **arrays)


@pytest.mark.parametrize("kind", ["truncated", "missing", "shorter", "pickle"])
def test_error_names_the_damaged_arrays(folder: Path, kind: str) -> None:
    damage_arrays(folder, kind)
    (saved,) = open_copy(folder).concepts()
    with pytest.raises(ConvscopeError, match=r"concepts/0-relu/arrays\.npz in .* cannot be read"):
        saved.arrays()


# --- names, thumbnails -----------------------------------------------------------------------------------------------


def test_images_are_found_by_name(store: Store, files: list[str]) -> None:
    relative = os.path.relpath(files[3])
    assert ids_by_name(store, [files[5], "no.png", relative, files[0], "s3://bucket/x.png"]) == [5, None, 3, 0, None]
    assert [store.image_rows([n])[0]["name"] for n in (5, 3)] == [files[5], files[3]]


def test_thumbnails_show_the_input_under_the_heatmaps(model: convscope.Model) -> None:
    """The thumbnail is the whole image or the evaluation crop, resized to a square; `shapes` has the proportions."""
    wide = np.zeros((48, 96, 3), np.uint8)
    wide[:, :24], wide[:, 24:48], wide[:, 48:] = (255, 0, 0), (255, 255, 0), (0, 255, 0)
    whole = convscope.concepts(model, [wide], 0, count=2, crop=0.5, sobol_points=2)
    assert whole.shapes.tolist() == [[48, 96]]
    colors = np.asarray(Image.fromarray(whole.thumbnails[0]).resize((8, 1), Image.Resampling.BOX))[0]
    expected = [(255, 0, 0)] * 2 + [(255, 255, 0)] * 2 + [(0, 255, 0)] * 4
    assert np.abs(colors.astype(int) - expected).max() < 16
    assert whole.heatmaps.shape[2:] == (32, 32)
    cropped = convscope.concepts(model, [wide], 0, count=2, crop=0.5, sobol_points=2, fit="crop")
    top, left, bottom, right = cropped.geometry[0].box
    assert cropped.shapes.tolist() == [[round(bottom - top), round(right - left)]]
    assert right - left < 60
    center = np.asarray(Image.fromarray(wide).crop((round(left), round(top), round(right), round(bottom))))
    assert np.abs(cropped.thumbnails[0].mean((0, 1)) - center.mean((0, 1))).max() < 8


# --- the command line ------------------------------------------------------------------------------------------------


def run_command(command: str, files: list[str], out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, [command, MODEL, *files, "-o", str(out), "--preprocessing", SETTINGS, *options])


def test_command_saves_concepts_in_a_store(store: Store, files: list[str], tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path / "store")
    manifest = (tmp_path / "store" / "manifest.json").read_bytes()
    result = run_command("concepts", files, tmp_path / "store", "--target", "0", "--count", "2", "--sobol-points", "2")
    assert result.exit_code == 0, result.output
    (saved,) = copy.concepts()
    assert (saved.target, saved.layer, len(saved.arrays()["bank"])) == (0, "relu", 2)
    assert (tmp_path / "store" / "manifest.json").read_bytes() == manifest
    assert f"written to {tmp_path / 'store' / 'concepts' / '0-relu'}" in result.output


def test_command_saves_an_atlas_in_a_store(
    store: Store, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["convscope.decomposition.activation_atlas"], "umap_reducer", lambda seed: first_two)
    copy = copy_store(store, tmp_path / "store")
    options = ("--layer", "relu", "--grid", "2", "--min-count", "1", "--size", "16", "--steps", "1")
    result = run_command("atlas", files, tmp_path / "store", *options)
    assert result.exit_code == 0, result.output
    (saved,) = copy.atlases()
    maps = convscope.activations(load_model(), files, ["relu"])["relu"]
    n, row, column = saved.arrays()["sources"].T
    assert saved.arrays()["counts"].sum() == len(n)
    assert maps[n, :, row, column].any(1).all()
    assert f"{32 - len(n)} vectors were left out: all their channels are 0" in saved.manifest["notes"]


@pytest.mark.parametrize("command", [["concepts", "--target", "0"], ["atlas"]])
def test_other_weights_are_refused_before_computing(
    store: Store, files: list[str], tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_store(store, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    calls: list[str] = []
    monkeypatch.setattr(convscope, command[0], lambda *_, **__: calls.append(command[0]), raising=False)
    result = run_command(command[0], files, tmp_path / "store", *command[1:])
    assert isinstance(result.exception, ConvscopeError)
    assert "other weights than this model" in str(result.exception)
    assert calls == []
    assert not (tmp_path / "store" / command[0]).exists()
