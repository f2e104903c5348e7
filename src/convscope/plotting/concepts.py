"""How concepts and atlases look."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from convscope.decomposition.activation_atlas import Atlas
from convscope.decomposition.craft import Concepts
from convscope.images.colormap import blend
from convscope.plotting.figures import coloured, tile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS, OVERLAYS = 12, 3  # concepts in one figure, and pictures under the heat of each
THUMB = 240  # pixels of such a picture in the figure
CAPTION, GAP = 0.26, 4  # room under an icon, relative to its cell; pixels between icons
SMALLEST = 0.45  # an icon's side, relative to its cell's, where it stands for few vectors


def render_concepts(result: Concepts) -> Iterator[tuple[str, Image.Image]]:
    """A sheet of each concept's patches, a strip of pictures under its heat, and the figure."""
    for r, patches in enumerate(result.patches):
        yield f"concept_{r}_patches.png", Image.fromarray(tile(patches, 4, margin=4, background=(255, 255, 255)))
        for n in _telling(result, r):
            yield f"concept_{r}_heat_{n:04d}.png", _overlay(result, r, n)
    yield "concepts.png", _image(result.figure())


def draw_concepts(result: Concepts) -> Figure:
    """A row for each concept, up to twelve: how important it is, its patches, and the pictures that have most of it."""
    from matplotlib.figure import Figure

    rows, columns = min(len(result.bank), ROWS), result.patches.shape[1]
    pictures = min(OVERLAYS, len(result.evaluated_indices))
    widths = [1.35] + [1.0] * columns + [1.3] * pictures
    figure = Figure(figsize=(1.1 * sum(widths), 1.3 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    highest = max(float(result.importance.max()), 1e-12)
    for r, row in enumerate(panels):
        for axes in row[1:]:
            axes.set_axis_off()
        row[0].barh([0], [result.importance[r]], color="#3b6ea5", height=0.3)
        row[0].set_xlim(0, highest)
        row[0].set_ylim(-0.6, 1.2)
        row[0].set_axis_off()
        words = f"concept {r}\nimportance {result.importance[r]:.2f}\nlogit {result.ablation_effects[r]:+.2f}"
        row[0].text(0, 0.3, words, fontsize=8, va="bottom")
        for axes, patch in zip(row[1 : columns + 1], result.patches[r], strict=True):
            axes.imshow(patch)
        for axes, n in zip(row[columns + 1 :], _telling(result, r), strict=False):
            shown = _overlay(result, r, n)
            shown.thumbnail((THUMB, THUMB))
            axes.imshow(shown)
    some = f", {rows} of {len(result.bank)} concepts" if rows < len(result.bank) else ""
    title = f"{result.name} at {result.layer}{some}: crops with most of a concept, and its heat over whole pictures"
    figure.suptitle(title, fontsize=9)
    return figure


def _telling(result: Concepts, concept: int) -> list[int]:
    """The judged pictures, up to three, that have most of a concept anywhere."""
    most = result.heatmaps[:, concept].max((1, 2))
    return [int(n) for n in np.argsort(-most, kind="stable")[:OVERLAYS] if most[n] > 0]


def _overlay(result: Concepts, concept: int, n: int) -> Image.Image:
    """One of the judged pictures under the heat of a concept, relative to the concept's most over all of them."""
    heatmap = result.geometry[n].to_original(torch.from_numpy(result.heatmaps[n, concept])).numpy()
    highest = float(result.heatmaps[:, concept].max())
    return blend(result.original(int(result.evaluated_indices[n])), heatmap / max(highest, 1e-12), 0.4, "jet")


# --- atlases ---------------------------------------------------------------------------------------------------------


def render_atlas(result: Atlas) -> Iterator[tuple[str, Image.Image]]:
    """Each icon, the map of all of them, and the figure, where cells bear the names of classes."""
    for (row, column), icon in zip(result.cells, coloured(result.icons), strict=True):
        yield f"cell_{row}_{column}.png", Image.fromarray(icon)
    yield "map.png", _map(result)
    yield "atlas.png", _image(result.figure())


def draw_atlas(result: Atlas) -> Figure:
    """The map; under each icon the class that the mean of its cell speaks for most."""
    from matplotlib.figure import Figure

    side = max(4.0, 0.95 * result.grid)
    figure = Figure(figsize=(side, side * (1 + CAPTION) + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(_map(result), extent=(0, result.grid, result.grid * (1 + CAPTION), 0))
    axes.set_axis_off()
    if result.classes.shape[1]:
        for (row, column), names in zip(result.cells, result.names, strict=True):
            words = "\n".join(textwrap.wrap(names[0], 16)[:2])
            axes.text(column + 0.5, (row + 1) * (1 + CAPTION) - CAPTION, words, fontsize=5.5, ha="center", va="top")
    about = "" if result.target is None else f" that speak for {result.model.class_name(result.target)}"
    axes.set_title(f"{len(result.positions)} activations of {result.layer}{about}", fontsize=10)
    return figure


def _map(result: Atlas) -> Image.Image:
    """All icons where their cells lie, on white; the more vectors a cell holds, the larger its icon."""
    pixels = result.icons.shape[1]
    high = round(pixels * (1 + CAPTION))
    page = Image.new("RGB", (result.grid * pixels, result.grid * high), "white")
    shares = SMALLEST + (1 - SMALLEST) * np.sqrt(result.counts / result.counts.max())
    for (row, column), icon, share in zip(result.cells, coloured(result.icons), shares, strict=True):
        side = max(1, round(float(share) * (pixels - GAP)))
        corner = (int(column) * pixels + (pixels - side) // 2, int(row) * high + pixels - GAP - side)
        page.paste(Image.fromarray(icon).resize((side, side), Image.Resampling.LANCZOS), corner)
    return page


def _image(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return Image.open(buffer).convert("RGB")
