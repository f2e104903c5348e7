"""Patches cropped from original images, or from thumbnails where an original is missing or has changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convscope
import tests.oracles.stores as stores
from convscope.errors import ConvscopeError


@pytest.fixture
def photo_store(tmp_path, photos):
    """A store of the four sample photo_store, with their thumbnails; the files are next to it."""
    names, tiles, sizes = [], [], []
    for photo in photos:
        image = Image.open(photo).convert("RGB")
        image.thumbnail((640, 640))
        names.append(str(tmp_path / Path(photo).with_suffix(".png").name))
        image.save(names[-1])
        sizes.append((image.height, image.width))
        tiles.append(np.asarray(image.resize((80, 64)).resize((96, 96))))  # the network's input, squashed
    stores.write_small_store(tmp_path / "store", units=(6,), images=4, names=names, sizes=np.array(sizes))
    stores.write_thumbnails(tmp_path / "store", np.stack(tiles))
    return convscope.open_store(tmp_path / "store")


def test_patch_is_cropped_from_the_original_at_its_resolution(photo_store):
    for example in photo_store.unit("layer 0", 2).examples(None):
        original = np.asarray(Image.open(example.name))
        top, left, bottom, right = example.box_in_original
        rows, columns = slice(int(top), int(np.ceil(bottom))), slice(int(left), int(np.ceil(right)))
        np.testing.assert_array_equal(np.asarray(example.patch()), original[rows, columns])
        assert example.source == "original"
        assert photo_store.image(example.image).original().size == original.shape[1::-1]


def test_frame_surrounds_the_patch(photo_store):
    example = photo_store.unit("layer 0", 1).examples()[0]
    framed = np.asarray(example.framed()).astype(int)
    scale = framed.shape[0] / Image.open(example.name).height
    yellow = np.argwhere((framed == (255, 214, 0)).all(-1))
    low, high = yellow.min(0), yellow.max(0)
    expected = np.array(example.box_in_original) * scale
    assert np.all(np.abs(low - np.maximum(expected[:2], 3)) <= 8)
    assert np.all(np.abs(high + 1 - expected[2:]) <= 8)
    top, left, bottom, right = expected.round().astype(int)
    inside = np.s_[top + 1 : bottom - 1, left + 1 : right - 1]
    assert not (framed[inside] == (255, 214, 0)).all(-1).any()


def replace_content(path: str) -> None:
    """Replace an image by another of the same size."""
    size = Image.open(path).size
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8)).resize(size).save(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: Path(path).unlink(), "No such file"),
        (lambda path: Path(path).write_bytes(b"no picture"), "is not an image in a known format"),
        (lambda path: Image.open(path).resize((50, 40)).save(path), "has 50 x 40 pixels now"),
        (replace_content, "the content has changed"),
    ],
)
def test_missing_or_changed_original_is_replaced_by_its_thumbnail(photo_store, change, reason):
    example = photo_store.unit("layer 0", 2).examples()[0]
    original = example.patch().convert("L").resize((8, 8), Image.Resampling.BOX)
    change(example.name)
    view = example.view()
    assert (example.source, view.source) == ("thumbnail", "thumbnail")
    assert reason in view.note
    height, width = (b - a for a, b in zip(example.box_in_original[:2], example.box_in_original[2:], strict=True))
    patch = example.patch()
    assert abs(patch.width / patch.height - width / height) < 0.2 * width / height
    difference = np.asarray(patch.convert("L").resize((8, 8), Image.Resampling.BOX), int) - np.asarray(original, int)
    assert np.abs(difference).mean() < 20
    with pytest.raises(ConvscopeError, match=reason):
        photo_store.image(example.image).original()


@pytest.mark.parametrize("name", ["s3://bucket/a.png", "shards/a.tar!x.jpg", "t.parquet#12", "image 3", "/dev/zero"])
def test_image_without_a_plain_file_is_replaced_by_its_thumbnail(tmp_path, name):
    stores.write_small_store(tmp_path, units=(3,), images=1, names=[name])
    stores.write_thumbnails(tmp_path, np.full((1, 96, 96, 3), 90, np.uint8))
    store = convscope.open_store(tmp_path)
    assert store.unit("layer 0", 0).examples()[0].source == "thumbnail"
    assert store.image(0).view().image.size == (288, 240)
    assert ("not a plain file on this machine" in store.image(0).view().note) == ("://" in name)
    np.testing.assert_allclose(np.asarray(store.image(0).thumbnail()), 90, atol=3)


def test_file_address_is_a_plain_file(tmp_path):
    Image.new("RGB", (120, 100), (10, 200, 30)).save(tmp_path / "a b.png")
    stores.write_small_store(tmp_path / "store", units=(3,), images=1, names=[f"file://{tmp_path}/a b.png"])
    stores.write_thumbnails(tmp_path / "store", np.full((1, 96, 96, 3), (10, 200, 30), np.uint8))
    example = convscope.open_store(tmp_path / "store").unit("layer 0", 0).examples()[0]
    assert example.source == "original"
    assert example.patch().getpixel((0, 0)) == (10, 200, 30)


def test_thumbnails_are_cropped_from_their_sheets(tmp_path):
    stores.write_small_store(tmp_path, units=(2,), images=70)
    tiles = np.zeros((70, 96, 96, 3), np.uint8)
    tiles[...] = (np.arange(70) * 3)[:, None, None, None]
    stores.write_thumbnails(tmp_path, tiles)
    store = convscope.open_store(tmp_path)
    for image in (0, 7, 8, 63, 64, 69):
        np.testing.assert_allclose(np.asarray(store.image(image).thumbnail()), image * 3, atol=3)
