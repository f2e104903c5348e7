"""Findings about shortcuts: which of the tested candidates are reported, in which order, and with which numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from convscope.diagnosis.causal_tests import Effect
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.shortcut_candidates import ShortcutCandidate
from convscope.diagnosis.shortcut_findings import causal_findings
from convscope.diagnosis.shortcut_tests import Outcome
from convscope.diagnosis.unit_shortcuts import UnitCandidate, UnitOutcome
from tests.diagnosis.helpers import make_context, make_observations

COUNT = 24
LABELS = np.arange(COUNT) % 3
FIRST = np.arange(COUNT) < 8  # carriers of a candidate; the others carry another one
UNIT = 2


@pytest.fixture(scope="module")
def context() -> DiagnosisContext:
    """Image 3, of class 0, is taken for another one; 1 and 4, of others, are taken for class 0."""
    predictions = LABELS.copy()
    predictions[[1, 3, 4]] = 0, 2, 0
    features = np.random.default_rng(0).normal(size=(COUNT, 5)).astype(np.float16)
    observations = make_observations(LABELS, 5 * np.eye(3)[predictions], features=features, classes=("a", "b", "c"))
    facts = np.stack([np.arange(COUNT) % 5, -np.arange(COUNT), np.arange(COUNT) % 2], 1).astype(np.float32)
    observations = replace(observations, facts=facts, fact_names=("noise", "order", "parity"))
    return replace(make_context(observations), layer=SimpleNamespace(name="relu"))


def effect(size: float, control: float = 0.1) -> Effect:
    """Make an effect of a given size beyond controls; 8 of 10 answers change, and 1 of 10 for the controls."""
    return Effect(control + size + np.array([-0.1, 0.1, 0.0]), np.full(3, control), (0.8, 0.1))


def outcome(kind: str, size: float, carriers: np.ndarray = FIRST, label: int = 0, **options: object) -> Outcome:
    candidate = ShortcutCandidate(kind, label, np.where(carriers, 1 + np.arange(COUNT) / COUNT, 0.0), 0.5, 0.9)
    return Outcome(candidate, effect(size), 0.001, **options)  # type: ignore[arg-type]


def unit_outcome(size: float, carriers: np.ndarray = FIRST) -> UnitOutcome:
    return UnitOutcome(UnitCandidate(0, UNIT, carriers, 0.4), effect(size), effect(0.2, 0.05), 0.001)


def reported(context: DiagnosisContext, *outcomes: Outcome | UnitOutcome) -> list[object]:
    findings = causal_findings(context, outcomes, [0.001] * len(outcomes))
    return [(finding.evidence["feature"], finding.classes[0]) for finding in findings]


def test_numbers_of_a_feature_of_images(context: DiagnosisContext) -> None:
    (finding,) = causal_findings(context, [outcome("blur", 0.5, removed=effect(0.3, 0.2))], [0.02])
    assert finding.effect == pytest.approx(0.5)
    assert finding.interval[0] < 0.5 < finding.interval[1]
    assert finding.p_value == 0.02
    assert finding.evidence["inserted"] == pytest.approx(
        {"change": 0.6, "random change": 0.1, "answers": 0.8, "answers by random changes": 0.1}
    )
    assert finding.evidence["removed"] == pytest.approx(
        {"change": 0.5, "random change": 0.2, "answers": 0.8, "answers by random changes": 0.1}
    )
    assert finding.evidence["carriers of the class"] == 3 / 8
    assert "8 images carry it" in finding.summary
    assert "makes 80 % of them `a`; matched random changes, 10 %" in finding.summary


def test_images_that_are_taken_for_the_class_come_first_by_amount(context: DiagnosisContext) -> None:
    (finding,) = causal_findings(context, [outcome("color", 0.5)], [0.02])
    assert finding.images == (6, 4, 1, 0, 7, 5, 3, 2)


def test_facts_and_units_that_differ_most(context: DiagnosisContext) -> None:
    (finding,) = causal_findings(context, [outcome("color", 0.5)], [0.02])
    facts = finding.evidence["facts"]
    assert facts[0] == {"name": "order", "high": True, "separation": 1.0}
    separations = [fact["separation"] for fact in facts]
    assert separations == sorted(separations, reverse=True)
    peaks = context.observations.peaks.astype(np.float64)
    differences = (peaks[FIRST].mean(0) - peaks[~FIRST].mean(0)) / peaks.std(0)
    units = finding.evidence["units"]
    assert [unit["unit"] for unit in units] == np.argsort(-np.abs(differences)).tolist()
    assert [unit["difference"] for unit in units] == pytest.approx(differences[[unit["unit"] for unit in units]])


def test_numbers_of_a_unit(context: DiagnosisContext) -> None:
    (finding,) = causal_findings(context, [unit_outcome(0.5)], [0.03])
    assert finding.effect == pytest.approx(0.5)
    numbers = {"decrease": 0.6, "decrease by random units": 0.1, "answers that go away": 0.8, "by random units": 0.1}
    assert finding.evidence["set to its mean on other classes"] == pytest.approx(numbers)
    numbers |= {"decrease": 0.25, "decrease by random units": 0.05}
    assert finding.evidence["set to its mean on the class"] == pytest.approx(numbers)
    assert "80 % of the answers `a` to 3 images of other classes that have it go away" in finding.summary
    peaks = context.observations.peaks[:, UNIT]
    wrong, right = ([image for image in images if FIRST[image]] for images in ((1, 4), (0, 6)))
    assert finding.images == (*sorted(wrong, key=lambda i: -peaks[i]), *sorted(right, key=lambda i: -peaks[i]))


def test_one_of_several_about_the_same_images_is_reported(context: DiagnosisContext) -> None:
    background, patch = outcome("background", 0.5), outcome("blur", 0.45)
    assert reported(context, background, patch) == [("blur", 0)]  # the more specific one, unless much weaker
    assert reported(context, background, outcome("blur", 0.2)) == [("background", 0)]
    assert reported(context, unit_outcome(0.6), patch) == [("blur", 0)]  # features of images before units
    assert reported(context, unit_outcome(0.6), outcome("blur", 0.45, ~FIRST)) == [("unit", 0), ("blur", 0)]
    assert reported(context, patch, outcome("background", 0.5, label=1)) == [("background", 1), ("blur", 0)]


def test_what_is_not_causal_or_not_significant_is_not_reported(context: DiagnosisContext) -> None:
    assert causal_findings(context, [outcome("color", 0.5)], [0.06]) == ()
    assert reported(context, outcome("color", 0.1)) == []  # below the least effect
    assert reported(context, outcome("color", 0.5, removed=effect(-0.1))) == []
    assert reported(context, outcome("border", 0.5, center=effect(0.4))) == []  # the object reaches into the frame
    assert reported(context, unit_outcome(0.1)) == []
