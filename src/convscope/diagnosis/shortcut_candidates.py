"""Candidates for shortcuts: what sets the images of a class apart besides an object at varying positions.

All are computed from thumbnails and evidence that a diagnosis has recorded; the network does not run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convscope.diagnosis.interventions import detail, frame_mask
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.templates import Template, best_matches, correlate, refine, seed_patches
from convscope.diagnosis.wording import separation

Floats = npt.NDArray[np.float64]

SEARCHED = 40  # images of a class, and of the others, that recurring patches are searched in
SEED_IMAGES = 8
CHUNK = 256  # images that are measured at once
PATCH_SIDES = (0.15, 0.22)  # of the thumbnail's shorter side
MIN_CORRELATION = 0.6  # of the better half of a class's images with a patch
MIN_CONSTANT = 0.2  # fraction of a patch's pixels that are nearly equal
FRAMES = {"border": 1 / 20, "background": 1 / 6}
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
    observations: Observations, label: int, statistics: ImageStatistics, rng: np.random.Generator
) -> list[ShortcutCandidate]:
    """Return candidates for a class that separate its images from the others."""
    is_member = observations.labels == label
    others = observations.is_labelled & ~is_member
    candidates = []
    for kind, amounts in statistics.amounts(is_member, others).items():
        value = separation(np.where(is_member | others, amounts, np.nan), is_member)
        if value >= MIN_SEPARATION[kind]:
            threshold = best_threshold(amounts[is_member], amounts[others])
            candidates.append(ShortcutCandidate(kind, label, amounts, threshold, value))
    patch = find_patch(observations, statistics, label, rng)
    return [*candidates, *([patch] if patch else [])]


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
        self.thumbnails = thumbnails
        parts = [self._measure(self.pixels(rows)) for rows in chunks(len(thumbnails))]
        self.vectors = {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}

    def pixels(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return thumbnails (n, 3, s, s) in [0, 1]."""
        return torch.from_numpy(np.ascontiguousarray(self.thumbnails[rows])).movedim(3, 1).float() / 255

    @staticmethod
    def _measure(pixels: Tensor) -> dict[str, Floats]:
        vectors = {"color": _color_vector(pixels.flatten(2)), "blur": -detail(pixels).double().numpy()[:, None]}
        return vectors | {kind: _frame_vector(pixels, width) for kind, width in FRAMES.items()}

    def amounts(self, is_member: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]) -> dict[str, Floats]:
        """Return for each kind how much each image (N,) resembles the class rather than the others."""
        return {
            kind: vector[:, 0] if vector.shape[1] == 1 else discriminant(vector, is_member, others)
            for kind, vector in self.vectors.items()
        }


def chunks(count: int) -> list[npt.NDArray[np.int64]]:
    """Return the numbers below `count` in parts of at most 256."""
    return np.array_split(np.arange(count), max(1, -(-count // CHUNK)))


def _frame_vector(pixels: Tensor, width: float) -> Floats:
    """Return the colors and gradients (N, D) in a frame of images (N, C, H, W)."""
    mask = frame_mask((pixels.shape[2], pixels.shape[3]), width)
    vertical = (pixels[:, :, 1:] - pixels[:, :, :-1]).abs().mean(1)[:, mask[1:] & mask[:-1]]
    horizontal = (pixels[..., 1:] - pixels[..., :-1]).abs().mean(1)[:, mask[:, 1:] & mask[:, :-1]]
    gradients = torch.stack([g(1) for part in (vertical, horizontal) for g in (part.mean, part.std)], 1)
    return np.concatenate([_color_vector(pixels[:, :, mask]), gradients.double().numpy()], axis=1)


def _color_vector(flat: Tensor) -> Floats:
    """Return mean, deviation and extreme quantiles (N, 4 C) of channels (N, C, P)."""
    quantiles = torch.quantile(flat, torch.tensor([0.05, 0.95]), dim=2)
    parts = [flat.mean(2), flat.std(2, correction=0), quantiles[0], quantiles[1]]
    return torch.cat(parts, 1).double().numpy()


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


def find_patch(
    observations: Observations, statistics: ImageStatistics, label: int, rng: np.random.Generator
) -> ShortcutCandidate | None:
    """Find a patch that recurs in the images of a class with nearly equal pixels, and not in others."""
    predicted = np.flatnonzero((observations.labels == label) & (observations.predictions == label))
    outside = np.flatnonzero(observations.is_labelled & (observations.labels != label))
    if len(predicted) < SEED_IMAGES or len(outside) < SEED_IMAGES:
        return None
    chosen = rng.permutation(predicted)[:SEARCHED]
    inside_pixels, outside_pixels = (statistics.pixels(part) for part in (chosen, rng.permutation(outside)[:SEARCHED]))
    evidence = torch.from_numpy(np.asarray(observations.evidence[chosen], np.float32))
    variance = inside_pixels.var((0, 2, 3)).mean()
    best: tuple[float, Template] | None = None
    for relative in PATCH_SIDES:
        side = max(4, round(relative * min(inside_pixels.shape[2:])))
        seeds = seed_patches(inside_pixels, evidence, side, SEED_IMAGES)
        inside = correlate(inside_pixels, seeds).flatten(2).amax(2)
        rest = correlate(outside_pixels, seeds).flatten(2).amax(2)
        scores = torch.stack([a.quantile(0.6) - b.quantile(0.9) for a, b in zip(inside.T, rest.T, strict=True)])
        for seed in scores.topk(2).indices:
            template = refine(inside_pixels, seeds[seed], variance)
            values, others = (
                best_matches(inside_pixels, template.patch)[0],
                best_matches(outside_pixels, template.patch)[0],
            )
            quality = float(values.quantile(0.6) - others.quantile(0.9))
            is_patch = float(values.median()) >= MIN_CORRELATION and template.constancy >= MIN_CONSTANT
            if is_patch and (best is None or quality > best[0]):
                best = quality, template
    if best is None or best[0] <= 0:
        return None
    return _patch_candidate(observations, statistics, label, best[1])


def _patch_candidate(
    observations: Observations, statistics: ImageStatistics, label: int, template: Template
) -> ShortcutCandidate | None:
    parts = [best_matches(statistics.pixels(rows), template.patch) for rows in chunks(len(observations))]
    values = torch.cat([part[0] for part in parts]).double().numpy()
    corners = torch.cat([part[1] for part in parts]).numpy()
    is_member = observations.labels == label
    others = observations.is_labelled & ~is_member
    value = separation(np.where(is_member | others, values, np.nan), is_member)
    if value < MIN_SEPARATION["patch"]:
        return None
    threshold = best_threshold(values[is_member], values[others])
    return ShortcutCandidate("patch", label, values, threshold, value, template, corners)
