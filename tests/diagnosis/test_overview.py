"""Scores agree with scikit-learn, and calibration with simulations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn import metrics

from convscope.diagnosis.calibration import (
    debiased_calibration_error,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability_curve,
    risk_coverage,
    softmax,
)
from convscope.diagnosis.overview import class_scores, cluster_order, confusion_matrix, sample_rows, summarize
from tests.diagnosis.helpers import drawn_labels, make_observations


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_scores_agree_with_scikit_learn(generator):
    logits = generator.normal(size=(400, 7)) * 2
    labels = drawn_labels(logits, generator)
    labels[labels == 3] = 2  # a class that is predicted but never a label
    is_unlabelled = generator.random(400) < 0.2
    observations = make_observations(np.where(is_unlabelled, -1, labels), logits.astype(np.float32))
    overview = summarize(observations)
    true, predicted = labels[~is_unlabelled], logits.argmax(1)[~is_unlabelled]
    assert (overview.num_images, overview.num_labelled) == (400, len(true))
    assert overview.accuracy == pytest.approx(metrics.accuracy_score(true, predicted))
    with pytest.warns(UserWarning, match="classes not in y_true"):
        assert overview.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(true, predicted))
    low, high = overview.balanced_accuracy_interval
    assert low < overview.balanced_accuracy < high
    scores = overview.class_scores
    precision, recall, _, support = metrics.precision_recall_fscore_support(true, predicted, zero_division=np.nan)
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_array_equal(scores.num_labelled, support)
    np.testing.assert_array_equal(overview.confusion, metrics.confusion_matrix(true, predicted))
    assert sorted(overview.confusion_order) == list(range(len(scores.classes)))


def test_classes_that_do_not_occur_are_left_out():
    labels, predictions = np.array([5, 5, 9]), np.array([5, 900, 9])
    scores = class_scores(labels, predictions)
    assert scores.classes.tolist() == [5, 9, 900]
    np.testing.assert_array_equal(scores.recall, [0.5, 1, np.nan])
    assert confusion_matrix(labels, predictions, scores.classes).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_confused_classes_are_next_to_each_other():
    matrix = np.diag([20] * 6)
    matrix[0, 4] = matrix[4, 0] = 9
    matrix[4, 2] = 5
    matrix[1, 5] = 3
    order = cluster_order(matrix).tolist()
    assert order[:3] in ([0, 4, 2], [2, 4, 0])
    assert set(order[3:5]) == {1, 5}
    assert order[5] == 3


def test_calibrated_probabilities_have_no_debiased_error(generator):
    plain, debiased = [], []
    for _ in range(200):
        confidence = generator.uniform(0.3, 1, 300)
        curve = reliability_curve(confidence, generator.random(300) < confidence)
        weights = curve.counts / curve.counts.sum()
        squared = np.square(curve.accuracy - curve.confidence)
        plain.append(weights @ squared)
        debiased.append(weights @ (squared - curve.accuracy * (1 - curve.accuracy) / (curve.counts - 1)))
    assert np.mean(plain) > 0.008
    assert abs(np.mean(debiased)) < 3 * np.std(debiased) / np.sqrt(200) + 1e-4


def test_known_miscalibration_is_measured(generator):
    confidence = generator.uniform(0.5, 1, 200_000)
    curve = reliability_curve(confidence, generator.random(200_000) < confidence - 0.1)
    assert expected_calibration_error(curve) == pytest.approx(0.1, abs=0.005)
    assert debiased_calibration_error(curve) == pytest.approx(0.1, abs=0.005)
    np.testing.assert_allclose(curve.confidence - curve.accuracy, 0.1, atol=0.02)
    assert ((curve.interval[:, 0] <= curve.accuracy) & (curve.accuracy <= curve.interval[:, 1])).all()


def test_bins_hold_equal_numbers_and_whole_ties():
    curve = reliability_curve(np.array([0.5] * 10 + [0.9] * 5), np.array([True] * 4 + [False] * 6 + [True] * 5), 5)
    assert curve.counts.tolist() == [10, 5]
    assert curve.accuracy.tolist() == [0.4, 1.0]
    assert expected_calibration_error(curve) == pytest.approx((10 * 0.1 + 5 * 0.1) / 15)
    even = reliability_curve(np.linspace(0, 1, 100), np.ones(100, bool), 15)
    assert set(even.counts) == {6, 7}
    assert reliability_curve(np.array([0.7]), np.array([True])).counts.tolist() == [1]


def test_the_temperature_is_recovered(generator):
    true_logits = generator.normal(size=(20_000, 5)) * 2
    labels = drawn_labels(true_logits, generator)
    for temperature in (0.4, 2.5):
        logits = true_logits * temperature
        estimate = fit_temperature(logits, labels)
        assert estimate == pytest.approx(temperature, rel=0.05)
        best = minimize_scalar(
            lambda t, z=logits: -log_softmax(z / np.exp(t), axis=1)[np.arange(len(z)), labels].mean(), bounds=(-4, 4)
        )
        assert estimate == pytest.approx(np.exp(best.x), rel=2e-3)
    assert negative_log_likelihood(true_logits, labels) == pytest.approx(metrics.log_loss(labels, softmax(true_logits)))


def test_risk_coverage(generator):
    confidence = generator.random(200)
    correct = generator.random(200) < confidence
    curve = risk_coverage(confidence, correct, num_points=200)
    order = np.argsort(-confidence)
    np.testing.assert_allclose(curve.accuracy, correct[order].cumsum() / np.arange(1, 201))
    np.testing.assert_allclose(curve.coverage, np.arange(1, 201) / 200)
    assert curve.area == pytest.approx(1 - curve.accuracy.mean())
    tied = risk_coverage(np.full(4, 0.5), np.array([True, False, False, False]))
    np.testing.assert_allclose(tied.accuracy, 0.25)
    assert len(risk_coverage(confidence, correct, num_points=10).coverage) == 10


def test_large_data_are_sampled_with_a_seed(monkeypatch):
    monkeypatch.setattr("convscope.diagnosis.overview.MAX_LOGITS", 40)
    rows = np.arange(100, 200)
    sample = sample_rows(rows, 10, seed=1)
    assert len(set(sample)) == 4
    assert set(sample) <= set(rows)
    assert sample.tolist() == sample_rows(rows, 10, seed=1).tolist()
