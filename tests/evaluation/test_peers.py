"""Where Quantus defines the same figure it must give the same number. It is no dependency: skipped where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convscope
from tests.oracles.judged import SIDE, Weighted, gray, pictures, random_maps

quantus = pytest.importorskip("quantus")

QUIET = {"disable_warnings": True, "display_progressbar": False}


def both(metric: str, peer: object, **more: object) -> tuple[np.ndarray, np.ndarray]:
    model = gray(Weighted(torch.randn(3, SIDE, SIDE) * 0.3))
    x, heat = pictures(4), np.abs(random_maps(4, SIDE, SIDE))
    masks = np.zeros((4, SIDE, SIDE), bool)
    masks[:, 1:4, 2:5] = True
    own = convscope.evaluate(model, x, heat, metric, targets=[0, 1, 2, 0], masks=masks, **more)
    theirs = peer(
        model=model.module.eval(),
        x_batch=x.numpy(),
        y_batch=np.array([0, 1, 2, 0]),
        a_batch=heat[:, None].copy(),
        s_batch=masks[:, None],
        softmax=True,
        device="cpu",
    )
    curve = own.curves.get(metric, own[metric][..., None])[:, 0]
    return curve, np.asarray(theirs, np.float64)


def test_deletion():
    peer = quantus.PixelFlipping(features_in_step=4, perturb_baseline=0.0, abs=False, normalise=False, **QUIET)
    own, theirs = both("deletion", peer, steps=9, fill="zero")
    np.testing.assert_allclose(own[:, 1:], theirs, atol=1e-5)  # theirs leaves out the picture as it is


def test_sparseness():
    own, theirs = both("sparseness", quantus.Sparseness(abs=True, normalise=False, **QUIET))
    n = SIDE * SIDE
    # Theirs counts the places from 2 k - n - 1, as ours; and adds 1e-7 to every value.
    np.testing.assert_allclose(own[:, 0], theirs, atol=1e-5 * n)


def test_complexity():
    own, theirs = both("complexity", quantus.Complexity(abs=True, normalise=False, **QUIET))
    np.testing.assert_allclose(own[:, 0], theirs, atol=1e-5)


def test_energy():
    own, theirs = both("energy", quantus.RelevanceMassAccuracy(abs=False, normalise=False, **QUIET))
    np.testing.assert_allclose(own[:, 0], theirs, atol=1e-5)


def test_iou():
    own, theirs = both("iou", quantus.RelevanceRankAccuracy(abs=False, normalise=False, **QUIET))
    np.testing.assert_allclose(own[:, 0], theirs / (2 - theirs), atol=1e-5)


def test_pointing():
    own, theirs = both("pointing", quantus.PointingGame(abs=False, normalise=False, **QUIET))
    np.testing.assert_allclose(own[:, 0], theirs)
