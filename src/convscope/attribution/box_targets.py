"""Targets that are boxes: one object that a detector found, or may find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.detection.result import Detections
from convscope.engine.candidates import Candidates, box_iou
from convscope.errors import ConvscopeError, is_int

EXPECTED = "four numbers: left, top, right and bottom edge in pixels of the image, left < right and top < bottom"


@dataclass(frozen=True)
class BoxTarget:
    """A class in a box of an image, as a target of `convscope.heatmaps`; made by `convscope.box_target`.

    Attributes
    ----------
    label : int or str
        The class.
    box : tuple of float
        Left, top, right and bottom edge in pixels of the image.
    """

    label: int | str
    box: tuple[float, float, float, float]

    def name(self, class_name: str) -> str:
        """Name the target."""
        return f"{class_name} in {' '.join(f'{edge:.0f}' for edge in self.box)}"


@check_arguments
def box_target(label: int | str | Detections, box: Any = 0) -> BoxTarget:
    """Define the target "class `label` in a box" for a detector.

    The score is that of the best candidate: its probability of the class times its overlap with the box. ::

        s = max_a p_a(label) IoU(b_a, box)

    Gradients pass through the probabilities; the overlap is a constant of each candidate, since it has no derivative
    where a candidate equals the box.

    Parameters
    ----------
    label : int, str or Detections
        Index or name of the class; or the detections in one image.
    box : sequence of float or int
        Left, top, right and bottom edge in pixels of the image; of detections the number of the box.

    Returns
    -------
    BoxTarget
        For `targets` of `convscope.heatmaps`: one for all images, a list of T for all, or a list of T for each.

    Raises
    ------
    ConvscopeError
        For anything else than a box, and for a number that the detections do not have.

    References
    ----------
    Petsiuk et al., Black-box Explanation of Object Detectors via Saliency Maps (D-RISE), CVPR 2021, equation 3, where
    the class probability stands for the similarity of class vectors: the target's is 1 for its class.

    Examples
    --------
    >>> import convscope
    >>> convscope.box_target("dog", (20, 30, 120, 200))
    BoxTarget(label='dog', box=(20.0, 30.0, 120.0, 200.0))
    """
    if isinstance(label, Detections):
        return _target_of_detection(label, box)
    values = np.asarray(box, dtype=float).ravel() if not isinstance(box, str | int) else np.empty(0)
    if values.shape != (4,) or not np.isfinite(values).all() or not (values[:2] < values[2:]).all():
        raise ConvscopeError(f"box is {box!r}; expected {EXPECTED}")
    left, top, right, bottom = map(float, values)
    return BoxTarget(label, (left, top, right, bottom))


def _target_of_detection(detections: Detections, index: Any) -> BoxTarget:
    if len(detections) != 1:
        raise ConvscopeError(
            f"label is detections in {len(detections)} images; expected those in one: box_target(detections[0], 0)"
        )
    count = len(detections.labels)
    if not count:
        raise ConvscopeError(
            f"{detections.image_names[0]} has no boxes with a score of {detections.threshold:g} or more"
        )
    if not is_int(index) or not 0 <= index < count:
        raise ConvscopeError(f"box is {index!r}; {detections.image_names[0]} has {count} boxes, numbered from 0")
    left, top, right, bottom = map(float, detections.boxes[index])
    if not (left < right and top < bottom):
        raise ConvscopeError(f"box {index} of {detections.image_names[0]} has no area, so that nothing overlaps it")
    return BoxTarget(int(detections.labels[index]), (left, top, right, bottom))


def has_boxes(targets: object) -> bool:
    """Return whether there are boxes among targets."""
    if isinstance(targets, list | tuple):
        return any(has_boxes(target) for target in targets)
    return isinstance(targets, BoxTarget)


def parse_box_targets(targets: object, num_images: int) -> tuple[tuple[BoxTarget, ...], ...]:
    """Return T box targets for each image; nothing if `targets` holds none.

    Raises
    ------
    ConvscopeError
        For a mixture of boxes and other targets, and for different numbers of them.
    """
    items = list(targets) if isinstance(targets, Sequence) and not isinstance(targets, str) else [targets]
    nested = any(isinstance(item, Sequence) and any(isinstance(t, BoxTarget) for t in item) for item in items)
    rows = [tuple(item) if isinstance(item, Sequence) else (item,) for item in items] if nested else [tuple(items)]
    flat = [target for row in rows for target in row]
    if not any(isinstance(target, BoxTarget) for target in flat):
        return ()
    if not all(isinstance(target, BoxTarget) for target in flat):
        raise ConvscopeError("targets mixes boxes with other targets; give only one kind")
    rows = rows if nested else rows * num_images
    if len(rows) != num_images or len({len(row) for row in rows}) > 1:
        raise ConvscopeError(
            f"targets has boxes for {len(rows)} images, {', '.join(str(len(row)) for row in rows)} each; expected "
            f"equally many for each of the {num_images} images"
        )
    return tuple(rows)


def box_scores(candidates: Candidates, classes: Tensor, boxes: Tensor) -> Tensor:
    """Compute the scores of targets: the best candidate's class probability times its overlap with the box.

    Parameters
    ----------
    candidates : Candidates
        Of M inputs.
    classes : Tensor of shape (M, T)
        Class indices.
    boxes : Tensor of shape (M, T, 4)
        Edges as fractions of the input.

    Returns
    -------
    Tensor of shape (M, T)
    """
    count, num_candidates = candidates.probabilities.shape[:2]
    overlap = box_iou(candidates.boxes.detach()[:, :, None], boxes[:, None].to(candidates.boxes))
    index = classes[:, None].expand(count, num_candidates, classes.shape[1])
    return (candidates.probabilities.gather(2, index) * overlap).amax(1)
