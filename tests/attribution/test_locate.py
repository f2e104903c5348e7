"""Boxes and maps of objects whose place is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from convscope.attribution.map_boxes import find_boxes, largest_regions
from convscope.attribution.refinement import DILATIONS, SHARPNESS, STEPS, refine_maps
from tests.attribution.helpers import random_images

SIDE = 64  # of the network's input; images are twice as large
CELL = 4  # pixels of the input; 8 of the images
RED, BLUE = (230, 20, 20), (20, 20, 230)


class PatchDetector(nn.Module):
    """Scores of red and of blue: the mean over cells of 4 x 4 pixels of how much of that color exceeds the others."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 2, CELL, CELL, bias=False)
        with torch.no_grad():
            colors = torch.tensor([[1, -1, -1], [-1, -1, 1]]) / CELL**2
            self.cells.weight.copy_(colors[:, :, None, None].expand_as(self.cells.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x).relu().mean((2, 3))


class FixedSize(nn.Module):
    """The same for inputs of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.features = PatchDetector().cells
        self.head = nn.Linear(2 * (SIDE // CELL) ** 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).relu().flatten(1))


def load(net: nn.Module) -> convscope.Model:
    return convscope.load(net.eval(), preprocessing={"size": SIDE}, classes=["red", "blue"])


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return load(PatchDetector())


def paint(*patches: tuple[tuple[int, int, int, int], tuple[int, int, int]], size: int = 2 * SIDE) -> np.ndarray:
    """Return gray noise with patches at (left, top, right, bottom)."""
    image = np.random.default_rng(0).integers(100, 140, (size, size, 1), np.uint8).repeat(3, 2)
    for (left, top, right, bottom), color in patches:
        image[top:bottom, left:right] = color
    return image


# --- boxes -----------------------------------------------------------------------------------------------------------

PLACES = [((16, 24, 72, 64), RED), ((88, 72, 120, 120), BLUE)]


def test_boxes_of_planted_patches_to_a_cell(model: convscope.Model) -> None:
    locations = convscope.locate(model, paint(*PLACES), [["red", "blue"]])
    expected = [place for place, _ in PLACES]
    assert np.abs(locations.boxes[0] - expected).max() <= 2 * CELL
    assert (locations.scores > 0.9).all()
    for heatmap, (left, top, right, bottom) in zip(locations.resized()[0], expected, strict=True):
        around = heatmap[top - 2 * CELL : bottom + 2 * CELL, left - 2 * CELL : right + 2 * CELL]
        assert around.sum() > 0.99 * heatmap.sum()
        y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
        assert left <= x < right
        assert top <= y < bottom


def test_boxes_lie_in_the_image_that_was_given(model: convscope.Model) -> None:
    """An image of another shape, squashed or cropped."""
    image = np.concatenate([np.full((2 * SIDE, 2 * SIDE, 3), 120, np.uint8), paint(PLACES[0])], axis=1)
    left, top, right, bottom = PLACES[0][0]
    for fit, tolerance in (("squash", 4 * CELL), ("crop", 4 * CELL)):
        if fit == "crop":
            image = np.pad(image[:, 2 * SIDE :], ((0, 0), (2 * SIDE, 2 * SIDE), (0, 0)), mode="edge")
        (box,) = convscope.locate(model, image, "red", fit=fit).boxes[0]
        assert np.abs(box - [left + 2 * SIDE, top, right + 2 * SIDE, bottom]).max() <= tolerance


def test_no_evidence_has_no_box_and_says_so(model: convscope.Model) -> None:
    locations = convscope.locate(model, paint(PLACES[0]), [["red", "blue"]])
    assert np.isnan(locations.boxes[0, 1]).all()
    assert locations.scores[0, 1] == 0
    assert locations.notes == (
        "image 0, blue: the map is zero everywhere; no position has positive evidence in all of the maps that are "
        "multiplied",
    )
    assert "nan" not in str(locations).lower()
    assert len(locations.overlay()) == 2


@pytest.mark.parametrize("threshold", [0, 0.2, 0.6, 1])
def test_boxes_by_an_independent_labelling(threshold: float) -> None:
    maps = torch.rand(4, 3, 9, 12, generator=torch.Generator().manual_seed(1)).sub(0.4) ** 3
    boxes, scores = find_boxes(maps, threshold)
    for n, t in itertools.product(range(4), range(3)):
        positive = maps[n, t].clamp(min=0).numpy()
        regions, count = ndimage.label((positive >= threshold * positive.max()) & (positive > 0), np.ones((3, 3)))
        largest = 1 + np.argmax([(regions == i + 1).sum() for i in range(count)])
        rows, columns = ndimage.find_objects(regions)[largest - 1]
        expected = [columns.start / 12, rows.start / 9, columns.stop / 12, rows.stop / 9]
        np.testing.assert_allclose(boxes[n, t], expected, rtol=1e-6)
        assert float(scores[n, t]) == pytest.approx(positive[rows, columns].sum() / positive.sum(), rel=1e-5)


def test_largest_region_of_a_spiral() -> None:
    """The path from one end to the other takes many steps."""
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[0, 0, ::2] = True
    mask[0, 0, 1::4, -1] = mask[0, 0, 3::4, 0] = True
    assert torch.equal(largest_regions(mask), mask)
    mask[0, 0, 4] = False  # two of the same size: the first
    expected = mask.clone()
    expected[0, 0, 4:] = False
    expected[0, 0, 3] = mask[0, 0, 3]
    assert torch.equal(largest_regions(mask)[..., :3, :], expected[..., :3, :])


# --- refinement ------------------------------------------------------------------------------------------------------


def refine_by_hand(maps: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Average a map (h, w) by the equation, cell by cell; `colors` (3, h, w)."""
    height, width = maps.shape
    directions = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]

    def neighbours(row: int, column: int) -> list[tuple[int, int]]:
        return [
            (min(max(row + d * a, 0), height - 1), min(max(column + d * b, 0), width - 1))
            for d in DILATIONS
            for a, b in directions
        ]

    for _ in range(STEPS):
        average = np.zeros_like(maps)
        for row, column in itertools.product(range(height), range(width)):
            around = neighbours(row, column)
            center = colors[:, row, column]
            values = np.stack([colors[:, r, c] for r, c in around])
            deviation = np.concatenate([values, center[None]]).std(0, ddof=1)
            logits = -(np.abs(values - center) / (0.1 * deviation)).mean(1)
            weights = np.exp(logits - logits.max())
            average[row, column] = (weights / weights.sum() * [maps[r, c] for r, c in around]).sum()
        maps = average
    return maps


def test_refinement_by_the_equation() -> None:
    x = random_images(1, (3, 24, 40))
    maps = torch.randn(1, 2, 6, 10, generator=torch.Generator().manual_seed(2))
    colors = x[0].double().reshape(3, 6, 4, 10, 4).mean((2, 4)).numpy()
    for actual, values in zip(refine_maps(maps, x)[0], maps[0].double().numpy(), strict=True):
        expected = refine_by_hand(np.sign(values) * np.abs(values) ** SHARPNESS, colors)
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_refinement_keeps_constant_maps_also_on_constant_images() -> None:
    for x in (random_images(2), torch.full((2, 3, 24, 24), 0.7)):
        np.testing.assert_allclose(refine_maps(torch.full((2, 1, 3, 3), 2.0), x), 2.0**SHARPNESS, rtol=1e-5)


# --- the call --------------------------------------------------------------------------------------------------------


def test_maps_are_those_of_heatmaps(model: convscope.Model) -> None:
    image = paint(*PLACES)
    locations = convscope.locate(model, image, "red")
    heatmaps = convscope.heatmaps(model, image, "red", scale=(1, 1.625), fuse="product", refine=True)
    assert np.array_equal(locations.values, heatmaps.values)
    assert heatmaps.values.shape[2:] == (SIDE // 4, SIDE // 4)
    assert type(locations.heatmaps) is convscope.Heatmaps
    assert np.array_equal(locations.heatmaps.values, heatmaps.values)
    assert convscope.evaluate(model, image, locations)["insertion"].shape == (1, 1)


def test_cost_is_two_passes_whatever_the_number_of_targets() -> None:
    net, pixels = PatchDetector(), []
    model = load(net)
    image = paint(*PLACES)
    convscope.locate(model, image)  # the layer is chosen, and the larger size tried, once per model
    net.register_forward_pre_hook(lambda _, inputs: pixels.append(inputs[0].shape[-1] ** 2 / SIDE**2))
    convscope.locate(model, image, [["red", "blue"]])
    assert pixels == [1, 1.625**2]
    assert sum(pixels) < 5


def test_batch_equals_single_images(model: convscope.Model) -> None:
    images = [paint(*PLACES), paint(PLACES[1]), paint(*[(place, RED) for place, _ in PLACES])]
    together = convscope.locate(model, images, [["red", "blue"]] * 3)
    for n, image in enumerate(images):
        alone = convscope.locate(model, image, [["red", "blue"]])
        np.testing.assert_allclose(together.values[n], alone.values[0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(together.boxes[n], alone.boxes[0], equal_nan=True)
        np.testing.assert_allclose(together[n].scores, alone.scores, rtol=1e-5)


def test_network_of_fixed_size_is_used_at_that_size() -> None:
    torch.manual_seed(0)
    locations = convscope.locate(load(FixedSize()), paint(*PLACES), "red")
    assert "the network runs at its own size, 64 x 64, alone: locations are less exact" in locations.notes
    assert locations.settings["scale"] == [1.0]


def test_refused_arguments(model: convscope.Model) -> None:
    image = paint()
    with pytest.raises(ConvscopeError, match="threshold"):
        convscope.locate(model, image, threshold=1.5)
    with pytest.raises(ConvscopeError, match="green"):
        convscope.locate(model, image, "green")
    with pytest.raises(ConvscopeError, match="has no argument scale"):
        convscope.locate(model, image, scale=2)
    signals = convscope.load(
        nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        preprocessing={"size": (32,), "channel_order": "channels", "mean": (0,), "std": (1,)},
    )
    with pytest.raises(ConvscopeError, match="images only"):
        convscope.locate(signals, torch.zeros(1, 1, 32))


# --- the result ------------------------------------------------------------------------------------------------------


def test_saved_and_opened(model: convscope.Model, tmp_path) -> None:
    locations = convscope.locate(model, [paint(*PLACES), paint(PLACES[0])], [["red", "blue"]] * 2, threshold=0.4)
    folder = locations.save(tmp_path / "saved")
    opened = convscope.open(folder)
    assert isinstance(opened, convscope.Locations)
    for name in ("values", "boxes", "scores", "targets", "logits"):
        assert np.array_equal(getattr(opened, name), getattr(locations, name), equal_nan=True)
    assert (opened.threshold, opened.settings, opened.extras) == (0.4, locations.settings, {})
    assert str(opened) == str(locations)
    lines = (folder / "locations.csv").read_text().splitlines()
    assert lines[0] == "image,target,probability,score,left,top,right,bottom,index,file"
    assert len(lines) == 5
    assert all((folder / line.split(",")[-1]).is_file() for line in lines[1:])


def test_overlay_shows_the_box(model: convscope.Model) -> None:
    locations = convscope.locate(model, paint(PLACES[0]), "red")
    (plain,), (boxed,) = locations.heatmaps.overlay(size=256), locations.overlay(size=256)
    changed = np.argwhere((np.asarray(plain) != np.asarray(boxed)).any(2))
    left, top, right, bottom = 2 * locations.boxes[0, 0]
    assert changed.min(0).tolist() == [top, left]
    assert changed.max(0).tolist() == [bottom - 1, right - 1]
    assert len(locations.figure().axes) == 2  # the image, and the overlay
