"""Non-negative factorisation: closed forms, planted parts, and agreement with scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.decomposition import NMF
from torch import Tensor

from convscope import ConvscopeError
from convscope.decomposition.nmf import coefficients, factorize


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Half of it 0, as behind a rectifier."""
    return (random(rows, columns, seed=seed) - 0.5).clamp(min=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "columns", "count"), [(60, 40, 5), (40, 90, 10), (200, 30, 3)])
def test_error_is_that_of_scikit_learn(rows: int, columns: int, count: int, seed: int) -> None:
    """Local optima differ; none may be worse by more than a hundredth."""
    a = sparse(rows, count, seed) @ sparse(count, columns, seed + 9) + 0.3 * sparse(rows, columns, seed + 50)
    theirs = NMF(count, init="nndsvda", max_iter=2000, tol=1e-6).fit(a.numpy()).reconstruction_err_ / float(a.norm())
    ours = factorize(a, count)
    assert ours.error <= 1.01 * theirs
    assert ours.error >= 0.95 * theirs


def test_error_and_scale_are_what_they_are_said_to_be() -> None:
    a = sparse(50, 30)
    found = factorize(a, 4)
    assert found.error == pytest.approx(float((a - found.coefficients @ found.bank).norm() / a.norm()), rel=1e-9)
    assert found.bank.norm(dim=1).numpy() == pytest.approx(np.ones(4), rel=1e-12)
    assert float(found.bank.min()) >= 0
    assert float(found.coefficients.min()) >= 0


def test_one_part_is_the_leading_singular_vector() -> None:
    """Perron and Frobenius: it has no negative entries, and no other matrix of rank one comes nearer."""
    a = random(40, 25)
    _, values, right = torch.linalg.svd(a)
    found = factorize(a, 1)
    assert found.bank[0].numpy() == pytest.approx(right[0].abs().numpy(), abs=1e-4)
    assert found.error == pytest.approx(float((values[1:].square().sum() / values.square().sum()).sqrt()), rel=1e-6)


def test_parts_that_do_not_overlap_are_found_exactly() -> None:
    parts = torch.zeros(3, 12, dtype=torch.float64)
    for k in range(3):
        parts[k, 4 * k : 4 * k + 4] = random(4, seed=k) + 0.1
    parts /= parts.norm(dim=1, keepdim=True)
    shares = sparse(80, 3, seed=7) * torch.tensor([3.0, 2.0, 1.0])
    found = factorize(shares @ parts, 3)
    order = (found.bank @ parts.T).argmax(0)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert found.error < 1e-6
    assert found.bank[order].numpy() == pytest.approx(parts.numpy(), abs=1e-6)
    assert found.coefficients[:, order].numpy() == pytest.approx(shares.numpy(), abs=1e-5)


def test_rounds_never_make_it_worse() -> None:
    a = sparse(50, 40)
    errors = [factorize(a, 6, rounds).error for rounds in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_there_is_nothing_better_nearby() -> None:
    """The gradient of |A - U W|^2 by W is 0 where W is above 0, and not negative where W is 0."""
    a = sparse(60, 30)
    u, w, _ = factorize(a, 4, rounds=3000)
    gradient = (u.T @ u @ w - u.T @ a) / (u.T @ a).abs().max()
    assert float(gradient[w > 1e-6].abs().max()) < 0.01
    assert float(gradient.min()) > -0.01


def test_scale_and_order_of_rows_do_not_matter() -> None:
    a, order = sparse(50, 30), torch.randperm(50)
    plain, scaled, mixed = factorize(a, 4), factorize(1000 * a, 4), factorize(a[order], 4)
    assert scaled.bank.numpy() == pytest.approx(plain.bank.numpy(), abs=1e-9)
    assert scaled.coefficients.numpy() == pytest.approx(1000 * plain.coefficients.numpy(), rel=1e-6, abs=1e-6)
    assert mixed.bank.numpy() == pytest.approx(plain.bank.numpy(), abs=1e-9)
    assert mixed.coefficients.numpy() == pytest.approx(plain.coefficients[order].numpy(), abs=1e-8)


def test_the_same_bytes_again() -> None:
    a = sparse(50, 30).float()
    first, second = factorize(a, 4), factorize(a.clone(), 4)
    assert torch.equal(first.bank, second.bank)
    assert torch.equal(first.coefficients, second.coefficients)


def test_more_parts_than_there_are() -> None:
    """A matrix of rank two has two parts; others stay empty and spoil nothing."""
    a = random(20, 2) @ random(2, 10, seed=1)
    found = factorize(a, 5)
    assert found.error < 1e-3
    assert bool(found.bank.isfinite().all())
    assert bool(found.coefficients.isfinite().all())


@pytest.mark.parametrize("seed", range(3))
def test_coefficients_are_scipys_non_negative_least_squares(seed: int) -> None:
    bank, data = sparse(6, 20, seed), random(40, 20, seed=seed + 5) - 0.3
    expected = [scipy.optimize.nnls(bank.T.numpy(), row)[0] for row in data.numpy()]
    assert coefficients(data, bank).numpy() == pytest.approx(np.stack(expected), abs=1e-7)


def test_coefficients_of_parts_that_are_nearly_alike() -> None:
    bank = torch.stack([random(20), random(20) + 0.05 * random(20, seed=1), random(20, seed=2)])
    data = random(30, 20, seed=3)
    expected = [scipy.optimize.nnls(bank.T.numpy(), row)[0] for row in data.numpy()]
    assert coefficients(data, bank).numpy() == pytest.approx(np.stack(expected), abs=1e-4)


def test_coefficients_do_not_depend_on_neighbours() -> None:
    bank, data = sparse(6, 20), random(40, 20, seed=5)
    alone = torch.cat([coefficients(row[None], bank) for row in data])
    assert coefficients(data, bank).numpy() == pytest.approx(alone.numpy(), abs=1e-9)


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (torch.tensor([[1.0, -0.1], [0.0, 1.0]]), 1, "nowhere negative"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 1, "nowhere negative"),
        (torch.zeros(3, 4), 2, "0 everywhere"),
        (torch.ones(3, 4), 4, "4 parts of a matrix 3 x 4; expected a number from 1 to 3"),
        (torch.ones(3, 4), 0, "0 parts"),
    ],
)
def test_what_is_refused(data: Tensor, count: int, message: str) -> None:
    with pytest.raises(ConvscopeError, match=message):
        factorize(data, count)
