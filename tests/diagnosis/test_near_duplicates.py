"""Near duplicates: copies that were planted, and images that only look alike."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convscope.diagnosis.near_duplicates import (
    CentredFeatures,
    difference_hash,
    duplicate_pairs,
    find_near_duplicates,
    group_duplicates,
    splits_of,
)
from tests.diagnosis.helpers import SIDE, make_context, make_observations


def smooth_images(count: int, seed: int = 0) -> np.ndarray:
    """Return random images of coarse colored cells."""
    cells = np.random.default_rng(seed).integers(40, 200, (count, 6, 6, 3), dtype=np.uint8)
    resized = [Image.fromarray(c).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for c in cells]
    return np.stack([np.asarray(image) for image in resized])


def features_of(images: np.ndarray) -> np.ndarray:
    """Return features that similar images share: their colors on a coarse grid, without the brightness."""
    cells = images.reshape(len(images), 4, SIDE // 4, 4, SIDE // 4, 3).mean((2, 4))
    flat = cells.reshape(len(images), -1) / 255
    return (flat - flat.mean(1, keepdims=True)).astype(np.float16)


def as_jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=80)
    return np.asarray(Image.open(buffer).convert("RGB"))


CHANGES = {
    "compressed": as_jpeg,
    "brighter": lambda image: np.clip(image * 1.1 + 5.0, 0, 255).astype(np.uint8),
    "resized": lambda image: np.asarray(Image.fromarray(image).resize((20, 20)).resize((SIDE, SIDE))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(change: str) -> None:
    images = smooth_images(30)
    images = np.concatenate([images, CHANGES[change](images[4])[None], CHANGES[change](images[9])[None]])
    result = group_duplicates(images, features_of(images), 1 << 20, lambda _done, _total: None)
    assert sorted(result.groups) == [(4, 30), (9, 31)]
    assert min(result.similarity) > 0.85


def test_both_hash_and_features_must_agree() -> None:
    images = smooth_images(20)
    twins = np.concatenate([images, images])
    other_features = np.random.default_rng(0).normal(size=(40, 16))
    assert not group_duplicates(twins, other_features, 1 << 20, lambda _done, _total: None).groups
    same_features = np.concatenate([features_of(images)] * 2)
    others = np.concatenate([images, smooth_images(20, seed=1)])
    assert not group_duplicates(others, same_features, 1 << 20, lambda _done, _total: None).groups


def test_images_of_another_color_are_no_copies() -> None:
    image = np.full((SIDE, SIDE, 3), 120, np.uint8)
    red, blue = image.copy(), image.copy()
    red[8:20, 8:20], blue[8:20, 8:20] = (220, 60, 60), (110, 110, 250)
    images = np.concatenate([smooth_images(5), red[None], blue[None]])
    features = np.concatenate([np.random.default_rng(0).normal(size=(5, 4)), np.ones((2, 4))])
    assert not group_duplicates(images, features, 1 << 20, lambda _done, _total: None).groups


def test_plain_images_are_no_copies() -> None:
    images = np.full((6, SIDE, SIDE, 3), 90, np.uint8)
    assert (difference_hash(images) == 0).all()
    assert not group_duplicates(images, np.ones((6, 3)), 1 << 20, lambda _done, _total: None).groups


def test_hash_by_hand() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 72)[None, :, None], (72, 72, 3)).astype(np.uint8)
    (bits,) = difference_hash(ramp[None])
    assert bits[:64].tolist() == [1] * 64  # each cell is brighter than its left neighbour
    assert bits[64:].tolist() == [-1] * 64  # and as bright as the one above it


def test_pairs_agree_with_brute_force_for_every_block_size() -> None:
    generator = np.random.default_rng(0)
    prototypes = np.where(generator.random((6, 128)) < 0.5, 1, -1)
    hashes = np.repeat(prototypes, 5, 0)
    hashes = torch.from_numpy(np.where(generator.random(hashes.shape) < 0.08, -hashes, hashes).astype(np.int8))
    features = np.repeat(generator.normal(size=(6, 12)), 5, 0) + generator.normal(0, 0.25, (30, 12))
    differing = (hashes[:, None] != hashes[None]).sum(2)
    centred = features - features.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosine = centred @ centred.T
    expected = {(i, j) for i in range(30) for j in range(i + 1, 30) if differing[i, j] <= 16 and cosine[i, j] >= 0.85}
    assert 10 < len(expected) < 60
    for block in (4, 7, 64):
        parts = list(duplicate_pairs(hashes, CentredFeatures(features), block, lambda _done, _total: None))
        pairs = [(i, j) for first, second, _ in parts for i, j in zip(first.tolist(), second.tolist(), strict=True)]
        assert sorted(pairs) == sorted(expected)


def test_findings_on_labels_splits_and_copies() -> None:
    images = smooth_images(12)
    images[[9, 10, 11]] = images[[0, 1, 1]]
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1])  # image 9 is a copy of 0 with another label
    names = [f"data/{'train' if i < 6 else 'val'}/{i}.png" for i in range(12)]
    context = make_context(
        make_observations(labels, np.zeros((12, 2)), features=features_of(images), thumbnails=images, names=names)
    )
    search = find_near_duplicates(context)
    conflict, leak, copies = search.findings
    assert conflict.images == (0, 9)
    assert conflict.classes == (0, 1)
    assert conflict.summary.startswith("1 group of near-identical images has different labels, such as 0.png")
    assert conflict.effect == 0.5
    assert sorted(leak.images) == [0, 1, 9, 10, 11]
    assert leak.summary.startswith("3 images of `val` have a near-identical copy in another split")
    assert leak.effect == 3 / 6
    assert sorted(copies.evidence["groups"]) == [[0, 9], [1, 10, 11]]
    assert copies.effect == 3 / 12
    assert all(f.kind == "duplicate" and f.interval[0] < f.effect < f.interval[1] for f in search.findings)
    assert len(find_near_duplicates(context, splits=["a"] * 12).findings) == 2


def test_splits_are_read_from_paths() -> None:
    assert splits_of(["x/train/cat/1.png", str(Path("x", "Val", "cat", "1.png"))]) == ("train", "Val")
    assert splits_of(["x/train/1.png", "x/train/2.png"]) is None
    assert splits_of(["train", "val"]) is None  # names of files
