"""The proxy is 1 for features whose examples the judge sees alike, and 1/2 for random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convscope import ConvscopeError
from convscope.dictionaries.interpretability import interpretability, separations
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
    clear = separations(planted, vectors, 16, 10, torch.Generator().manual_seed(0))
    assert (clear > 0.9).all()
    noise = separations(torch.rand(40, 100, 5, 5, generator=g), vectors, 16, 100, torch.Generator().manual_seed(0))
    assert abs(noise.mean() - 0.5) < 0.05
    rare = torch.zeros(40, 1, 5, 5)
    rare[:3, 0, 0, 0] = 1
    assert len(separations(rare, vectors, 16, 10, torch.Generator())) == 0


def test_features_and_units_beside_each_other(model, learned, x):
    result = interpretability(learned, model, x, model, judge_layer="relu2", examples=6)
    assert result.mean_units == pytest.approx(result.units.mean())
    assert result.interval_features[0] <= result.mean_features <= result.interval_features[1]
    assert result.interval_units[0] <= result.mean_units <= result.interval_units[1]
    again = interpretability(learned, model, x, model, judge_layer="relu2", examples=6)
    np.testing.assert_array_equal(again.features, result.features)
    with pytest.raises(ConvscopeError, match="expected at least 4"):
        interpretability(learned, model, x[:2], model, judge_layer=LAYER)
