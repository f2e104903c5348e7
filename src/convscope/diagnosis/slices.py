"""Slices: groups of images on which the network errs more often than on others of their class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convscope.diagnosis.clustering import jaccard, row_moments, standardize
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.search import Search
from convscope.diagnosis.statistics import LEVEL, benjamini_hochberg, wilson_interval
from convscope.diagnosis.subgroups import MIN_SIZE, Candidate, Flags, SubgroupSearch, distinct, embed
from convscope.diagnosis.wording import NO_LABELS, describe_images, percent, separation

MIN_ERRORS = 4  # of a class in the half that proposes
PER_CLASS = 12  # candidates that are tested
OVERLAP = 0.35  # Jaccard index from which two slices are reported as one
CLEAR = 0.8  # separation from which a fact describes a slice
UNITS = 5
DESCRIBED = 1.6  # weight of the significance of groups that facts describe, against clusters of features
PURPOSE = (
    "Groups of images of a class, or of all classes, on which the network errs more often than on the others: clusters "
    "of its features, and intervals of one or two facts about images. One half of the images proposed groups, the "
    "other half tested them."
)


def find_slices(context: DiagnosisContext) -> Search:
    """Find groups of images on which the network errs more often than it should.

    Groups are proposed from the errors of one half of the labelled images, and tested on the other half: the number of
    errors in the group against that among all images of the same classes, by the exact test that is conditional on the
    errors in each class. P-values are corrected for the number of groups (Benjamini-Hochberg); of groups that overlap,
    or that are parts of each other and have one description, the most significant is reported.

    Parameters
    ----------
    context : DiagnosisContext

    Returns
    -------
    Search
        Findings of the kind "slice", those with the most errors beyond expectation first. The effect is the accuracy in
        the group minus that of the other images of its classes, in the half that tests.

    References
    ----------
    Eyuboglu et al., Domino: Discovering Systematic Errors with Cross-Modal Embeddings, ICLR 2022.
    Chung et al., Slice Finder: Automated Data Slicing for Model Validation, ICDE 2019.
    """
    observations = context.observations
    rng = np.random.default_rng(context.seed)
    labelled = np.flatnonzero(observations.is_labelled)
    proposes = _half(observations, labelled, rng)
    candidates: list[Candidate] = []
    searches = list(_searches(observations, labelled, proposes))
    about_images = _facts_about_images(observations)
    for done, search in enumerate(searches):
        context.report_progress(done, len(searches))
        facts = np.asarray(observations.facts[search.rows])[:, about_images]
        points = embed((observations.features, observations.peaks), search.rows, rng)
        proposed = distinct(search.by_features(points, rng))[:PER_CLASS]
        proposed += distinct(search.by_facts(facts, about_images))[:PER_CLASS]
        candidates += distinct(proposed)
    tests = [_Test.of(candidate, observations, proposes) for candidate in candidates]
    corrected = benjamini_hochberg([test.p_value for test in tests]) if tests else np.empty(0)
    significant = [(t, float(q)) for t, q in zip(tests, corrected, strict=True) if q <= LEVEL and t.effect < 0]
    significant.sort(key=lambda pair: -pair[0].z * (DESCRIBED if pair[0].candidate.conditions else 1))
    reported: list[tuple[_Test, float]] = []
    for test, q in significant:
        if all(jaccard(test.candidate.members, other.candidate.members) < OVERLAP for other, _ in reported):
            reported.append((test, q))
    findings = without_repetitions([_finding(observations, test, q) for test, q in reported])
    context.report_progress(len(searches), len(searches))
    return Search("slice", PURPOSE, len(tests), _detectable(observations, labelled), findings)


def without_repetitions(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Leave out slices that an earlier one describes in the same words, and of which it has half of the images."""
    reported: list[Finding] = []
    for finding in findings:
        others = (other for other in reported if other.evidence["description"] == finding.evidence["description"])
        if all(2 * len(set(finding.images) & set(other.images)) < len(finding.images) for other in others):
            reported.append(finding)
    return tuple(reported)


def _facts_about_images(observations: Observations) -> list[int]:
    """Return the positions of the facts that do not depend on the network's answer, as those about its evidence do."""
    return [i for i, name in enumerate(observations.fact_names) if not name.startswith("evidence")]


def _half(observations: Observations, labelled: npt.NDArray[np.int64], rng: np.random.Generator) -> Flags:
    """Draw the half of the images (N,) that proposes groups: half of each class, half of its errors."""
    proposes = np.zeros(len(observations), bool)
    shuffled = rng.permutation(labelled)
    keys = 2 * observations.labels[shuffled] + observations.is_correct[shuffled]
    proposes[shuffled[np.argsort(keys, kind="stable")][::2]] = True
    return proposes


def _searches(observations: Observations, labelled: npt.NDArray[np.int64], proposes: Flags) -> Iterator[SubgroupSearch]:
    """Yield a search for each class with enough errors, and one for all images."""
    count, wrong = len(observations), ~observations.is_correct
    labels = observations.labels[labelled]
    rates = np.zeros(len(observations.classes))
    for label in np.unique(labels):
        rows = labelled[labels == label]
        rates[label] = wrong[rows][proposes[rows]].mean() if proposes[rows].any() else 0.0
        if np.count_nonzero(wrong[rows] & proposes[rows]) >= MIN_ERRORS and len(rows) >= 4 * MIN_SIZE:
            yield SubgroupSearch(rows, count, int(label), wrong[rows], np.full(len(rows), rates[label]), proposes[rows])
    if np.count_nonzero(wrong[labelled]) >= 2 * MIN_ERRORS:
        yield SubgroupSearch(labelled, count, -1, wrong[labelled], rates[labels], proposes[labelled])


@dataclass(frozen=True)
class _Test:
    """A candidate with what the testing half says: sizes, correct images, and the exact p-value."""

    candidate: Candidate
    peers: Flags
    counts: tuple[int, int, int, int]  # images and correct ones in the group; images and correct ones of its peers
    p_value: float
    z: float

    @classmethod
    def of(cls, candidate: Candidate, observations: Observations, proposes: Flags) -> _Test:
        """Test a candidate."""
        labels, correct = observations.labels, observations.is_correct
        has_class = observations.is_labelled if candidate.label < 0 else labels == candidate.label
        tests = ~proposes & has_class
        inside, peers = candidate.members & tests, ~candidate.members & tests
        p_value = stratified_excess_test(~correct[tests], candidate.members[tests], labels[tests])
        everywhere = candidate.members & has_class, has_class & ~candidate.members
        sizes = [int(np.count_nonzero(part)) for part in (inside, inside & correct, peers, peers & correct)]
        return cls(
            candidate,
            everywhere[1],
            (sizes[0], sizes[1], sizes[2], sizes[3]),
            p_value,
            excess_z(~correct, *everywhere, labels),
        )

    @property
    def accuracies(self) -> tuple[float, float]:
        """The accuracy in the group, and of its peers."""
        inside, correct, peers, peers_correct = self.counts
        return correct / max(inside, 1), peers_correct / max(peers, 1)

    @property
    def effect(self) -> float:
        """The difference of the accuracies."""
        return self.accuracies[0] - self.accuracies[1]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference (Newcombe, Interval estimation for the difference, 1998, method 10)."""
        inside, correct, peers, peers_correct = self.counts
        (low, high), (peers_low, peers_high) = (
            [float(v) for v in wilson_interval(k, n)] for k, n in ((correct, inside), (peers_correct, peers))
        )
        p, q = self.accuracies
        below, above = np.hypot(p - low, peers_high - q), np.hypot(high - p, q - peers_low)
        return float(p - q - below), float(p - q + above)


def stratified_excess_test(wrong: Flags, members: Flags, strata: npt.NDArray[np.int64]) -> float:
    """Return the probability of at least as many errors in a group by chance: the exact conditional test.

    Within each stratum the number of errors in the group is hypergeometric, given the errors in the stratum; the sum
    over strata has the convolution of their distributions (Gart, Point and interval estimation of the common odds
    ratio in the combination of 2 x 2 tables, Biometrika 1970). With one stratum it is Fisher's exact test.

    Parameters
    ----------
    wrong, members : ndarray of shape (n,), bool
    strata : ndarray of shape (n,)
    """
    distribution = np.ones(1)
    for stratum in np.unique(strata[members]):
        rows = strata == stratum
        distribution = np.convolve(
            distribution,
            hypergeometric(int(rows.sum()), int(wrong[rows].sum()), int(members[rows].sum())),
        )
    observed = int(np.count_nonzero(wrong & members))
    return float(min(1.0, distribution[observed:].sum()))


def hypergeometric(total: int, marked: int, size: int) -> npt.NDArray[np.float64]:
    """Return the probabilities of 0 to `size` marked ones among `size` out of `total`, of which `marked` are."""
    logs = np.concatenate([[0.0], np.log(np.arange(1, total + 1)).cumsum()])  # logarithms of factorials
    k = np.arange(max(0, size - (total - marked)), min(size, marked) + 1)

    def choose(n: npt.ArrayLike, r: npt.ArrayLike) -> npt.NDArray[np.float64]:
        n, r = np.asarray(n), np.asarray(r)
        return np.asarray(logs[n] - logs[r] - logs[n - r])

    probabilities = np.zeros(size + 1)
    probabilities[k] = np.exp(choose(marked, k) + choose(total - marked, size - k) - choose(total, size))
    return probabilities


def excess_z(wrong: Flags, members: Flags, peers: Flags, labels: npt.NDArray[np.int64]) -> float:
    """Return how far the errors in a group exceed their expectation given those of each class, in deviations."""
    excess, variance = 0.0, 0.0
    for label in np.unique(labels[members]):
        rows = (labels == label) & (members | peers)
        n, k, m = rows.sum(), wrong[rows].sum(), members[rows].sum()
        excess += wrong[rows & members].sum() - m * k / n
        variance += m * (n - m) * k * (n - k) / (n * n * max(n - 1, 1))
    return float(excess / np.sqrt(variance)) if variance > 0 else 0.0


def _finding(observations: Observations, test: _Test, q: float) -> Finding:
    """Put a tested candidate into words."""
    candidate, members = test.candidate, np.flatnonzero(test.candidate.members)
    among = test.candidate.members | test.peers
    facts = _facts(observations, test, among)
    units = _units(observations, members, np.flatnonzero(test.peers))
    name = observations.classes[candidate.label] if candidate.label >= 0 else None
    words = [(str(fact["name"]), bool(fact["high"])) for fact in facts][: 2 if candidate.conditions else 1]
    text = describe_images(words, name, [int(unit["unit"]) for unit in units[:3]])
    inside, rest = test.accuracies
    confused = _confusions(observations, members)
    goes_to = f", most errors as `{observations.classes[confused[0]]}`" if confused else ""
    classes = ((candidate.label,) if candidate.label >= 0 else ()) + tuple(confused[:1])
    return Finding(
        kind="slice",
        summary=f"{text[0].upper()}{text[1:]}: {percent(inside)} right instead of {percent(rest)}"
        f" ({len(members)} images{goes_to}).",
        recommendation=f"Add {text} to the training data, or weigh them more, and measure this group separately.",
        images=tuple(int(i) for i in _typical_first(observations, members)),
        classes=classes,
        effect=test.effect,
        interval=test.interval,
        p_value=q,
        evidence={
            "effect": "accuracy in the group minus accuracy of the other images of its classes, tested half",
            "accuracy": inside,
            "accuracy of the others": rest,
            "tested images": test.counts[0],
            "errors beyond expectation, deviations": test.z,
            "facts": facts,
            "units": units,
            "description": text,
        },
    )


def _facts(observations: Observations, test: _Test, among: Flags) -> list[dict[str, object]]:
    """Return the conditions of a slice, or else the facts that describe it, the best first."""
    candidate = test.candidate
    members = candidate.members[among]
    separations = np.array([separation(column, members) for column in np.asarray(observations.facts[among]).T])
    chosen = [(c.fact, c.is_high, c.threshold) for c in candidate.conditions]
    if not chosen:
        about_images = _facts_about_images(observations)
        order = sorted(about_images, key=lambda f: -abs(separations[f] - 0.5))
        clear = [int(f) for f in order if abs(separations[f] - 0.5) >= CLEAR - 0.5][:3]
        medians = np.nanmedian(observations.facts[candidate.members][:, clear], axis=0) if clear else []
        chosen = [(f, bool(separations[f] > 0.5), float(m)) for f, m in zip(clear, medians, strict=True)]
    return [
        {
            "name": observations.fact_names[fact],
            "high": is_high,
            "threshold" if candidate.conditions else "median": threshold,
            "separation": float(max(separations[fact], 1 - separations[fact])),
        }
        for fact, is_high, threshold in chosen
    ]


def _units(
    observations: Observations, members: npt.NDArray[np.int64], peers: npt.NDArray[np.int64]
) -> list[dict[str, float | int]]:
    """Return the units whose means over positions differ most between a slice and its peers, in deviations."""
    inside, outside = (row_moments(observations.features, rows)[0] for rows in (members, peers))
    difference = (inside - outside) / row_moments(observations.features, np.concatenate([members, peers]))[1]
    best = np.argsort(-np.abs(difference), kind="stable")[:UNITS]
    return [{"unit": int(unit), "difference": float(difference[unit])} for unit in best]


def _confusions(observations: Observations, members: npt.NDArray[np.int64]) -> list[int]:
    """Return the classes that wrong images of a slice are taken for, the most frequent first."""
    wrong = members[~observations.is_correct[members]]
    counts = np.bincount(observations.predictions[wrong], minlength=len(observations.classes))
    return [int(c) for c in np.argsort(-counts, kind="stable") if counts[c] > 0]


def _typical_first(observations: Observations, members: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Order the images of a slice: wrong ones first, each part by its distance from the slice's mean features."""
    values = standardize(observations.features[members])
    distance = np.square(values - np.median(values, axis=0)).sum(1)
    return members[np.lexsort((distance, observations.is_correct[members]))]


def _detectable(observations: Observations, labelled: npt.NDArray[np.int64]) -> str:
    """Say which drop of accuracy would have been significant in a group of a typical class."""
    sizes = np.bincount(observations.labels[labelled], minlength=1)
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return NO_LABELS
    half = max(2, int(np.median(sizes)) // 2)
    group = max(1, half // 4)
    rate = float((~observations.is_correct[labelled]).mean())
    for errors in range(group + 1):
        marked = min(half, errors + round(rate * (half - group)))
        if hypergeometric(half, marked, group)[errors:].sum() <= LEVEL / PER_CLASS:
            return f"In a class of typical size, {errors} errors among {group} tested images would have been found."
    return "The classes are too small for a group within one class to be found."
