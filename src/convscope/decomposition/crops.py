"""Choose crops of images, find the best that do not overlap, and cut them out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from convscope.images.decoding import Array


def crop_boxes(
    image_size: tuple[int, int], input_size: tuple[int, int], fraction: float, max_crops: int, seed: tuple[int, int]
) -> np.ndarray:
    """Place crops on a grid over an image, half a crop (or slightly less) apart.

    Parameters
    ----------
    image_size : tuple of int
        (H, W) of the image.
    input_size : tuple of int
        (h, w) of the network's input, whose proportions crops have.
    fraction : float
        Side of a crop relative to the largest rectangle of these proportions in the image, in (0, 1].
    max_crops : int
        Of a larger grid, so many crops are drawn at random.
    seed : tuple of int
        Seed of these random crops.

    Returns
    -------
    ndarray
        (M, 4) int32, M <= `max_crops`: top, left, bottom, right in pixels, row by row.
    """
    scale = fraction * min(side / input_side for side, input_side in zip(image_size, input_size, strict=True))
    sides = [
        min(side, max(1, round(scale * input_side))) for side, input_side in zip(image_size, input_size, strict=True)
    ]
    steps = [math.ceil((length - side) / max(side / 2, 1)) + 1 for length, side in zip(image_size, sides, strict=True)]
    count = math.prod(steps)
    cells = np.arange(count)
    if count > max_crops:
        cells = np.sort(np.random.default_rng(seed).choice(count, max_crops, replace=False))
    rows, columns = np.divmod(cells, steps[1])
    top, left = (
        np.rint(index * (length - side) / max(1, n - 1)).astype(np.int32)
        for index, length, side, n in zip((rows, columns), image_size, sides, steps, strict=True)
    )
    return np.stack([top, left, top + sides[0], left + sides[1]], axis=1).astype(np.int32)


def non_overlapping_top_k(values: np.ndarray, crops: np.ndarray, k: int, max_overlap: float) -> np.ndarray:
    """Select the k crops with the highest positive values, without those that overlap a better one.

    Parameters
    ----------
    values : ndarray
        (M,) one per crop.
    crops : ndarray
        (M, 5) image, top, left, bottom, right.
    k : int
        Maximum number of crops.
    max_overlap : float
        The largest intersection over union of two selected crops.

    Returns
    -------
    ndarray
        (k,) int64 indices, best first; -1 where there are no more.
    """
    selected: list[int] = []
    for i in np.argsort(-values, kind="stable"):
        if len(selected) == k or values[i] <= 0:
            break
        if all(_intersection_over_union(crops[i], crops[j]) <= max_overlap for j in selected):
            selected.append(int(i))
    return np.array(selected + [-1] * (k - len(selected)))


def cut_examples(
    load_image: Callable[[int], Array], crops: np.ndarray, examples: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Cut examples out of their images and resize them.

    Parameters
    ----------
    load_image : callable
        Returns an image by its index, uint8 (H, W, 3); called once for each image.
    crops : ndarray
        (M, 5) image, top, left, bottom, right.
    examples : ndarray
        (R, P) indices of crops; -1 where there is none.
    size : tuple of int
        Height and width (h, w) of the result.

    Returns
    -------
    ndarray
        uint8 (R, P, h, w, 3), white where there is no example.
    """
    patches = np.full((*examples.shape, *size, 3), 255, np.uint8)
    image_of_example = np.where(examples >= 0, crops[examples, 0], -1)
    for image in np.unique(image_of_example[image_of_example >= 0]):
        original = load_image(image)
        for position in zip(*np.nonzero(image_of_example == image), strict=True):
            top, left, bottom, right = crops[examples[position], 1:]
            patch = Image.fromarray(original[top:bottom, left:right])
            patches[position] = np.asarray(patch.resize(size[::-1], Image.Resampling.BICUBIC))
    return patches


def _intersection_over_union(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the overlap of two crops (image, top, left, bottom, right); 0 for different images."""
    sides = np.minimum(a[3:], b[3:]) - np.maximum(a[1:3], b[1:3])
    if a[0] != b[0] or sides.min() <= 0:
        return 0.0
    intersection = int(np.prod(sides))
    areas = [int(np.prod(box[3:] - box[1:3])) for box in (a, b)]
    return intersection / (sum(areas) - intersection)
