"""Figures of the names of units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from convscope.figures import RenderedFile
from convscope.plotting.panels import BLUE, DARK, LIGHT_BLUE, create_panels, omitted, shorten, to_image
from convscope.store.unit_names import UnitNames

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_UNITS = 30  # in one figure
CHANCE = 0.5
LEFT_EDGE = 0.4  # runners-up with lower scores are drawn here


def render_unit_names(result: UnitNames) -> Iterator[tuple[str, RenderedFile]]:
    """Yield the figure."""
    yield "names.png", to_image(draw_unit_names(result))


def draw_unit_names(result: UnitNames, *, ax: Axes | None = None, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw the scores of the units with the best names, from chance to 1, and those of their runners-up."""
    order = result.order[:MAX_UNITS]
    named = int(result.named.sum())
    title = f"Names of units of {result.model.name}: {named:,} of {len(result):,} named"
    title += omitted(len(order), named, "names")
    figure, [[axes]] = create_panels(1, 1, 7.5, 0.9 + 0.22 * max(3, len(order)), title, ax=ax, figsize=figsize)
    if not named:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no name is better than chance", transform=axes.transAxes, ha="center", color="gray")
        return figure
    rows = np.arange(len(order))
    axes.barh(rows, result.scores[order] - CHANCE, left=CHANCE, color=BLUE, height=0.7)
    axes.plot(
        np.maximum(result.runner_up_scores[order], LEFT_EDGE),
        rows,
        "o",
        color=LIGHT_BLUE,
        markeredgecolor=DARK,
        markersize=4,
    )
    for row, i in enumerate(order):
        text = f" {shorten(str(result.names[i]), 40)}"
        axes.text(max(CHANCE, float(np.nan_to_num(result.scores[i]))), row, text, va="center", fontsize=8)
    layers = set(result.layer[order].tolist())
    labels = [f"{shorten(str(result.layer[i]), 24)} {result.units[i]}" for i in order]
    axes.set_yticks(rows, [str(result.units[i]) for i in order] if len(layers) == 1 else labels, fontsize=8)
    axes.set_ylim(max(3, len(order)) - 0.5, -0.5)
    axes.set_xlim(LEFT_EDGE - 0.01, 1.45)
    axes.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("area under the ROC curve on other images; dots: runner-up", fontsize=8)
    axes.set_ylabel(f"unit of {shorten(layers.pop())}" if len(layers) == 1 else "unit", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
