"""Gray images of 16 bits whose values fill little of their range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscope import ConvscopeError, Preprocessing
from convscope.images.loading import ImageBatchLoader


@pytest.fixture
def xray(tmp_path: Path) -> tuple[str, np.ndarray]:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8)).astype(np.uint16)
    values[0, 0] = 4095
    Image.fromarray(values).save(tmp_path / "x.png")
    return str(tmp_path / "x.png"), values


def test_values_of_twelve_bits_are_noted(xray: tuple[str, np.ndarray]) -> None:
    path, values = xray
    loader = ImageBatchLoader(path, Preprocessing.of({"size": 8, "channels": 1}))
    (batch,) = loader.batches(1)
    np.testing.assert_allclose(batch.x[0, 0].numpy(), values / 65535, atol=1e-6)
    (note,) = loader.notes
    assert "uses 6% of the range" in note
    assert "value_range=4095" in note


def test_the_range_of_values_can_be_given(xray: tuple[str, np.ndarray]) -> None:
    path, values = xray
    loader = ImageBatchLoader(path, Preprocessing.of({"size": 8, "channels": 1, "value_range": (95, 4095)}))
    (batch,) = loader.batches(1)
    np.testing.assert_allclose(batch.x[0, 0].numpy(), ((values - 95.0) / 4000).clip(0, 1), atol=1e-5)
    assert loader.notes == []


def test_a_full_range_is_not_noted(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    loader = ImageBatchLoader(str(tmp_path / "x.png"), Preprocessing.of({"size": 8, "channels": 1}))
    list(loader.batches(1))
    assert loader.notes == []


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ConvscopeError, match=r"value_range is .* expected \(low, high\)"):
        Preprocessing(value_range=(5, 5))
