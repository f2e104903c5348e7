"""Class activation maps as their papers write them: one picture, one channel and one place at a time, float64.

Each takes activation and gradient of one picture, (C, ...) both, and gives a map (...).
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
    """Zhou 2016, equation 2: the weight of a channel's average is Z times its gradient, wherever that is read off."""
    first = (0,) * (gradient.ndim - 1)
    size = prod(gradient.shape[1:])
    return _weighted_sum([float(gradient[(k, *first)]) * size for k in range(len(gradient))], activation)


def grad_cam(activation: Maps, gradient: Maps) -> Maps:
    """Selvaraju 2017, equations 1 and 2, without the rectification."""
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
    """Muhammad 2020, equation 3: the places' coordinates along the first right singular vector."""
    matrix = np.array([[activation[(k, *i)] for k in range(len(activation))] for i in _positions(activation)])
    first = matrix @ np.linalg.svd(matrix, full_matrices=True)[2][0]
    return (first if first.sum() >= 0 else -first).reshape(activation.shape[1:])


def eigen_grad_cam(activation: Maps, gradient: Maps) -> Maps:
    """The same of gradient times activation, on the side of hirescam."""
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
