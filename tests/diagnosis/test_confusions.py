"""Planted confusions and miscalibration are found; without them nothing is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from convscope.diagnosis import confusions, miscalibration
from convscope.diagnosis.confusions import find_confusions
from convscope.diagnosis.importance import importance, sort_findings
from convscope.diagnosis.miscalibration import calibration_p_value, find_miscalibration
from convscope.diagnosis.overview import summarize
from tests.diagnosis.helpers import drawn_labels, make_context, make_observations

NUM_CLASSES = 8


def classified(labels: np.ndarray, predictions: np.ndarray, scale: float = 4.0) -> np.ndarray:
    """Return logits whose largest value is at the predictions."""
    return (np.eye(NUM_CLASSES)[predictions] * scale).astype(np.float32)


def with_random_errors(generator: np.random.Generator, count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Return labels, and predictions of which a fifth are spread evenly over the other classes."""
    labels = generator.integers(0, NUM_CLASSES, count)
    others = (labels + generator.integers(1, NUM_CLASSES, count)) % NUM_CLASSES
    return labels, np.where(generator.random(count) < 0.2, others, labels)


def test_the_test_is_that_of_a_binomial_by_hand():
    matrix = np.array([[10, 4, 1], [2, 10, 3], [1, 2, 10]])
    pairs, num_candidates = confusions.tested_confusions(matrix)
    assert num_candidates == 6
    assert len(pairs) == 6
    # Errors of the label 0: class 1 takes 2 of the 3 errors of class 2, class 2 takes 3 of the 5 of class 1.
    first, second = (2 + 0.5) / (3 + 1), (3 + 0.5) / (5 + 1)
    expected = 5 * first / (first + second)
    assert pairs[0].expected == pytest.approx(expected)
    raw = []
    for pair in pairs:
        (other,) = {0, 1, 2} - {pair.label, pair.prediction}
        alpha, p = matrix[other, pair.prediction] + 0.5, pair.expected / pair.errors
        raw.append(stats.betabinom.sf(pair.count - 1, pair.errors, alpha, alpha * (1 - p) / p))
    np.testing.assert_allclose([pair.p_value for pair in pairs], stats.false_discovery_control(raw))


def test_planted_confusions_are_found():
    generator = np.random.default_rng(0)
    labels, predictions = with_random_errors(generator)
    swapped = (labels == 2) & (generator.random(len(labels)) < 0.15)
    predictions[swapped] = 5
    predictions[(labels == 5) & (generator.random(len(labels)) < 0.15)] = 2
    predictions[(labels == 1) & (generator.random(len(labels)) < 0.1)] = 7
    observations = make_observations(labels, classified(labels, predictions))
    search = find_confusions(make_context(observations), summarize(observations))
    assert {frozenset(finding.classes) for finding in search.findings} == {frozenset({2, 5}), frozenset({1, 7})}
    assert search.num_candidates == NUM_CLASSES * (NUM_CLASSES - 1)
    for finding in search.findings:
        label, prediction = finding.classes
        count, total = ((labels == label) & (predictions == prediction)).sum(), (labels == label).sum()
        assert finding.effect == pytest.approx(count / total)
        assert finding.interval[0] < finding.effect < finding.interval[1]
        assert f"{count} of {total} images of `class {label}`" in finding.summary
        wrong = set(finding.images)
        assert wrong <= set(np.flatnonzero(np.isin(labels, finding.classes) & (labels != predictions)))


def test_random_errors_are_no_confusion():
    num_found = 0
    for seed in range(30):
        labels, predictions = with_random_errors(np.random.default_rng(seed), 500)
        observations = make_observations(labels, classified(labels, predictions))
        search = find_confusions(make_context(observations), summarize(observations))
        num_found += bool(search.findings)
        assert "would have been found" in search.detectable
    assert num_found <= 3  # of 30 at a false discovery rate of 5 %


def test_two_classes_and_no_errors():
    assert confusions.tested_confusions(np.array([[5, 2], [1, 5]])) == ([], 0)
    assert confusions.tested_confusions(np.eye(4, dtype=int)) == ([], 0)


def test_overconfidence_is_found_with_its_temperature():
    generator = np.random.default_rng(0)
    true_logits = generator.normal(size=(3000, NUM_CLASSES)) * 1.5
    labels = drawn_labels(true_logits, generator)
    observations = make_observations(labels, (true_logits * 2).astype(np.float32))
    overview = summarize(observations)
    (finding,) = find_miscalibration(make_context(observations), overview).findings
    assert finding.evidence["temperature"] == pytest.approx(2, rel=0.1)
    assert finding.effect == pytest.approx(overview.mean_confidence - overview.accuracy)
    assert finding.interval[0] < finding.effect < finding.interval[1]
    assert finding.p_value == pytest.approx(0.001)
    assert "over-confident" in finding.summary
    assert finding.evidence["debiased_calibration_error_with_temperature"] < 0.03 < overview.calibration_error
    assert not observations.is_correct[list(finding.images)].any()
    under = make_observations(labels, (true_logits / 2).astype(np.float32))
    (finding,) = find_miscalibration(make_context(under), summarize(under)).findings
    assert "under-confident" in finding.summary
    assert finding.effect < 0


def test_confidence_is_blamed_only_where_temperature_and_difference_agree():
    labels = np.zeros(20, int)
    overview = summarize(make_observations(labels, classified(labels, labels)))
    for temperature, effect, word in ((2, 0.1, "over-"), (0.5, -0.1, "under-"), (0.9, 0.1, ""), (1.1, -0.1, "")):
        text = miscalibration._summary(replace(overview, temperature=temperature), effect, 0.0)
        assert ("confident" in text) == bool(word)
        assert f"is {word}" in text


def test_no_temperature_is_recommended_where_none_helps():
    labels = np.zeros(400, int)
    predictions = np.where(np.arange(400) % 4 == 0, 1, 0)  # wrong on half of the images it is sure of, and on no others
    logits = np.where(np.arange(400)[:, None] % 2 == 0, 5.0, 0.3) * np.eye(2)[predictions]
    observations = make_observations(labels, logits.astype(np.float32))
    (finding,) = find_miscalibration(make_context(observations), summarize(observations)).findings
    before = finding.evidence["debiased_calibration_error"]
    assert finding.evidence["debiased_calibration_error_with_temperature"] >= before
    assert f"The calibration error is {before:.3f}, and no temperature reduces it." in finding.summary
    assert "Divide" not in finding.recommendation


def test_calibrated_networks_have_no_finding():
    p_values = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        confidence = generator.uniform(0.4, 1, 200)
        p_values.append(calibration_p_value(confidence, generator.random(200) < confidence, seed))
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(1000, 4)) * 2
    observations = make_observations(drawn_labels(logits, generator), logits.astype(np.float32))
    search = find_miscalibration(make_context(observations), summarize(observations))
    assert not search.findings
    assert "points between mean confidence and accuracy would have been found" in search.detectable


def test_few_images_are_not_tested():
    labels = np.zeros(5, int)
    observations = make_observations(labels, classified(labels, labels))
    search = find_miscalibration(make_context(observations), summarize(observations))
    assert search.num_candidates == 0
    assert "5 labelled images are too few" in search.detectable


def test_findings_are_sorted_by_the_images_they_explain():
    generator = np.random.default_rng(0)
    labels, predictions = with_random_errors(generator)
    predictions[(labels == 2) & (generator.random(len(labels)) < 0.3)] = 5
    predictions[(labels == 1) & (generator.random(len(labels)) < 0.1)] = 7
    observations = make_observations(labels, classified(labels, predictions, 20))
    overview = summarize(observations)
    context = make_context(observations)
    findings = [*find_confusions(context, overview).findings[::-1], *find_miscalibration(context, overview).findings]
    ordered = sort_findings(findings, overview.num_labelled)
    assert [f.kind for f in ordered] == ["calibration", "confusion", "confusion"]
    assert ordered[1].classes == (2, 5)
    values = [importance(f, overview.num_labelled) for f in ordered]
    assert values == sorted(values, reverse=True)
