"""Candidate groups of images: clusters of what the network sees in them, and intervals of facts about them.

Candidates are proposed from the errors of one half of the images; whether an image belongs to a candidate depends on
its features and facts alone, so that the other half tests it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convscope.diagnosis.clustering import (
    Floats,
    StandardizedRows,
    cluster_means,
    jaccard,
    k_means,
    principal_components,
    squared_distances,
)

Flags = npt.NDArray[np.bool_]

COMPONENTS = 12
CLUSTER_COUNTS = (2, 3, 4, 6, 8)
ERROR_WEIGHTS = (0.0, 2.0, 4.0)  # of the error, relative to the deviation of a component
QUANTILES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
PAIRS = 6  # single conditions that are combined with each other
MIN_SIZE = 5  # images in each half
MIN_EFFECT = 0.08  # by which the error rate exceeds that of the others
SAME = 0.7  # Jaccard index from which two candidates are the same


@dataclass(frozen=True)
class Condition:
    """A condition on a fact: above or below a threshold."""

    fact: int
    is_high: bool
    threshold: float


@dataclass(frozen=True)
class Candidate:
    """A group of images of a class, or of all classes.

    Attributes
    ----------
    members : ndarray of shape (N,), bool
    label : int
        The class; -1 for all classes.
    conditions : tuple of Condition
        Empty for clusters of features.
    z : float
        How far the number of errors in the half of the images that proposes exceeds its expectation, in deviations.
    """

    members: Flags
    label: int
    conditions: tuple[Condition, ...]
    z: float


def embed(arrays: Sequence[npt.NDArray[np.floating]], rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Return standardised principal components (n, D) of rows of arrays (N, C), such as a layer's means and maxima."""
    components = principal_components(StandardizedRows(arrays, rows), COMPONENTS, rng)
    # A component's deviation is reduced to its square root: weak components count more, noise does not dominate.
    deviation = np.maximum(components.std(0), 1e-6)
    return np.asarray(components / np.sqrt(deviation * deviation[0]), np.float32)


def cluster_candidates(points: Floats, wrong: Flags, proposes: Flags, rng: np.random.Generator) -> Iterator[Flags]:
    """Yield clusters of points (N, D), among them such in whose making the errors take part.

    Clusters are formed by k-means of the proposing half with the error as an additional coordinate, in the manner of
    the error-aware mixture of Domino (Eyuboglu et al., Domino: Discovering Systematic Errors with Cross-Modal
    Embeddings, ICLR 2022); all points are then assigned by their distance in the other coordinates alone.
    """
    basis = points[proposes]
    for weight in ERROR_WEIGHTS:
        augmented = np.concatenate([basis, weight * wrong[proposes, None]], axis=1).astype(np.float32)
        for count in CLUSTER_COUNTS:
            if len(basis) < count * MIN_SIZE:
                continue
            clusters = k_means(augmented, count, rng)
            centers = cluster_means(basis, clusters, count, basis[:count])
            nearest = squared_distances(points, centers).argmin(1)
            for cluster in range(count):
                yield nearest == cluster


def fact_intervals(facts: npt.NDArray[np.floating]) -> Iterator[tuple[int, bool, float, Flags]]:
    """Yield intervals of single facts (N, F): the column, whether it is above the threshold, and which rows lie in it.

    Thresholds are quantiles; missing values lie in no interval.
    """
    for column, values in enumerate(facts.T):
        known = values[np.isfinite(values)]
        if len(known) < 4 * MIN_SIZE or known.min() == known.max():
            continue
        for threshold in np.unique(np.quantile(known, QUANTILES)):
            yield column, False, float(threshold), values <= threshold
        for threshold in np.unique(np.quantile(known, 1 - np.array(QUANTILES))):
            yield column, True, float(threshold), values >= threshold


@dataclass(frozen=True)
class SubgroupSearch:
    """Images among which groups are searched.

    Attributes
    ----------
    rows : ndarray of shape (n,), int64
        Positions of the images among all N.
    count : int
        N.
    label : int
        Their class; -1 for all classes.
    wrong : ndarray of shape (n,), bool
    expected : ndarray of shape (n,)
        The error rate that each image's class has.
    proposes : ndarray of shape (n,), bool
        The half whose errors propose groups.
    """

    rows: npt.NDArray[np.int64]
    count: int
    label: int
    wrong: Flags
    expected: npt.NDArray[np.floating]
    proposes: Flags

    def candidate(self, members: Flags, conditions: tuple[Condition, ...] = ()) -> Candidate | None:
        """Return a candidate, if its group is large enough and its errors are too many in the proposing half."""
        inside, outside = members & self.proposes, ~members & self.proposes
        sizes = [np.count_nonzero(part) for part in (inside, outside, members & ~self.proposes)]
        if min(sizes) < MIN_SIZE:
            return None
        excess = self.wrong[inside].mean() - self.expected[inside].mean()
        rest = self.wrong[outside].mean() - self.expected[outside].mean()
        if excess - rest < MIN_EFFECT:
            return None
        variance = (self.expected[inside] * (1 - self.expected[inside])).sum() * sizes[1] / (sizes[0] + sizes[1])
        z = excess * sizes[0] / np.sqrt(max(float(variance), 1e-9))
        everywhere = np.zeros(self.count, bool)
        everywhere[self.rows[members]] = True
        return Candidate(everywhere, self.label, conditions, float(z))

    def by_features(self, points: Floats, rng: np.random.Generator) -> list[Candidate]:
        """Return candidates that are clusters of points (n, D)."""
        clusters = cluster_candidates(points, self.wrong, self.proposes, rng)
        return [candidate for members in clusters if (candidate := self.candidate(members))]

    def by_facts(self, facts: npt.NDArray[np.floating], numbers: Sequence[int]) -> list[Candidate]:
        """Return candidates that are intervals of one or two facts (n, F), whose numbers (F,) are given."""
        singles = [
            candidate
            for column, is_high, threshold, members in fact_intervals(facts)
            if (candidate := self.candidate(members, (Condition(numbers[column], is_high, threshold),)))
        ]
        best = distinct(singles)[:PAIRS]
        pairs = []
        for i, one in enumerate(best):
            for other in best[:i]:
                members = (one.members & other.members)[self.rows]
                pair = self.candidate(members, (*other.conditions, *one.conditions))
                if pair and pair.z > max(one.z, other.z):
                    pairs.append(pair)
        return singles + pairs


def distinct(candidates: list[Candidate], threshold: float = SAME) -> list[Candidate]:
    """Return the candidates by falling z, without those that nearly equal a better one."""
    result: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: -c.z):
        if all(jaccard(candidate.members, other.members) < threshold for other in result):
            result.append(candidate)
    return result
