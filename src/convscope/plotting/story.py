"""How a story looks: a figure, and a page with everything in it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from convscope.engine.model import LOGITS
from convscope.featurevis.layer_story import Story
from convscope.plotting.figures import coloured, pattern_grid
from convscope.results import file_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render_story(result: Story) -> Iterator[tuple[str, Image.Image | str]]:
    for i, chapter in enumerate(result.chapters):
        yield f"{i + 1}_{file_names([chapter.layer])[chapter.layer]}.png", pattern_grid(chapter.images)
    figure = _image(result.figure())
    yield "story.png", figure
    yield "index.html", _page(result, figure)


def draw_story(result: Story) -> Figure:
    """A row of patterns per layer, beside it what is measured of them: the median over all, and the middle half."""
    from matplotlib.figure import Figure

    chapters = result.chapters
    most = max(len(chapter.images) for chapter in chapters)
    names = list(chapters[0].statistics)
    widths = [1.0] * most + [1.6] * len(names)
    figure = Figure(figsize=(sum(widths) * 1.25, 1.45 * len(chapters) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(chapters), most + len(names), width_ratios=widths)
    shared: dict[str, Any] = {}
    for r, chapter in enumerate(chapters):
        for c, image in enumerate(coloured(chapter.images)):
            axes = figure.add_subplot(grid[r, c])
            axes.imshow(image)
            axes.set_xticks([])
            axes.set_yticks([])
            if c == 0:
                sees = "sees " + (" x ".join(map(str, chapter.receptive_field)) if chapter.receptive_field else "all")
                label = "\n".join([*_broken(chapter.layer), sees])
                axes.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        for c, name in enumerate(names):
            axes = figure.add_subplot(grid[r, most + c], sharex=shared.get(name))
            shared[name] = axes
            low, middle, high = np.percentile(chapter.statistics[name], (25, 50, 75))
            axes.plot([low, high], [0, 0], color="#8aa9cc", linewidth=6, solid_capstyle="butt")
            axes.plot([middle], [0], marker="|", color="#1c2430", markersize=14, markeredgewidth=2)
            axes.set_yticks([])
            axes.tick_params(labelsize=7, labelbottom=r == len(chapters) - 1)
            axes.spines[["left", "right", "top"]].set_visible(False)
            if r == 0:
                axes.set_title(name, fontsize=8)
    return figure


def _broken(layer: str) -> list[str]:
    """A layer's name in lines of 18 letters at most, parted behind dots and slashes where that will do."""
    return re.findall(r".{1,18}$|.{1,17}[./]|.{1,18}", layer)


def _page(result: Story, figure: Image.Image) -> str:
    """The story as one page, pictures inside."""
    from jinja2 import Environment, PackageLoader

    pages = Environment(
        loader=PackageLoader("convscope.plotting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    chapters = [
        {
            "layer": chapter.layer,
            "sees": row["receptive field"],
            "picture": _url(pattern_grid(chapter.images, columns=len(chapter.images))),
            "names": ", ".join(chapter.names) if chapter.layer == LOGITS else ", ".join(map(str, chapter.units)),
            "measured": {name: (row[name], row[f"{name}, quartiles"]) for name in chapter.statistics},
        }
        for chapter, row in zip(result.chapters, result.table(), strict=True)
    ]
    html: str = pages.get_template("story.html").render(
        model=result.model, chapters=chapters, figure=_url(figure), notes=result.notes
    )
    return html


def _image(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")


def _url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
