"""Create matplotlib figures and fill their panels.

Figures are created without pyplot, which would keep a reference to each of them. Matplotlib is imported inside the
functions, so that saving grids of images does not need it.
"""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, LIGHT_BLUE, DARK = "#3b6ea5", "#8aa9cc", "#1c2430"
ELLIPSIS = "…"


def create_panels(
    rows: int, columns: int, width: float, height: float, height_ratios: list[float] | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """Create a figure of `width` by `height` inches with a grid of panels; return it and the panels by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios).tolist()


def flatten(panels: list[list[Axes]]) -> list[Axes]:
    """List the panels of all rows."""
    return [axes for row in panels for axes in row]


def show_image(axes: Axes, image: Image.Image | np.ndarray, title: str = "") -> None:
    """Fill a panel with an image under a title."""
    axes.imshow(np.asarray(image))
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def hide(panels: list[Axes]) -> None:
    """Leave panels blank."""
    for axes in panels:
        axes.set_axis_off()


def note_omitted(figure: Figure, displayed: int, count: int, noun: str) -> None:
    """Title a figure "16 of 20 images" if it does not display all of them."""
    if displayed < count:
        figure.suptitle(f"{displayed} of {count} {noun}", fontsize=10)


def to_image(figure: Figure, dpi: int = 120) -> Image.Image:
    """Render a figure as an RGB image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")


def image_title(name: str) -> str:
    """Return an image's file name without its folder, shortened."""
    return shorten(Path(name).name)


def wrap(text: str, width: int) -> list[str]:
    """Break a text into about two lines; shorten it in the middle if it is longer."""
    return textwrap.wrap(shorten(text, 2 * width), width)


def shorten(text: str, length: int = 40) -> str:
    """Put a text on one line of at most `length` characters, with an ellipsis in the middle if needed."""
    text = " ".join(text.split())
    half = length // 2
    return text if len(text) <= length else f"{text[: length - half - 1]}{ELLIPSIS}{text[-half:]}"
