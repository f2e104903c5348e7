"""Non-negative matrix factorisation: closed forms, known factors, optimality conditions, agreement with references."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from convscope import ConvscopeError
from convscope.decomposition.nmf import factorize, nnls


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    """Draw a matrix from a uniform distribution."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Draw a matrix of which half is 0, as after a ReLU."""
    return (random_matrix(rows, columns, seed=seed) - 0.5).clamp(min=0)


def multiplicative_updates(a: np.ndarray, rank: int, steps: int = 1000) -> float:
    """Return the relative error of Lee and Seung's algorithm (NeurIPS 2000, theorem 1) from a random start."""
    rng = np.random.default_rng(0)
    u, w = rng.random((len(a), rank)) + 0.1, rng.random((rank, a.shape[1])) + 0.1
    for _ in range(steps):
        w *= (u.T @ a) / np.maximum(u.T @ u @ w, 1e-12)
        u *= (a @ w.T) / np.maximum(u @ (w @ w.T), 1e-12)
    return float(np.linalg.norm(a - u @ w) / np.linalg.norm(a))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "columns", "rank"), [(60, 40, 5), (40, 90, 10), (200, 30, 3)])
def test_error_is_that_of_multiplicative_updates(rows: int, columns: int, rank: int, seed: int) -> None:
    """Local optima differ: the error may not be larger by more than 1 %."""
    low_rank = sparse_matrix(rows, rank, seed) @ sparse_matrix(rank, columns, seed + 9)
    a = low_rank + 0.3 * sparse_matrix(rows, columns, seed + 50)
    reference = multiplicative_updates(a.numpy(), rank)
    error = factorize(a, rank).error
    assert error <= 1.01 * reference
    assert error >= 0.95 * reference


def test_error_scale_and_signs() -> None:
    a = sparse_matrix(50, 30)
    result = factorize(a, 4)
    assert result.error == pytest.approx(float((a - result.coefficients @ result.bank).norm() / a.norm()), rel=1e-9)
    assert result.bank.norm(dim=1).numpy() == pytest.approx(np.ones(4), rel=1e-12)
    assert float(result.bank.min()) >= 0
    assert float(result.coefficients.min()) >= 0


def test_single_component_is_the_leading_singular_vector() -> None:
    """By Perron and Frobenius it is non-negative, and no other matrix of rank one is closer."""
    a = random_matrix(40, 25)
    _, values, right = torch.linalg.svd(a)
    result = factorize(a, 1)
    assert result.bank[0].numpy() == pytest.approx(right[0].abs().numpy(), abs=1e-4)
    assert result.error == pytest.approx(float((values[1:].square().sum() / values.square().sum()).sqrt()), rel=1e-6)


def test_disjoint_components_are_recovered() -> None:
    components = torch.zeros(3, 12, dtype=torch.float64)
    for k in range(3):
        components[k, 4 * k : 4 * k + 4] = random_matrix(4, seed=k) + 0.1
    components /= components.norm(dim=1, keepdim=True)
    weights = sparse_matrix(80, 3, seed=7) * torch.tensor([3.0, 2.0, 1.0])
    result = factorize(weights @ components, 3)
    order = (result.bank @ components.T).argmax(0)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert result.error < 1e-6
    assert result.bank[order].numpy() == pytest.approx(components.numpy(), abs=1e-6)
    assert result.coefficients[:, order].numpy() == pytest.approx(weights.numpy(), abs=1e-5)


def test_more_iterations_do_not_increase_the_error() -> None:
    a = sparse_matrix(50, 40)
    errors = [factorize(a, 6, max_iter).error for max_iter in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_result_is_a_stationary_point() -> None:
    """The gradient of |A - U W|^2 by W is 0 where W is above 0, and not negative where W is 0."""
    a = sparse_matrix(60, 30)
    u, w, _ = factorize(a, 4, max_iter=3000)
    gradient = (u.T @ u @ w - u.T @ a) / (u.T @ a).abs().max()
    assert float(gradient[w > 1e-6].abs().max()) < 0.01
    assert float(gradient.min()) > -0.01


def test_scale_and_order_of_rows_do_not_matter() -> None:
    a, order = sparse_matrix(50, 30), torch.randperm(50)
    original, scaled, permuted = factorize(a, 4), factorize(1000 * a, 4), factorize(a[order], 4)
    assert scaled.bank.numpy() == pytest.approx(original.bank.numpy(), abs=1e-9)
    assert scaled.coefficients.numpy() == pytest.approx(1000 * original.coefficients.numpy(), rel=1e-6, abs=1e-6)
    assert permuted.bank.numpy() == pytest.approx(original.bank.numpy(), abs=1e-9)
    assert permuted.coefficients.numpy() == pytest.approx(original.coefficients[order].numpy(), abs=1e-8)


def test_same_data_give_the_same_bytes() -> None:
    a = sparse_matrix(50, 30).float()
    first, second = factorize(a, 4), factorize(a.clone(), 4)
    assert torch.equal(first.bank, second.bank)
    assert torch.equal(first.coefficients, second.coefficients)


def test_rank_above_that_of_the_data() -> None:
    """A matrix of rank two has two components; the others are harmless."""
    a = random_matrix(20, 2) @ random_matrix(2, 10, seed=1)
    result = factorize(a, 5)
    assert result.error < 1e-3
    assert bool(result.bank.isfinite().all())
    assert bool(result.coefficients.isfinite().all())


@pytest.mark.parametrize("seed", range(3))
def test_nnls_agrees_with_scipy_row_by_row(seed: int) -> None:
    bank, data = sparse_matrix(6, 20, seed), random_matrix(40, 20, seed=seed + 5) - 0.3
    expected = [scipy.optimize.nnls(bank.T.numpy(), row)[0] for row in data.numpy()]
    assert nnls(data, bank).numpy() == pytest.approx(np.stack(expected), abs=1e-7)


def test_nnls_with_nearly_equal_components() -> None:
    bank = torch.stack(
        [random_matrix(20), random_matrix(20) + 0.05 * random_matrix(20, seed=1), random_matrix(20, seed=2)]
    )
    data = random_matrix(30, 20, seed=3)
    expected = [scipy.optimize.nnls(bank.T.numpy(), row)[0] for row in data.numpy()]
    assert nnls(data, bank).numpy() == pytest.approx(np.stack(expected), abs=1e-4)


def test_nnls_rows_are_independent() -> None:
    bank, data = sparse_matrix(6, 20), random_matrix(40, 20, seed=5)
    separate = torch.cat([nnls(row[None], bank) for row in data])
    assert nnls(data, bank).numpy() == pytest.approx(separate.numpy(), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_nnls_satisfies_the_optimality_conditions(seed: int) -> None:
    """Karush, Kuhn and Tucker: the gradient is 0 where u > 0 and not negative where u = 0."""
    bank, data = sparse_matrix(6, 20, seed), random_matrix(40, 20, seed=seed + 5) - 0.3
    u = nnls(data, bank)
    gradient = (u @ bank - data) @ bank.T
    assert float(u.min()) == 0
    assert float(gradient[u > 0].abs().max()) < 1e-9
    assert float(gradient.min()) > -1e-9


@pytest.mark.parametrize(
    ("data", "rank", "message"),
    [
        (torch.tensor([[1.0, -0.1], [0.0, 1.0]]), 1, "negative or infinite values"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 1, "negative or infinite values"),
        (torch.zeros(3, 4), 2, "0 everywhere"),
        (torch.ones(3, 4), 4, "4 components of a matrix 3 x 4; expected 1 to 3"),
        (torch.ones(3, 4), 0, "0 components"),
    ],
)
def test_invalid_data_are_refused(data: Tensor, rank: int, message: str) -> None:
    with pytest.raises(ConvscopeError, match=message):
        factorize(data, rank)
