"""Non-negative matrix factorisation A ~ U W: data as sums of a few parts. Deterministic, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from convscope.errors import ConvscopeError

ROUNDS = 500  # of both factors
AT_ONCE = 5  # updates of a factor for one product with the data, which is what costs
SETTLED = 1e-5  # the largest relative change of the error in a round that ends the work
EXACT = 1e-10  # of coefficients, relative to the largest one


class Factorization(NamedTuple):
    """A (n, d) ~ U W: `coefficients` U (n, r) and `bank` W (r, d), float64; each row of W has length 1.

    `error` is |A - U W| / |A| in the Frobenius norm.
    """

    coefficients: Tensor
    bank: Tensor
    error: float


def factorize(data: Tensor, count: int, rounds: int = ROUNDS) -> Factorization:
    """`count` parts whose non-negative sums come as near as can be to the rows of `data` (n, d), in squared error.

    Hierarchical alternating least squares: in turn each column of U and each row of W takes the value that is best
    while all others stay (Cichocki and Phan 2009, algorithm 2), from NNDSVD's start (Boutsidis and Gallopoulos 2008).
    No random numbers. A local optimum, as with any such method. Raises ConvscopeError for negative or infinite data,
    for data that are 0 everywhere and for more parts than rows or columns.
    """
    a = data.double()
    most = min(a.shape)
    if not 1 <= count <= most:
        rows, columns = a.shape
        raise ConvscopeError(f"{count} parts of a matrix {rows} x {columns}; expected a number from 1 to {most}")
    if not bool(a.isfinite().all()) or bool(a.min() < 0):
        raise ConvscopeError("only finite data that are nowhere negative are sums of non-negative parts")
    square = a.square().sum()
    if not bool(square > 0):
        raise ConvscopeError("the data are 0 everywhere: there are no parts to find")
    u, w = _start(a, count)
    before = float("inf")
    for _ in range(rounds):
        u = _descend(u, a @ w.T, w @ w.T)
        # W's turn is U's with the matrices turned over.
        w = _descend(w.T, a.T @ u, u.T @ u).T
        error = float(_error(square, a, u, w))
        if error >= (1 - SETTLED) * before:
            break
        before = error
    lengths = w.norm(dim=1)
    w = w / torch.where(lengths > 0, lengths, 1)[:, None]
    u = coefficients(a, w)
    return Factorization(u, w, float(_error(square, a, u, w).sqrt()))


def coefficients(data: Tensor, bank: Tensor, rounds: int = 2000) -> Tensor:
    """For each row a of `data` (n, d) the non-negative u (r,) with the least |a - u W|: (n, r), float64.

    Cyclic coordinate descent on the normal equations; each row is a problem of its own, convex, and solved to rounding.
    """
    a, w = data.double(), bank.double()
    products, gram = a @ w.T, w @ w.T
    u = torch.zeros_like(products)
    for _ in range(rounds):
        before = u
        u = _descend(u, products, gram, 1)
        if bool(((u - before).abs().amax(1) <= EXACT * u.amax(1)).all()):
            break
    return u


def _descend(u: Tensor, products: Tensor, gram: Tensor, times: int = AT_ONCE) -> Tensor:
    """U (n, r) nearer to the least |A - U W|: u_k <- max(0, u_k + (A W^T - U W W^T)_k / (W W^T)_kk) for each k in turn.

    `products` is A W^T (n, r), `gram` W W^T (r, r). A part that is 0 stays as it is.
    """
    u = u.clone()
    for _ in range(times):
        for k in range(len(gram)):
            if bool(gram[k, k] > 0):
                u[:, k] = (u[:, k] + (products[:, k] - u @ gram[:, k]) / gram[k, k]).clamp(min=0)
    return u


def _error(square: Tensor, a: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """|A - U W|^2 / |A|^2, `square` being |A|^2, without a matrix as large as A."""
    return ((square - 2 * (a.T @ u * w.T).sum() + (u.T @ u * (w @ w.T)).sum()) / square).clamp(min=0)


def _start(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """U (n, r) and W (r, d) from A's leading singular vectors.

    Of x y^T, each pair's, the larger of the two non-negative parts is kept, x+ y+^T or x- y-^T; so it does not matter
    which sign the decomposition gave the pair.
    """
    left, values, right = torch.linalg.svd(a, full_matrices=False)
    us, ws = [], []
    for x, value, y in zip(left.T[:count], values[:count], right[:count], strict=True):
        plus, minus = (x.clamp(min=0), y.clamp(min=0)), ((-x).clamp(min=0), (-y).clamp(min=0))
        sizes = [float(p.norm() * q.norm()) for p, q in (plus, minus)]
        p, q = plus if sizes[0] >= sizes[1] else minus
        share = (value * max(sizes)).sqrt()
        us.append(share * p / p.norm().clamp(min=1e-300))
        ws.append(share * q / q.norm().clamp(min=1e-300))
    return torch.stack(us, 1), torch.stack(ws)
