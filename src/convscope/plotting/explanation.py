"""Figures of explanations: the image with each unit's region, the unit's patches, and the proof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from convscope.explanations.result import Explanation
from convscope.figures import RenderedFile
from convscope.images.colormap import SEQUENTIAL, ColorScale
from convscope.images.resizing import resize_to
from convscope.plotting.panels import (
    BLUE,
    DARK,
    LIGHT_BLUE,
    RED,
    check_image,
    create_figure,
    hide,
    image_title,
    shorten,
    show_image,
    to_image,
    wrap,
)
from convscope.results import unique_file_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4  # of units
PANEL = 2.3  # inches
MAX_SIDE = 480  # pixels of a displayed image


def render_explanation(result: Explanation) -> Iterator[tuple[str, RenderedFile]]:
    """Yield the figure of each image."""
    names = unique_file_names(Path(name).stem[:50] for name in result.image_names)
    for n, name in enumerate(names):
        yield f"{name}.png", to_image(draw_explanation(result, image=n))


def draw_explanation(result: Explanation, *, image: int = 0, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw the explanation for one image: the image, each unit's region with its patches, and the proof."""
    check_image(image, len(result))
    one = result.select(image)
    count = int(one.counts[0])
    has_patches = one.patches is not None
    columns = max(1, min(COLUMNS, count))
    rows = -(-max(count, 1) // columns)
    photo = _photo(one)
    ratio = min(1.5, photo.height / photo.width)
    height = rows * (PANEL * ratio + 0.55 + 0.75 * has_patches)
    figure = create_figure((columns + 2) * PANEL, max(height, PANEL * ratio + 2.1), one.sentences[0], figsize)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[2, columns])[0]
    panels = left.subplots(2, 1, height_ratios=[1.4, 1])
    show_image(panels[0], photo, f"{image_title(one.image_names[0])}: {shorten(one.target_names[0], 30)}")
    _draw_proof(panels[1], one)
    kinds = [ratio, 0.34] if has_patches else [ratio]
    grid = right.subplots(rows * len(kinds), columns, squeeze=False, height_ratios=kinds * rows)
    hide([axes for row in grid for axes in row])
    for f in range(count):
        row, column = divmod(f, columns)
        _draw_unit(grid[row * len(kinds)][column], one, f, photo)
        if one.patches is not None:
            grid[row * len(kinds) + 1][column].imshow(np.concatenate(list(one.patches[0, f]), axis=1))
    return figure


def _photo(one: Explanation) -> Image.Image:
    """Return the image, no larger than it is displayed."""
    photo = Image.fromarray(one.image_source.original(one.image_indices[0]))
    photo.thumbnail((MAX_SIDE, MAX_SIDE))
    return photo


def _draw_unit(axes: Axes, one: Explanation, f: int, photo: Image.Image) -> None:
    """Draw the contribution of a unit over the image, and the box of its region."""
    from matplotlib.patches import Rectangle

    share = one.shares[0, f]
    amount = f"{one.effects[0, f]:+.2f}" if np.isnan(share) else f"{share:.0%}"
    title = "\n".join([*wrap(one.unit_label(0, f), 26), f"{amount}  {one.positions[0][f]}".rstrip()])
    maps = one.maps[0, f]
    if maps.size == 0:
        show_image(axes, photo, title)
        return
    geometry = one.geometry[0].scaled_within(1, max(photo.size))
    resized = geometry.to_original(torch.from_numpy(maps)).numpy()
    scale = ColorScale(float(max(resized.max(), 1e-12)), signed=False, colormap=SEQUENTIAL)
    pixels = resize_to(np.asarray(photo), geometry.image_size)
    show_image(axes, scale.overlay(pixels, resized), title)
    if np.isfinite(one.boxes[0, f]).all():
        factor = geometry.image_size[1] / one.geometry[0].image_size[1]
        left, top, right, bottom = one.boxes[0, f] * factor
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=1.5))


def _draw_proof(axes: Axes, one: Explanation) -> None:
    """Draw the logit with all units, without the selected ones, and without others."""
    count = int(one.counts[0])
    bars = [
        (f"all {one.noun}s", one.logits[0], DARK),
        ("without it" if count == 1 else f"without these {count}", one.removed_logits[0], RED),
    ]
    draws = one.random_logits[0][np.isfinite(one.random_logits[0])]
    if len(draws):
        bars.append(("without another" if count == 1 else f"without {count} others", draws.mean(), LIGHT_BLUE))
    bars.append((f"without all {one.noun}s", one.base_logits[0], BLUE))
    names, values, colors = zip(*bars, strict=True)
    axes.barh(range(len(bars)), values, color=colors, height=0.65)
    if len(draws):
        axes.plot(draws, np.full(len(draws), 2), "|", color=DARK, markersize=9, alpha=0.6)
    for y, value in enumerate(values):
        end = max(value, 0, *draws) if len(draws) and y == 2 else max(value, 0)
        axes.text(end, y, f"  {value:z.2f}", va="center", fontsize=8)
    axes.margins(x=0.2)
    axes.axvline(0, color=DARK, linewidth=0.8)
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"logit of {shorten(one.target_names[0], 30)}", fontsize=8)
