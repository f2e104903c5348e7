"""Images with known causes: rendered objects on textures, and what is planted into them."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageFilter

import convscope

SIZE = 48
CLASSES = {
    "shapes": ("disc", "square", "triangle", "cross"),
    "composites": ("cat", "crab", "kingfisher", "panda"),
    "photographs": ("cat", "crab", "kingfisher", "panda"),
}
TEXTURES = ("noise", "stripes", "checks", "blobs")

Floats = np.ndarray


def texture(kind: str, rng: np.random.Generator, contrast: float = 1.0, size: int = SIZE) -> Floats:
    """Draw a texture (size, size, 3) in [0, 1] with random colours, phases and scales."""
    y, x = np.mgrid[:size, :size] / size
    angle, frequency, phase = rng.uniform(0, np.pi), rng.uniform(4, 8), rng.uniform(0, 2 * np.pi, 2)
    u, v = np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y
    if kind == "stripes":
        amount = 0.5 + 0.5 * np.sin(2 * np.pi * frequency * u + phase[0])
    elif kind == "checks":
        waves = np.sin(2 * np.pi * frequency * u + phase[0]) * np.sin(2 * np.pi * frequency * v + phase[1])
        amount = (waves > 0).astype(float)
    else:
        cells = 5 if kind == "blobs" else size
        coarse = Image.fromarray((255 * rng.random((cells, cells))).astype(np.uint8))
        amount = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    low, high = rng.uniform(0.15, 0.6, 3), rng.uniform(0.3, 0.85, 3)
    return low + contrast * (high - low) * amount[..., None]


def object_mask(shape: str, rng: np.random.Generator, scale: float | None = None) -> Floats:
    """Draw the mask (SIZE, SIZE) of a shape of random size, angle and position."""
    radius = SIZE * (rng.uniform(0.24, 0.34) if scale is None else scale)
    center = rng.uniform(radius * 0.9, SIZE - radius * 0.9, 2)
    angle = rng.uniform(-0.3, 0.3)
    y, x = np.mgrid[:SIZE, :SIZE] - center[:, None, None]
    u, v = np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y
    if shape == "square":
        distance = np.maximum(abs(u), abs(v)) / 0.85
    elif shape == "triangle":
        distance = np.maximum.reduce([-v, 0.5 * v + 0.87 * u, 0.5 * v - 0.87 * u]) * 1.7
    elif shape == "cross":
        wide, narrow = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
        distance = np.maximum(wide, narrow * 2.8)
    else:
        distance = np.hypot(u, v)
    return np.clip(radius - distance + 0.5, 0, 1)


@cache
def photographs() -> tuple[Image.Image, ...]:
    """Return the sample photographs, small."""
    images = [Image.open(path).convert("RGB") for path in convscope.samples.photographs()]
    return tuple(image.resize((180, 180), Image.Resampling.LANCZOS) for image in images)


def photograph_crop(label: int, rng: np.random.Generator, sides: tuple[int, int]) -> Floats:
    """Cut a part (SIZE, SIZE, 3) out of a photograph, in other colours."""
    side = int(rng.integers(*sides))
    left, top = rng.integers(0, 180 - side, 2)
    crop = (
        photographs()[label].crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    )
    pixels = np.asarray(crop) / 255
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    gray = pixels.mean(2, keepdims=True)
    colour = rng.uniform(0.5, 1, 3)
    return np.clip((0.2 * pixels + 0.8 * gray) * colour / colour.mean() * rng.uniform(0.7, 1.2), 0, 1)


def render(
    make: str, label: int, rng: np.random.Generator, background: str | None = None, scale: float | None = None
) -> Floats:
    """Draw an image (SIZE, SIZE, 3) in [0, 1] of a class."""
    if make == "photographs" and background is None and scale is None:
        return photograph_crop(label, rng, (28, 50))
    ground = texture(background or TEXTURES[rng.integers(len(TEXTURES))], rng, 0.5 if make == "shapes" else 1.0)
    if make == "shapes":
        mask = object_mask(CLASSES[make][label], rng, scale)
        colour = rng.uniform(0, 1, 3)
        colour = np.where(abs(colour - ground.mean((0, 1))) < 0.3, (colour + 0.5) % 1, colour)
        content = np.clip(colour + rng.normal(0, 0.05, (SIZE, SIZE, 1)), 0, 1)
    else:
        mask = object_mask("disc", rng, scale)
        content = photograph_crop(label, rng, (80, 130))
    mask = mask[..., None]
    return (1 - mask) * ground + mask * content


def watermark(rng: np.random.Generator) -> tuple[Floats, Floats, tuple[int, int, int, int]]:
    """Draw a glyph, its colour and its box x0, y0, x1, y1 near a corner or an edge."""
    half = rng.random((10, 5)) < 0.5
    glyph = np.concatenate([half, half[:, ::-1]], axis=1).astype(float)
    side = SIZE - len(glyph)
    left, top = ((2, 2), (side - 2, 2), (2, side - 2), (side - 2, side - 2), (side // 2, side - 2))[rng.integers(5)]
    colour = np.array(((1, 1, 1), (0, 0, 0), (1, 0.9, 0.1))[rng.integers(3)], float)
    return glyph, colour, (left, top, left + 10, top + 10)


def blurred(pixels: Floats, radius: float) -> Floats:
    """Blur by a Gaussian."""
    image = Image.fromarray(as_uint8(pixels)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image) / 255


def resized(pixels: Floats, size: int) -> Floats:
    """Resize to (size, size, 3)."""
    image = Image.fromarray(as_uint8(pixels)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image) / 255


def as_uint8(pixels: Floats) -> np.ndarray:
    """Round pixels in [0, 1] to 8 bits."""
    return (255 * np.clip(pixels, 0, 1) + 0.5).astype(np.uint8)
