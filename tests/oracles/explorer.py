"""A network, images and a store that are small enough for the explorer's tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

import convscope
from convscope.diagnosis.changed_images import ChangedImages
from convscope.diagnosis.finding import Finding
from tests.oracles.nets import SmallConvNet, randomized

HOSTILE_NAME = "<script>alert(1)</script>"
CLASSES = ["red", "green", "blue", HOSTILE_NAME, "gray"]
HOSTILE_FILE_NAME = '"><img src=x onerror=alert(1)>.png'


def tiny_model() -> convscope.Model:
    """Return a model of three convolutions with 8, 12 and 10 units, images of 32 x 32 pixels and five classes."""
    return convscope.load(
        randomized(SmallConvNet()), preprocessing={"size": 32, "mean": 0.5, "std": 0.25}, classes=CLASSES
    )


def smooth_image(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    """Return a smooth color image, uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode_image(pixels: np.ndarray, format_name: str = "PNG") -> bytes:
    """Return the content of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format_name)
    return buffer.getvalue()


def data_folder(root: Path, count: int = 12) -> Path:
    """Write images into folders named after two classes; one file has a hostile name."""
    for index in range(count):
        folder = root / CLASSES[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        name = HOSTILE_FILE_NAME if index == 3 else f"{index}.png"
        (folder / name).write_bytes(encode_image(smooth_image(index)))
    return root


def save_concepts_and_atlas(
    model: convscope.Model, store: convscope.Store
) -> tuple[convscope.Concepts, convscope.Atlas]:
    """Save concepts of two classes and an atlas in a store.

    Two images of the atlas are arrays, so that the data set of the store does not have them by name.
    """
    files = [store.image(index).name for index in range(store.num_images)]
    settings = {"count": 3, "crop": 0.5, "sobol_points": 8, "patches": 4, "only_predicted": False}
    concepts = convscope.concepts(model, files, 1, layer="relu3", **settings)
    store.save_result(concepts)
    for layer in ("relu2", "relu3"):
        store.save_result(convscope.concepts(model, files, 3, layer=layer, **settings))
    images = [*(np.asarray(Image.open(file).convert("RGB")) for file in files[:2]), *files[2:]]
    atlas = convscope.atlas(
        model,
        images,
        layer="relu3",
        grid=3,
        positions_per_image=5,
        min_count=2,
        size=16,
        steps=2,
        reducer=lambda vectors: vectors[:, :2],
    )
    store.save_result(atlas)
    return concepts, atlas


def save_diagnosis(model: convscope.Model, store: convscope.Store, data: Path) -> convscope.Diagnosis:
    """Save a diagnosis in a store: of the images in a folder, with two findings that are made up."""
    diagnosis = convscope.diagnose(model, data, layer="relu3", workers=0, progress=False)
    assert diagnosis.observations is not None
    evidence = {
        "effect": "change of the probability",
        "units": [{"unit": 2, "difference": 1.5}, {"unit": 4, "difference": -1.0}],
    }
    findings = [
        Finding(
            "shortcut", f"A mark for `{HOSTILE_NAME}`.", "Remove it.", (0, 3, 5), (3,), 0.5, (0.4, 0.6), 0.01, evidence
        ),
        Finding("duplicate", "2 images are copies.", "Remove one.", (7, 1), (), 2.0, (1.0, 3.0), float("nan")),
    ]
    pixels = np.stack([smooth_image(seed, 96, 96) for seed in range(4)])
    changed = ChangedImages(
        finding=np.array([1, 1]),
        inserted=np.array([True, False]),
        image=np.array([2, 0]),
        before=pixels[:2],
        after=pixels[2:],
        prediction_before=np.array([1, 3]),
        prediction_after=np.array([3, 3]),
        confidence_before=np.array([0.75, 0.5], np.float32),
        confidence_after=np.array([0.625, 0.25], np.float32),
    )
    planted = convscope.Diagnosis.of(
        model,
        diagnosis.observations,
        findings,
        searches=diagnosis.searches,
        overview=diagnosis.overview,
        label_quality=diagnosis.label_quality,
        changed_images=changed,
        layer="relu3",
        layer_reason="",
        data_name="data",
    )
    store.save_result(planted)
    return planted
