"""Atlases: every number against a slow recount; the reduction is ours to give, UMAP where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
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
from convscope.decomposition.activation_atlas import NUM_CLASSES
from convscope.images.loading import ImageBatchLoader
from tests.oracles.colours import MODEL, SETTINGS, SIZE, WEIGHTS, load_model, random_images, tile_image
from tests.oracles.nets import SmallConvNet, diff_snapshots, in_training, randomized, snapshot

QUICK: dict[str, Any] = {"size": SIZE, "steps": 4}


def first_two(vectors: np.ndarray) -> np.ndarray:
    """Red to the right, green down: a reduction that anyone can follow."""
    return vectors[:, :2] + 0.01 * vectors[:, 2:3]


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return load_model()


@pytest.fixture(scope="module")
def usual() -> convscope.Model:
    return convscope.load(randomized(SmallConvNet()), preprocessing={"size": SIZE})


@pytest.fixture(scope="module")
def shown() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (12, 40, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def found(usual: convscope.Model, shown: np.ndarray) -> Atlas:
    return convscope.atlas(
        usual, shown, layer="relu2", grid=4, positions_per_image=6, min_count=3, reducer=first_two, **QUICK
    )


# --- what is laid out ------------------------------------------------------------------------------------------------


def vectors(usual: convscope.Model, shown: np.ndarray, found: Atlas) -> np.ndarray:
    """The activations at the places that the atlas names."""
    maps = convscope.activations(usual, shown, found.layer)[found.layer]
    n, row, column = found.sources.T
    picked: np.ndarray = maps[n, :, row, column]
    return picked


def test_places(found: Atlas) -> None:
    """Six of each picture, none twice, in order."""
    assert found.sources[:, 0].tolist() == np.repeat(np.arange(12), 6).tolist()
    assert len(np.unique(found.sources, axis=0)) == 72
    assert found.sources[:, 1:].min() >= 0
    assert found.sources[:, 1:].max() <= 15
    assert len(np.unique(found.sources[:, 1:], axis=0)) > 40  # each picture draws its own


def test_positions_keep_the_order_of_the_reduction(usual: convscope.Model, shown: np.ndarray, found: Atlas) -> None:
    laid = first_two(vectors(usual, shown, found)).astype(float)
    assert found.positions.min() >= 0
    assert found.positions.max() <= 1
    for axis in (0, 1):
        order = np.argsort(laid[:, axis], kind="stable")
        steps = np.diff(found.positions[order, axis])
        assert (steps >= -1e-6).all()
        low, high = np.quantile(laid[:, axis], (0.01, 0.99))
        scale = ((laid[order, axis] - low) / (high - low)).clip(0, 1)
        assert found.positions[order, axis] == pytest.approx((scale + np.arange(72) / 71) / 2, abs=1e-4)


def test_cells_are_what_a_recount_finds(usual: convscope.Model, shown: np.ndarray, found: Atlas) -> None:
    own = vectors(usual, shown, found)
    members: dict[tuple[int, int], list[int]] = {}
    for i, (across, down) in enumerate(found.positions):
        members.setdefault((min(int(down * 4), 3), min(int(across * 4), 3)), []).append(i)
    expected = {cell: rows for cell, rows in members.items() if len(rows) >= 3}
    assert [tuple(cell) for cell in found.cells.tolist()] == sorted(expected)
    assert 0 < len(expected) < len(members)  # some cells hold too few, so that the limit is put to use
    for i, cell in enumerate(sorted(expected)):
        assert found.counts[i] == len(expected[cell])
        assert np.flatnonzero(found.cell_index == i).tolist() == expected[cell]
        assert found.means[i] == pytest.approx(own[expected[cell]].mean(0), abs=1e-5)
    few = [i for rows in members.values() if len(rows) < 3 for i in rows]
    assert sorted(np.flatnonzero(found.cell_index == -1)) == sorted(few)
    assert found.notes == (f"{72 - len(few)} of 72 vectors are in cells that are drawn",)


def effects_recounted(model: convscope.Model, shown: np.ndarray, found: Atlas) -> np.ndarray:
    """The fall of all logits when a hook wipes out one place: the whole network runs, once for each vector."""
    at: list[tuple[int, int]] = []

    def wipe(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for row, column in at:
            output[:, :, row, column] = 0
        return output

    prepared = [next(ImageBatchLoader(one, model.preprocessing).batches(1)).x for one in shown]
    net = model.module
    falls = []
    module = dict(net.named_modules())[found.layer]
    handle = module.register_forward_hook(wipe)
    with torch.no_grad():
        for n, row, column in found.sources.tolist():
            at[:] = []
            before = net(prepared[n])
            at[:] = [(row, column)]
            falls.append((before - net(prepared[n]))[0].numpy())
    handle.remove()
    return np.stack(falls)


def test_classes_are_those_whose_logits_fall(model: convscope.Model) -> None:
    """The logits are means over 32 x 32 places: without one of them they fall by w . v / 1024."""
    tiles = random_images(8)
    result = convscope.atlas(
        model, tiles, layer="relu", grid=3, positions_per_image=9, min_count=2, reducer=first_two, **QUICK
    )
    maps = convscope.activations(model, tiles, "relu")["relu"]
    n, row, column = result.sources.T
    falls = maps[n, :, row, column] @ WEIGHTS.numpy().T / SIZE**2
    for i in range(len(result.cells)):
        mean = falls[result.cell_index == i].mean(0)
        assert result.effects[i] == pytest.approx(np.sort(mean)[::-1], abs=1e-6)
        assert result.classes[i][0] == mean.argmax() or result.effects[i][0] == pytest.approx(result.effects[i][1])
        assert result.names[i] == [["warm", "cold"][k] for k in result.classes[i]]


def test_effects_behind_further_layers() -> None:
    """Where more than a mean lies behind the layer, against hooks on the whole network."""
    model = convscope.load(
        randomized(SmallConvNet(inplace=False)), preprocessing={"size": SIZE, "interpolation": "nearest"}
    )
    tiles = np.random.default_rng(5).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    result = convscope.atlas(
        model, tiles, layer="relu2", grid=1, positions_per_image=5, min_count=1, reducer=first_two, **QUICK
    )
    mean = effects_recounted(model, tiles, result).mean(0)
    order = np.argsort(-mean)[:NUM_CLASSES]
    assert result.classes[0].tolist() == order.tolist()
    assert result.effects[0] == pytest.approx(mean[order], abs=1e-5)


def test_a_class_keeps_what_speaks_for_it(model: convscope.Model) -> None:
    """Of colours with weights (3, 2, 1) for warm and (-1, 0, 2.5) for cold, red and green are warm and blue is cold."""
    tiles = random_images(8)
    asked: dict[str, Any] = {
        "layer": "relu",
        "grid": 2,
        "positions_per_image": 9,
        "min_count": 1,
        "reducer": first_two,
        **QUICK,
    }
    warm, cold = (convscope.atlas(model, tiles, target=name, **asked) for name in ("warm", "cold"))
    everything = convscope.atlas(model, tiles, **asked)
    maps = convscope.activations(model, tiles, "relu")["relu"]

    def colours(result: Atlas) -> list[int]:
        n, row, column = result.sources.T
        return maps[n, :, row, column][:, :3].argmax(1).tolist()

    assert set(colours(warm)) == {0, 1}
    assert set(colours(cold)) == {2}
    n, row, column = everything.sources.T
    lit = (maps[n, :, row, column] > 0).any(1)
    assert len(warm.sources) + len(cold.sources) == lit.sum()  # black speaks for nothing
    assert (warm.target, warm.top_k, everything.target) == (0, 1, None)
    both = convscope.atlas(model, tiles, target="warm", top_k=2, **asked)
    assert len(both.sources) == lit.sum()


def test_icons_show_the_colour_of_their_cells(model: convscope.Model) -> None:
    tiles = [tile_image([[name] * 4] * 4) for name in ("red", "green", "blue") for _ in range(3)]

    def apart(rows: np.ndarray) -> np.ndarray:
        return rows[:, :3] @ np.array([[0.0, 0], [1, 0], [0, 1]])

    result = convscope.atlas(
        model,
        tiles,
        layer="relu",
        grid=2,
        positions_per_image=3,
        min_count=2,
        reducer=apart,
        size=32,
        steps=40,
        power=1,
    )
    assert len(result.cells) == 3
    assert sorted(result.means.argmax(1).tolist()) == [0, 1, 2]
    assert result.icons.mean((1, 2)).argmax(1).tolist() == result.means.argmax(1).tolist()
    drawn = convscope.activations(model, list(result.icons), "relu")["relu"].mean((2, 3))
    assert (drawn @ result.means.T).argmax(1).tolist() == [0, 1, 2]


# --- neighbours, seeds, what is left ---------------------------------------------------------------------------------


def test_places_do_not_depend_on_other_pictures(usual: convscope.Model, shown: np.ndarray, found: Atlas) -> None:
    fewer = convscope.atlas(
        usual, shown[:5], layer="relu2", grid=2, positions_per_image=6, min_count=1, reducer=first_two, **QUICK
    )
    assert fewer.sources.tolist() == found.sources[:30].tolist()
    other = convscope.atlas(
        usual, shown[:5], layer="relu2", grid=2, positions_per_image=6, min_count=1, reducer=first_two, seed=1, **QUICK
    )
    assert other.sources.tolist() != fewer.sources.tolist()


def test_the_same_seed_gives_the_same_bytes(usual: convscope.Model, shown: np.ndarray, found: Atlas) -> None:
    again = convscope.atlas(
        usual, shown, layer="relu2", grid=4, positions_per_image=6, min_count=3, reducer=first_two, **QUICK
    )
    assert {k: v.tobytes() for k, v in again.arrays().items()} == {k: v.tobytes() for k, v in found.arrays().items()}


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool, shown: np.ndarray) -> None:
    net, hooks = in_training(randomized(SmallConvNet()))
    model = convscope.load(net, preprocessing={"size": SIZE})
    before, calls = snapshot(net), []

    def watch(done: float, total: int) -> None:
        calls.append((done, total))
        if fails and done > 1.4:
            raise KeyboardInterrupt

    def ask() -> Atlas:
        return convscope.atlas(model, shown, layer="relu2", grid=2, reducer=first_two, progress=watch, **QUICK)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            ask()
    else:
        ask()
        done = [d for d, _ in calls]
        assert done == sorted(done)
        assert calls[-1] == (2, 2)
    assert diff_snapshots(before, snapshot(net)) == []
    assert hooks


def test_a_picture_that_cannot_be_read_is_named(model: convscope.Model, tmp_path: Path) -> None:
    Image.fromarray(random_images(1)[0]).save(tmp_path / "0.png")
    files = [str(tmp_path / "none.png"), str(tmp_path / "0.png")]
    result = convscope.atlas(model, files, grid=1, min_count=1, reducer=first_two, **QUICK)
    assert result.image_names == (files[1],)
    assert [failure.name for failure in result.failed] == [files[0]]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "fc"}, "it has no places"),
        ({"layer": "nowhere"}, "is not in this model"),
        ({"target": 7}, "class 7 is out of range"),
        ({"grid": 0}, "grid is 0"),
        ({"positions_per_image": 1.5}, "positions_per_image is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"min_count": 1000}, "no cell holds 1000 of the 48 vectors"),
        ({"reducer": lambda v: v[:, :1]}, r"reduce gave \(48, 1\); expected finite numbers \(48, 2\)"),
        ({"reducer": lambda v: v[:, :2] * np.nan}, "expected finite numbers"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str, usual: convscope.Model, shown: np.ndarray) -> None:
    with pytest.raises(ConvscopeError, match=message):
        convscope.atlas(usual, shown, **{"layer": "relu2", "reducer": first_two, **QUICK, **settings})


def test_places_where_nothing_is_said_have_no_cell(model: convscope.Model) -> None:
    """All channels are 0 where the picture is black: there is no direction to draw."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
    plain = convscope.load(net, preprocessing={"size": SIZE, "mean": 0.0, "std": 1.0})
    half = np.random.default_rng(0).integers(100, 256, (6, SIZE, SIZE, 3), np.uint8)
    half[:, : SIZE // 2] = 0
    found = convscope.atlas(
        plain, half, layer="1", grid=2, positions_per_image=20, min_count=2, reducer=first_two, size=SIZE, steps=2
    )
    dark = 6 * 20 - len(found.sources)
    assert dark > 0
    assert (found.sources[:, 1] >= SIZE // 2).all()
    assert f"{dark} vectors were left out: all their channels are 0" in found.notes
    with pytest.raises(ConvscopeError, match="all channels of '1' are 0 at every place"):
        convscope.atlas(plain, np.zeros_like(half), layer="1", reducer=first_two, size=SIZE, steps=2)


def test_a_class_that_nothing_speaks_for(model: convscope.Model) -> None:
    with pytest.raises(ConvscopeError, match="no vector speaks for 'cold'"):
        convscope.atlas(model, tile_image([["red"] * 4] * 4), layer="relu", target="cold", reducer=first_two, **QUICK)


def test_without_umap_the_extra_is_named(
    model: convscope.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before any picture is opened: there is none under this name."""
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConvscopeError, match=r"pip install 'convscope\[atlas\]'"):
        convscope.atlas(model, str(tmp_path / "none.png"))


# --- saved, drawn, with UMAP, asked for in a shell -------------------------------------------------------------------


def test_what_is_saved(found: Atlas, tmp_path: Path) -> None:
    found.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["kind"] == "atlas"
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert (arrays["means"] == found.means).all()
    row, column = found.cells[0]
    with Image.open(tmp_path / f"cell_{row}_{column}.png") as icon:
        assert (np.asarray(icon) == found.icons[0]).all()
    with Image.open(tmp_path / "map.png") as page:
        pixels = np.asarray(page)
    height, width = pixels.shape[0] / found.grid, pixels.shape[1] / found.grid
    for r in range(found.grid):
        for c in range(found.grid):
            cell = pixels[round(r * height) : round((r + 1) * height), round(c * width) : round((c + 1) * width)]
            assert bool((cell < 255).any()) == ([r, c] in found.cells.tolist())


def test_fuller_cells_have_larger_icons(found: Atlas) -> None:
    from convscope.plotting.atlas import atlas_map

    pixels = np.asarray(atlas_map(found))
    height, width = pixels.shape[0] / found.grid, pixels.shape[1] / found.grid
    covered = [
        int(
            (pixels[round(r * height) : round((r + 1) * height), round(c * width) : round((c + 1) * width)] < 255)
            .any(2)
            .sum()
        )
        for r, c in found.cells
    ]
    assert covered[int(found.counts.argmax())] > covered[int(found.counts.argmin())]


def test_the_figure_names_each_cell(found: Atlas) -> None:
    texts = [text.get_text().replace("\n", " ") for text in found.figure().axes[0].texts]
    assert texts == [names[0] for names in found.names]


def test_umap_keeps_apart_what_is_apart(model: convscope.Model, tmp_path: Path) -> None:
    """Two colours, a little of others in each: two islands; twice the same bytes. Then the command, on the same."""
    pytest.importorskip("umap")
    draw = np.random.default_rng(0)
    tiles = [
        np.clip(tile_image([[name] * 4] * 4) * 0.7 + draw.integers(0, 60, (64, 64, 3)), 0, 255).astype(np.uint8)
        for name in ("red", "blue")
        for _ in range(8)
    ]
    asked: dict[str, Any] = {"layer": "relu", "grid": 4, "positions_per_image": 4, "min_count": 2}
    first, second = (convscope.atlas(model, tiles, **asked, **QUICK) for _ in range(2))
    assert first.positions.tobytes() == second.positions.tobytes()
    blue = first.sources[:, 0] >= 8
    for i in range(len(first.cells)):  # no cell holds both
        assert len(set(blue[first.cell_index == i])) == 1
    files = []
    for i, picture in enumerate(tiles):
        Image.fromarray(picture).save(tmp_path / f"{i:02d}.png")
        files.append(str(tmp_path / f"{i:02d}.png"))
    more = ["--layer", "relu", "--grid", "4", "--least", "2", "--size", str(SIZE), "--steps", "4", "-o", str(tmp_path)]
    done = CliRunner().invoke(app, ["atlas", MODEL, *files, *more, "--preprocessing", SETTINGS])
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert arrays["positions"].tobytes() == first.positions.tobytes()
