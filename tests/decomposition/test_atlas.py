"""Activation atlases: every array against a direct computation, with a simple reducer and with UMAP."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import convscope
from convscope import Atlas, ConvscopeError
from convscope.cli import app
from convscope.decomposition import projection
from convscope.decomposition.activation_atlas import MAX_CLASSES
from convscope.decomposition.projection import umap_reducer
from convscope.images.loading import ImageBatchLoader
from tests.oracles.colors import MODEL, SETTINGS, SIZE, WEIGHTS, load_model, random_images, tile_image
from tests.oracles.nets import SmallConvNet, UnusedBranchNet, diff_snapshots, in_training, randomized, snapshot

QUICK: dict[str, Any] = {"size": SIZE, "steps": 4}


def first_two(vectors: np.ndarray) -> np.ndarray:
    """Reduce to two channels: red to the right, green down."""
    return vectors[:, :2] + 0.01 * vectors[:, 2:3]


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return load_model()


@pytest.fixture(scope="module")
def conv_model() -> convscope.Model:
    return convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (12, 40, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def small_atlas(conv_model: convscope.Model, images: np.ndarray) -> Atlas:
    return convscope.atlas(
        conv_model, images, layer="relu2", grid=4, positions_per_image=6, min_count=3, reducer=first_two, **QUICK
    )


def test_default_layer_is_that_of_heatmaps(images: np.ndarray) -> None:
    """A branch that the scores do not depend on runs last."""
    network = convscope.load(randomized(UnusedBranchNet()), preprocessing={"size": SIZE})
    result = convscope.atlas(
        network, images, grid=2, positions_per_image=6, min_count=1, reducer=lambda vectors: vectors[:, :2], **QUICK
    )
    assert (result.layer, network.layers.last_spatial().name) == ("used", "zeroed")


# --- vectors, cells, classes -----------------------------------------------------------------------------------------


def source_vectors(conv_model: convscope.Model, images: np.ndarray, small_atlas: Atlas) -> np.ndarray:
    """Return the activations at the atlas's sources."""
    maps = convscope.activations(conv_model, images, small_atlas.layer)[small_atlas.layer]
    n, row, column = small_atlas.sources.T
    selected: np.ndarray = maps[n, :, row, column]
    return selected


def test_sources_are_distinct_random_positions(small_atlas: Atlas) -> None:
    """Six of each image, none twice, in order."""
    assert small_atlas.sources[:, 0].tolist() == np.repeat(np.arange(12), 6).tolist()
    assert len(np.unique(small_atlas.sources, axis=0)) == 72
    assert small_atlas.sources[:, 1:].min() >= 0
    assert small_atlas.sources[:, 1:].max() <= 15
    assert len(np.unique(small_atlas.sources[:, 1:], axis=0)) > 40  # drawn for each image


def test_coordinates_keep_the_order_of_the_reducer(
    conv_model: convscope.Model, images: np.ndarray, small_atlas: Atlas
) -> None:
    reduced = first_two(source_vectors(conv_model, images, small_atlas)).astype(float)
    assert small_atlas.positions.min() >= 0
    assert small_atlas.positions.max() <= 1
    for axis in (0, 1):
        order = np.argsort(reduced[:, axis], kind="stable")
        steps = np.diff(small_atlas.positions[order, axis])
        assert (steps >= -1e-6).all()
        low, high = np.quantile(reduced[:, axis], (0.01, 0.99))
        scale = ((reduced[order, axis] - low) / (high - low)).clip(0, 1)
        assert small_atlas.positions[order, axis] == pytest.approx((scale + np.arange(72) / 71) / 2, abs=1e-4)


def test_cells_agree_with_a_direct_count(conv_model: convscope.Model, images: np.ndarray, small_atlas: Atlas) -> None:
    activation_vectors = source_vectors(conv_model, images, small_atlas)
    members: dict[tuple[int, int], list[int]] = {}
    for i, (x, y) in enumerate(small_atlas.positions):
        members.setdefault((min(int(y * 4), 3), min(int(x * 4), 3)), []).append(i)
    expected = {cell: rows for cell, rows in members.items() if len(rows) >= 3}
    assert [tuple(cell) for cell in small_atlas.cells.tolist()] == sorted(expected)
    assert 0 < len(expected) < len(members)  # some cells have too few
    for i, cell in enumerate(sorted(expected)):
        assert small_atlas.counts[i] == len(expected[cell])
        assert np.flatnonzero(small_atlas.cell_index == i).tolist() == expected[cell]
        assert small_atlas.means[i] == pytest.approx(activation_vectors[expected[cell]].mean(0), abs=1e-5)
    left_out = [i for rows in members.values() if len(rows) < 3 for i in rows]
    assert sorted(np.flatnonzero(small_atlas.cell_index == -1)) == sorted(left_out)
    assert small_atlas.notes == (f"{72 - len(left_out)} of 72 vectors are in cells that are shown",)


def removal_effects(model: convscope.Model, images: np.ndarray, small_atlas: Atlas) -> np.ndarray:
    """Compute the decrease of all logits when a hook sets one position to 0: a full forward pass for each vector."""
    positions_to_zero: list[tuple[int, int]] = []

    def set_to_zero(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for row, column in positions_to_zero:
            output[:, :, row, column] = 0
        return output

    inputs = [next(ImageBatchLoader(one, model.preprocessing).batches(1)).x for one in images]
    net = model.module
    decreases = []
    module = dict(net.named_modules())[small_atlas.layer]
    handle = module.register_forward_hook(set_to_zero)
    with torch.no_grad():
        for n, row, column in small_atlas.sources.tolist():
            positions_to_zero[:] = []
            before = net(inputs[n])
            positions_to_zero[:] = [(row, column)]
            decreases.append((before - net(inputs[n]))[0].numpy())
    handle.remove()
    return np.stack(decreases)


def test_classes_are_those_whose_logits_decrease(model: convscope.Model) -> None:
    """The logits are means over 32 x 32 positions: without one of them they decrease by w . v / 1024."""
    tiles = random_images(8)
    result = convscope.atlas(
        model, tiles, layer="relu", grid=3, positions_per_image=9, min_count=2, reducer=first_two, **QUICK
    )
    maps = convscope.activations(model, tiles, "relu")["relu"]
    n, row, column = result.sources.T
    decreases = maps[n, :, row, column] @ WEIGHTS.numpy().T / SIZE**2
    for i in range(len(result.cells)):
        mean = decreases[result.cell_index == i].mean(0)
        assert result.effects[i] == pytest.approx(np.sort(mean)[::-1], abs=1e-6)
        assert result.classes[i][0] == mean.argmax() or result.effects[i][0] == pytest.approx(result.effects[i][1])
        assert result.names[i] == [["warm", "cold"][k] for k in result.classes[i]]


def test_effects_agree_with_hooks_before_further_layers() -> None:
    """Compare with hooks where more than a mean follows the layer."""
    model = convscope.load(
        randomized(SmallConvNet(inplace=False)), preprocessing={"size": SIZE, "interpolation": "nearest"}
    )
    tiles = np.random.default_rng(5).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    result = convscope.atlas(
        model, tiles, layer="relu2", grid=1, positions_per_image=5, min_count=1, reducer=first_two, **QUICK
    )
    mean = removal_effects(model, tiles, result).mean(0)
    order = np.argsort(-mean)[:MAX_CLASSES]
    assert result.classes[0].tolist() == order.tolist()
    assert result.effects[0] == pytest.approx(mean[order], abs=1e-5)


def test_target_selects_the_vectors_that_support_it(model: convscope.Model) -> None:
    """Of colors with weights (3, 2, 1) for warm and (-1, 0, 2.5) for cold, red and green are warm and blue is cold."""
    tiles = random_images(8)
    settings: dict[str, Any] = {
        "layer": "relu",
        "grid": 2,
        "positions_per_image": 9,
        "min_count": 1,
        "reducer": first_two,
        **QUICK,
    }
    warm, cold = (convscope.atlas(model, tiles, target=name, **settings) for name in ("warm", "cold"))
    unrestricted = convscope.atlas(model, tiles, **settings)
    maps = convscope.activations(model, tiles, "relu")["relu"]

    def channels(result: Atlas) -> list[int]:
        n, row, column = result.sources.T
        return maps[n, :, row, column][:, :3].argmax(1).tolist()

    assert set(channels(warm)) == {0, 1}
    assert set(channels(cold)) == {2}
    n, row, column = unrestricted.sources.T
    nonzero = (maps[n, :, row, column] > 0).any(1)
    assert len(warm.sources) + len(cold.sources) == nonzero.sum()  # black supports neither
    assert (warm.target, warm.top_k, unrestricted.target) == (0, 1, None)
    both = convscope.atlas(model, tiles, target="warm", top_k=2, **settings)
    assert len(both.sources) == nonzero.sum()


def test_icons_show_the_color_of_their_cells(model: convscope.Model) -> None:
    tiles = [tile_image([[name] * 4] * 4) for name in ("red", "green", "blue") for _ in range(3)]

    def by_color(rows: np.ndarray) -> np.ndarray:
        return rows[:, :3] @ np.array([[0.0, 0], [1, 0], [0, 1]])

    result = convscope.atlas(
        model,
        tiles,
        layer="relu",
        grid=2,
        positions_per_image=3,
        min_count=2,
        reducer=by_color,
        size=32,
        steps=40,
        power=1,
    )
    assert len(result.cells) == 3
    assert sorted(result.means.argmax(1).tolist()) == [0, 1, 2]
    assert result.icons.mean((1, 2)).argmax(1).tolist() == result.means.argmax(1).tolist()
    icon_activations = convscope.activations(model, list(result.icons), "relu")["relu"].mean((2, 3))
    assert (icon_activations @ result.means.T).argmax(1).tolist() == [0, 1, 2]


# --- independence, determinism, no side effects ----------------------------------------------------------------------


def test_sources_do_not_depend_on_other_images(
    conv_model: convscope.Model, images: np.ndarray, small_atlas: Atlas
) -> None:
    fewer = convscope.atlas(
        conv_model, images[:5], layer="relu2", grid=2, positions_per_image=6, min_count=1, reducer=first_two, **QUICK
    )
    assert fewer.sources.tolist() == small_atlas.sources[:30].tolist()
    other_seed = convscope.atlas(
        conv_model,
        images[:5],
        layer="relu2",
        grid=2,
        positions_per_image=6,
        min_count=1,
        reducer=first_two,
        seed=1,
        **QUICK,
    )
    assert other_seed.sources.tolist() != fewer.sources.tolist()


def test_same_seed_gives_the_same_bytes(conv_model: convscope.Model, images: np.ndarray, small_atlas: Atlas) -> None:
    repeated = convscope.atlas(
        conv_model, images, layer="relu2", grid=4, positions_per_image=6, min_count=3, reducer=first_two, **QUICK
    )
    assert {k: v.tobytes() for k, v in repeated.arrays().items()} == {
        k: v.tobytes() for k, v in small_atlas.arrays().items()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_unchanged_afterwards(fails: bool, images: np.ndarray) -> None:
    net, hooks = in_training(randomized(SmallConvNet()))
    model = convscope.load(net, preprocessing={"size": SIZE})
    before, calls = snapshot(net), []

    def record_progress(amounts: float, total: int) -> None:
        calls.append((amounts, total))
        if fails and amounts > 1.4:
            raise KeyboardInterrupt

    def run() -> Atlas:
        return convscope.atlas(
            model, images, layer="relu2", grid=2, reducer=first_two, progress=record_progress, **QUICK
        )

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
        amounts = [d for d, _ in calls]
        assert amounts == sorted(amounts)
        assert calls[-1] == (2, 2)
    assert diff_snapshots(before, snapshot(net)) == []
    assert hooks


def test_unreadable_images_are_reported(model: convscope.Model, tmp_path: Path) -> None:
    Image.fromarray(random_images(1)[0]).save(tmp_path / "0.png")
    files = [str(tmp_path / "none.png"), str(tmp_path / "0.png")]
    result = convscope.atlas(model, files, grid=1, min_count=1, reducer=first_two, **QUICK)
    assert result.image_names == (files[1],)
    assert [failure.name for failure in result.failed] == [files[0]]


# --- invalid arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "fc"}, "without spatial positions"),
        ({"layer": "nowhere"}, "is not in this model"),
        ({"target": 7}, "class 7 is out of range"),
        ({"grid": 0}, "grid is 0"),
        ({"positions_per_image": 1.5}, "positions_per_image is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"min_count": 1000}, "no cell has 1000 of the 48 vectors"),
        (
            {"reducer": lambda v: v[:, :1]},
            r"reducer returned shape \(48, 1\); expected finite numbers of shape \(48, 2\)",
        ),
        ({"reducer": lambda v: v[:, :2] * np.nan}, "expected finite numbers"),
    ],
)
def test_invalid_arguments_are_refused(
    settings: dict[str, Any], message: str, conv_model: convscope.Model, images: np.ndarray
) -> None:
    with pytest.raises(ConvscopeError, match=message):
        convscope.atlas(conv_model, images, **{"layer": "relu2", "reducer": first_two, **QUICK, **settings})


def test_zero_vectors_are_left_out(model: convscope.Model) -> None:
    """All channels are 0 where the image is black."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
    relu_model = convscope.load(net, preprocessing={"size": SIZE, "mean": 0.0, "std": 1.0})
    half_black = np.random.default_rng(0).integers(100, 256, (6, SIZE, SIZE, 3), np.uint8)
    half_black[:, : SIZE // 2] = 0
    small_atlas = convscope.atlas(
        relu_model,
        half_black,
        layer="1",
        grid=2,
        positions_per_image=20,
        min_count=2,
        reducer=first_two,
        size=SIZE,
        steps=2,
    )
    num_dark = 6 * 20 - len(small_atlas.sources)
    assert num_dark > 0
    assert (small_atlas.sources[:, 1] >= SIZE // 2).all()
    assert f"{num_dark} vectors were left out: all their channels are 0" in small_atlas.notes
    with pytest.raises(ConvscopeError, match="all channels of '1' are 0 at every sampled position"):
        convscope.atlas(relu_model, np.zeros_like(half_black), layer="1", reducer=first_two, size=SIZE, steps=2)


def test_class_without_supporting_vectors_is_refused(model: convscope.Model) -> None:
    with pytest.raises(ConvscopeError, match="no vector supports 'cold'"):
        convscope.atlas(model, tile_image([["red"] * 4] * 4), layer="relu", target="cold", reducer=first_two, **QUICK)


def test_missing_umap_is_reported_before_images_are_read(
    model: convscope.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConvscopeError, match=r"pip install 'convscope\[atlas\]'"):
        convscope.atlas(model, str(tmp_path / "none.png"))


# --- saving, figure, UMAP --------------------------------------------------------------------------------------------


def test_saved_files(small_atlas: Atlas, tmp_path: Path) -> None:
    small_atlas.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["kind"] == "atlas"
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert (arrays["means"] == small_atlas.means).all()
    row, column = small_atlas.cells[0]
    with Image.open(tmp_path / f"cell_{row}_{column}.png") as icon:
        assert (np.asarray(icon) == small_atlas.icons[0]).all()
    with Image.open(tmp_path / "map.png") as atlas_image:
        pixels = np.asarray(atlas_image)
    height, width = pixels.shape[0] / small_atlas.grid, pixels.shape[1] / small_atlas.grid
    for r in range(small_atlas.grid):
        for c in range(small_atlas.grid):
            cell = pixels[round(r * height) : round((r + 1) * height), round(c * width) : round((c + 1) * width)]
            assert bool((cell < 255).any()) == ([r, c] in small_atlas.cells.tolist())


def test_larger_cells_have_larger_icons(small_atlas: Atlas) -> None:
    from convscope.plotting.atlas import atlas_map

    pixels = np.asarray(atlas_map(small_atlas))
    height, width = pixels.shape[0] / small_atlas.grid, pixels.shape[1] / small_atlas.grid
    covered = [
        int(
            (pixels[round(r * height) : round((r + 1) * height), round(c * width) : round((c + 1) * width)] < 255)
            .any(2)
            .sum()
        )
        for r, c in small_atlas.cells
    ]
    assert covered[int(small_atlas.counts.argmax())] > covered[int(small_atlas.counts.argmin())]


def test_figure_names_the_class_of_each_cell(small_atlas: Atlas) -> None:
    texts = [text.get_text().replace("\n", " ") for text in small_atlas.figure().axes[0].texts]
    assert texts == [names[0] for names in small_atlas.names]


@pytest.fixture(scope="module")
def interpreted_umap() -> Iterator[None]:
    """Run UMAP without compilation by numba, which takes far longer than reducing a few vectors, and with few edges."""
    numba = pytest.importorskip("numba")
    pytest.importorskip("umap")

    def unload() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in ("umap", "pynndescent")]
        return {name: sys.modules.pop(name) for name in names}

    compiled, numba.config.DISABLE_JIT = unload(), True
    neighbors, projection.UMAP_NEIGHBORS = projection.UMAP_NEIGHBORS, 5
    try:
        yield
    finally:
        projection.UMAP_NEIGHBORS = neighbors
        numba.config.DISABLE_JIT = False
        unload()
        sys.modules.update(compiled)


@pytest.mark.usefixtures("interpreted_umap")
@pytest.mark.parametrize("count", [16, 52])  # few vectors start from random coordinates, more from a spectral layout
def test_umap_separates_clusters(count: int) -> None:
    rng = np.random.default_rng(0)
    second = np.arange(count) % 2 == 1
    vectors = np.where(second[:, None], [0.0, 0.1, 1.0, 0.0], [1.0, 0.1, 0.0, 0.0]) + rng.random((count, 4)) * 0.1
    vectors = vectors.astype(np.float32)
    coordinates = umap_reducer(0)(vectors)
    distances = np.linalg.norm(coordinates[:, None] - coordinates, axis=2)
    same_cluster = second[:, None] == second
    within = np.where(same_cluster & ~np.eye(count, dtype=bool), distances, np.inf).min(1)
    between = np.where(same_cluster, np.inf, distances).min(1)
    assert (within < between / 2).all()


@pytest.mark.usefixtures("interpreted_umap")
def test_command_gives_the_same_bytes_with_umap(model: convscope.Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tiles = [
        np.clip(tile_image([[name] * 4] * 4) * 0.7 + rng.integers(0, 60, (64, 64, 3)), 0, 255).astype(np.uint8)
        for name in ("red", "red", "blue", "blue")
    ]
    result = convscope.atlas(model, tiles, layer="relu", grid=4, positions_per_image=4, min_count=1, **QUICK)
    blue = result.sources[:, 0] >= 2
    for i in range(len(result.cells)):  # no cell has vectors of both colors
        assert len(set(blue[result.cell_index == i])) == 1
    files = []
    for i, image in enumerate(tiles):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    options = ["--layer", "relu", "--grid", "4", "--min-count", "1", "--size", str(SIZE), "--steps", "4"]
    arguments = ["atlas", MODEL, *files, *options, "-o", str(tmp_path), "--preprocessing", SETTINGS]
    output = CliRunner().invoke(app, arguments)
    assert output.exit_code == 0, output.output
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert arrays["positions"].tobytes() == result.positions.tobytes()
