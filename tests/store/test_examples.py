"""Patches, and the pictures that they are cut from: originals, or thumbnails where those are gone or changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convscope
import tests.oracles.stores as stores
from convscope.errors import ConvscopeError


@pytest.fixture
def photographs(tmp_path, photos):
    """A store over the four sample photographs, whose files lie beside it, with their thumbnails."""
    names, tiles, sizes = [], [], []
    for photo in photos:
        image = Image.open(photo).convert("RGB")
        names.append(str(tmp_path / Path(photo).with_suffix(".png").name))
        image.save(names[-1])
        sizes.append((image.height, image.width))
        tiles.append(np.asarray(image.resize((80, 64)).resize((96, 96))))  # the network's input, squashed
    stores.small(tmp_path / "store", units=(6,), pictures=4, names=names, sizes=np.array(sizes))
    stores.thumbnails(tmp_path / "store", np.stack(tiles))
    return convscope.open_store(tmp_path / "store")


def test_a_patch_is_cut_from_the_original_at_its_own_resolution(photographs):
    for example in photographs.unit("layer 0", 2).examples(None):
        whole = np.asarray(Image.open(example.name))
        top, left, bottom, right = example.box_in_original
        rows, columns = slice(int(top), int(np.ceil(bottom))), slice(int(left), int(np.ceil(right)))
        np.testing.assert_array_equal(np.asarray(example.patch()), whole[rows, columns])
        assert example.source == "original"
        assert photographs.image(example.image).original().size == whole.shape[1::-1]


def test_the_frame_is_around_the_patch(photographs):
    example = photographs.unit("layer 0", 1).examples()[0]
    framed = np.asarray(example.framed()).astype(int)
    share = framed.shape[0] / Image.open(example.name).height
    yellow = np.argwhere((framed == (255, 214, 0)).all(-1))
    low, high = yellow.min(0), yellow.max(0)
    expected = np.array(example.box_in_original) * share
    assert np.all(np.abs(low - np.maximum(expected[:2], 3)) <= 8)
    assert np.all(np.abs(high + 1 - expected[2:]) <= 8)
    top, left, bottom, right = expected.round().astype(int)
    inside = np.s_[top + 1 : bottom - 1, left + 1 : right - 1]
    assert not (framed[inside] == (255, 214, 0)).all(-1).any()


def replaced(path: str) -> None:
    """By another picture of the same size."""
    size = Image.open(path).size
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8)).resize(size).save(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda path: Path(path).unlink(), "No such file"),
        (lambda path: Path(path).write_bytes(b"no picture"), "not a picture"),
        (lambda path: Image.open(path).resize((50, 40)).save(path), "is 50 x 40 pixels now"),
        (replaced, "shows something else"),
    ],
)
def test_a_picture_that_is_gone_or_changed_is_shown_from_its_thumbnail(photographs, change, why):
    example = photographs.unit("layer 0", 2).examples()[0]
    original = example.patch().convert("L").resize((8, 8), Image.Resampling.BOX)
    change(example.name)
    seen = example.view()
    assert (example.source, seen.source) == ("thumbnail", "thumbnail")
    assert why in seen.note
    height, width = (b - a for a, b in zip(example.box_in_original[:2], example.box_in_original[2:], strict=True))
    shown = example.patch()
    assert abs(shown.width / shown.height - width / height) < 0.2 * width / height
    difference = np.asarray(shown.convert("L").resize((8, 8), Image.Resampling.BOX), int) - np.asarray(original, int)
    assert np.abs(difference).mean() < 20
    with pytest.raises(ConvscopeError, match=why):
        photographs.image(example.image).original()


@pytest.mark.parametrize("name", ["s3://bucket/a.png", "shards/a.tar!x.jpg", "t.parquet#12", "image 3", "/dev/zero"])
def test_what_is_no_plain_file_is_shown_from_its_thumbnail(tmp_path, name):
    stores.small(tmp_path, units=(3,), pictures=1, names=[name])
    stores.thumbnails(tmp_path, np.full((1, 96, 96, 3), 90, np.uint8))
    store = convscope.open_store(tmp_path)
    assert store.unit("layer 0", 0).examples()[0].source == "thumbnail"
    assert store.image(0).view().image.size == (288, 240)
    assert ("no plain file of this machine" in store.image(0).view().note) == ("://" in name)
    np.testing.assert_allclose(np.asarray(store.image(0).thumbnail()), 90, atol=3)


def test_a_file_address_is_a_plain_file(tmp_path):
    Image.new("RGB", (120, 100), (10, 200, 30)).save(tmp_path / "a b.png")
    stores.small(tmp_path / "store", units=(3,), pictures=1, names=[f"file://{tmp_path}/a b.png"])
    stores.thumbnails(tmp_path / "store", np.full((1, 96, 96, 3), (10, 200, 30), np.uint8))
    example = convscope.open_store(tmp_path / "store").unit("layer 0", 0).examples()[0]
    assert example.source == "original"
    assert example.patch().getpixel((0, 0)) == (10, 200, 30)


def test_thumbnails_are_found_on_their_sprites(tmp_path):
    stores.small(tmp_path, units=(2,), pictures=70)
    tiles = np.zeros((70, 96, 96, 3), np.uint8)
    tiles[...] = (np.arange(70) * 3)[:, None, None, None]
    stores.thumbnails(tmp_path, tiles)
    store = convscope.open_store(tmp_path)
    for picture in (0, 7, 8, 63, 64, 69):
        np.testing.assert_allclose(np.asarray(store.image(picture).thumbnail()), picture * 3, atol=3)
