"""Crops of pictures: where they are cut, and which of them show something best."""

from __future__ import annotations

import math

import numpy as np


def crop_boxes(
    image: tuple[int, int], like: tuple[int, int], share: float, most: int, seed: tuple[int, int]
) -> np.ndarray:
    """Crops (M, 4) of a picture (H, W): top, left, bottom, right in its pixels, row by row; M is `most` at most.

    Their sides are `share` of the largest rectangle with the proportions `like` (h, w) that fits into the picture. They
    lie on a grid from rim to rim, half a crop or a little less from one to the next; of a larger grid `most` are drawn
    at random, from `seed`.
    """
    scale = share * min(side / wish for side, wish in zip(image, like, strict=True))
    sides = [min(side, max(1, round(scale * wish))) for side, wish in zip(image, like, strict=True)]
    steps = [math.ceil((whole - side) / max(side / 2, 1)) + 1 for whole, side in zip(image, sides, strict=True)]
    count = math.prod(steps)
    chosen = np.arange(count)
    if count > most:
        chosen = np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
    rows, columns = np.divmod(chosen, steps[1])
    top, left = (
        np.rint(at * (whole - side) / max(1, n - 1)).astype(np.int32)
        for at, whole, side, n in zip((rows, columns), image, sides, steps, strict=True)
    )
    return np.stack([top, left, top + sides[0], left + sides[1]], axis=1).astype(np.int32)


def non_overlapping_top_k(values: np.ndarray, crops: np.ndarray, count: int, overlap: float) -> np.ndarray:
    """The `count` crops with the highest of the values (M,) above 0, -1 where there are no more: int64 (count,).

    crops (M, 5): picture, top, left, bottom, right. One that overlaps a better one by more than `overlap`
    (intersection over union) is passed over.
    """
    found: list[int] = []
    for i in np.argsort(-values, kind="stable"):
        if len(found) == count or values[i] <= 0:
            break
        if all(_overlap(crops[i], crops[j]) <= overlap for j in found):
            found.append(int(i))
    return np.array(found + [-1] * (count - len(found)))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two crops, each with its picture; 0 of crops of different pictures."""
    sides = np.minimum(a[3:], b[3:]) - np.maximum(a[1:3], b[1:3])
    if a[0] != b[0] or sides.min() <= 0:
        return 0.0
    areas = [int(np.prod(box[3:] - box[1:3])) for box in (a, b)]
    inner = int(np.prod(sides))
    return inner / (sum(areas) - inner)
