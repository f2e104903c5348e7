"""Figures and the report of a diagnosis."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import interpolate

from convscope.diagnosis.finding import Finding
from convscope.diagnosis.result import Diagnosis
from convscope.figures import RenderedFile
from convscope.formatting import base_name
from convscope.images.colormap import ColorScale
from convscope.plotting.diagnosis_page import diagnosis_page, quoted
from convscope.plotting.panels import BLUE, DARK, LIGHT_BLUE, create_figure, shorten, show_image, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_FINDINGS = 4  # in the figure
IMAGES_PER_FINDING = 8
MAX_CLASSES = 30  # of the confusion matrix: those that are confused most
FEW_CLASSES = 20  # up to which their names are larger
MAX_MARKED = 12  # classes up to which the numbers are written into the confusion matrix
MIN_COVERAGE = 0.05  # below, the error rate is that of few images
WIDTH, PLOTS_HEIGHT, FINDING_HEIGHT = 12.0, 4.0, 1.75


def render_diagnosis(result: Diagnosis) -> Iterator[tuple[str, RenderedFile]]:
    """Yield the figure, the plots of the report, and the report."""
    yield "diagnosis.png", to_image(draw_diagnosis(result))
    figure = create_figure(WIDTH, PLOTS_HEIGHT, "")
    _draw_overview(figure.subplots(1, 3).tolist(), result)
    yield "overview.png", to_image(figure)
    overlays = {int(image): overlay(result, n) for n, image in enumerate(result.examples)}
    yield "index.html", diagnosis_page(result, overlays)


def draw_diagnosis(result: Diagnosis, *, figsize: tuple[float, float] | None = None) -> Figure:
    """Draw confusion matrix, reliability and risk by coverage; below, the first findings with images."""
    findings = result.findings[:MAX_FINDINGS]
    low, high = result.overview.accuracy_interval
    title = f"{result.model.name} on {shorten(base_name(result.data_name))}: accuracy {result.overview.accuracy:.1%} "
    title += f"({low:.1%} to {high:.1%}), {len(result.findings)} findings"
    figure = create_figure(WIDTH, PLOTS_HEIGHT + FINDING_HEIGHT * len(findings), title, figsize)
    ratios = [PLOTS_HEIGHT] + [FINDING_HEIGHT] * len(findings)
    grid = figure.add_gridspec(1 + len(findings), 1, height_ratios=ratios)
    plots = grid[0].subgridspec(1, 3)
    _draw_overview([figure.add_subplot(plots[0, column]) for column in range(3)], result)
    for row, finding in enumerate(findings, 1):
        _draw_finding(grid[row].subgridspec(1, IMAGES_PER_FINDING + 3), figure, result, finding, row)
    return figure


def overlay(result: Diagnosis, position: int) -> np.ndarray:
    """Return a thumbnail with the positive evidence for the predicted class, uint8 (s, s, 3)."""
    return overlay_evidence(result.thumbnails[position], result.evidence[position])


def overlay_evidence(thumbnail: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Return a thumbnail (s, s, 3), uint8, with the positive part of evidence (h, w)."""
    positive = torch.from_numpy(np.asarray(evidence, np.float32)).clamp(min=0)
    resized = interpolate(positive[None, None], thumbnail.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    return np.asarray(ColorScale(float(resized.max())).overlay(thumbnail, resized))


def _draw_overview(panels: list[Axes], result: Diagnosis) -> None:
    """Fill three panels with the confusion matrix, the reliability curve and the risk by coverage."""
    _draw_confusion(panels[0], result)
    _draw_reliability(panels[1], result)
    _draw_coverage(panels[2], result)


def _draw_confusion(axes: Axes, result: Diagnosis) -> None:
    """Draw the shares of each label's images by prediction, for the classes that are confused most."""
    overview, order = result.overview, result.overview.confusion_order
    matrix = overview.confusion
    positions = order[np.isin(order, most_confused(matrix, MAX_CLASSES))]
    counts = matrix[np.ix_(positions, positions)]
    shares = counts / np.maximum(matrix[positions].sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [shorten(result.model.class_name(int(k)), 16) for k in overview.class_scores.classes[positions]]
    size = 7 if len(names) <= FEW_CLASSES else 5
    axes.set_xticks(range(len(names)), names, fontsize=size, rotation=90)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(names) <= MAX_MARKED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else DARK
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    more = f"; the {len(names)} of {len(order)} classes confused most" if len(names) < len(order) else ""
    axes.set_title(f"confusion matrix{more}", fontsize=9)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("label", fontsize=8)


def most_confused(matrix: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of `count` classes of a confusion matrix (P, P): of the pairs with most errors, then others.

    Both classes of a pair are there, so that the errors can be seen also where each class has few images.
    """
    errors = np.triu(matrix + matrix.T, 1)
    pairs = np.argsort(-errors, axis=None, kind="stable")[: min(count * count, np.count_nonzero(errors))]
    by_pairs = np.stack(np.unravel_index(pairs, matrix.shape), 1).ravel()
    positions = list(dict.fromkeys([*by_pairs.tolist(), *range(len(matrix))]))
    return np.array(positions[:count])


def _draw_reliability(axes: Axes, result: Diagnosis) -> None:
    """Draw the accuracy by confidence, with intervals, against the diagonal."""
    curve = result.overview.reliability
    axes.plot([0, 1], [0, 1], color=DARK, linewidth=0.8, linestyle="--")
    axes.vlines(curve.confidence, curve.interval[:, 0], curve.interval[:, 1], color=LIGHT_BLUE, linewidth=3)
    axes.plot(curve.confidence, curve.accuracy, "o", color=BLUE, markersize=4)
    start = max(0.0, min(float(curve.confidence.min()), float(curve.interval.min())) - 0.05)
    axes.set_xlim(start, 1.02)
    axes.set_ylim(start, 1.02)
    axes.set_title(f"reliability; calibration error {result.overview.calibration_error:.3f}", fontsize=9)
    axes.set_xlabel("confidence of the network", fontsize=8)
    axes.set_ylabel("share that is right (95 % intervals)", fontsize=8)
    _tidy(axes)


def _draw_coverage(axes: Axes, result: Diagnosis) -> None:
    """Draw the error rate when only the most confident images are classified."""
    curve = result.overview.risk_coverage
    is_stable = curve.coverage >= MIN_COVERAGE
    axes.plot(curve.coverage[is_stable], 1 - curve.accuracy[is_stable], color=BLUE)
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, None)
    axes.set_title("errors if unsure images are left out", fontsize=9)
    axes.set_xlabel("share of images that are classified", fontsize=8)
    axes.set_ylabel("error rate on these", fontsize=8)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _draw_finding(grid: object, figure: Figure, result: Diagnosis, finding: Finding, number: int) -> None:
    """Draw a row: the sentence, and the first images with their evidence."""
    text = figure.add_subplot(grid[0, :3])  # type: ignore[index]
    text.set_axis_off()
    sentence = "\n".join(textwrap.wrap(quoted(finding.summary), 52)[:8])
    text.text(0, 1, f"{number}. {finding.kind}", fontsize=9, fontweight="bold", va="top", transform=text.transAxes)
    text.text(0, 0.85, sentence, fontsize=8, va="top", transform=text.transAxes)
    for column in range(IMAGES_PER_FINDING):
        axes = figure.add_subplot(grid[0, 3 + column])  # type: ignore[index]
        axes.set_axis_off()
        if column < len(finding.images):
            image = finding.images[column]
            position = int(np.searchsorted(result.examples, image))
            show_image(axes, overlay(result, position))
            axes.set_title(caption(result, image, "\n"), fontsize=7)


def caption(result: Diagnosis, image: int, separator: str) -> str:
    """Return label and prediction of an image: "cat > dog"."""
    label = int(result.labels[image])
    name = shorten(result.model.class_name(label), 18) if label >= 0 else "no label"
    return f"{name}{separator}> {shorten(result.model.class_name(int(result.predictions[image])), 18)}"
