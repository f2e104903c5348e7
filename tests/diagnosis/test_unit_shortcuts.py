"""Units as shortcuts: one that flips answers is found with its effect in closed form; the object is not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from convscope.diagnosis.changed_images import change_images
from convscope.diagnosis.search import Search
from convscope.diagnosis.shortcuts import find_shortcuts
from convscope.diagnosis.unit_shortcuts import (
    PeakStatistics,
    UnitCandidate,
    flipped_rate,
    measure_units,
    propose_units,
    removal_effect,
)
from tests.diagnosis.planted import SIZE, context_of

COUNT, UNITS = 180, 8
PROP = 3  # the channel that a thing of changing pixels and position excites


class PropNetwork(nn.Module):
    """Logits from the means of maps: channels 0 to 2 speak for the classes, 3 for the first, the others for none.

    The input has three channels. Objects are bright in one of them; the prop is dark in all.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, UNITS, 1)
        weights = torch.zeros(UNITS, 3)
        weights[:3] = 1.5 * torch.eye(3) - 0.5
        weights[PROP] = -1.0
        weights[4:] = torch.rand((UNITS - 4, 3), generator=torch.Generator().manual_seed(0))
        self.mix.weight.data = weights[:, :, None, None]
        self.mix.bias.data = torch.tensor([-0.2, -0.2, -0.2, 0.3] + [0.1] * (UNITS - 4))
        self.relu = nn.ReLU()
        self.head = nn.Linear(UNITS, 3)
        self.head.weight.data.zero_()
        self.head.bias.data.zero_()
        self.head.weight.data[:, :3] = 100 * torch.eye(3)
        self.head.weight.data[0, PROP] = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.mix(x)).mean((2, 3)))


def make_data() -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Return labels, which images have the prop (half of the first class, a fifth of the others), and images."""
    rng = np.random.default_rng(0)
    labels = np.arange(COUNT) % 3
    number = np.arange(COUNT) // 3
    has_prop = np.where(labels == 0, number % 2 == 0, number % 5 == 0)
    x = rng.uniform(0.3, 0.5, (COUNT, 3, SIZE, SIZE))
    for image, label, prop in zip(x, labels, has_prop, strict=True):
        top, left = rng.integers(0, SIZE - 8, 2)
        image[label, top : top + 8, left : left + 8] += 0.5
        for _ in range(40 if prop else 0):
            y, z = rng.integers(0, SIZE - 2, 2)
            image[:, y : y + 2, z : z + 2] = rng.uniform(0, 0.1)
    return labels, has_prop, torch.from_numpy(x).float()


@pytest.fixture(scope="module")
def planted():
    return make_data()


@pytest.fixture(scope="module")
def search(planted) -> Search:
    labels, _, x = planted
    return find_shortcuts(context_of(PropNetwork(400.0), x, labels))


def test_a_unit_that_flips_answers_is_found(planted, search):
    _, has_prop, _ = planted
    finding = next(f for f in search.findings if f.evidence["feature"] == "unit")
    assert finding.classes == (0,)
    assert finding.evidence["units"][0]["unit"] == PROP
    assert set(finding.images) == set(np.flatnonzero(has_prop).tolist())
    assert finding.effect > 0.5
    assert finding.summary.startswith(f"What unit {PROP} of `relu` responds to makes the network answer `red`.")
    json.dumps(dict(finding.evidence))


def test_the_effect_equals_its_closed_form(planted):
    labels, has_prop, x = planted
    network = PropNetwork(400.0)
    context = context_of(network, x, labels)
    rows = np.flatnonzero(has_prop)[:10]
    controls = np.full((2, 10), 5)
    means = torch.linspace(0, 0.7, UNITS)
    effect = removal_effect(context, rows, UnitCandidate(0, PROP, has_prop, 1.0), controls, means)
    with torch.no_grad():
        features = network.relu(network.mix(x[rows])).mean((2, 3)).double()
    weight, bias = network.head.weight.detach().double(), network.head.bias.detach().double()
    before = (features @ weight.T + bias).softmax(1)[:, 0]
    features[:, PROP] = means[PROP]
    after = features @ weight.T + bias
    assert np.allclose(effect.changes, before - after.softmax(1)[:, 0], atol=1e-5)
    assert effect.answers[0] == pytest.approx(float((after.argmax(1) != 0).double().mean()))
    assert np.allclose(effect.controls, 0, atol=1e-5)  # unit 5 has no influence


def test_without_influence_nothing_is_proposed_or_found(planted):
    labels, _, x = planted
    context = context_of(PropNetwork(0.0), x, labels)
    assert propose_units(context.observations, [0, 1, 2]) == []
    assert not [f for f in find_shortcuts(context).findings if f.evidence["feature"] == "unit"]


def test_a_unit_that_goes_with_errors_but_does_not_cause_them_is_tested_and_not_reported(planted):
    labels, has_prop, x = planted
    context = context_of(PropNetwork(400.0), x, labels)
    peaks = context.observations.peaks.copy()
    peaks[:, 6] = has_prop  # as if a unit without influence were high on the same images
    tested = list(measure_units(replace(context, observations=replace(context.observations, peaks=peaks)), [0]))
    assert {outcome.candidate.unit: outcome.is_causal for outcome in tested} == {PROP: True, 6: False}
    assert {outcome.candidate.unit: outcome.members is None for outcome in tested} == {PROP: False, 6: True}


def test_a_unit_without_which_the_class_is_not_recognised_is_the_objects(planted):
    """Images of other classes that look like the class have its unit high, and those of the class without it fail."""
    labels, has_prop, x = planted
    observations = context_of(PropNetwork(400.0), x, labels).observations
    assert PROP in {c.unit for c in propose_units(observations, [0])}
    logits = observations.logits.copy()
    logits[(labels == 0) & ~has_prop] = (0, 1, 0)
    assert propose_units(replace(observations, logits=logits), [0]) == []


def test_statistics_of_peaks_equal_those_of_all_values_at_once(planted):
    labels, _, x = planted
    observations = context_of(PropNetwork(400.0), x, labels).observations
    peaks = np.random.default_rng(1).normal(3, 2, (600, 5)).astype(np.float16)  # more than a chunk of images
    peaks[:, 4] = 1
    labels, is_part = np.arange(600) % 3, np.arange(600) % 7 == 0
    statistics = PeakStatistics(replace(observations, peaks=peaks, labels=labels))
    values = peaks.astype(np.float64)
    deviations = values[:, :4].std(0)
    differences = (values[is_part].mean(0) - values[~is_part].mean(0))[:4] / deviations
    np.testing.assert_allclose(statistics.difference(is_part), [*differences, 0], atol=1e-9)
    rows = np.arange(40, 90)
    standardized = (values[rows].mean(0) - values.mean(0))[:4] / deviations
    np.testing.assert_allclose(statistics.standardized(rows), [*standardized, 0], atol=1e-9)
    label_means = np.stack([values[labels == k].mean(0) for k in labels[rows]])
    elevation = (values[rows] - label_means).mean(0)[:4] / deviations
    np.testing.assert_allclose(statistics.elevation(rows), [*elevation, 0], atol=1e-9)


def test_flips_are_counted_within_labels():
    labels = np.repeat([0, 1, 2], 8)
    carriers = np.tile([True, True, False, False], 6)
    predictions = labels.copy()
    predictions[8:10] = 0  # two of the four carriers of class 1
    predictions[18] = 0  # one of the four others of class 2
    x = torch.rand((24, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    observations = replace(context_of(PropNetwork(0.0), x, labels).observations, logits=np.eye(3)[predictions])
    assert flipped_rate(observations, 0, carriers) == pytest.approx((4 * (2 / 4 - 0) + 4 * (0 - 1 / 4)) / 8)


def test_same_seed_same_findings(planted, search):
    labels, _, x = planted
    assert find_shortcuts(context_of(PropNetwork(400.0), x, labels)) == search


def test_units_have_no_changed_images(planted, search):
    labels, _, x = planted
    units = [f for f in search.findings if f.evidence["feature"] == "unit"]
    assert units
    assert len(change_images(context_of(PropNetwork(400.0), x, labels), units).image) == 0
