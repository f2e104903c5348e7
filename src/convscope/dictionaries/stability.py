"""How far two dictionaries of one layer agree."""

from __future__ import annotations

import numpy as np

from convscope.dictionaries.result import Dictionary
from convscope.errors import ConvscopeError, require_extra


def stability(a: Dictionary, b: Dictionary) -> float:
    """Return the mean cosine of the atoms of two dictionaries that are matched one to one as well as possible.

    ::

        max over permutations p of  mean over i of  a_i . b_p(i)

    Of dictionaries that differ in size, the features of the smaller one are matched. Dead features count: their
    directions are as they began.

    Parameters
    ----------
    a, b : Dictionary
        Of the same layer; from different seeds or images, say.

    Returns
    -------
    float
        1 if both have the same atoms.

    Raises
    ------
    ConvscopeError
        If the atoms have different numbers of channels, and without scipy (``convscope[concepts]``).

    References
    ----------
    Fel et al., Archetypal SAE, ICML 2025, equation 3. The Hungarian algorithm finds the optimum.

    Examples
    --------
    >>> import convscope
    >>> from convscope.dictionaries.stability import stability
    >>> photos = convscope.samples.photographs()
    >>> options = {"features": 64, "active": 8, "steps": 5}
    >>> first, second = (convscope.dictionary("lite0", photos, "blocks.6", **options, seed=seed) for seed in (0, 1))
    >>> stability(first, first) > 0.999, stability(first, second) < 0.9
    (True, True)
    """
    if a.atoms.shape[1] != b.atoms.shape[1]:
        raise ConvscopeError(
            f"the dictionaries are of layers with {a.atoms.shape[1]} and {b.atoms.shape[1]} units; expected one layer"
        )
    return matched_cosine(a.atoms, b.atoms)


def matched_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean cosine of unit vectors (F, C) and (G, C) under the best matching of one to one."""
    optimize = require_extra("scipy.optimize", "concepts")
    similarity = first @ second.T
    rows, columns = optimize.linear_sum_assignment(-similarity)
    return float(similarity[rows, columns].mean())
