"""Slices: a planted weak group is found, noise is not; the exact test agrees with SciPy's."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.slices import (
    excess_z,
    find_slices,
    hypergeometric,
    stratified_excess_test,
    without_repetitions,
)

COUNT, UNITS = 400, 12


def context(seed: int, wrong: np.ndarray, features: np.ndarray, facts: np.ndarray) -> DiagnosisContext:
    """Return a context of images of four classes, of which `wrong` ones are taken for the next class."""
    labels = np.arange(COUNT) % 4
    predictions = np.where(wrong, (labels + 1) % 4, labels)
    observations = Observations(
        image_names=tuple(map(str, range(COUNT))),
        image_ids=np.arange(COUNT),
        labels=labels,
        classes=("cat", "crab", "bird", "panda"),
        logits=5 * np.eye(4)[predictions],
        features=features,
        peaks=features,
        evidence=np.zeros((COUNT, 2, 2)),
        facts=facts,
        fact_names=("brightness", "width"),
        thumbnails=np.zeros((COUNT, 4, 4, 3), np.uint8),
    )
    return DiagnosisContext(SimpleNamespace(), None, observations, lambda _: None, seed, lambda *_: None, 1)


def draws(seed: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng, rng.normal(size=(COUNT, UNITS)), rng.normal(size=(COUNT, 2))


def test_a_group_in_the_features_is_found():
    rng, features, facts = draws(0)
    members = (np.arange(COUNT) % 4 == 1) & (rng.random(COUNT) < 0.3)
    features[members, :4] += 4
    wrong = rng.random(COUNT) < np.where(members, 0.7, 0.08)
    search = find_slices(context(0, wrong, features, facts))
    finding = search.findings[0]
    images = np.isin(np.arange(COUNT), finding.images)
    assert (images & members).sum() >= 0.9 * max(images.sum(), members.sum())
    assert finding.kind == "slice"
    assert finding.classes == (1, 2)
    assert finding.p_value < 0.01
    assert finding.interval[0] < finding.effect < finding.interval[1] < 0
    assert {unit["unit"] for unit in finding.evidence["units"][:4]} == {0, 1, 2, 3}
    assert "`crab`" in finding.summary
    json.dumps(dict(finding.evidence))


def test_what_a_finding_says_about_its_images():
    """Its errors come first, with the class that most are taken for; units differ by the means of both parts."""
    rng, features, facts = draws(0)
    members = (np.arange(COUNT) % 4 == 1) & (rng.random(COUNT) < 0.3)
    features[members, :3] += [5, -5, 4]
    wrong = rng.random(COUNT) < np.where(members, 0.7, 0.08)
    made = context(0, wrong, features, facts)
    logits = made.observations.logits.copy()
    logits[np.flatnonzero(members & wrong)[:4]] = (0, 0, 0, 9)  # a few are taken for another class than most
    observations = replace(made.observations, logits=logits)
    finding = find_slices(replace(made, observations=observations)).findings[0]
    assert finding.classes == (1, 2)
    images = np.array(finding.images)
    assert wrong[images].tolist() == sorted(wrong[images].tolist(), reverse=True)
    is_peer = (np.arange(COUNT) % 4 == 1) & ~np.isin(np.arange(COUNT), images)
    deviation = np.concatenate([features[images], features[is_peer]]).std(0)
    differences = (features[images].mean(0) - features[is_peer].mean(0)) / deviation
    units = finding.evidence["units"]
    assert [unit["unit"] for unit in units] == np.argsort(-np.abs(differences))[: len(units)].tolist()
    assert [unit["difference"] for unit in units] == pytest.approx([differences[unit["unit"]] for unit in units])


def test_errors_beyond_expectation_are_those_of_hypergeometric_distributions():
    rng = np.random.default_rng(7)
    labels, wrong, members = np.arange(60) % 2, rng.random(60) < 0.3, rng.random(60) < 0.4
    mean = variance = 0.0
    for label in (0, 1):
        rows = labels == label
        law = stats.hypergeom(rows.sum(), wrong[rows].sum(), members[rows].sum())
        mean, variance = mean + law.mean(), variance + law.var()
    expected = ((wrong & members).sum() - mean) / np.sqrt(variance)
    assert excess_z(wrong, members, ~members, labels) == pytest.approx(expected)


def test_a_group_by_a_fact_is_found_and_named():
    rng, features, facts = draws(1)
    members = (np.arange(COUNT) % 4 == 0) & (facts[:, 0] < -0.6)
    wrong = rng.random(COUNT) < np.where(members, 0.8, 0.05)
    finding = find_slices(context(0, wrong, features, facts)).findings[0]
    images = np.isin(np.arange(COUNT), finding.images)
    assert (images & members).sum() >= 0.75 * max(images.sum(), members.sum())
    assert finding.summary.startswith("Dark images of `cat`: ")


def test_noise_has_no_slices():
    false = 0
    for seed in range(10):
        rng, features, facts = draws(100 + seed)
        false += len(find_slices(context(seed, rng.random(COUNT) < 0.2, features, facts)).findings)
    assert false <= 1  # the false discovery rate is 0.05


def test_classes_of_different_accuracy_are_no_slice():
    rng, features, facts = draws(2)
    wrong = rng.random(COUNT) < np.array([0.02, 0.05, 0.4, 0.6])[np.arange(COUNT) % 4]
    facts[:, 0] = np.arange(COUNT) % 4  # a fact that is the class
    assert find_slices(context(0, wrong, features, facts)).findings == ()


def test_images_without_labels_take_no_part():
    rng, features, facts = draws(3)
    base = context(0, rng.random(COUNT) < 0.2, features, facts)
    unlabelled = replace(base, observations=replace(base.observations, labels=np.full(COUNT, -1)))
    assert find_slices(unlabelled).findings == ()


@pytest.mark.parametrize(("total", "marked", "drawn"), [(20, 7, 5), (9, 9, 4), (30, 0, 6), (12, 8, 10)])
def test_hypergeometric_agrees_with_scipy(total, marked, drawn):
    expected = stats.hypergeom(total, marked, drawn).pmf(np.arange(drawn + 1))
    np.testing.assert_allclose(hypergeometric(total, marked, drawn), expected, atol=1e-12)


def test_exact_test_is_fishers_with_one_stratum_and_exact_with_two():
    rng = np.random.default_rng(0)
    wrong, members = rng.random(60) < 0.3, rng.random(60) < 0.4
    table = [[np.sum(members & wrong), np.sum(members & ~wrong)], [np.sum(~members & wrong), np.sum(~members & ~wrong)]]
    expected = stats.fisher_exact(table, alternative="greater").pvalue
    np.testing.assert_allclose(stratified_excess_test(wrong, members, np.zeros(60, int)), expected)
    strata = np.arange(60) % 2
    observed = np.sum(wrong & members)
    shuffled = np.empty((4000, 60), bool)
    for row in shuffled:
        for stratum in (0, 1):
            row[strata == stratum] = rng.permutation(wrong[strata == stratum])
    simulated = ((shuffled & members).sum(1) >= observed).mean()
    assert abs(stratified_excess_test(wrong, members, strata) - simulated) < 0.03


def test_a_part_of_a_slice_with_the_same_description_is_left_out():
    words = {"description": "dark images"}
    whole = Finding("slice", "", "", (1, 5, 9, 13), (1,), -0.3, (-0.5, -0.1), 0.01, words)
    part = replace(whole, images=(9, 13, 17))
    elsewhere = replace(whole, images=(13, 21, 25))
    other_words = replace(part, evidence={"description": "bright images"})
    assert without_repetitions([whole, part, elsewhere, other_words]) == (whole, elsewhere, other_words)
    assert without_repetitions([part, whole]) == (part,)
