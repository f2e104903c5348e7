"""Metrics that Quantus defines in the same way have the same values. Skipped unless Quantus is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convscope
from tests.oracles.synthetic_models import SIDE, Weighted, grayscale_model, random_images, random_maps

quantus = pytest.importorskip("quantus")

SILENT = {"disable_warnings": True, "display_progressbar": False}


def actual_and_expected(metric: str, quantus_metric: object, **options: object) -> tuple[np.ndarray, np.ndarray]:
    model = grayscale_model(Weighted(torch.randn(3, SIDE, SIDE) * 0.3))
    x, heatmap = random_images(4), np.abs(random_maps(4, SIDE, SIDE))
    masks = np.zeros((4, SIDE, SIDE), bool)
    masks[:, 1:4, 2:5] = True
    actual = convscope.evaluate(model, x, heatmap, metric, targets=[0, 1, 2, 0], masks=masks, **options)
    expected = quantus_metric(
        model=model.module.eval(),
        x_batch=x.numpy(),
        y_batch=np.array([0, 1, 2, 0]),
        a_batch=heatmap[:, None].copy(),
        s_batch=masks[:, None],
        softmax=True,
        device="cpu",
    )
    curve = actual.curves.get(metric, actual[metric][..., None])[:, 0]
    return curve, np.asarray(expected, np.float64)


def test_deletion():
    quantus_metric = quantus.PixelFlipping(
        features_in_step=4, perturb_baseline=0.0, abs=False, normalise=False, **SILENT
    )
    actual, expected = actual_and_expected("deletion", quantus_metric, steps=9, fill="zero")
    np.testing.assert_allclose(actual[:, 1:], expected, atol=1e-5)  # Quantus leaves out the unchanged image


def test_sparseness():
    actual, expected = actual_and_expected("sparseness", quantus.Sparseness(abs=True, normalise=False, **SILENT))
    n = SIDE * SIDE
    # Quantus has the same weights, 2 k - n - 1, and adds 1e-7 to every value.
    np.testing.assert_allclose(actual[:, 0], expected, atol=1e-5 * n)


def test_complexity():
    actual, expected = actual_and_expected("complexity", quantus.Complexity(abs=True, normalise=False, **SILENT))
    np.testing.assert_allclose(actual[:, 0], expected, atol=1e-5)


def test_energy():
    actual, expected = actual_and_expected(
        "energy", quantus.RelevanceMassAccuracy(abs=False, normalise=False, **SILENT)
    )
    np.testing.assert_allclose(actual[:, 0], expected, atol=1e-5)


def test_iou():
    actual, expected = actual_and_expected("iou", quantus.RelevanceRankAccuracy(abs=False, normalise=False, **SILENT))
    np.testing.assert_allclose(actual[:, 0], expected / (2 - expected), atol=1e-5)


def test_pointing():
    actual, expected = actual_and_expected("pointing", quantus.PointingGame(abs=False, normalise=False, **SILENT))
    np.testing.assert_allclose(actual[:, 0], expected)
