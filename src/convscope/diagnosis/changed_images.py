"""Images before and after a shortcut is inserted or removed, with the network's answers: the evidence to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convscope.diagnosis import interventions
from convscope.diagnosis.causal_tests import MARGIN, Scores
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.forward import scoring_forward
from convscope.diagnosis.shortcut_candidates import FRAMES
from convscope.images.decode_worker import THUMBNAIL_SIDE, thumbnail

MAX_EXAMPLES = 4  # images of each action
SAMPLE = 16  # images of each side that colors and blur are measured on

Classes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChangedImages:
    """D images, before and after a shortcut was inserted or removed.

    Attributes
    ----------
    finding : ndarray of shape (D,), int64
        The number of the shortcut's finding, from 1.
    inserted : ndarray of shape (D,), bool
        Whether the shortcut was inserted into an image of another class, or else removed from one of its class.
    image : ndarray of shape (D,), int64
        Indices into the report's `image_names`.
    before, after : ndarray of shape (D, s, s, 3), uint8
        The network's input, resized.
    prediction_before, prediction_after : ndarray of shape (D,), int64
    confidence_before, confidence_after : ndarray of shape (D,), float32
        Probability of the predicted class.
    """

    finding: Classes
    inserted: npt.NDArray[np.bool_]
    image: Classes
    before: npt.NDArray[np.uint8]
    after: npt.NDArray[np.uint8]
    prediction_before: Classes
    prediction_after: Classes
    confidence_before: npt.NDArray[np.float32]
    confidence_after: npt.NDArray[np.float32]

    @classmethod
    def none(cls) -> ChangedImages:
        """Return no images."""
        integers, floats = np.empty(0, np.int64), np.empty(0, np.float32)
        images = np.empty((0, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8)
        return cls(integers, np.empty(0, bool), integers, images, images, integers, integers, floats, floats)

    @classmethod
    def joined(cls, parts: Sequence[ChangedImages]) -> ChangedImages:
        """Return the images of several parts."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def change_images(context: DiagnosisContext, findings: Sequence[Finding]) -> ChangedImages:
    """Insert each shortcut into a few images of other classes, drawn at random, and remove it from its typical images.

    Parameters
    ----------
    context : DiagnosisContext
    findings : sequence of Finding
        In the order of the report; those that are no shortcuts are skipped, and units, which are no part of an
        image.

    Returns
    -------
    ChangedImages
        Up to four images of each action and finding. Blur cannot be removed.
    """
    context.report_progress(0, len(findings))
    changeable = [
        (number, finding)
        for number, finding in enumerate(findings, start=1)
        if finding.kind == "shortcut" and finding.evidence["feature"] != "unit"
    ]
    if not changeable:
        return ChangedImages.none()
    parts: list[ChangedImages] = []
    with scoring_forward(context.model, context.memory) as scores:
        for number, finding in changeable:
            context.report_progress(number - 1, len(findings))
            parts += _change(context, scores, number, finding)
    context.report_progress(len(findings), len(findings))
    return ChangedImages.joined(parts) if parts else ChangedImages.none()


def _change(context: DiagnosisContext, scores: Scores, number: int, finding: Finding) -> Iterator[ChangedImages]:
    observations, label = context.observations, finding.classes[0]
    is_listed = np.isin(np.arange(len(observations)), finding.images)
    is_other = observations.is_labelled & (observations.labels != label) & (observations.predictions != label)
    taken = [n for n, image in enumerate(finding.images) if observations.predictions[image] == label][:SAMPLE]
    others = np.random.default_rng(context.seed).permutation(np.flatnonzero(is_other & ~is_listed))[:SAMPLE]
    if not taken or not len(others):
        return
    carriers = np.array([finding.images[n] for n in taken], np.int64)
    inside, outside = (context.load_inputs(rows.tolist()).float() for rows in (carriers, others))
    inserted = insert(finding, taken, inside, outside)[:MAX_EXAMPLES]
    yield _compare(context, scores, number, others[:MAX_EXAMPLES], outside[:MAX_EXAMPLES], inserted, inserts=True)
    removed = remove(finding, taken, inside, outside)
    if removed is not None:
        yield _compare(
            context,
            scores,
            number,
            carriers[:MAX_EXAMPLES],
            inside[:MAX_EXAMPLES],
            removed[:MAX_EXAMPLES],
            inserts=False,
        )


def insert(finding: Finding, rows: Sequence[int], inside: Tensor, outside: Tensor) -> Tensor:
    """Insert what a finding is about into images of other classes.

    Parameters
    ----------
    finding : Finding
        A shortcut.
    rows : sequence of int
        Which of the finding's images `inside` holds.
    inside, outside : Tensor of shape (n, C, H, W), (m, C, H, W)
        Network inputs that have it, and others that have not.
    """
    feature, donors = str(finding.evidence["feature"]), torch.arange(len(outside)) % len(inside)
    if feature in FRAMES:
        return interventions.replace_region(outside, inside[donors], _frame(inside, feature))
    if feature == "patch":
        corners, sides = _boxes(finding, rows, inside)
        patches = interventions.cut_boxes(inside[donors], corners[donors], sides)
        return interventions.paste_boxes(outside, patches, corners[donors])
    if feature == "color":
        return interventions.shift_colors(outside, *interventions.color_difference(inside, outside))
    target = float(interventions.detail(inside).median())
    return interventions.gaussian_blur(outside, interventions.blur_to_match(outside, target))


def remove(finding: Finding, rows: Sequence[int], inside: Tensor, outside: Tensor) -> Tensor | None:
    """Remove what a finding is about from images that have it; the parameters are those of `insert`. None for blur."""
    feature, donors = str(finding.evidence["feature"]), torch.arange(len(inside)) % len(outside)
    if feature in FRAMES:
        return interventions.replace_region(inside, outside[donors], _frame(inside, feature))
    if feature == "patch":
        return interventions.remove_boxes(inside, *_boxes(finding, rows, inside))
    if feature == "color":
        return interventions.shift_colors(inside, *interventions.color_difference(outside, inside))
    return None


def _frame(x: Tensor, feature: str) -> Tensor:
    return interventions.frame_mask((x.shape[2], x.shape[3]), FRAMES[feature]).to(x.device)


def _boxes(finding: Finding, rows: Sequence[int], x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the upper left corners (n, 2) of the patch in images, with a margin, and the sides (h, w) of its box."""
    size = np.array([x.shape[2], x.shape[3]])
    boxes = np.array([finding.evidence["boxes"][n] for n in rows])  # x0, y0, x1, y1
    extent = (boxes[0, 2:] - boxes[0, :2])[::-1] * size
    sides = np.minimum(np.rint((1 + 2 * MARGIN) * extent).astype(np.int64), size)
    corners = np.rint(boxes[:, 1::-1] * size - MARGIN * extent).astype(np.int64).clip(0, size - sides)
    return torch.from_numpy(corners), (int(sides[0]), int(sides[1]))


def _compare(
    context: DiagnosisContext,
    scores: Scores,
    number: int,
    rows: Classes,
    before: Tensor,
    after: Tensor,
    *,
    inserts: bool,
) -> ChangedImages:
    """Run the network on images before and after a change."""
    confidence, classes = scores(torch.cat([before, after])).max(1)
    first, last = classes.numpy().reshape(2, -1)
    first_confidence, last_confidence = confidence.numpy().reshape(2, -1)
    return ChangedImages(
        finding=np.full(len(rows), number),
        inserted=np.full(len(rows), inserts),
        image=rows,
        before=_thumbnails(context, before),
        after=_thumbnails(context, after),
        prediction_before=first,
        prediction_after=last,
        confidence_before=first_confidence,
        confidence_after=last_confidence,
    )


def _thumbnails(context: DiagnosisContext, x: Tensor) -> npt.NDArray[np.uint8]:
    """Return network inputs as small images (n, s, s, 3)."""
    pixels = context.model.preprocessing.denormalize(x.cpu()).permute(0, 2, 3, 1).numpy()
    return np.stack([thumbnail(image) for image in pixels])
