"""The proxy is 1 for features whose examples the judge sees alike, and 1/2 for random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convscope import ConvscopeError
from convscope.dictionaries.interpretability import interpretability, separation
from tests.dictionaries.conftest import LAYER


def test_planted_and_random_channels():
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 8, 5, 5, generator=g)
    planted = torch.zeros(40, 3, 5, 5)
    for n in range(40):
        for channel in range(3):
            row, column = divmod(int(torch.randint(25, (1,), generator=g)), 5)
            planted[n, channel, row, column] = 1 + torch.rand(1, generator=g)
            vectors[n, :, row, column] = 0.1 * vectors[n, :, row, column] + 8 * torch.eye(8)[channel]
    clear = separation(planted, vectors, 16, 10, torch.Generator().manual_seed(0))
    assert (clear.from_random > 0.9).all()
    assert (clear.from_others > 0.9).all()
    noise = separation(torch.rand(40, 100, 5, 5, generator=g), vectors, 16, 100, torch.Generator().manual_seed(0))
    assert abs(noise.from_random.mean() - 0.5) < 0.05
    assert abs(noise.from_others.mean() - 0.5) < 0.05


def test_channels_that_respond_to_the_same_are_told_from_random_positions_only():
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 8, 5, 5, generator=g)
    vectors[:, 0, 2, 2] += 8  # an object in the middle of each image
    maps = 0.1 * torch.rand(200, 20, 5, 5, generator=g)
    maps[:, :, 2, 2] += torch.rand(200, 20, generator=g) + 0.1
    same = separation(maps, vectors, 16, 20, torch.Generator().manual_seed(0))
    assert (same.from_random > 0.9).all()
    assert abs(same.from_others.mean() - 0.5) < 0.05


def test_channels_with_fewer_examples_are_left_out():
    maps = torch.zeros(40, 4, 5, 5)
    maps[:16, :2, 0, 0] = 1
    maps[:15, 2:, 0, 0] = 1
    result = separation(maps, torch.rand(40, 8, 5, 5), 16, 10, torch.Generator().manual_seed(0))
    assert result.judged == 0.5
    assert len(result.from_random) == len(result.from_others) == 2
    none = separation(torch.zeros(40, 1, 5, 5), torch.rand(40, 8, 5, 5), 16, 10, torch.Generator())
    assert len(none.from_random) == 0
    assert np.isnan(none.summary()["from_random"]).all()


def test_features_and_units_beside_each_other(model, learned, x):
    result = interpretability(learned, model, x, model, judge_layer="relu2", examples=6)
    for part in (result.features, result.units, result.directions):
        mean, low, high = part.summary()["from_others"]
        assert mean == pytest.approx(part.from_others.mean())
        assert low <= mean <= high
    again = interpretability(learned, model, x, model, judge_layer="relu2", examples=6)
    np.testing.assert_array_equal(again.features.from_others, result.features.from_others)
    with pytest.raises(ConvscopeError, match="expected at least 6"):
        interpretability(learned, model, x[:2], model, judge_layer=LAYER, examples=6)
