"""Draw docs/images/overview.webp: feature maps, patterns and heatmaps of the bundled network, as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import convscope

OUT = Path(__file__).parents[1] / "images" / "overview.webp"
FRAMES, MILLISECONDS, HOLD = 26, 110, 2200
SIDE, GAP, HEAD = 240, 16, 34
LAYERS = ("bn1", "blocks.1.1.bn1", "blocks.2.1.bn1", "blocks.4.1.bn1")
UNITS = (("blocks.1.1.bn1", 16), ("blocks.2.1.bn1", 8), ("blocks.3.2.bn1", 40), ("logits", 387))
TITLES = ("what it sees: feature maps", "what it looks for: patterns", "why it decides: heatmap")
FONT = ImageFont.load_default(16)


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay square images out in a square panel."""
    cell = (SIDE - 2 * (columns - 1)) // columns
    out = Image.new("RGB", (SIDE, SIDE), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        out.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (column * (cell + 2), row * (cell + 2)))
    return out


def feature_panels(model: convscope.Model, photo: str) -> list[Image.Image]:
    """Return a panel for each layer: the sixteen channels that vary most."""
    activations, panels = convscope.activations(model, photo, list(LAYERS)), []
    for layer in LAYERS:
        maps = activations[layer][0]
        chosen = maps[np.argsort(-(maps.std((1, 2)) / (np.abs(maps).max((1, 2)) + 1e-6)))[:16]]
        low, high = (np.quantile(chosen, q, (1, 2), keepdims=True) for q in (0.02, 0.98))
        scaled = np.clip((chosen - low) / (high - low + 1e-6), 0, 1)
        colors = (matplotlib.colormaps["viridis"](scaled)[..., :3] * 255).astype(np.uint8)
        panels.append(grid([Image.fromarray(image) for image in colors], 4))
    return panels


def pattern_panels(model: convscope.Model) -> list[Image.Image]:
    """Return the ascent of four patterns."""
    series = []
    for layer, unit in UNITS:
        patterns = convscope.patterns(model, layer, [unit], frames=FRAMES)
        frames = np.asarray(patterns.frames)[:, 0]
        positions = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
        series.append([Image.fromarray(frames[i]) for i in positions])
    return [grid(images, 2) for images in zip(*series, strict=True)]


def heatmap_panels(model: convscope.Model, photo: str) -> list[Image.Image]:
    """Return the heatmap while it appears over the photograph."""
    heatmaps = convscope.heatmaps(model, photo, "lesser panda", scale=(1, 2, 3), fuse="product")
    overlays = [heatmaps.overlay(alpha=0.55 * min(1, i / (FRAMES * 0.7)))[0] for i in range(FRAMES)]
    return [_centre(image) for image in overlays]


def _centre(image: Image.Image) -> Image.Image:
    """Crop an image to a square panel."""
    side = min(image.size)
    left, top = (image.width - side) // 3, (image.height - side) // 2
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def main() -> None:
    """Write the animation."""
    model, photo = convscope.load("lite0"), convscope.samples.photographs()[3]
    features, patterns = feature_panels(model, photo), pattern_panels(model)
    heatmaps = heatmap_panels(model, photo)
    frames = []
    for number in range(FRAMES):
        layer = number * len(LAYERS) // FRAMES
        frame = Image.new("RGB", (3 * SIDE + 2 * GAP, HEAD + SIDE), "white")
        pen = ImageDraw.Draw(frame)
        for column, panel in enumerate((features[layer], patterns[number], heatmaps[number])):
            pen.text((column * (SIDE + GAP), 8), TITLES[column], "black", FONT)
            frame.paste(panel, (column * (SIDE + GAP), HEAD))
        frames.append(frame)
    durations = [MILLISECONDS] * (FRAMES - 1) + [HOLD]
    OUT.parent.mkdir(exist_ok=True)
    frames[0].save(OUT, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=68, method=6)


if __name__ == "__main__":
    main()
