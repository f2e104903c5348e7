"""Figures and pages of stories."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.engine.layer_table import format_receptive_field
from convscope.engine.model import LOGITS
from convscope.featurevis.layer_story import Chapter, Story
from convscope.plotting.grids import pattern_grid, to_rgb
from convscope.plotting.panels import DARK, LIGHT_BLUE, to_image
from convscope.results import RenderedFile, file_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110


def render_story(result: Story) -> Iterator[tuple[str, RenderedFile]]:
    """Yield the patterns of each chapter, the figure, and an HTML page that contains all of them."""
    for i, chapter in enumerate(result.chapters):
        yield f"{i + 1}_{file_names([chapter.layer])[chapter.layer]}.png", pattern_grid(chapter.images)
    figure = to_image(draw_story(result), DPI)
    yield "story.png", figure
    yield "index.html", _page(result, figure)


def draw_story(result: Story) -> Figure:
    """Draw a row per layer: its patterns, and the median and quartiles of each image statistic."""
    from matplotlib.figure import Figure

    chapters = result.chapters
    columns = max(len(chapter.images) for chapter in chapters)
    names = list(chapters[0].statistics)
    widths = [1.0] * columns + [1.6] * len(names)
    figure = Figure(figsize=(sum(widths) * 1.25, 1.45 * len(chapters) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(chapters), columns + len(names), width_ratios=widths)
    first_row: dict[str, Axes] = {}
    for r, chapter in enumerate(chapters):
        for c, image in enumerate(to_rgb(chapter.images)):
            axes = figure.add_subplot(grid[r, c])
            axes.imshow(image)
            axes.set_xticks([])
            axes.set_yticks([])
            if c == 0:
                axes.set_ylabel(_row_label(chapter), fontsize=8, rotation=0, ha="right", va="center")
        for c, name in enumerate(names):
            axes = figure.add_subplot(grid[r, columns + c], sharex=first_row.get(name))
            first_row.setdefault(name, axes)
            _draw_quartiles(axes, chapter.statistics[name])
            axes.tick_params(labelsize=7, labelbottom=r == len(chapters) - 1)
            if r == 0:
                axes.set_title(name, fontsize=8)
    return figure


def _row_label(chapter: Chapter) -> str:
    """Name a layer and its receptive field."""
    size = format_receptive_field(chapter.receptive_field)
    return "\n".join([*wrap_layer_name(chapter.layer), "receptive field", size])


def _draw_quartiles(axes: Axes, values: np.ndarray) -> None:
    """Draw the interquartile range as a band and the median as a mark."""
    low, median, high = np.percentile(values, (25, 50, 75))
    axes.plot([low, high], [0, 0], color=LIGHT_BLUE, linewidth=6, solid_capstyle="butt")
    axes.plot([median], [0], marker="|", color=DARK, markersize=14, markeredgewidth=2)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)


def wrap_layer_name(layer: str) -> list[str]:
    """Break a layer's name into lines of at most 18 characters, after dots and slashes where possible."""
    return re.findall(r".{1,18}$|.{1,17}[./]|.{1,18}", layer)


def _page(result: Story, figure: Image.Image) -> str:
    """Render the HTML page, with the images as data URLs."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("convscope.plotting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    chapters = [
        {
            "layer": chapter.layer,
            "receptive_field": format_receptive_field(chapter.receptive_field),
            "image": _data_url(pattern_grid(chapter.images, columns=len(chapter.images))),
            "names": ", ".join(chapter.names) if chapter.layer == LOGITS else ", ".join(map(str, chapter.units)),
            "statistics": {name: (row[name], row[f"{name}, quartiles"]) for name in chapter.statistics},
        }
        for chapter, row in zip(result.chapters, result.table(), strict=True)
    ]
    html: str = environment.get_template("story.html").render(
        model=result.model, chapters=chapters, figure=_data_url(figure), notes=result.notes
    )
    return html


def _data_url(image: Image.Image) -> str:
    """Encode an image as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
