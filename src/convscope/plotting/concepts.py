"""Figures and images of concepts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from convscope.decomposition.result import Concepts
from convscope.images.colormap import SEQUENTIAL, ColorScale
from convscope.images.resizing import resize_to
from convscope.plotting.grids import tile
from convscope.plotting.panels import (
    BLUE,
    add_color_bar,
    create_figure,
    flatten,
    hide,
    omitted,
    shorten,
    to_image,
    trim_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CONCEPTS = 12  # in one figure
MAX_OVERLAYS = 3  # images per concept
OVERLAY_SIDE = 240  # pixels of an overlay in the figure
BAR_WIDTH = 0.5  # inches


def render_concepts(result: Concepts) -> Iterator[tuple[str, Image.Image]]:
    """Yield a sheet of the patches of each concept, its overlays, and the figure."""
    for concept, patches in enumerate(result.patches):
        sheet = tile(patches, 4, margin=4, background=(255, 255, 255))
        yield f"concept_{concept}_patches.png", Image.fromarray(sheet)
        for n in _top_images(result, concept):
            yield f"concept_{concept}_heatmap_{n:04d}.png", _overlay(result, concept, n, SEQUENTIAL)
    yield "concepts.png", to_image(draw_concepts(result))


def draw_concepts(
    result: Concepts,
    *,
    figsize: tuple[float, float] | None = None,
    cmap: str | None = None,
    alpha: float | None = None,
) -> Figure:
    """Draw a row per concept, at most twelve: importance, patches, and overlays on the images with most of it."""
    rows, columns = min(len(result.bank), MAX_CONCEPTS), result.patches.shape[1]
    overlays = min(MAX_OVERLAYS, len(result.evaluated_indices))
    widths = [1.5] + [1.0] * columns + [1.3] * overlays
    number = "" if result.name == f"class {result.target}" else f", class {result.target},"
    title = f"Concepts of {result.name}{number} at {shorten(result.layer)} ({result.model.name})"
    title += omitted(rows, len(result.bank), "concepts")
    figure = create_figure(1.15 * sum(widths) + BAR_WIDTH, 1.35 * rows + 0.4, title, figsize)
    panels = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths).tolist()
    for concept, (first, *others) in enumerate(panels):
        hide(others)
        _draw_importance(first, result, concept)
        for axes, patch in zip(others[:columns], result.patches[concept], strict=True):
            axes.imshow(patch)
        for axes, n in zip(others[columns:], _top_images(result, concept), strict=False):
            axes.imshow(_overlay(result, concept, n, cmap or SEQUENTIAL, alpha, OVERLAY_SIDE))
    panels[0][1].set_title("crops with the highest activations", fontsize=9, loc="left")
    if overlays:
        panels[0][1 + columns].set_title("heatmaps on whole images", fontsize=9, loc="left")
        bar_scale = ColorScale(1, colormap=cmap or SEQUENTIAL)
        add_color_bar(flatten(panels), bar_scale, "coefficient", ticks=("0", "max"))
    if figsize is None:
        trim_rows(figure, panels)
    return figure


def _draw_importance(axes: Axes, result: Concepts, concept: int) -> None:
    """Draw the importance of a concept as a bar, with the numbers above it."""
    axes.barh([0], [result.importance[concept]], color=BLUE, height=0.3)
    axes.set_xlim(0, max(float(result.importance.max()), 1e-12))
    axes.set_ylim(-0.6, 1.4)
    axes.set_axis_off()
    effect, maximum = result.ablation_effects[concept], float(result.heatmaps[:, concept].max())
    lines = (f"concept {concept}", f"importance {result.importance[concept]:.2f}", f"logit {effect:+.2f}")
    axes.text(0, 0.3, "\n".join((*lines, f"heatmap max {maximum:.3g}")), fontsize=8, va="bottom")


def _top_images(result: Concepts, concept: int) -> list[int]:
    """List the evaluated images, at most three, with the highest positive maxima of a concept."""
    maxima = result.heatmaps[:, concept].max((1, 2))
    return [int(n) for n in np.argsort(-maxima, kind="stable")[:MAX_OVERLAYS] if maxima[n] > 0]


def _overlay(
    result: Concepts, concept: int, n: int, colormap: str, alpha: float | None = None, longest: int | None = None
) -> Image.Image:
    """Blend an evaluated image with a concept's heatmap, relative to the concept's maximum over all images."""
    geometry = result.geometry[n] if longest is None else result.geometry[n].scaled_within(longest, longest)
    image = resize_to(result.original(int(result.evaluated_indices[n])), geometry.image_size)
    heatmap = geometry.to_original(torch.from_numpy(result.heatmaps[n, concept])).numpy()
    scale = ColorScale(float(result.heatmaps[:, concept].max()), colormap=colormap)
    return scale.overlay(image, heatmap, alpha)
