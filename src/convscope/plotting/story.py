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
from convscope.figures import RenderedFile
from convscope.plotting.grids import captioned_tile, to_rgb
from convscope.plotting.panels import DARK, LIGHT_BLUE, create_figure, inches, show_image, to_image, wrap
from convscope.results import file_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
MIN_SIDE, LABEL_WIDTH = 1.25, 1.3  # inches of a pattern, and of the names of the layers


def render_story(result: Story) -> Iterator[tuple[str, RenderedFile]]:
    """Yield the patterns of each chapter, the figure, and an HTML page that contains all of them."""
    for i, chapter in enumerate(result.chapters):
        yield f"{i + 1}_{file_names([chapter.layer])[chapter.layer]}.png", chapter_sheet(chapter)
    figure = to_image(draw_story(result), DPI)
    yield "story.png", figure
    yield "index.html", _page(result, figure)


def chapter_sheet(chapter: Chapter, columns: int = 8) -> Image.Image:
    """Arrange the patterns of a chapter in a grid, with the numbers of their units or the names of their classes."""
    return captioned_tile(to_rgb(chapter.images), _unit_titles(chapter, " "), columns, margin=5)


def draw_story(result: Story, *, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw a row per layer: its patterns, and the median and quartiles of each image statistic.

    Patterns have their own size or larger.
    """
    chapters = result.chapters
    columns = max(len(chapter.images) for chapter in chapters)
    names = list(chapters[0].statistics)
    side = max(MIN_SIDE, *(inches(chapter.images.shape[2]) for chapter in chapters)) + 0.12
    widths = [side] * columns + [2.0] * len(names)
    title = f"Patterns from the first layer to the last ({result.model.name})"
    figure = create_figure(sum(widths) + LABEL_WIDTH, (side + 0.45) * len(chapters) + 0.4, title, figsize)
    grid = figure.add_gridspec(len(chapters), columns + len(names), width_ratios=widths)
    first_row: dict[str, Axes] = {}
    for r, chapter in enumerate(chapters):
        titles = _unit_titles(chapter, "\n")
        for c, image in enumerate(to_rgb(chapter.images)):
            axes = figure.add_subplot(grid[r, c])
            show_image(axes, image, "\n".join(line for part in titles[c].split("\n") for line in wrap(part, 20)))
            if c == 0:
                _label_row(axes, chapter)
        for c, name in enumerate(names):
            axes = figure.add_subplot(grid[r, columns + c], sharex=first_row.get(name))
            first_row.setdefault(name, axes)
            _draw_quartiles(axes, chapter.statistics[name])
            axes.tick_params(labelsize=8, labelbottom=r == len(chapters) - 1)
            if r == 0:
                axes.set_title(f"{name}\n(median and quartiles)", fontsize=9)
    return figure


def _unit_titles(chapter: Chapter, separator: str) -> list[str]:
    """Return the number of each unit, for classes with the name."""
    if chapter.layer != LOGITS:
        return [f"unit {unit}" for unit in chapter.units]
    return [f"class {unit}{separator}{name}" for unit, name in zip(chapter.units, chapter.names, strict=True)]


def _label_row(axes: Axes, chapter: Chapter) -> None:
    """Write a layer's name at the left of its first pattern."""
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(_row_label(chapter), fontsize=8, rotation=0, ha="right", va="center")


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
            "image": _data_url(chapter_sheet(chapter, columns=len(chapter.images))),
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
