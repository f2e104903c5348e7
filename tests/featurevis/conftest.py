"""Fixtures of the tests of feature visualisation."""

from __future__ import annotations

import numpy as np
import pytest

import convscope
from tests.featurevis.helpers import load_model
from tests.oracles.nets import SmallConvNet, randomized


@pytest.fixture(scope="session")
def small_model() -> convscope.Model:
    """Return three convolutions and five classes, for images of 32 x 32."""
    return load_model(randomized(SmallConvNet()), 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """Return a smooth image (32, 40, 3) with structure on all scales, never quite black or white."""
    y, x = np.mgrid[:32, :40]
    waves = [np.sin(y / 3 + x / (2 + c)) + np.cos(y * x / (40 + 9 * c)) for c in range(3)]
    return (128 + 50 * np.stack(waves, axis=2)).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photographs() -> np.ndarray:
    """Return three images (3, 32, 40, 3) of random squares of 4 x 4 pixels."""
    squares = np.random.default_rng(0).integers(20, 236, (3, 8, 10, 3), np.uint8)
    return squares.repeat(4, 1).repeat(4, 2)
