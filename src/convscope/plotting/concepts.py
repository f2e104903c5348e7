"""Figures and images of concepts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from convscope.decomposition.result import Concepts
from convscope.images.colormap import blend
from convscope.plotting.grids import tile
from convscope.plotting.panels import BLUE, hide, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CONCEPTS = 12  # in one figure
MAX_OVERLAYS = 3  # images per concept
OVERLAY_SIDE = 240  # pixels of an overlay in the figure


def render_concepts(result: Concepts) -> Iterator[tuple[str, Image.Image]]:
    """Yield a sheet of the patches of each concept, its overlays, and the figure."""
    for concept, patches in enumerate(result.patches):
        sheet = tile(patches, 4, margin=4, background=(255, 255, 255))
        yield f"concept_{concept}_patches.png", Image.fromarray(sheet)
        for n in _top_images(result, concept):
            yield f"concept_{concept}_heatmap_{n:04d}.png", _overlay(result, concept, n)
    yield "concepts.png", to_image(draw_concepts(result))


def draw_concepts(result: Concepts) -> Figure:
    """Draw a row per concept, at most twelve: importance, patches, and overlays on the images with most of it."""
    from matplotlib.figure import Figure

    rows, columns = min(len(result.bank), MAX_CONCEPTS), result.patches.shape[1]
    overlays = min(MAX_OVERLAYS, len(result.evaluated_indices))
    widths = [1.35] + [1.0] * columns + [1.3] * overlays
    figure = Figure(figsize=(1.1 * sum(widths), 1.3 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths).tolist()
    for concept, (first, *others) in enumerate(panels):
        hide(others)
        _draw_importance(first, result, concept)
        for axes, patch in zip(others[:columns], result.patches[concept], strict=True):
            axes.imshow(patch)
        for axes, n in zip(others[columns:], _top_images(result, concept), strict=False):
            overlay = _overlay(result, concept, n)
            overlay.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
            axes.imshow(overlay)
    limit = f", {rows} of {len(result.bank)} concepts" if rows < len(result.bank) else ""
    title = f"{result.name} at {result.layer}{limit}: crops with the highest activations, and heatmaps on whole images"
    figure.suptitle(title, fontsize=9)
    return figure


def _draw_importance(axes: Axes, result: Concepts, concept: int) -> None:
    """Draw the importance of a concept as a bar, with the numbers above it."""
    axes.barh([0], [result.importance[concept]], color=BLUE, height=0.3)
    axes.set_xlim(0, max(float(result.importance.max()), 1e-12))
    axes.set_ylim(-0.6, 1.2)
    axes.set_axis_off()
    effect = result.ablation_effects[concept]
    label = f"concept {concept}\nimportance {result.importance[concept]:.2f}\nlogit {effect:+.2f}"
    axes.text(0, 0.3, label, fontsize=8, va="bottom")


def _top_images(result: Concepts, concept: int) -> list[int]:
    """List the evaluated images, at most three, with the highest positive maxima of a concept."""
    maxima = result.heatmaps[:, concept].max((1, 2))
    return [int(n) for n in np.argsort(-maxima, kind="stable")[:MAX_OVERLAYS] if maxima[n] > 0]


def _overlay(result: Concepts, concept: int, n: int) -> Image.Image:
    """Blend an evaluated image with a concept's heatmap, relative to the concept's maximum over all images."""
    heatmap = result.geometry[n].to_original(torch.from_numpy(result.heatmaps[n, concept])).numpy()
    maximum = float(result.heatmaps[:, concept].max())
    return blend(result.original(int(result.evaluated_indices[n])), heatmap / max(maximum, 1e-12), 0.4, "jet")
