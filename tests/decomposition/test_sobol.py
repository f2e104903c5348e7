"""Total Sobol indices against closed forms and a direct computation of the estimator."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from convscope import ConvscopeError
from convscope.decomposition.sobol import precision_notes, saltelli_points, total_indices


def estimate_indices(
    function: Callable[[Tensor], Tensor], num_inputs: int, num_points: int = 1024, seed: int = 0
) -> np.ndarray:
    return total_indices(function(saltelli_points(num_inputs, num_points, seed)), num_inputs).numpy()


@pytest.mark.parametrize("seed", range(3))
def test_additive_function(seed: int) -> None:
    """Of sum a x the index is a^2 / sum a^2: each input's fraction of the variance."""
    weights = torch.tensor([3.0, -2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    expected = (weights.square() / weights.square().sum()).numpy()
    assert estimate_indices(lambda x: x @ weights + 7, 5, seed=seed) == pytest.approx(expected, abs=0.01)


def test_unused_input_has_index_zero() -> None:
    assert estimate_indices(lambda x: x[:, 0] * x[:, 1], 3)[2] == 0


def test_ishigami_function() -> None:
    """sin x1 + a sin^2 x2 + b x3^4 sin x1 on [-pi, pi]: x3 acts with x1 only."""
    a, b, pi = 7.0, 0.1, math.pi

    def ishigami(x: Tensor) -> Tensor:
        x = (2 * x - 1) * pi
        return x[:, 0].sin() + a * x[:, 1].sin() ** 2 + b * x[:, 2] ** 4 * x[:, 0].sin()

    first_order, interaction = (1 + b * pi**4 / 5) ** 2 / 2, b**2 * pi**8 * (1 / 18 - 1 / 50)
    variance = first_order + a**2 / 8 + interaction
    expected = [(first_order + interaction) / variance, a**2 / 8 / variance, interaction / variance]
    assert expected == pytest.approx([0.5576, 0.4424, 0.2437], abs=1e-4)  # as in the literature
    assert estimate_indices(ishigami, 3, 4096) == pytest.approx(expected, abs=0.02)
    assert estimate_indices(ishigami, 3, 4096).sum() > 1.2


def test_g_function() -> None:
    """prod (|4 x - 2| + a) / (1 + a): V_i = 1 / (3 (1 + a)^2), total = V_i prod_{j != i} (1 + V_j) / V."""
    a = np.array([0.0, 1.0, 4.5, 9.0])

    def g(x: Tensor) -> Tensor:
        return (((4 * x - 2).abs() + torch.from_numpy(a)) / (1 + torch.from_numpy(a))).prod(1)

    partial_variances = 1 / (3 * (1 + a) ** 2)
    total = np.prod(1 + partial_variances)
    assert estimate_indices(g, 4, 4096) == pytest.approx(
        partial_variances * total / (1 + partial_variances) / (total - 1), abs=0.02
    )


def test_estimator_agrees_with_its_formula() -> None:
    inputs, count = 3, 8
    points = saltelli_points(inputs, count, seed=4)
    values = (points @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).square() + points[:, 0]
    parts = values.numpy().reshape(inputs + 2, count)
    variance = np.concatenate([parts[0], parts[1]]).var()
    expected = [
        sum((parts[0][n] - parts[2 + i][n]) ** 2 for n in range(count)) / (2 * count * variance) for i in (0, 1, 2)
    ]
    assert total_indices(values, inputs).numpy() == pytest.approx(expected, rel=1e-12)


def test_saltelli_points() -> None:
    points = saltelli_points(3, 16, seed=1).reshape(5, 16, 3).numpy()
    assert points.min() >= 0
    assert points.max() < 1
    a, b = points[:2]
    for i, mixed in enumerate(points[2:]):
        others = [k for k in range(3) if k != i]
        assert (mixed[:, i] == b[:, i]).all()
        assert (mixed[:, others] == a[:, others]).all()
    # Of a scrambled net of 16 points, one lies in each sixteenth of every axis.
    assert sorted((a[:, 0] * 16).astype(int)) == list(range(16))
    assert sorted((b[:, 2] * 16).astype(int)) == list(range(16))


def test_points_depend_on_the_seed() -> None:
    assert torch.equal(saltelli_points(4, 32, 3), saltelli_points(4, 32, 3))
    assert not torch.equal(saltelli_points(4, 32, 3), saltelli_points(4, 32, 4))


def test_batch_of_functions_agrees_with_single_functions() -> None:
    points = saltelli_points(3, 64)
    values = torch.stack([points[:, 0], points.prod(1), points.sum(1).exp()])
    first_order = torch.stack([total_indices(row, 3) for row in values])
    assert total_indices(values, 3).numpy() == pytest.approx(first_order.numpy(), rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-14])
def test_constant_function_has_indices_zero(scale: float) -> None:
    """Rounding does not count as variance."""
    assert estimate_indices(lambda x: 5 + scale * x[:, 0], 2).tolist() == [0, 0]


def test_scale_of_the_function_does_not_matter() -> None:
    assert estimate_indices(lambda x: 1e-9 * x.prod(1), 2) == pytest.approx(
        estimate_indices(lambda x: x.prod(1), 2), rel=1e-6
    )


@pytest.mark.parametrize(("inputs", "count"), [(0, 8), (3, 1)])
def test_invalid_counts_are_refused(inputs: int, count: int) -> None:
    with pytest.raises(ConvscopeError, match="expected at least 1 input and 2 points"):
        saltelli_points(inputs, count)


def test_indices_above_one_are_the_error_of_few_points_and_are_named() -> None:
    """The index of the only input that matters is 1; its estimate scatters around it, less with more points."""

    def estimates(num_points: int) -> torch.Tensor:
        points = [saltelli_points(3, num_points, seed) for seed in range(16)]
        return torch.stack([total_indices(p[:, 0].exp(), 3)[0] for p in points])

    few, many = estimates(4), estimates(256)
    assert few.max() > 1.2
    assert (many - 1).abs().max() < 0.05
    (note,) = precision_notes(torch.tensor([1.334, 0.2]), 1, 32)
    assert "1.33 was estimated: the error is 0.33 or more with 32 points on 1 image" in note
    assert precision_notes(torch.tensor([0.9, 0.2]), 1, 32) == []
