"""Reference class activation maps: the papers' formulas, one image, channel and position at a time, in float64.

Each function takes the activation and gradient (C, ...) of one image and returns a map (...).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

Maps = np.ndarray


def _positions(maps: Maps) -> list[tuple[int, ...]]:
    return list(np.ndindex(*maps.shape[1:]))


def _weighted_sum(weights: list[float], activation: Maps) -> Maps:
    heatmap = np.zeros(activation.shape[1:])
    for k, weight in enumerate(weights):
        for i in _positions(activation):
            heatmap[i] += weight * activation[(k, *i)]
    return heatmap


def cam(activation: Maps, gradient: Maps) -> Maps:
    """Zhou 2016, equation 2: the weight of a channel's average is Z times its gradient at any position."""
    first = (0,) * (gradient.ndim - 1)
    size = prod(gradient.shape[1:])
    return _weighted_sum([float(gradient[(k, *first)]) * size for k in range(len(gradient))], activation)


def grad_cam(activation: Maps, gradient: Maps) -> Maps:
    """Selvaraju 2017, equations 1 and 2, without the final ReLU."""
    weights = []
    for k in range(len(gradient)):
        weights.append(sum(float(gradient[(k, *i)]) for i in _positions(gradient)) / prod(gradient.shape[1:]))
    return _weighted_sum(weights, activation)


def hirescam(activation: Maps, gradient: Maps) -> Maps:
    """Draelos 2020, equation 5."""
    heatmap = np.zeros(activation.shape[1:])
    for k in range(len(activation)):
        for i in _positions(activation):
            heatmap[i] += gradient[(k, *i)] * activation[(k, *i)]
    return heatmap


def grad_cam_pp(activation: Maps, gradient: Maps) -> Maps:
    """Chattopadhay 2018: equation 19, then equation 7, then the sum."""
    weights = []
    for k in range(len(gradient)):
        total = sum(float(activation[(k, *i)]) for i in _positions(activation))
        weight = 0.0
        for i in _positions(gradient):
            g = float(gradient[(k, *i)])
            denominator = 2 * g**2 + total * g**3
            alpha = g**2 / denominator if denominator != 0 else 0.0
            weight += alpha * max(g, 0.0)
        weights.append(weight)
    return _weighted_sum(weights, activation)


def xgrad_cam(activation: Maps, gradient: Maps) -> Maps:
    """Fu 2020, equation 8."""
    weights = []
    for k in range(len(gradient)):
        total = sum(float(activation[(k, *i)]) for i in _positions(activation))
        weight = 0.0
        for i in _positions(gradient):
            weight += float(gradient[(k, *i)]) * (float(activation[(k, *i)]) / total if total != 0 else 0.0)
        weights.append(weight)
    return _weighted_sum(weights, activation)


def layer_cam(activation: Maps, gradient: Maps) -> Maps:
    """Jiang 2021, equations 5 and 6."""
    heatmap = np.zeros(activation.shape[1:])
    for k in range(len(activation)):
        for i in _positions(activation):
            heatmap[i] += max(float(gradient[(k, *i)]), 0.0) * activation[(k, *i)]
    return heatmap


def eigen_cam(activation: Maps, gradient: Maps) -> Maps:
    """Muhammad 2020, equation 3: the positions' coordinates along the first right singular vector."""
    matrix = np.array([[activation[(k, *i)] for k in range(len(activation))] for i in _positions(activation)])
    first = matrix @ np.linalg.svd(matrix, full_matrices=True)[2][0]
    return (first if first.sum() >= 0 else -first).reshape(activation.shape[1:])


def eigen_grad_cam(activation: Maps, gradient: Maps) -> Maps:
    """Eigen-CAM of gradient times activation, with the sign of HiResCAM."""
    first = eigen_cam(gradient * activation, gradient)
    return first if (first * hirescam(activation, gradient)).sum() >= 0 else -first


FORMULAS: dict[str, Callable[[Maps, Maps], Maps]] = {
    "cam": cam,
    "grad-cam": grad_cam,
    "hirescam": hirescam,
    "grad-cam++": grad_cam_pp,
    "xgrad-cam": xgrad_cam,
    "layer-cam": layer_cam,
    "eigen-cam": eigen_cam,
    "eigen-grad-cam": eigen_grad_cam,
}
