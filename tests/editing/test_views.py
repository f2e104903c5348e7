"""Names, patches and patterns of units beside their effects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

import convscope
from convscope import ConvscopeError
from convscope.plotting.effects import draw_effects
from convscope.results import pattern_folders
from convscope.store.unit_views import TILE_SIZE, square_tile
from tests.editing.conftest import SIZE
from tests.oracles.explorer import smooth_image
from tests.oracles.names import name_units
from tests.oracles.nets import SmallConvNet, randomized

LAYER, NAMES = "relu2", {4: "striped fur", 7: "leaves"}
IMAGES = [smooth_image(i) for i in range(4)]


@pytest.fixture(scope="module")
def store(model: convscope.Model, tmp_path_factory: pytest.TempPathFactory) -> convscope.Store:
    folder = tmp_path_factory.mktemp("views") / "store"
    store = convscope.scan(model, IMAGES, folder, layers=[LAYER], k=4, workers=0)
    name_units(store, LAYER, NAMES)
    patterns = convscope.patterns(model, LAYER, [4], steps=2)
    patterns.save(folder / pattern_folders(store.layers)[LAYER])
    return store


@pytest.fixture(scope="module")
def effects(model: convscope.Model, store: convscope.Store) -> convscope.Effects:
    return convscope.effects(model, IMAGES, LAYER, store=store, curve=True)


def test_units_have_the_names_of_the_store(effects: convscope.Effects) -> None:
    assert effects.unit_names == tuple(NAMES.get(unit, "") for unit in effects.units.tolist())
    assert {row["unit"]: row["name"] for row in effects.rows()} == dict(enumerate(effects.unit_names))
    assert "striped fur" in str(effects)
    assert effects.text_files()["effects.csv"].splitlines()[0].startswith("unit,name,")
    assert effects.labels[4:8] == ["4 striped fur", "5", "6", "7 leaves"]


def test_pictures_are_those_of_the_store(effects: convscope.Effects, store: convscope.Store) -> None:
    assert effects.patch_units.tolist() == effects.top(24)
    assert effects.patches.shape == (len(effects.patch_units), 3, TILE_SIZE, TILE_SIZE, 3)
    for unit, patches in zip(effects.patch_units.tolist(), effects.patches, strict=True):
        examples = store.unit(LAYER, unit).examples(3)
        for patch, example in zip(patches, examples, strict=False):
            np.testing.assert_array_equal(patch, square_tile(example.patch()))
        assert (patches[len(examples) :] == 255).all()
    assert effects.pattern_units.tolist() == [4]
    np.testing.assert_array_equal(effects.patterns[0], square_tile(store.unit(LAYER, 4).pattern()))


def test_patterns_are_added(model: convscope.Model, effects: convscope.Effects) -> None:
    patterns = convscope.patterns(model, LAYER, effects.top(2), steps=2)
    added = effects.with_patterns(patterns)
    np.testing.assert_array_equal(added.patterns, patterns.images)
    assert added.pattern_units.tolist() == effects.top(2)
    with pytest.raises(ConvscopeError, match="expected those of units of layer 'relu2'"):
        effects.with_patterns(convscope.patterns(model, "relu1", [0], steps=2))


def test_pictures_stand_in_the_rows_of_their_bars(effects: convscope.Effects) -> None:
    figure = draw_effects(effects)
    figure.canvas.draw()
    bars, tiles = figure.axes[:2]
    assert [label.get_text() for label in bars.get_yticklabels()] == [effects.labels[u] for u in effects.order]
    for y in range(len(effects.units)):
        heights = [axes.transData.transform((0, y))[1] for axes in (bars, tiles)]
        assert heights[0] == pytest.approx(heights[1], abs=2)  # pixels
    assert len(tiles.images) == 1 + 3 * len(effects.patch_units)


def test_saved_pictures_are_opened_again(effects: convscope.Effects, tmp_path: Path) -> None:
    opened = convscope.open(effects.save(tmp_path))
    assert opened.unit_names == effects.unit_names
    for name, array in effects.arrays().items():
        np.testing.assert_array_equal(getattr(opened, name), array)


def test_explanations_have_names_and_patches_too(
    model: convscope.Model, store: convscope.Store, effects: convscope.Effects
) -> None:
    explanation = convscope.explain(model, IMAGES[:2], layer=LAYER, store=store, features=4, draws=0)
    by_unit = dict(zip(effects.patch_units.tolist(), effects.patches, strict=True))
    for n, row in enumerate(explanation.units.tolist()):
        for f, unit in enumerate(row):
            assert explanation.unit_names[n][f] == NAMES.get(unit, "")
            expected = by_unit[unit] if unit >= 0 else np.full_like(effects.patches[0], 255)
            np.testing.assert_array_equal(explanation.patches[n, f], expected)


def test_stores_of_other_models_and_layers_are_refused(model: convscope.Model, store: convscope.Store) -> None:
    with pytest.raises(ConvscopeError, match="layer 'relu1' is not in"):
        convscope.effects(model, IMAGES, "relu1", store=store)
    net: nn.Module = randomized(SmallConvNet()).eval()
    net.get_parameter("conv1.weight").data.mul_(2)
    other = convscope.load(net, preprocessing={"size": SIZE})
    with pytest.raises(ConvscopeError, match="other weights"):
        convscope.effects(other, IMAGES, LAYER, store=store)
