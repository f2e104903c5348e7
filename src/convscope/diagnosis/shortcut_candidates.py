"""Candidates for shortcuts: what sets the images of a class apart besides an object at varying positions.

All are computed from thumbnails and evidence that a diagnosis has recorded; the network does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convscope.diagnosis.clustering import chunks
from convscope.diagnosis.interventions import detail, frame_mask
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.templates import Correlations, Template, grow, refine, seed_patches
from convscope.diagnosis.wording import separation

Floats = npt.NDArray[np.float64]

SEARCHED = 40  # images of a class, and of the others, that recurring patches are searched in
SEED_IMAGES = 8
PATCH_SIDES = (0.15, 0.22)  # of the thumbnail's shorter side
MIN_CORRELATION = 0.6  # of the better half of a class's images with a patch
MIN_CONSTANT = 0.2  # fraction of a patch's pixels that are nearly equal
FRAMES = {"border": 1 / 20, "background": 1 / 6}
INSIDE_BORDER = "inside the border"
"""The frame after the next one; where it separates a class as well as the border, the object reaches the rim."""
DISTINCT = 0.5  # of the confusion by what is inside, up to which a border is a candidate
MIN_SEPARATION = {"patch": 0.75, "border": 0.75, "background": 0.75, "color": 0.9, "blur": 0.85}


@dataclass(frozen=True)
class ShortcutCandidate:
    """What may give a class away.

    Attributes
    ----------
    kind : {"patch", "border", "background", "color", "blur"}
    label : int
        The class.
    amounts : ndarray of shape (N,)
        How much of it each image has.
    threshold : float
        From which an image carries it.
    separation : float
        Area under the ROC curve of the amounts, for the class against the others.
    template : Template or None
        Of a patch, as fractions of 1 in the thumbnail's pixels.
    corners : ndarray of shape (N, 2) or None
        (y, x) of the patch's best match in each thumbnail.
    """

    kind: str
    label: int
    amounts: Floats
    threshold: float
    separation: float
    template: Template | None = None
    corners: npt.NDArray[np.int64] | None = None

    @property
    def carriers(self) -> npt.NDArray[np.bool_]:
        """Which images (N,) carry it."""
        return np.asarray(self.amounts >= self.threshold)


def propose(
    observations: Observations,
    classes: Sequence[int],
    rng: np.random.Generator,
    report_progress: Callable[[int], None],
) -> list[ShortcutCandidate]:
    """Return candidates that separate the images of a class from the others.

    Parameters
    ----------
    observations : Observations
    classes : sequence of int
    rng : numpy.random.Generator
    report_progress : callable
        Called with the number of classes done.
    """
    statistics = ImageStatistics(observations.thumbnails)
    candidates, templates = [], {}
    for done, label in enumerate(classes):
        report_progress(done)
        is_member = observations.labels == label
        others = observations.is_labelled & ~is_member
        amounts = statistics.amounts(is_member, others)
        inside = amounts.pop(INSIDE_BORDER)
        confusions = [1 - _separation(values, is_member, others) for values in (amounts["border"], inside)]
        if confusions[0] >= DISTINCT * confusions[1]:
            del amounts["border"]
        for kind, values in amounts.items():
            candidates += _candidate(observations, ShortcutCandidate(kind, label, values, 0, 0))
        if template := find_template(observations, label, rng):
            templates[label] = template
    for label, (values, corners) in match_templates(observations.thumbnails, templates).items():
        candidate = ShortcutCandidate("patch", label, values, 0, 0, templates[label], corners)
        candidates += _candidate(observations, candidate)
    return candidates


def _separation(amounts: Floats, is_member: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve of amounts, for a class against the others."""
    return separation(np.where(is_member | others, amounts, np.nan), is_member)


def _candidate(observations: Observations, candidate: ShortcutCandidate) -> list[ShortcutCandidate]:
    """Return a candidate with its threshold and separation, if it separates the class well enough."""
    is_member = observations.labels == candidate.label
    others, amounts = observations.is_labelled & ~is_member, candidate.amounts
    value = _separation(amounts, is_member, others)
    if value < MIN_SEPARATION[candidate.kind]:
        return []
    return [replace(candidate, separation=value, threshold=best_threshold(amounts[is_member], amounts[others]))]


def best_threshold(inside: Floats, outside: Floats) -> float:
    """Return the threshold with the largest difference of the rates above it (Youden, Index for rating tests, 1950)."""
    thresholds = np.unique(np.concatenate([inside, outside]))
    thresholds = (thresholds[1:] + thresholds[:-1]) / 2
    if not len(thresholds):
        return float(inside[0])
    above = [1 - np.searchsorted(np.sort(values), thresholds) / len(values) for values in (inside, outside)]
    return float(thresholds[int((above[0] - above[1]).argmax())])


class ImageStatistics:
    """Global statistics of thumbnails (N, s, s, 3): colors, detail, and those of frames.

    Parameters
    ----------
    thumbnails : ndarray of shape (N, s, s, 3), uint8
    """

    def __init__(self, thumbnails: np.ndarray) -> None:
        parts = [self._measure(thumbnails[rows]) for rows in chunks(len(thumbnails))]
        self.vectors = {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}

    @staticmethod
    def _measure(thumbnails: np.ndarray) -> dict[str, Floats]:
        pixels = as_pixels(thumbnails)
        vectors = {
            "color": color_vector(thumbnails.reshape(len(thumbnails), -1, 3)),
            "blur": -detail(pixels).double().numpy()[:, None],
        }
        vectors |= {kind: _frame_vector(thumbnails, pixels, width) for kind, width in FRAMES.items()}
        rows, columns = (max(1, round(2 * FRAMES["border"] * side)) for side in pixels.shape[2:])
        inner = slice(rows, -rows), slice(columns, -columns)
        inside = _frame_vector(thumbnails[:, *inner], pixels[:, :, *inner], FRAMES["border"])
        return vectors | {INSIDE_BORDER: inside}

    def amounts(self, is_member: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]) -> dict[str, Floats]:
        """Return for each kind how much each image (N,) resembles the class rather than the others."""
        return {
            kind: vector[:, 0] if vector.shape[1] == 1 else discriminant(vector, is_member, others)
            for kind, vector in self.vectors.items()
        }


def as_pixels(thumbnails: np.ndarray) -> Tensor:
    """Return thumbnails (n, s, s, 3) as images (n, 3, s, s) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(thumbnails)).movedim(3, 1).float() / 255


def _frame_vector(thumbnails: np.ndarray, pixels: Tensor, width: float) -> Floats:
    """Return the colors and gradients (N, D) in a frame of thumbnails (N, s, s, 3); `pixels` are the same in [0, 1]."""
    mask = frame_mask((pixels.shape[2], pixels.shape[3]), width)
    vertical = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean(1)[:, mask[1:] & mask[:-1]]
    horizontal = (pixels[..., 1:] - pixels[..., :-1]).abs().mean(1)[:, mask[:, 1:] & mask[:, :-1]]
    gradients = torch.stack([g(1) for part in (vertical, horizontal) for g in (part.mean, part.std)], 1)
    return np.concatenate([color_vector(thumbnails[:, mask.numpy()]), gradients.double().numpy()], axis=1)


def color_vector(levels: np.ndarray) -> Floats:
    """Return mean, deviation and the quantiles 0.05 and 0.95 (N, 4 C) of channels (N, P, C) of 256 levels, as uint8.

    All follow from the number of pixels of each level; quantiles are levels that occur.
    """
    count, pixels, channels = levels.shape
    offsets = 256 * np.arange(count * channels).reshape(count, 1, channels)
    counts = np.bincount((levels + offsets).ravel(), minlength=256 * count * channels)
    shares = counts.reshape(count, channels, 256) / pixels
    values = np.arange(256) / 255
    mean = shares @ values
    deviation = np.sqrt(np.maximum(shares @ values**2 - mean**2, 0))
    cumulative = shares.cumsum(2)
    quantiles = [values[(cumulative >= q - 1e-9).argmax(2)] for q in (0.05, 0.95)]
    return np.concatenate([mean, deviation, *quantiles], axis=1)


def discriminant(vectors: Floats, is_member: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]) -> Floats:
    """Project vectors (N, D) on Fisher's discriminant between a class and the others.

    ::

        w = S^-1 (mean of members - mean of others),    S: mean of both covariances, plus 1 % of its diagonal

    References
    ----------
    Fisher, The use of multiple measurements in taxonomic problems, Annals of Eugenics 1936.
    """
    inside, outside = vectors[is_member], vectors[others]
    scatter = (np.cov(inside.T) + np.cov(outside.T)) / 2
    scatter = scatter + np.diag(0.01 * np.diag(scatter) + 1e-9)
    weights = np.linalg.solve(scatter, inside.mean(0) - outside.mean(0))
    return np.asarray(vectors @ weights)


def find_template(observations: Observations, label: int, rng: np.random.Generator) -> Template | None:
    """Find a patch that recurs in the images of a class with nearly equal pixels, and not in others."""
    predicted = np.flatnonzero((observations.labels == label) & (observations.predictions == label))
    outside = np.flatnonzero(observations.is_labelled & (observations.labels != label))
    if len(predicted) < SEED_IMAGES or len(outside) < SEED_IMAGES:
        return None
    chosen = rng.permutation(predicted)[:SEARCHED]
    inside, rest = (
        Correlations(as_pixels(observations.thumbnails[rows])) for rows in (chosen, rng.permutation(outside)[:SEARCHED])
    )
    evidence = torch.from_numpy(np.asarray(observations.evidence[chosen], np.float32))
    variance = inside.images.var((0, 2, 3)).mean()
    best: tuple[float, Template] | None = None
    for relative in PATCH_SIDES:
        side = max(4, round(relative * min(inside.images.shape[2:])))
        seeds = seed_patches(inside.images, evidence, side, SEED_IMAGES)
        peaks = [part.maps(seeds).flatten(2).amax(2).T for part in (inside, rest)]
        scores = torch.stack([_gap(*pair) for pair in zip(*peaks, strict=True)])
        for seed in scores.topk(2).indices:
            template = refine(inside, seeds[seed], variance)
            values, others = (part.best_matches(template.patch)[0] for part in (inside, rest))
            quality = float(_gap(values, others))
            is_patch = float(values.median()) >= MIN_CORRELATION and template.constancy >= MIN_CONSTANT
            if is_patch and (best is None or quality > best[0]):
                best = quality, template
    return grow(inside, best[1], variance) if best and best[0] > 0 else None


def _gap(inside: Tensor, outside: Tensor) -> Tensor:
    """Return how far the correlations of most images of a class exceed those of nearly all others."""
    return inside.quantile(0.6) - outside.quantile(0.9)


def match_templates(
    thumbnails: np.ndarray, templates: Mapping[int, Template]
) -> dict[int, tuple[Floats, npt.NDArray[np.int64]]]:
    """Return the correlation (N,) and position (N, 2) of each template's best match in each image, by the same keys."""
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {key: [] for key in templates}
    for rows in chunks(len(thumbnails)) if templates else []:
        correlations = Correlations(as_pixels(thumbnails[rows]))
        for key, template in templates.items():
            parts[key].append(correlations.best_matches(template.patch))
    return {
        key: (torch.cat([p[0] for p in matches]).double().numpy(), torch.cat([p[1] for p in matches]).numpy())
        for key, matches in parts.items()
    }
