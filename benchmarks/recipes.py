"""Write docs/recipes.jpg: the same eight units by every recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import convscope
from convscope.featurevis.objectives import caricature
from convscope.samples import photographs

# Edges, textures, parts and objects: layer and channel of Lite0, or class.
UNITS = (
    ("bn1", 3),
    ("blocks.1.1.bn1", 16),
    ("blocks.2.1.bn1", 8),
    ("blocks.3.2.bn1", 40),
    ("blocks.4.2.bn1", 12),
    ("blocks.5.3.bn1", 100),
    ("logits", 387),
    ("logits", 817),
)
RECIPES = ("plain", "robust", "maco", "dream", "caricature")
TILE, GAP, HEAD, SIDE = 160, 6, 40, 92
LARGE, SMALL = (ImageFont.load_default(size) for size in (16, 12))


def pattern(model: convscope.Model, recipe: str, layer: str, number: int) -> Image.Image:
    """Compute one unit's pattern; a caricature is of the whole layer."""
    start_options = {"start": photographs()[0]} if recipe in ("dream", "caricature") else {}
    if recipe == "caricature":
        patterns = convscope.patterns(model, caricature(layer), recipe=recipe, **start_options)
    else:
        patterns = convscope.patterns(model, layer, [number], recipe=recipe, **start_options)
    return Image.fromarray(patterns.images[0])


def sheet(model: convscope.Model) -> Image.Image:
    """Arrange recipes from top to bottom and units from left to right."""
    width, height = SIDE + len(UNITS) * (TILE + GAP), HEAD + len(RECIPES) * (TILE + GAP)
    out = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(out)
    for column, (layer, number) in enumerate(UNITS):
        left = SIDE + column * (TILE + GAP)
        name = model.class_name(number) if layer == "logits" else f"channel {number}"
        pen.text((left, 4), layer, "black", LARGE)
        pen.text((left, 22), name, "black", SMALL)
    for row, recipe in enumerate(RECIPES):
        top = HEAD + row * (TILE + GAP)
        pen.text((4, top + TILE / 2 - 8), recipe, "black", LARGE)
        for column, (layer, number) in enumerate(UNITS):
            out.paste(_tile(pattern(model, recipe, layer, number)), (SIDE + column * (TILE + GAP), top))
    return out


def _tile(image: Image.Image) -> Image.Image:
    """Return a tile of fixed size: larger images are resized, smaller ones centred."""
    if min(image.size) > TILE:
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        return image.resize((TILE, TILE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    out = Image.fromarray(np.full((TILE, TILE, 3), 240, np.uint8))
    out.paste(image, tuple((TILE - length) // 2 for length in image.size))
    return out


def main() -> None:
    sheet(convscope.load("lite0")).save(Path(__file__).parents[1] / "docs" / "recipes.jpg", quality=88)


if __name__ == "__main__":
    main()
