"""Detections of networks whose boxes are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import convscope
from convscope.engine.candidates import DetectionReader, box_iou
from convscope.errors import ConvscopeError
from tests.oracles.detectors import SIDE, CellDetector, image_with_squares

WHITE, GRAY, RED = (255, 255, 255), (204, 204, 204), (255, 0, 0)


@pytest.fixture(scope="module")
def model():
    """A detector of bright and red cells."""
    return convscope.load(
        CellDetector().eval(), task="detection", classes=["gray", "red"], preprocessing={"size": (SIDE, SIDE)}
    )


def test_boxes_labels_and_scores_of_planted_squares(model):
    image = image_with_squares({(8, 16): GRAY, (24, 0): RED})
    detections = convscope.detect(model, image, threshold=0.5)
    np.testing.assert_array_equal(detections.boxes, [[24, 0, 32, 8], [8, 16, 16, 24]])
    assert detections.names == ["red", "gray"]
    np.testing.assert_allclose(detections.scores, [1, 0.8], atol=1e-6)


def test_threshold_is_inclusive_and_can_leave_nothing(model):
    image = image_with_squares({(8, 16): GRAY})
    assert len(convscope.detect(model, image, threshold=0.79).labels) == 1
    nothing = convscope.detect(model, image, threshold=0.81)
    assert len(nothing.labels) == 0
    assert nothing.boxes.shape == (0, 4)
    with pytest.raises(ConvscopeError, match="has no boxes"):
        convscope.box_target(nothing[0])


def test_boxes_go_back_through_squash_exactly(model):
    image = np.zeros((64, 128, 3), np.uint8)
    image[32:48, 32:64] = 255  # cell (row 2, column 1) of the 32 x 32 input
    detections = convscope.detect(model, image, threshold=0.9)
    np.testing.assert_allclose(detections.boxes, [[32, 32, 64, 48]], atol=1e-4)


def test_boxes_go_back_through_crop_exactly():
    preprocessing = {"size": (SIDE, SIDE), "resize": SIDE}
    model = convscope.load(CellDetector().eval(), task="detection", preprocessing=preprocessing)
    image = np.zeros((64, 128, 3), np.uint8)  # the crop is its middle, 64 x 64, shown at half the size
    image[16:32, 32 + 48 : 32 + 64] = 255
    detections = convscope.detect(model, image, threshold=0.9, fit="crop")
    np.testing.assert_allclose(detections.boxes, [[80, 16, 96, 32]], atol=1e-4)


def test_boxes_go_back_through_a_gray_border_exactly(model):
    image = np.zeros((32, 64, 3), np.uint8)  # shown at half the size, below and above 8 gray rows
    image[16:32, 32:48] = 255  # cell (row 2, column 2) of the 32 x 32 input
    detections = convscope.detect(model, image, threshold=0.9, fit="pad")
    np.testing.assert_allclose(detections.boxes, [[32, 16, 48, 32]], atol=1e-4)
    heatmaps = convscope.heatmaps(model, image, convscope.box_target(detections[0]), method="saliency", fit="pad")
    np.testing.assert_allclose(heatmaps.logits, [detections.scores], atol=1e-5)
    (resized,) = heatmaps.resized()
    assert resized.shape == (1, 32, 64)
    assert resized[0, 15:, 31:49].sum() > 0.999 * resized[0].sum()


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (90, 100)])
def test_boxes_go_back_through_a_letterbox_function(shape):
    height, width = shape
    side = max(shape)

    def letterbox(image):
        canvas = Image.new("RGB", (side, side), (114, 114, 114))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        pixels = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))
        return torch.tensor(pixels).permute(2, 0, 1) / 255

    model = convscope.load(CellDetector().eval(), task="detection", preprocessing=letterbox)
    top, left = (side - height) // 2, (side - width) // 2
    cell = side // 4
    image = np.zeros((height, width, 3), np.uint8)
    x0, y0 = max(0, cell - left), max(0, 2 * cell - top)
    image[y0 : 3 * cell - top, x0 : 2 * cell - left] = 255
    detections = convscope.detect(model, image, threshold=0.5)
    expected = np.clip([cell - left, 2 * cell - top, 2 * cell - left, 3 * cell - top], 0, [width, height] * 2)
    np.testing.assert_allclose(detections[0].boxes[:1], [expected], atol=0.02 * side)


def test_batch_equals_single_images(model):
    images = [image_with_squares(squares) for squares in ({(0, 0): WHITE}, {}, {(8, 8): RED, (16, 0): GRAY})]
    together = convscope.detect(model, images)
    assert together.counts.tolist() == [1, 0, 2]
    for image, one in zip(images, together, strict=True):
        alone = convscope.detect(model, image)
        np.testing.assert_array_equal(one.boxes, alone.boxes)
        np.testing.assert_array_equal(one.scores, alone.scores)
        np.testing.assert_array_equal(one.labels, alone.labels)


def test_overlapping_boxes_of_a_class_are_removed_once():
    def two_boxes(_module, x):
        columns = torch.tensor([[16.0, 16, 16, 16, 0.9, 0], [17, 16, 16, 16, 0.8, 0], [16, 16, 16, 16, 0.1, 0.7]])
        return columns.T.expand(len(x), -1, -1) + 0 * x.mean()

    model = convscope.load(
        nn.Conv2d(3, 1, 1), forward=two_boxes, task="detection", preprocessing={"size": (SIDE, SIDE)}
    )
    image = image_with_squares({})
    assert convscope.detect(model, image).labels.tolist() == [0, 1]
    np.testing.assert_allclose(convscope.detect(model, image, overlap=1).scores, [0.9, 0.8, 0.7], atol=1e-6)


def test_iou_is_intersection_over_union():
    first, second = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 3, 3])
    assert float(box_iou(first, second)) == pytest.approx(1 / 7)
    assert float(box_iou(first, first)) == 1
    assert float(box_iou(first, first + 5)) == 0


def test_formats_of_one_set_of_candidates_agree():
    boxes = torch.tensor([[[8.0, 4, 16, 20], [0, 0, 32, 32]]])
    scores = torch.tensor([[[0.9, 0.0], [0.0, 0.4]]])
    centered = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], 2)
    columns = torch.cat([centered, scores], 2)
    objectness = torch.cat([centered, torch.full((1, 2, 1), 0.5), scores / 0.5 * 0.5], 2)
    outputs = {
        "corners": {"boxes": boxes, "scores": scores},
        "columns": columns.transpose(1, 2),
        "rows": columns.repeat(1, 4, 1),
        "lists": [{"boxes": boxes[0], "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.4])}],
        "queries": {"logits": scores.clamp(1e-6).logit(), "pred_boxes": centered / 32},
    }
    for name, output in outputs.items():
        candidates = DetectionReader(2).candidates(output, (32, 32))
        torch.testing.assert_close(candidates.boxes[:, :2], boxes / 32, msg=name)
        torch.testing.assert_close(candidates.probabilities[:, :2], scores, atol=1e-5, rtol=0, msg=name)
    halved = DetectionReader(2).candidates(objectness.repeat(1, 5, 1), (32, 32))
    torch.testing.assert_close(halved.probabilities[:, :2], scores / 2)


def test_logits_in_place_of_probabilities_are_refused():
    with pytest.raises(ConvscopeError, match="expected probabilities"):
        DetectionReader().check(torch.full((1, 6, 9), 3.0))


def test_a_classifier_is_refused_with_the_argument_that_helps(lite0, photos):
    with pytest.raises(ConvscopeError, match="task='detection'"):
        convscope.detect(lite0, photos[0])


def test_function_as_detector_sees_the_planted_square():
    module = CellDetector().eval()

    def black_box(images):
        with torch.no_grad():
            return module(images)

    model = convscope.load(black_box, task="detection", classes=["gray", "red"], preprocessing={"size": (SIDE, SIDE)})
    detections = convscope.detect(model, image_with_squares({(16, 8): WHITE}))
    np.testing.assert_array_equal(detections.boxes, [[16, 8, 24, 16]])


def test_saved_detections_open_again(model, tmp_path):
    images = [image_with_squares({(8, 8): WHITE}), image_with_squares({(0, 0): RED, (24, 24): GRAY})]
    detections = convscope.detect(model, images)
    folder = detections.save(tmp_path / "out")
    table = (folder / "detections.csv").read_text().splitlines()
    assert len(table) == 4
    assert table[0].startswith("image,box,class,score")
    opened = convscope.open(folder)
    np.testing.assert_array_equal(opened.boxes, detections.boxes)
    assert opened[1].names == ["red", "gray"]
    assert opened.rows() == detections.rows()
    assert len(opened.figure().axes) == 2


def test_figure_draws_each_box_where_it_is(model):
    from matplotlib.patches import Rectangle

    detections = convscope.detect(model, image_with_squares({(8, 16): WHITE}))
    (axes,) = detections.figure().axes
    (patch,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert (*patch.get_xy(), patch.get_width(), patch.get_height()) == (7.5, 15.5, 8, 8)


def test_lists_of_boxes_without_labels_are_of_one_class():
    """As face detectors return them: arrays of objects, and None where nothing was found."""

    def faces(images):
        found = [np.array([[4.0, 4, 20, 28], [0, 0, 8, 8]], object), np.array([0.9, 0.6], object)]
        return [
            {"boxes": found[0], "scores": found[1]} if image.mean() > 0.5 else {"boxes": None, "scores": [None]}
            for image in images
        ]

    model = convscope.load(faces, task="detection", classes=["face"], preprocessing={"size": (SIDE, SIDE)})
    white, black = np.full((SIDE, SIDE, 3), 255, np.uint8), np.zeros((SIDE, SIDE, 3), np.uint8)
    detections = convscope.detect(model, [black, white])
    assert detections.counts.tolist() == [0, 2]
    np.testing.assert_allclose(detections.boxes, [[4, 4, 20, 28], [0, 0, 8, 8]], atol=1e-5)
    assert detections.names == ["face", "face"]
    heatmaps = convscope.heatmaps(model, white, convscope.box_target(detections[1]), samples=20)
    assert heatmaps.method == "d-rise"
    np.testing.assert_allclose(heatmaps.logits, [[0.9]], atol=1e-5)
