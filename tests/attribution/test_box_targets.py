"""Heatmaps of boxes: scores and gradients in closed form, and D-RISE from its equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convscope
from convscope.attribution.methods import cam, rise
from convscope.errors import ConvscopeError
from tests.oracles.detectors import SIDE, STRIDE, CellDetector, image_with_squares

WHITE, GRAY, RED = (255, 255, 255), (204, 204, 204), (255, 0, 0)


@pytest.fixture(scope="module")
def model():
    """A detector of bright and red cells."""
    return convscope.load(
        CellDetector().eval(), task="detection", classes=["gray", "red"], preprocessing={"size": (SIDE, SIDE)}
    )


@pytest.fixture(scope="module")
def image():
    """Two bright squares of the same class."""
    return image_with_squares({(8, 16): GRAY, (24, 0): WHITE})


def test_score_is_probability_times_overlap(model, image):
    targets = [convscope.box_target("gray", (8, 16, 16, 24)), convscope.box_target("gray", (8, 16, 24, 24))]
    heatmaps = convscope.heatmaps(model, image, targets, method="saliency")
    np.testing.assert_allclose(heatmaps.logits, [[0.8, 0.4]], atol=1e-6)
    assert heatmaps.names == [["gray in 8 16 16 24", "gray in 8 16 24 24"]]


def test_gradient_is_that_of_the_cell_in_the_box_alone(model, image):
    detections = convscope.detect(model, image)
    assert detections.boxes[1].tolist() == [8, 16, 16, 24]
    heatmaps = convscope.heatmaps(model, image, convscope.box_target(detections[0], 1), method="saliency")
    expected = np.zeros((SIDE, SIDE), np.float32)
    expected[16:24, 8:16] = 1 / (3 * STRIDE**2)
    np.testing.assert_allclose(heatmaps.values[0, 0], expected, atol=1e-8)


def test_class_of_the_box_decides(model):
    image = image_with_squares({(8, 16): RED})
    gray, red = (convscope.box_target(name, (8, 16, 16, 24)) for name in ("gray", "red"))
    heatmaps = convscope.heatmaps(model, image, [gray, red], method="input-x-gradient")
    np.testing.assert_allclose(heatmaps.logits, [[1 / 3, 1]], atol=1e-6)
    np.testing.assert_allclose(heatmaps.values[0].sum((1, 2)), [1 / 3, 1], atol=1e-5)


def test_boxes_lie_in_the_image_not_in_the_input(model):
    image = np.zeros((64, 128, 3), np.uint8)
    image[32:48, 32:64] = 255
    (score,) = convscope.detect(model, image).scores
    heatmaps = convscope.heatmaps(model, image, convscope.box_target("gray", (32, 32, 64, 48)), method="saliency")
    np.testing.assert_allclose(heatmaps.logits, [[score]], atol=1e-5)
    (resized,) = heatmaps.resized()
    assert resized[0, 30:50, 28:68].sum() > 0.99 * resized[0].sum()


def test_flips_mirror_the_box_with_the_image(model, image):
    target = convscope.box_target("gray", (8, 16, 16, 24))
    alone = convscope.heatmaps(model, image, target, method="input-x-gradient")
    flipped = convscope.heatmaps(model, image, target, method="input-x-gradient", smooth="flips")
    np.testing.assert_allclose(flipped.values, alone.values, atol=1e-6)  # the detector treats mirror images alike
    np.testing.assert_allclose(flipped.logits, alone.logits)


def test_flips_mirror_the_region_with_the_image():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)).eval()
    model = convscope.load(network, task="segmentation", preprocessing={"size": (SIDE, SIDE)})
    mask = np.zeros((SIDE, SIDE))
    mask[4:12, 2:9] = 1
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    alone, flipped = (
        convscope.heatmaps(model, pixels, convscope.segmentation_target(1, mask), method="saliency", smooth=smooth)
        for smooth in (None, "flips")
    )
    np.testing.assert_allclose(flipped.values, alone.values, atol=1e-7)
    assert not flipped.values[0, 0, mask == 0].any()


def test_each_image_has_its_own_boxes(model):
    images = [image_with_squares({(0, 0): WHITE}), image_with_squares({(24, 24): GRAY})]
    boxes = [[convscope.box_target("gray", (0, 0, 8, 8))], [convscope.box_target("gray", (24, 24, 32, 32))]]
    together = convscope.heatmaps(model, images, boxes, method="saliency")
    np.testing.assert_allclose(together.logits[:, 0], [1, 0.8], atol=1e-5)
    for n, image in enumerate(images):
        alone = convscope.heatmaps(model, image, boxes[n], method="saliency")
        np.testing.assert_array_equal(alone.values[0], together.values[n])


def test_grad_cam_lies_in_the_box(model):
    image = image_with_squares({(8, 16): WHITE})
    heatmaps = convscope.heatmaps(model, image, convscope.box_target("gray", (8, 16, 16, 24)), layer="cells")
    assert np.flatnonzero(heatmaps.values[0, 0] > 0).tolist() == [2 * 4 + 1]


def test_odam_is_its_equation_and_the_default(model, image):
    """The gradient of the box's cell, spread by a Gaussian of a quarter of the box's sides, weights the other cells."""
    box = (8, 16, 16, 24)
    heatmaps = convscope.heatmaps(model, image, convscope.box_target("gray", box), layer="cells")
    assert heatmaps.method == "odam"
    cells = image.mean(2).reshape(4, STRIDE, 4, STRIDE).mean((1, 3)) / 255
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 0.25) ** 2)  # of one cell, a quarter of which is the deviation
    kernel /= kernel.sum()
    weights = np.outer(kernel[1:5], kernel[2:6])  # around row 2, column 1
    np.testing.assert_allclose(heatmaps.values[0, 0], weights * cells, rtol=1e-4, atol=1e-7)


def test_odam_of_a_batch_and_many_targets_equals_single_ones():
    generator = torch.Generator().manual_seed(0)
    activation, gradient = torch.randn(2, 3, 5, 6, 9, generator=generator)
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.4], [0.0, 0.0, 1, 1], [0.5, 0.5, 0.51, 0.9]])
    together = cam.odam(activation, gradient, boxes)
    for n in range(3):
        alone = cam.odam(activation[n : n + 1], gradient[n : n + 1], boxes[n : n + 1])[0]
        torch.testing.assert_close(alone, together[n])
        deviations = (boxes[n, 2:] - boxes[n, :2]).numpy()[::-1] * (6, 9) / 4
        smoothed = np.empty((5, 6, 9))
        for k in range(5):
            smoothed[k] = brute_force_blur(gradient[n, k].numpy(), deviations)
        np.testing.assert_allclose(together[n], (smoothed * activation[n].numpy()).sum(0), rtol=1e-4, atol=1e-5)
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).repeat(3, 1)
    torch.testing.assert_close(cam.odam(activation, gradient, point), cam.hirescam(activation, gradient))


def brute_force_blur(values, deviations):
    """Sum over all positions of the value times a Gaussian, normalised on integers as far as the map is long."""
    result = np.zeros_like(values, dtype=float)
    kernels = []
    for count, deviation in zip(values.shape, deviations, strict=True):
        kernel = {d: np.exp(-0.5 * (d / deviation) ** 2) for d in range(1 - count, count)}
        total = sum(kernel.values())
        kernels.append({d: value / total for d, value in kernel.items()})
    for i, j in np.ndindex(values.shape):
        for a, b in np.ndindex(values.shape):
            result[i, j] += kernels[0][a - i] * kernels[1][b - j] * values[a, b]
    return result


def test_odam_without_boxes_names_grad_cam(model, image):
    with pytest.raises(ConvscopeError, match="for classes: grad-cam"):
        convscope.heatmaps(model, image, "gray", method="odam", layer="cells")


def overlap(first, second):
    """Intersection over union of two boxes."""
    width = max(0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (first, second)]
    return width * height / (sum(areas) - width * height)


def test_d_rise_equals_its_equation(model, image):
    box, samples = (8, 16, 18, 24), 40
    heatmaps = convscope.heatmaps(
        model, image, convscope.box_target("gray", box), method="d-rise", samples=samples, cells=4, tolerance=0
    )
    generator = torch.Generator().manual_seed(0)
    grids, shifts = rise._random_grids(samples, (4, 4), (SIDE, SIDE), 0.5, generator)
    masks = rise._upsample_masks(grids, shifts, (SIDE, SIDE)).numpy().astype(np.float64)
    pixels = image.mean(2) / 255
    expected = np.zeros((SIDE, SIDE))
    for mask in masks:
        cells = (pixels * mask).reshape(4, STRIDE, 4, STRIDE).mean((1, 3))
        weight = max(
            cells[row, column] * overlap((8 * column, 8 * row, 8 * column + 8, 8 * row + 8), box)
            for row in range(4)
            for column in range(4)
        )
        expected += weight * mask / (0.5 * samples)
    np.testing.assert_allclose(heatmaps.values[0, 0], expected, rtol=1e-4, atol=1e-6)


def test_d_rise_of_a_function_has_its_energy_in_the_box(image):
    module = CellDetector().eval()

    def black_box(images):
        with torch.no_grad():
            return module(images)

    model = convscope.load(black_box, task="detection", classes=["gray", "red"], preprocessing={"size": (SIDE, SIDE)})
    target = convscope.box_target("gray", (24, 0, 32, 8))
    heatmaps = convscope.heatmaps(model, image, target, method="d-rise", samples=1000, cells=4, tolerance=0)
    values = heatmaps.values[0, 0]
    assert values[:8, 24:].mean() > 1.3 * values.mean()
    assert np.unravel_index(values.argmax(), values.shape)[0] < 8


def test_d_rise_without_boxes_names_rise(model, image):
    with pytest.raises(ConvscopeError, match="for classes: rise"):
        convscope.heatmaps(model, image, "gray", method="d-rise")


@pytest.mark.parametrize("box", [(1, 2, 3), (5, 0, 4, 9), (0, 0, np.nan, 3), "0 0 1 1"])
def test_other_boxes_are_refused(box):
    with pytest.raises(ConvscopeError, match="expected four numbers"):
        convscope.box_target(0, box)


def test_detected_box_without_area_is_refused():
    def line(images):
        return torch.tensor([16.0, 16, 8, 0, 0.9]).reshape(1, 5, 1).repeat(len(images), 1, 1)

    model = convscope.load(line, task="detection", preprocessing={"size": (SIDE, SIDE)})
    with pytest.raises(ConvscopeError, match="has no area"):
        convscope.box_target(convscope.detect(model, image_with_squares({})))


def test_perturbed_layers_may_leave_the_range_of_probabilities(model, image):
    """The proof of a layer's influence replaces its output by noise; the scores are then no probabilities."""
    heatmaps = convscope.heatmaps(model, image, "gray")
    assert np.exp(heatmaps.logits[0, 0]) == pytest.approx(1, abs=1e-5)


def test_boxes_for_a_classifier_are_refused(lite0, photos):
    with pytest.raises(ConvscopeError, match="task='detection'"):
        convscope.heatmaps(lite0, photos[0], convscope.box_target(1, (0, 0, 8, 8)))


def test_boxes_and_classes_cannot_be_mixed(model, image):
    with pytest.raises(ConvscopeError, match="mixes"):
        convscope.heatmaps(model, image, [convscope.box_target(0, (0, 0, 8, 8)), "gray"])


def test_deletion_of_the_box_loses_its_score(model, image):
    heatmaps = convscope.heatmaps(model, image, convscope.box_target("gray", (8, 16, 16, 24)), method="saliency")
    evaluation = convscope.evaluate(model, image, heatmaps, metrics=("deletion",))
    assert evaluation.curves["deletion"][0, 0, 0] == pytest.approx(0.8, abs=1e-5)
    assert evaluation.curves["deletion"][0, 0, -1] < 0.8


def test_layers_that_come_into_question_for_boxes_are_found_once(image, monkeypatch):
    """The boxes choose among them anew in each call."""
    from convscope.attribution import default_layer

    calls = []
    count = default_layer._num_boxes
    monkeypatch.setattr(default_layer, "_num_boxes", lambda *args: calls.append(1) or count(*args))
    fresh = convscope.load(CellDetector().eval(), task="detection", preprocessing={"size": (SIDE, SIDE)})
    layers = [
        convscope.heatmaps(fresh, image, convscope.box_target(0, box)).layer
        for box in ((8, 16, 16, 24), (0, 0, 32, 32))
    ]
    assert len(calls) == 1
    assert set(layers) <= set(fresh.layers.names)
