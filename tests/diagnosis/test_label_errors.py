"""Wrong labels: the formulas by hand, and wrong labels that were planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convscope
from convscope.diagnosis.confident_learning import (
    calibrated_counts,
    class_thresholds,
    confident_classes,
    confident_joint,
    fit_label_noise,
    label_quality,
    label_rates,
)
from convscope.diagnosis.label_errors import check_labels, find_label_errors
from convscope.diagnosis.linear_head import assign_folds, cross_validated_logits, fit_linear_head
from convscope.diagnosis.observations import Observations
from tests.diagnosis.helpers import average_precision, make_context, make_observations

PROBABILITIES = np.array(
    [[0.9, 0.1, 0.0], [0.7, 0.2, 0.1], [0.2, 0.8, 0.0], [0.1, 0.9, 0.0], [0.5, 0.3, 0.2], [0.0, 0.2, 0.8]]
)
LABELS = np.array([0, 0, 0, 1, 1, 2])


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def with_wrong_labels(count: int = 900, num_classes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return calibrated logits, labels of which a fifth of class 1 is called 3, and which labels are wrong."""
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 1, (count, num_classes))
    logits[np.arange(count), generator.integers(0, num_classes, count)] += 4
    cumulative = softmax(logits).cumsum(1)
    truth = (cumulative < generator.random((count, 1))).sum(1).clip(max=num_classes - 1)
    is_wrong = (truth == 1) & (generator.random(count) < 0.2)
    return logits, np.where(is_wrong, 3, truth), is_wrong


def observe(labels: np.ndarray, logits: np.ndarray) -> Observations:
    """Make observations whose features are the logits."""
    return make_observations(labels, logits, features=logits.astype(np.float16))


def test_confident_joint_by_hand() -> None:
    thresholds = class_thresholds(PROBABILITIES[np.arange(6), LABELS], LABELS, 3)
    np.testing.assert_allclose(thresholds, [(0.9 + 0.7 + 0.2) / 3, (0.9 + 0.3) / 2, 0.8])
    confident = confident_classes(PROBABILITIES, thresholds)
    # 0.6 for class 0, 0.6 for class 1, 0.8 for class 2; the fifth image reaches none
    assert confident.tolist() == [0, 0, 1, 1, -1, 2]
    joint = confident_joint(LABELS, confident, 3)
    assert joint.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 1]]
    counts = calibrated_counts(joint, np.bincount(LABELS))
    np.testing.assert_allclose(counts, [[2, 1, 0], [0, 2, 0], [0, 0, 1]])  # row 1: 1 confident image stands for 2


def test_the_most_probable_class_wins_above_several_thresholds() -> None:
    assert confident_classes(np.array([[0.45, 0.5, 0.05]]), np.array([0.4, 0.45, 0.9])).tolist() == [1]
    assert confident_classes(np.array([[0.45, 0.5, 0.05]]), np.array([0.4, 0.55, 0.9])).tolist() == [0]


def test_classes_without_images_are_never_confident() -> None:
    thresholds = class_thresholds(np.array([0.9]), np.array([0]), 2)
    assert np.isinf(thresholds[1])
    assert confident_classes(np.array([[0.0, 1.0]]), thresholds).tolist() == [-1]
    quality = label_quality(np.array([[0.0, 1.0]]), np.array([0]), thresholds, label_rates(np.eye(2)))
    assert np.isfinite(quality).all()


def test_label_quality_by_hand() -> None:
    thresholds, rates = np.array([0.5, 0.8]), np.array([[0.9, 0.2], [0.1, 0.8]])
    quality = label_quality(np.array([[0.3, 0.7]]), np.array([0]), thresholds, rates)
    right, wrong = 0.3 / 0.5 * 0.9, 0.7 / 0.8 * 0.2
    np.testing.assert_allclose(quality, [right / (right + wrong)], rtol=1e-6)
    # without wrong labels the quality is the self-confidence, but for the thresholds
    plain = label_quality(np.array([[0.3, 0.7]]), np.array([0]), np.ones(2), np.ones((2, 2)))
    np.testing.assert_allclose(plain, [0.3], rtol=1e-6)


def test_rates_by_hand() -> None:
    rates = label_rates(np.array([[90.0, 0.0], [10.0, 100.0]]))
    error = (10 + 0.5) / (200 + 1)
    np.testing.assert_allclose(rates[1, 0], (10 + 100 * error) / (100 + 100))
    np.testing.assert_allclose(rates.sum(0), 1)


def test_images_are_ranked_without_a_confidently_wrong_label() -> None:
    """Two classes of twelve images; one label is wrong, but the network is too unsure of the right class to count."""
    probabilities = np.array([[0.7, 0.001]] * 12 + [[0.001, 0.3]] + [[0.001, 0.4]] * 12)
    labels = np.array([0] * 13 + [1] * 12)
    thresholds = class_thresholds(probabilities[np.arange(25), labels], labels, 2)
    joint = confident_joint(labels, confident_classes(probabilities, thresholds), 2)
    assert joint[0, 1] == joint[1, 0] == 0
    rates = label_rates(calibrated_counts(joint, np.array([13, 12])))
    quality = label_quality(probabilities, labels, thresholds, rates)
    assert quality.argmin() == 12
    assert quality[12] < 0.2
    assert np.delete(quality, 12).min() > 0.9


def test_planted_labels_are_ranked_above_self_confidence() -> None:
    logits, labels, is_wrong = with_wrong_labels()
    quality = check_labels(logits, labels).quality
    self_confidence = softmax(logits)[np.arange(len(labels)), labels]
    ours, plain = (average_precision(is_wrong, -scores) for scores in (quality, self_confidence))
    assert ours > plain + 0.03
    assert ((quality >= 0) & (quality <= 1)).all()


def test_planted_labels_are_a_finding() -> None:
    logits, labels, is_wrong = with_wrong_labels()
    search, quality = find_label_errors(make_context(observe(labels, logits)))
    (finding,) = search.findings
    assert (finding.kind, finding.classes) == ("label-error", (3, 1))
    assert "labelled `class 3` look like `class 1`" in finding.summary
    assert is_wrong[list(finding.images)].mean() > 0.75
    assert finding.interval[0] <= is_wrong.sum() <= finding.interval[1]
    assert finding.p_value < 1e-4
    assert np.all(np.diff(quality[list(finding.images)]) >= 0)  # the most suspicious first


def test_blind_spots_of_the_network_are_no_wrong_labels() -> None:
    generator = np.random.default_rng(6)
    labels = generator.integers(0, 3, 300)
    features = np.eye(3)[labels] * 4 + generator.normal(0, 0.5, (300, 3))
    predicted = np.where((labels == 2) & (generator.random(300) < 0.3), 0, labels)  # confidently wrong
    logits = 6 * np.eye(3)[predicted] + generator.normal(0, 0.5, (300, 3))
    context = make_context(make_observations(labels, logits, features=features.astype(np.float16)))
    assert not [f for f in find_label_errors(context)[0].findings if f.classes == (2, 0)]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_right_labels_are_no_finding(temperature: float) -> None:
    generator = np.random.default_rng(2)
    logits = generator.normal(0, 1.5, (800, 6))
    cumulative = softmax(logits).cumsum(1)
    labels = (cumulative < generator.random((800, 1))).sum(1).clip(max=5)
    search, _ = find_label_errors(make_context(observe(labels, logits * temperature)))  # overconfident at 3
    assert not search.findings
    assert "would have been found" in search.detectable


def test_noise_and_temperature_are_told_apart() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 1, (4000, 5))
    logits[np.arange(4000), generator.integers(0, 5, 4000)] += 4
    labels = (softmax(logits).cumsum(1) < generator.random((4000, 1))).sum(1).clip(max=4)
    clean = fit_label_noise(2 * logits, labels)
    assert clean.temperature == pytest.approx(2, rel=0.15)
    assert clean.interval[0] == 0
    noisy = np.where(generator.random(4000) < 0.08, generator.integers(0, 5, 4000), labels)
    fit = fit_label_noise(2 * logits, noisy)
    assert fit.temperature == pytest.approx(2, rel=0.15)
    assert fit.interval[0] <= 0.08 <= fit.interval[1]
    assert fit.p_value < 1e-6
    search, _ = find_label_errors(make_context(observe(noisy, 2 * logits)))
    total = sum(finding.effect for finding in search.findings)
    assert total == pytest.approx((noisy != labels).sum(), rel=0.3)


def test_unlabelled_images_have_no_quality() -> None:
    logits, labels, _ = with_wrong_labels(100)
    labels[:10] = -1
    _, quality = find_label_errors(make_context(observe(labels, logits)))
    assert np.isnan(quality[:10]).all()
    assert np.isfinite(quality[10:]).all()
    search, quality = find_label_errors(make_context(make_observations(np.full(100, -1), logits)))
    assert not search.findings
    assert np.isnan(quality).all()


def test_blocks_do_not_change_the_result() -> None:
    logits, labels, _ = with_wrong_labels(300)
    whole, parts = check_labels(logits, labels), check_labels(logits, labels, memory=5 * 8 * 6 * 7)
    np.testing.assert_array_equal(whole.quality, parts.quality)
    np.testing.assert_array_equal(whole.joint, parts.joint)
    np.testing.assert_allclose(whole.expected, parts.expected)


def test_a_memorizing_network_is_noted_and_folds_find_its_wrong_labels() -> None:
    generator = np.random.default_rng(4)
    truth = generator.integers(0, 3, 300)
    features = np.eye(3)[truth] @ generator.normal(0, 2, (3, 10)) + generator.normal(0, 0.5, (300, 10))
    is_wrong = generator.random(300) < 0.06
    labels = np.where(is_wrong, (truth + 1) % 3, truth)
    context = make_context(make_observations(labels, 20 * np.eye(3)[labels], features=features.astype(np.float16)))
    search, quality = find_label_errors(context)
    assert not search.findings
    assert "folds=5" in search.notes[0]
    search, quality = find_label_errors(context, folds=5)
    assert average_precision(is_wrong, -quality) > 0.9
    assert search.findings
    images = [i for finding in search.findings for i in finding.images]
    assert is_wrong[images].mean() > 0.8


def test_folds_are_even_in_each_class() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 5])
    folds = assign_folds(labels, 5, seed=0)
    for k in range(3):
        assert np.bincount(folds[labels == k], minlength=5).tolist() == [(labels == k).sum() // 5] * 5
    assert (folds == assign_folds(labels, 5, seed=0)).all()


def test_the_head_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 3, 120)
    features = (np.eye(3)[labels] @ generator.normal(0, 1, (3, 6)) + generator.normal(0, 1, (120, 6))).astype(
        np.float32
    )
    head = fit_linear_head(torch.from_numpy(features), torch.from_numpy(labels), 3, robust=False).numpy()
    peer = linear_model.LogisticRegression(C=1 / (1e-3 * 120), max_iter=1000, tol=1e-8)  # the same penalty per image
    peer.fit(features, labels)
    np.testing.assert_allclose(softmax(features @ head[:-1] + head[-1]), peer.predict_proba(features), atol=5e-3)


@pytest.mark.parametrize("folds", [1, -1, 2.5, 1000])
def test_folds_are_checked(folds: object) -> None:
    logits, labels, _ = with_wrong_labels(50)
    with pytest.raises(convscope.ConvscopeError, match="folds is"):
        find_label_errors(make_context(observe(labels, logits)), folds=folds)  # type: ignore[arg-type]


def test_classes_without_images_take_no_part_in_the_head():
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(60, 5)), np.arange(60) % 3
    few = cross_validated_logits(features, labels, 3, 5, 0, lambda *_: None)
    many = cross_validated_logits(features, np.array([2, 5, 7])[labels], 9, 5, 0, lambda *_: None)
    assert np.array_equal(many[:, [2, 5, 7]], few)
    assert np.isneginf(np.delete(many, [2, 5, 7], axis=1)).all()
