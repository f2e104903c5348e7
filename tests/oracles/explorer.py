"""A network, pictures and a store that are small enough to be explored in a moment."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

import convscope
from tests.oracles.nets import Usual, filled

HOSTILE = "<script>alert(1)</script>"
CLASSES = ["red", "green", "blue", HOSTILE, "gray"]
NAME = '"><img src=x onerror=alert(1)>.png'


def tiny_model() -> convscope.Model:
    """Convolutions of 8, 12 and 10 units on pictures of 32 x 32; five classes, one with a name that means harm."""
    net = filled(Usual())
    return convscope.load(net, preprocessing={"size": 32, "mean": 0.5, "std": 0.25}, classes=CLASSES)


def picture(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth coloured picture, uint8 (H, W, 3)."""
    drawn = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(drawn).resize((width, height), Image.Resampling.BICUBIC))


def as_file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def data_folder(where: Path, count: int = 12) -> Path:
    """Pictures in folders named after two classes; one of them has a name that means harm."""
    for number in range(count):
        folder = where / CLASSES[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        name = NAME if number == 3 else f"{number}.png"
        (folder / name).write_bytes(as_file(picture(number)))
    return where


def kept(model: convscope.Model, store: convscope.Store) -> tuple[convscope.Concepts, convscope.Atlas]:
    """Concepts of a class and an atlas, of the store's own pictures and one more, put into the store."""
    files = [store.image(number).name for number in range(store.num_images)]
    settings = {"count": 3, "crop": 0.5, "masks": 8, "patches": 4, "only_predicted": False}
    found = convscope.concepts(model, files, 1, layer="relu3", **settings)
    store.save_result(found)
    for layer in ("relu2", "relu3"):
        store.save_result(convscope.concepts(model, files, 3, layer=layer, **settings))
    given = [*(np.asarray(Image.open(file).convert("RGB")) for file in files[:2]), *files[2:]]
    drawn = convscope.atlas(
        model,
        given,
        layer="relu3",
        grid=3,
        positions_per_image=5,
        min_count=2,
        size=16,
        steps=2,
        reducer=lambda vectors: vectors[:, :2],
    )
    store.save_result(drawn)
    return found, drawn
