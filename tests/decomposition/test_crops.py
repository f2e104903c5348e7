"""Grids of crops, and the selection of crops that do not overlap."""

from __future__ import annotations

import numpy as np
import pytest

from convscope.decomposition.crops import crop_boxes, non_overlapping_top_k


def test_crops_form_a_grid_up_to_the_borders() -> None:
    """A third of 90 x 180, square: 30 pixels; (90 - 30) / 15 + 1 = 5 rows, (180 - 30) / 15 + 1 = 11."""
    boxes = crop_boxes((90, 180), (224, 224), 1 / 3, 100, (0, 0))
    rows, columns = np.unique(boxes[:, 0]), np.unique(boxes[:, 1])
    assert rows.tolist() == [0, 15, 30, 45, 60]
    assert columns.tolist() == list(range(0, 151, 15))
    assert len(boxes) == 55
    assert (boxes[:, 2:] - boxes[:, :2] == 30).all()


@pytest.mark.parametrize(("image_size", "fraction"), [((7, 500), 0.5), ((33, 47), 0.9), ((1, 1), 0.3), ((64, 64), 1.0)])
def test_crops_are_inside_the_image_and_of_one_size(image_size: tuple[int, int], fraction: float) -> None:
    boxes = crop_boxes(image_size, (20, 30), fraction, 25, (0, 0))
    assert 1 <= len(boxes) <= 25
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= image_size).all()
    assert len(np.unique(boxes[:, 2:] - boxes[:, :2], axis=0)) == 1
    height, width = boxes[0, 2:] - boxes[0, :2]
    assert abs(height * 30 - width * 20) <= 30  # the proportions of the input, up to rounding
    assert len(np.unique(boxes, axis=0)) == len(boxes)


def test_random_crops_depend_on_seed_and_image() -> None:
    boxes = [crop_boxes((300, 400), (1, 1), 0.2, 10, (seed, index)) for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert (boxes[0] == boxes[1]).all()
    assert (boxes[0] != boxes[2]).any()
    assert (boxes[0] != boxes[3]).any()


def test_selected_crops_do_not_overlap() -> None:
    crops = np.array([[0, 0, 0, 10, 10], [0, 2, 0, 12, 10], [0, 8, 0, 18, 10], [1, 0, 0, 10, 10], [1, 50, 0, 60, 10]])
    # The second covers 8 of 12 rows of the first, the third 2 of 18; the fourth is in another image.
    assert non_overlapping_top_k(np.array([5.0, 4, 3, 2, 0]), crops, 5, 0.3).tolist() == [0, 2, 3, -1, -1]
    assert non_overlapping_top_k(np.array([5.0, 4, 3, 2, 0]), crops, 5, 0.66).tolist() == [0, 2, 3, -1, -1]
    assert non_overlapping_top_k(np.array([5.0, 4, 3, 2, 0]), crops, 5, 0.67).tolist() == [0, 1, 2, 3, -1]
    assert non_overlapping_top_k(np.array([1.0, 1, 1, 1, 1]), crops, 2, 0.3).tolist() == [0, 2]
