"""Create matplotlib figures and fill their panels.

Figures are created without pyplot, which would keep a reference to each of them (`display` attaches the figures that
``pyplot.show()`` shows). Matplotlib is imported inside the functions, so that saving grids of images does not need it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from convscope.errors import ConvscopeError, is_int
from convscope.images.colormap import ColorScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, LIGHT_BLUE, DARK, RED = "#3b6ea5", "#8aa9cc", "#1c2430", "#c0392b"
ELLIPSIS = "…"
LETTERS_PER_INCH = 11  # of a title
ROW_GAP = 0.09  # inches between rows of images


def create_figure(
    width: float, height: float, title: str, figsize: tuple[float, float] | None = None, padding: float = 0.04
) -> Figure:
    """Create a figure of `width` by `height` inches, plus the height of its title; or of `figsize`."""
    from convscope.plotting.display import DisplayFigure

    lines = "\n".join(textwrap.wrap(title, int(LETTERS_PER_INCH * (figsize[0] if figsize else width))))
    figure = DisplayFigure(figsize=figsize or (width, height + _title_height(lines)), padding=padding)
    figure.suptitle(lines, fontsize=10)
    return figure


def create_panels(
    rows: int,
    columns: int,
    width: float,
    height: float,
    title: str,
    *,
    height_ratios: list[float] | None = None,
    width_ratios: list[float] | None = None,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
) -> tuple[Figure, list[list[Axes]]]:
    """Create a figure of `width` by `height` inches with a title and a grid of panels; return it and the panels by row.

    With `ax`, its figure and `ax` as the only panel; the title is left out. Raises ConvscopeError if there are more
    panels than one, or both `ax` and `figsize`.
    """
    if ax is not None:
        require_one_panel(rows * columns)
        if figsize is not None:
            raise ConvscopeError("ax and figsize are given; expected one of them: the size of ax is that of its figure")
        return root_figure(ax), [[ax]]
    figure = create_figure(width, height, title, figsize)
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios, width_ratios=width_ratios)
    return figure, panels.tolist()


def trim_rows(figure: Figure, panels: list[list[Axes]]) -> None:
    """Reduce a figure's height to that of its rows: images that are wider than their panels leave some blank."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout, grid = figure.get_layout_engine(), panels[0][0].get_gridspec()
    if not isinstance(layout, ConstrainedLayoutEngine) or grid is None:
        return
    ConstrainedLayoutEngine.execute(layout, figure)  # one pass: sizes change by less than a pixel in the second
    rows = [[axes for axes in row if axes.get_aspect() != "auto"] or row for row in panels]
    for axes in flatten(rows):
        axes.apply_aspect()
    grid.set_height_ratios([max(axes.get_position().height for axes in row) for row in rows])
    extents = [max(box.height for axes in row if (box := axes.get_tightbbox()) is not None) for row in rows]
    figure.set_figheight(sum(extents) / figure.dpi + ROW_GAP * len(rows) + _title_height(figure.get_suptitle()))


def _title_height(title: str) -> float:
    """Return the inches that a figure's title takes."""
    return 0.17 * (title.count("\n") + 1) + 0.15


def omitted(displayed: int, count: int, noun: str) -> str:
    """Return the end of a title, "; 16 of 20 images", if a figure does not display all of them."""
    return f"; {displayed} of {count} {noun}" if displayed < count else ""


def require_one_panel(count: int) -> None:
    """Raise ConvscopeError for a figure that has several panels and cannot be drawn in axes of the user's."""
    if count != 1:
        raise ConvscopeError(
            f"ax takes a figure of one panel; this one has {count}: omit ax (figsize sets its size), or select one part"
        )


def root_figure(ax: Axes) -> Figure:
    """Return the figure that contains axes, also where they are part of a subfigure."""
    figure = ax.figure
    while figure.figure is not figure:
        figure = figure.figure
    return figure


def inches(pixels: float) -> float:
    """Return the length at which so many pixels are drawn one by one."""
    from matplotlib import rcParams

    return float(pixels / rcParams["figure.dpi"])


def add_color_bar(
    axes: Axes | Sequence[Axes], scale: ColorScale, label: str = "evidence", ticks: Sequence[str] | None = None
) -> None:
    """Draw a color bar of the height of a panel beside it, or one beside several; `ticks` label both ends.

    By default these are the values of the scale, and zero.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = ScalarMappable(Normalize(scale.minimum, scale.maximum), scale.colormap)
    if isinstance(axes, Sequence):
        column, share = _last_column(axes)
        bar = axes[0].figure.colorbar(colors, ax=column, fraction=0.04 / share, pad=0.02 / share, aspect=30)
    else:
        bar = axes.figure.colorbar(colors, cax=axes.inset_axes((1.02, 0, 0.03, 1)))
    values = [-scale.maximum, 0, scale.maximum] if scale.signed else [0, scale.maximum]
    bar.set_ticks(values, labels=ticks or [f"{value:.3g}" for value in values])
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label(label, fontsize=8)
    if not scale.signed and ticks is None:  # beside the bar, between the numbers at its ends
        bar.ax.yaxis.set_label_coords(1.6, 0.5)
        bar.ax.yaxis.label.set_verticalalignment("top")
    bar.outline.set_linewidth(0.5)


def _last_column(panels: Sequence[Axes]) -> tuple[Sequence[Axes], float]:
    """Return the rightmost panels and their share of the width of all.

    A color bar beside all panels is beside these. The layout measures a color bar once for each of its panels.
    """
    specs = [spec for axes in panels if (spec := axes.get_subplotspec()) is not None]
    if len(specs) < len(panels):
        return panels, 1.0
    stop = max(spec.colspan.stop for spec in specs)
    widths = np.asarray(specs[0].get_gridspec().get_width_ratios(), float)
    all_widths = widths[min(spec.colspan.start for spec in specs) : stop]
    last = [axes for axes, spec in zip(panels, specs, strict=True) if spec.colspan.stop == stop]
    return last, float(all_widths[-1] / all_widths.sum())


def check_image(image: int, count: int) -> None:
    """Raise ConvscopeError unless there is an image of this number."""
    if not is_int(image) or not 0 <= image < count:
        raise ConvscopeError(f"image is {image!r}; expected a whole number from 0 to {count - 1}")


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


def to_image(figure: Figure, dpi: int = 120) -> Image.Image:
    """Render a figure as an RGB image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 0})
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
