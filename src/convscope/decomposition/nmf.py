"""Non-negative matrix factorisation and non-negative least squares, by scikit-learn and scipy, in float64."""

from __future__ import annotations

import threading
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convscope.errors import ConvscopeError, require_extra

MAX_ITER = 2000
TOLERANCE = 1e-6  # of the projected gradient, relative to its first value
EXTRA = "concepts"

_warnings_lock = threading.Lock()  # filters of warnings belong to the process: one thread at a time changes them


def check_dependencies() -> None:
    """Raise ConvscopeError if scikit-learn or scipy is not installed."""
    for package in ("sklearn.decomposition", "scipy.optimize"):
        require_extra(package, EXTRA)


class Factorization(NamedTuple):
    """A factorisation A ~ U W of a matrix (n, d) into non-negative factors.

    Attributes
    ----------
    coefficients : Tensor
        U, (n, r) float64: the best one for this `bank`.
    bank : Tensor
        W, (r, d) float64: rows of length 1.
    error : float
        |A - U W| / |A| in the Frobenius norm.
    """

    coefficients: Tensor
    bank: Tensor
    error: float


def factorize(data: Tensor, rank: int, max_iter: int = MAX_ITER) -> Factorization:
    """Find `rank` non-negative directions whose non-negative combinations approximate the rows of a matrix.

    scikit-learn's coordinate descent (Cichocki and Phan 2009), started by NNDSVD (Boutsidis and Gallopoulos 2008). The
    result is a local optimum; the same data give the same bytes.

    Parameters
    ----------
    data : Tensor
        (n, d), non-negative.
    rank : int
        Number of directions, at most min(n, d).
    max_iter : int
        Maximum number of iterations.

    Returns
    -------
    Factorization

    Raises
    ------
    ConvscopeError
        For negative, infinite or all-zero data, and for a rank out of range.
    """
    a = data.double().numpy()
    if not 1 <= rank <= min(a.shape):
        raise ConvscopeError(
            f"{rank} components of a matrix {a.shape[0]} x {a.shape[1]}; expected 1 to {min(a.shape)}, or more crops"
        )
    if not np.isfinite(a).all() or a.min() < 0:
        raise ConvscopeError("the data contain negative or infinite values; only non-negative data can be factorised")
    norm = np.linalg.norm(a)
    if norm == 0:
        raise ConvscopeError("the data are 0 everywhere; there is nothing to factorise")
    components = _fit_components(a, rank, max_iter)
    lengths = np.linalg.norm(components, axis=1, keepdims=True)
    bank = torch.from_numpy(components / np.where(lengths > 0, lengths, 1))
    coefficients = nnls(data, bank)
    return Factorization(coefficients, bank, float(np.linalg.norm(a - (coefficients @ bank).numpy()) / norm))


def _fit_components(a: np.ndarray, rank: int, max_iter: int) -> np.ndarray:
    """Fit scikit-learn's NMF and return its components (rank, d)."""
    decomposition = require_extra("sklearn.decomposition", EXTRA)
    exceptions = require_extra("sklearn.exceptions", EXTRA)
    model = decomposition.NMF(rank, init="nndsvd", solver="cd", tol=TOLERANCE, max_iter=max_iter, random_state=0)
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # the error is reported with the result
        model.fit(a)
    components: np.ndarray = model.components_
    return components


def nnls(data: Tensor, bank: Tensor) -> Tensor:
    """Solve the non-negative least squares problem of every row: the u >= 0 with the smallest |a - u W|.

    Parameters
    ----------
    data : Tensor
        (n, d) rows a.
    bank : Tensor
        (r, d) matrix W.

    Returns
    -------
    Tensor
        (n, r) float64.
    """
    optimize = require_extra("scipy.optimize", EXTRA)
    # |a - u W| differs from |a Q - u R^T| by a constant, where W^T = Q R: r equations instead of d for each row.
    q, r = np.linalg.qr(bank.double().numpy().T)
    projections = data.double().numpy() @ q
    max_iter = 100 * len(bank)
    rows = [optimize.nnls(r, row, maxiter=max_iter)[0] for row in projections]
    return torch.from_numpy(np.array(rows).reshape(len(projections), len(bank)))


def encode(bank: np.ndarray, maps: Tensor) -> Tensor:
    """Compute how much of each concept is at each position of feature maps, by non-negative least squares.

    Parameters
    ----------
    bank : ndarray
        (R, C) concepts.
    maps : Tensor
        (N, C, h, w) activations.

    Returns
    -------
    Tensor
        (N, R, h, w) float32, non-negative.
    """
    return coefficients_to_maps(nnls(position_vectors(maps), torch.from_numpy(bank)), maps.shape)


def position_vectors(maps: Tensor) -> Tensor:
    """Reshape maps (N, C, h, w) to one row per position, (N h w, C)."""
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)


def coefficients_to_maps(coefficients: Tensor, shape: torch.Size) -> Tensor:
    """Reshape coefficients (N h w, R) of the positions of maps of `shape` (N, C, h, w) to (N, R, h, w) float32."""
    rows = coefficients.float().reshape(shape[0], -1, coefficients.shape[1])
    return rows.transpose(1, 2).reshape(shape[0], -1, *shape[2:])
