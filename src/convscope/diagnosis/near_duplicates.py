"""Find images that are in a data set more than once, with small changes such as another size or compression."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from convscope.diagnosis.clustering import row_moments
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.search import Search
from convscope.diagnosis.statistics import wilson_interval
from convscope.formatting import base_name, count_of

HASH_SIDE = 8  # cells along each side of the grid whose differences are the hash
MAX_BITS = 16  # of the 128 of a hash in which duplicates may differ
MIN_COSINE = 0.85  # of the features of duplicates, centred
LAYOUT_SIDE = 16  # cells along each side of the grid whose colors are compared
MIN_LAYOUT = 0.97  # correlation of the colors of duplicates
MIN_CONTRAST = 4.0  # gray levels between the cells of an image that a hash can identify
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "holdout")
LUMA = (0.299, 0.587, 0.114)
PAIRS_AT_A_TIME = 4096
DENSE = 0.01  # fraction of candidates from which on all cosines of a block are computed at once


@dataclass(frozen=True)
class DuplicateGroups:
    """Groups of near duplicates.

    Attributes
    ----------
    groups : tuple of tuple of int
        Positions of the images of each group, the most similar group first.
    similarity : tuple of float
        For each group the lowest cosine among its pairs.
    num_pairs : int
        Number of pairs of images that were compared.
    """

    groups: tuple[tuple[int, ...], ...]
    similarity: tuple[float, ...]
    num_pairs: int


def difference_hash(thumbnails: np.ndarray) -> np.ndarray:
    """Return the difference hash of images: which of two neighbouring cells is brighter.

    The gray image is averaged over a grid; bits are the signs of the differences between neighbours from left to right
    (9 x 8 cells) and from top to bottom (8 x 9 cells). Brightness, contrast, size and compression change few of them.

    Parameters
    ----------
    thumbnails : ndarray of shape (N, s, s, 3), uint8

    Returns
    -------
    ndarray of shape (N, 128), int8
        1 for brighter, else -1; 0 in images without contrast.

    References
    ----------
    Krawetz, Kind of Like That, hackerfactor.com 2013.
    """
    images = torch.from_numpy(np.array(thumbnails)).float()
    gray = (images @ torch.tensor(LUMA))[:, None]
    across = interpolate(gray, (HASH_SIDE, HASH_SIDE + 1), mode="area")
    down = interpolate(gray, (HASH_SIDE + 1, HASH_SIDE), mode="area")
    differences = torch.cat([across.diff(dim=3).flatten(1), down.diff(dim=2).flatten(1)], 1)
    bits = torch.where(differences > 0, 1, -1)
    has_contrast = across.flatten(1).amax(1) - across.flatten(1).amin(1) >= MIN_CONTRAST
    return (bits * has_contrast[:, None]).to(torch.int8).numpy()


def layout_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the correlation (n,) of the colors of pairs of images, averaged over a grid of 16 x 16 cells.

    Parameters
    ----------
    first, second : ndarray of shape (n, s, s, 3), uint8
    """
    grids = []
    for images in (first, second):
        channels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
        cells = interpolate(channels, (LAYOUT_SIDE, LAYOUT_SIDE), mode="area").flatten(1)
        grids.append(normalize(cells - cells.mean(1, keepdim=True), dim=1))
    correlation: np.ndarray = (grids[0] * grids[1]).sum(1).numpy()
    return correlation


class CentredFeatures:
    """Features minus their mean and of length 1, so that their products are correlations; read where they are indexed.

    Parameters
    ----------
    features : ndarray of shape (N, C)
        It may be mapped into memory.
    """

    def __init__(self, features: np.ndarray) -> None:
        self._features = features
        self._mean = row_moments(features, np.arange(len(features)))[0].astype(np.float32)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        values = self._features[rows if isinstance(rows, slice) else rows.numpy()]
        return normalize(torch.from_numpy(np.asarray(values, np.float32) - self._mean), dim=1)


def duplicate_pairs(
    hashes: Tensor, features: CentredFeatures, block: int, report_progress: Callable[[int, int], None]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield pairs of images that differ in at most `MAX_BITS` bits and have a cosine of at least `MIN_COSINE`.

    Hashes are compared by matrix products of blocks, N^2 / 2 times 128 multiplications; cosines only where they agree.

    Parameters
    ----------
    hashes : Tensor of shape (N, 128)
        1 and -1; images with 0 have no duplicates.
    features : CentredFeatures
    block : int
        Number of images that are compared with as many at a time.
    report_progress : callable

    Yields
    ------
    first, second, cosine : Tensor of shape (n,)
        With ``first < second``.
    """
    count = len(hashes)
    bits = hashes.float()
    min_agreement = bits.shape[1] - 2 * MAX_BITS
    for start in range(0, count, block):
        for other in range(start, count, block):
            agreement = bits[start : start + block] @ bits[other : other + block].T
            is_candidate = agreement >= min_agreement
            if start == other:
                is_candidate = is_candidate.triu(1)
            first, second = is_candidate.nonzero(as_tuple=True)
            if len(first) > DENSE * is_candidate.numel():
                cosine = (features[start : start + block] @ features[other : other + block].T)[first, second]
            else:
                cosine = _cosines(features, start + first, other + second)
            is_close = cosine >= MIN_COSINE
            yield start + first[is_close], other + second[is_close], cosine[is_close]
        report_progress(min(start + block, count), count)


def _cosines(features: CentredFeatures, first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines (n,) of pairs, some pairs at a time."""
    pairs = zip(torch.split(first, PAIRS_AT_A_TIME), torch.split(second, PAIRS_AT_A_TIME), strict=True)
    return torch.cat([(features[i] * features[j]).sum(1) for i, j in pairs])


def group_duplicates(
    thumbnails: np.ndarray, features: np.ndarray, memory: int, report_progress: Callable[[int, int], None]
) -> DuplicateGroups:
    """Group images (N, s, s, 3) with features (N, C) that are near duplicates; `memory` bounds a block in bytes.

    Two images are in a group if a chain of pairs leads from one to the other.
    """
    count = len(thumbnails)
    step = max(1, memory // (thumbnails[0].size * 16)) if count else 1
    parts = [difference_hash(thumbnails[i : i + step]) for i in range(0, count, step)]
    hashes = torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, 0)
    block = int(np.clip(math.isqrt(memory // 32), 64, 4096))
    parent = np.arange(count)
    lowest: dict[int, float] = {}
    for first, second, cosine in duplicate_pairs(hashes, CentredFeatures(features), block, report_progress):
        for i, j, value in _with_same_layout(thumbnails, first.numpy(), second.numpy(), cosine.numpy()):
            a, b = sorted((_root(parent, i), _root(parent, j)))
            parent[b] = a
            lowest[a] = min(value, lowest.get(a, 1.0), lowest.get(b, 1.0))
    roots = np.array([_root(parent, i) for i in range(count)], np.int64)
    names, sizes = np.unique(roots, return_counts=True)
    ordered = sorted((-lowest[root], root) for root in names[sizes > 1].tolist())
    groups = tuple(tuple(np.flatnonzero(roots == root).tolist()) for _, root in ordered)
    return DuplicateGroups(groups, tuple(-value for value, _ in ordered), count * (count - 1) // 2)


def _with_same_layout(
    thumbnails: np.ndarray, first: np.ndarray, second: np.ndarray, cosine: np.ndarray
) -> Iterator[tuple[int, int, float]]:
    """Yield those pairs whose colors correlate too."""
    for start in range(0, len(first), PAIRS_AT_A_TIME):
        i, j, values = (array[start : start + PAIRS_AT_A_TIME] for array in (first, second, cosine))
        is_same = layout_correlation(thumbnails[i], thumbnails[j]) >= MIN_LAYOUT
        yield from zip(i[is_same].tolist(), j[is_same].tolist(), values[is_same].tolist(), strict=True)


def _root(parent: np.ndarray, index: int) -> int:
    """Return the first image of an image's group, and shorten the way to it."""
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = int(parent[index])
    return index


def splits_of(image_names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the split of each image, such as "train", from the folders of its path; None if there are not two."""
    splits = [next((p for p in PurePath(name).parts[:-1] if p.lower() in SPLITS), "") for name in image_names]
    return tuple(splits) if len({split for split in splits if split}) > 1 else None


def find_near_duplicates(context: DiagnosisContext, splits: Sequence[str] | None = None) -> Search:
    """Find images that are in the data more than once, in several splits, or with different labels.

    Two images are near duplicates if their difference hashes differ in at most 16 of 128 bits, the correlation of
    their features is at least 0.85, and that of their colors on a grid of 16 x 16 at least 0.97. Mirrored, rotated and
    strongly cropped copies are not found.

    Parameters
    ----------
    context : DiagnosisContext
    splits : sequence of str, optional
        The split of each image, such as "train"; by default the name of a folder in its path, such as ``train`` or
        ``val``, if there are two.

    Returns
    -------
    Search
        Up to three findings of kind "duplicate": on different labels, on copies across splits, and on copies.
    """
    observations = context.observations
    splits = splits_of(observations.image_names) if splits is None else splits
    result = group_duplicates(observations.thumbnails, observations.features, context.memory, context.report_progress)
    findings = (
        *_conflicting_labels(result, observations),
        *_across_splits(result, observations, splits),
        *_copies(result, observations),
    )
    return Search(
        "duplicate",
        "Pairs of images with almost the same pixels and the same features: hashes that differ in at most one in eight "
        "bits, features with a correlation of at least 0.85, and colors with one of at least 0.97.",
        result.num_pairs,
        "Any pair would have been found, unless one image is mirrored, rotated or strongly cropped.",
        findings,
    )


def _conflicting_labels(result: DuplicateGroups, observations: Observations) -> list[Finding]:
    """Make the finding on groups with more than one label."""
    labels = observations.labels
    positions = [n for n, group in enumerate(result.groups) if len({labels[i] for i in group if labels[i] >= 0}) > 1]
    if not positions:
        return []
    images = tuple(i for n in positions for i in result.groups[n])
    first = result.groups[positions[0]]
    names = [f"`{observations.classes[k]}`" for k in dict.fromkeys(labels[i] for i in first if labels[i] >= 0)]
    summary = (
        f"{count_of(len(positions), 'group')} of near-identical images {_have(len(positions))} different labels, such "
        f"as {base_name(observations.image_names[first[0]])}: {' and '.join(names)}; one of the labels must be wrong."
    )
    classes, counts = np.unique([labels[i] for i in images if labels[i] >= 0], return_counts=True)
    return [
        _finding(
            "fraction of the groups of near duplicates that have different labels",
            summary,
            "Decide which label is right, correct the other one, and keep one image of each group.",
            images,
            tuple(classes[np.argsort(-counts, kind="stable")].tolist()),
            (len(positions), len(result.groups)),
            result,
            positions,
        )
    ]


def _across_splits(result: DuplicateGroups, observations: Observations, splits: Sequence[str] | None) -> list[Finding]:
    """Make the finding on groups with images of several splits."""
    if splits is None:
        return []
    positions = [n for n, group in enumerate(result.groups) if len({splits[i] for i in group} - {""}) > 1]
    if not positions:
        return []
    images = tuple(i for n in positions for i in result.groups[n])
    names = sorted({splits[i] for i in images} - {""}, key=lambda name: (not name.lower().startswith("tr"), name))
    evaluated = [i for i in images if splits[i] not in ("", names[0])]
    total = sum(split not in ("", names[0]) for split in splits)
    summary = (
        f"{count_of(len(evaluated), 'image')} of {' and '.join(f'`{name}`' for name in names[1:])} "
        f"{_have(len(evaluated))} a near-identical copy in another split, such as "
        f"{base_name(observations.image_names[evaluated[0]])}: the accuracy there is overestimated."
    )
    recommendation = f"Remove the copies from `{names[0]}`, train again, and evaluate again."
    effect = f"fraction of the images outside `{names[0]}` that have a copy in another split"
    sizes = (len(evaluated), total)
    return [_finding(effect, summary, recommendation, images, (), sizes, result, positions)]


def _copies(result: DuplicateGroups, observations: Observations) -> list[Finding]:
    """Make the finding on all groups."""
    if not result.groups:
        return []
    images = tuple(i for group in result.groups for i in group)
    redundant = len(images) - len(result.groups)
    summary = (
        f"{count_of(redundant, 'image')} of {len(observations):,} {'is a' if redundant == 1 else 'are'} near-identical "
        f"cop{'y' if redundant == 1 else 'ies'} of another image; {count_of(len(result.groups), 'image')} "
        f"{'is there more than once, and counts' if len(result.groups) == 1 else 'are there more than once, and count'}"
        " more than once in every number."
    )
    recommendation = "Keep one image of each group, or keep the groups together when the data are split."
    effect = "fraction of the images that are copies of another one"
    sizes, positions = (redundant, len(observations)), range(len(result.groups))
    return [_finding(effect, summary, recommendation, images, (), sizes, result, positions)]


def _finding(
    effect: str,
    summary: str,
    recommendation: str,
    images: tuple[int, ...],
    classes: tuple[int, ...],
    sizes: tuple[int, int],
    result: DuplicateGroups,
    positions: Sequence[int],
) -> Finding:
    """Make a finding whose effect is the fraction ``sizes[0] / sizes[1]``."""
    low, high = (float(edge) for edge in wilson_interval(*sizes))
    evidence = {
        "effect": effect,
        "groups": [list(result.groups[n]) for n in positions],
        "similarity": [round(result.similarity[n], 4) for n in positions],
    }
    value = sizes[0] / max(sizes[1], 1)
    return Finding("duplicate", summary, recommendation, images, classes, value, (low, high), float("nan"), evidence)


def _have(count: int) -> str:
    return "has" if count == 1 else "have"
