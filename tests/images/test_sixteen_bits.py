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


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32])
def test_arrays_of_integers_need_their_range(dtype: type[np.integer], xray: tuple[str, np.ndarray]) -> None:
    values = xray[1].astype(dtype)
    settings = {"size": 8, "channels": 1}
    with pytest.raises(ConvscopeError, match=r"value_range=\(low, high\)"):
        next(ImageBatchLoader(values, Preprocessing.of(settings)).batches(1))
    (batch,) = ImageBatchLoader(values, Preprocessing.of({**settings, "value_range": (95, 4095)})).batches(1)
    np.testing.assert_allclose(batch.x[0, 0].numpy(), ((xray[1] - 95.0) / 4000).clip(0, 1), atol=1e-5)


def test_an_image_in_hand_is_read_as_its_file(xray: tuple[str, np.ndarray]) -> None:
    preprocessing = Preprocessing.of({"size": 8, "channels": 1, "value_range": 4095})
    with Image.open(xray[0]) as image:
        (actual,) = ImageBatchLoader(image, preprocessing).batches(1)
    (expected,) = ImageBatchLoader(xray[0], preprocessing).batches(1)
    np.testing.assert_array_equal(actual.x.numpy(), expected.x.numpy())


def test_hounsfield_units() -> None:
    """A window from -160 to 240, as for soft tissue."""
    values = np.array([[-1000, -160], [40, 3000]], np.int16)
    preprocessing = Preprocessing.of({"size": 2, "channels": 1, "value_range": (-160, 240)})
    (batch,) = ImageBatchLoader(values, preprocessing).batches(1)
    np.testing.assert_allclose(batch.x[0, 0].numpy(), [[0, 0], [0.5, 1]], atol=1e-6)
