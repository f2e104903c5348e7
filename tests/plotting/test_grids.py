"""Grids of activations and patterns: scaling, layout and colors."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import convscope
from convscope import ConvscopeError
from convscope.images.colormap import lookup_table
from convscope.plotting.activations import (
    DEAD_COLOR,
    activation_grid,
    activation_pages,
    min_max,
    render_activations,
    standardize,
)
from convscope.plotting.grids import pattern_grid, tile
from tests.plotting.helpers import make_activations

RNG = np.random.default_rng(0)


def keras_book_scaling(channel_image: np.ndarray) -> np.ndarray:
    """Scale a channel as in the notebook 5.4 of "Deep learning with Python"."""
    channel_image = channel_image - channel_image.mean()
    channel_image = channel_image / channel_image.std()
    channel_image = channel_image * 64
    channel_image = channel_image + 128
    return np.clip(channel_image, 0, 255).astype("uint8")


MAPS = {
    "normal": RNG.normal(size=(5, 9, 7)),
    "rectified": np.maximum(RNG.normal(size=(5, 9, 7)), 0),
    "far from zero": RNG.normal(size=(5, 9, 7)) * 1e-3 + 50,
    "large": RNG.normal(size=(5, 9, 7)) * 1e6,
    "one bright position": np.eye(9)[None] * 1000,
}


@pytest.mark.parametrize("name", MAPS)
def test_standardize_equals_the_scaling_of_the_keras_book(name):
    maps = MAPS[name]
    expected = np.stack([keras_book_scaling(channel) for channel in maps])
    np.testing.assert_array_equal(standardize(maps), expected)
    separate = standardize(maps.astype(np.float32)).astype(int) - expected
    assert np.abs(separate).max() <= 1


def test_standardize_of_a_constant_map_is_gray():
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(standardize(np.full((2, 3, 3), 7.0)), np.full((2, 3, 3), 128))


def test_min_max():
    maps = np.array([[[0.0, 1.0], [2.0, 4.0]], [[-3.0, -3.0], [-3.0, -1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    with np.errstate(all="raise"):
        scaled = min_max(maps)
    assert scaled.dtype == np.uint8
    assert scaled.tolist() == [[[0, 64], [128, 255]], [[0, 0], [0, 255]], [[0, 0], [0, 0]]]


def test_tile_by_hand():
    images = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    grid = tile(images, 2, margin=1, background=(9, 9, 9))
    expected = [
        [1, 1, 1, 9, 2, 2, 2],
        [1, 1, 1, 9, 2, 2, 2],
        [9, 9, 9, 9, 9, 9, 9],
        [3, 3, 3, 9, 4, 4, 4],
        [3, 3, 3, 9, 4, 4, 4],
        [9, 9, 9, 9, 9, 9, 9],
        [5, 5, 5, 9, 9, 9, 9],
        [5, 5, 5, 9, 9, 9, 9],
    ]
    assert grid[..., 0].tolist() == expected
    assert tile(images, 8).shape == (2, 15, 3)  # no more columns than cells
    assert tile(images[:1], 8, margin=5).shape == (2, 3, 3)  # no margin around the grid


def test_pattern_grid_has_the_size_of_the_keras_book():
    """Size 8 * size + 7 * margin with size 150 and margin 5."""
    images = RNG.integers(0, 256, (64, 150, 150, 3), dtype=np.uint8)
    grid = np.asarray(pattern_grid(images))
    assert grid.shape == (1235, 1235, 3)
    for i, j in ((0, 0), (3, 5), (7, 7)):
        top, left = i * 155, j * 155
        np.testing.assert_array_equal(grid[top : top + 150, left : left + 150], images[8 * i + j])
    assert not grid[150:155].any()
    assert not grid[:, 305:310].any()
    gray = np.asarray(pattern_grid(images[:3, ..., :1]))
    assert gray.shape == (150, 460, 3)
    np.testing.assert_array_equal(gray[:, :150], images[0, ..., :1].repeat(3, 2))
    multichannel = np.concatenate([images[:2], images[2:4, ..., :2]], axis=-1)
    np.testing.assert_array_equal(np.asarray(pattern_grid(multichannel))[:, :150], images[0])


def test_activation_grid_contains_each_colored_map():
    maps = RNG.normal(size=(20, 32, 32))
    grid = np.asarray(activation_grid(maps, np.zeros(20, bool)))
    assert grid.shape == (2 * 32 + 1, 16 * 33 - 1, 3)  # 16 columns, as in the book
    for i in (0, 7, 19):
        top, left = i // 16 * 33, i % 16 * 33
        expected = lookup_table("viridis")[keras_book_scaling(maps[i])]
        np.testing.assert_array_equal(grid[top : top + 32, left : left + 32], expected)
    inferno = np.asarray(activation_grid(maps, np.zeros(20, bool), columns=5, scaling="minmax", colormap="inferno"))
    np.testing.assert_array_equal(inferno[:32, 33:65], lookup_table("inferno")[min_max(maps)[1]])
    with pytest.raises(ConvscopeError, match="scaling 'max' is not known; expected standard or minmax"):
        activation_grid(maps, np.zeros(20, bool), scaling="max")
    with pytest.raises(ConvscopeError, match="nearest: viridis"):
        activation_grid(maps, np.zeros(20, bool), colormap="viridi")


def test_small_maps_are_enlarged_by_whole_pixels():
    maps = RNG.normal(size=(2, 7, 7))
    grid = np.asarray(activation_grid(maps, np.zeros(2, bool)))
    assert grid.shape == (28, 28 * 2 + 1, 3)
    expected = lookup_table("viridis")[standardize(maps[:1])[0]].repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(grid[:28, :28], expected)


def test_dead_channels_are_gray_with_a_cross():
    """Rounding noise around a constant is not amplified."""
    maps = RNG.normal(size=(1, 3, 16, 16)).astype(np.float32)
    maps[0, 1] = 1 + RNG.normal(size=(16, 16)) * 1e-7
    maps[0, 2] = 0
    net = convscope.load(nn.Sequential(nn.Conv2d(3, 3, 3)), preprocessing={"size": 18})
    result = make_activations(net, **{"0": maps})
    assert result.summary("0")["dead"].tolist() == [[False, True, True]]
    grid = np.asarray(activation_pages(result, "0")[0])
    alive, noise, constant = (grid[:, 33 * i : 33 * i + 32] for i in range(3))
    np.testing.assert_array_equal(noise, constant)
    colors = {tuple(color) for color in constant.reshape(-1, 3).tolist()}
    assert colors == {DEAD_COLOR, (150, 150, 150)}  # gray, with a cross
    assert (constant[0, 0] == 150).all()
    assert (constant[0, -1] == 150).all()
    assert (constant[0, 16] == 90).all()
    for colormap in ("viridis", "jet", "inferno"):
        assert not {DEAD_COLOR, (150, 150, 150)} & {tuple(color) for color in lookup_table(colormap).tolist()}
    assert len(np.unique(alive.reshape(-1, 3), axis=0)) > 50


def test_activation_pages(model):
    wide = make_activations(model, **{"0": RNG.normal(size=(1, 2048, 2, 2))})
    pages = activation_pages(wide, "0")
    assert len(pages) == 8
    assert len({page.size for page in pages}) == 1
    assert pages[0].size == (16 * 33 - 1, 16 * 33 - 1)
    third = np.asarray(pages[2])[:32, :32]
    expected = lookup_table("viridis")[standardize(wide["0"][0, 512:513])[0]].repeat(16, 0).repeat(16, 1)
    np.testing.assert_array_equal(third, expected)
    names = [name for name, _ in render_activations(wide)]
    assert names == [f"an-image-with-a-very-long-name--number-0_0_page{n}.png" for n in range(1, 9)]
    assert [len(activation_pages(wide, "0", limit=n)) for n in (2048, 1024, 3)] == [1, 2, 683]


@pytest.mark.parametrize("shape", [(2, 7), (2, 5, 7), (2, 4, 1, 1)])
def test_layers_without_positions_have_no_grid(model, shape):
    result = make_activations(model, **{"0": RNG.normal(size=shape)})
    with pytest.raises(ConvscopeError, match="no maps to draw"):
        activation_pages(result, "0")
    with pytest.raises(ConvscopeError, match="none of these layers has maps to draw"):
        result.figure()
    assert not list(render_activations(result))
