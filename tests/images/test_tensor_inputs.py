"""Tensors that do not fit what the network takes are noted; those that preprocessing makes are not."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

import convscope
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing
from convscope.images.tensor_inputs import tensor_notes

IMAGENET = Preprocessing(size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PLAIN = Preprocessing(size=32)


@pytest.mark.parametrize("preprocessing", [IMAGENET, PLAIN, Preprocessing(size=32, range=255, mean=127, std=128)])
@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_preprocessed_photographs_have_no_notes(preprocessing, interpolation, photos):
    x = next(ImageBatchLoader(photos, preprocessing).batches(4)).x
    assert tensor_notes(x, preprocessing) == []
    assert tensor_notes(x + 0.1 * torch.randn(x.shape), preprocessing) == []


@pytest.mark.parametrize(
    ("preprocessing", "low", "high", "message"),
    [
        (
            IMAGENET,
            0,
            255,
            "tensors have values from 0 to 255, but preprocessed images have -2.12 to 2.64; tensors are",
        ),
        (
            IMAGENET,
            0,
            1,
            "tensors have values from 0 to 1, as if not normalised: preprocessed images have -2.12 to 2.64",
        ),
        (PLAIN, -2, 2.5, "tensors have values from -2 to 2.5, but preprocessed images have 0 to 1"),
        (Preprocessing(size=32, range=255), 0, 255, None),
        (Preprocessing(size=32, range=255), 0, 1, None),
        (PLAIN, 0, 1, None),
        (Preprocessing(size=32, mean=(0.0,) * 5, std=(1.0,) * 5, channel_order="channels"), 0, 255, None),
    ],
)
def test_ranges(preprocessing, low, high, message):
    x = torch.linspace(low, high, preprocessing.channels * 1024).view(1, -1, 32, 32)
    notes = tensor_notes(x, preprocessing)
    assert len(notes) == (message is not None)
    assert message is None or notes[0].startswith(message)


def test_sizes():
    assert tensor_notes(torch.zeros(1, 3, 20, 24), PLAIN) == [
        "tensors of size 20 x 24 were given; the size of the network's input is set to 32 x 32"
    ]


def test_notes_reach_the_result_once(lite0):
    x = torch.rand(3, 3, 64, 64) * 255
    for images, prefix in ((x, ""), (list(x), "image 0: ")):
        notes = convscope.predict(lite0, images).notes
        assert [note.partition(" were given")[0].partition(", but")[0] for note in notes] == [
            f"{prefix}tensors of size 64 x 64",
            f"{prefix}tensors have values from {x[0].min() if prefix else x.min():.3g} to "
            f"{x[0].max() if prefix else x.max():.3g}",
        ]
    assert "64 x 64" in str(convscope.heatmaps(lite0, x, scale=(1, 2)).notes)


def test_float_arrays_out_of_range_are_refused(lite0):
    with pytest.raises(convscope.ConvscopeError, match=r"values from 0 to 254; floats are expected in \[0, 1\]"):
        convscope.predict(lite0, np.arange(255.0).reshape(5, 17, 3))


def test_tensors_of_bytes_are_images(lite0, photos):
    """As `torchvision.io.decode_image` returns them: (C, H, W), also with one channel or with alpha."""
    array = np.asarray(PIL.Image.open(photos[0]).convert("RGB"))
    pixels = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = convscope.predict(lite0, array).logits
    dataset = torch.utils.data.TensorDataset(pixels[None])
    for images in (pixels, [pixels], pixels[None], dataset):
        np.testing.assert_array_equal(convscope.predict(lite0, images).logits, expected)
    gray = convscope.predict(lite0, array[..., 0]).logits
    np.testing.assert_array_equal(convscope.predict(lite0, pixels[:1]).logits, gray)
    heatmaps = convscope.heatmaps(lite0, pixels)
    assert heatmaps.resized()[0].shape[-2:] == array.shape[:2]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(20, 20, 3), r"a tensor \(20, 20, 3\) .*uint8 for pixels; channels come first: tensor.movedim"),
        (
            torch.zeros(1, 2, 20, 20, dtype=torch.uint8),
            r"expected a preprocessed, floating one, .*or uint8 for pixels$",
        ),
        (torch.zeros(1, 3, 20, 20, dtype=torch.int64), "expected a preprocessed, floating one"),
        (np.random.rand(3, 20, 20), r"\(3, 20, 20\); .*channels come last: numpy.moveaxis\(array, -3, -1\)"),
        (np.random.rand(2, 3, 20, 20), "channels come last"),
        (np.random.rand(2, 5, 20, 20), r"or \(N, H, W, C\)$"),
    ],
)
def test_other_layouts_are_refused_with_what_to_do(lite0, images, message):
    with pytest.raises(convscope.ConvscopeError, match=message):
        convscope.predict(lite0, images)


def test_images_that_are_much_enlarged_are_noted_once():
    sizes = [(8, 8), (9, 8), (9, 9), (3, 5)]
    loader = ImageBatchLoader([np.zeros((*size, 3), np.uint8) for size in sizes], PLAIN)
    list(loader.batches(2))
    note = (
        "images of 8 x 8 pixels are enlarged to 32 x 32; a network on small images needs preprocessing=dict(size=...)"
    )
    assert loader.notes == [note]
    loader = ImageBatchLoader([np.zeros((9, 8, 3), np.uint8)], PLAIN)
    list(loader.batches(2))
    assert loader.notes == []
