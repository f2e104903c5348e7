"""Every kind of figure: titles, labels of axes, color bars, and texts that neither overlap nor leave the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import convscope
from convscope import figures
from convscope.results import Result
from tests.figures.gallery import Gallery, draw_all, sheets
from tests.plotting.test_figures import color_bars, render, visible_texts


class Drawn(NamedTuple):
    """A result, its figure, and the options that it was drawn with."""

    result: Any
    figure: Figure
    options: dict[str, Any]


WITH_COLOR_BARS = (
    "activations",
    "heatmap",
    "signed",
    "gradient",
    "comparison",
    "concepts",
    "locations",
    "patching by pos",
)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawn]:
    """Draw all figures for a small network with long names and photographs of several sizes."""
    torch.manual_seed(0)  # weights with positive evidence for both targets
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )
    names = ["American Staffordshire terrier", "cat", "soft-coated wheaten terrier", "black-and-tan coonhound"]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((60, 80), (90, 40), (64, 64), (50, 120))]
    g = Gallery(
        model=convscope.load(net.eval(), preprocessing={"size": 48}, classes=names),
        images=images,
        first="1",
        last="3",
        target=0,
        other=2,
        steps=2,
        folder=tmp_path_factory.mktemp("gallery"),
    )
    return {name: Drawn(result, result.figure(**options), options) for name, result, options in draw_all(g)}


def test_all_kinds_of_results_are_drawn(gallery: dict[str, Drawn]) -> None:
    kinds = {kind.__name__ for result, *_ in gallery.values() for kind in type(result).__mro__}
    assert set(figures.PLOTTING_MODULES) <= kinds


def test_texts_are_legible(gallery: dict[str, Drawn]) -> None:
    for name, (_, figure, _) in gallery.items():
        try:
            pixels = render(figure)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        assert pixels.shape[:2] == figure.canvas.get_width_height()[::-1], name
        assert pixels.min() < 128 < pixels.max(), name  # dark texts on a light ground


def test_figures_say_what_they_are(gallery: dict[str, Drawn]) -> None:
    for name, (_, figure, _) in gallery.items():
        bands = [band.get_suptitle() for band in getattr(figure, "subfigs", [])]
        titles = [axes.get_title(loc=where) for axes in figure.axes for where in ("left", "center")]
        assert any([figure.get_suptitle(), *bands, *titles]), name
        assert bool(color_bars(figure)) == (name.startswith(WITH_COLOR_BARS)), name
        for bar in color_bars(figure):
            assert bar.get_ylabel(), name
            assert len([label for label in bar.get_yticklabels() if label.get_text()]) >= 2, name


def test_classes_and_units_are_named(gallery: dict[str, Drawn]) -> None:
    def texts(name: str) -> str:
        figure = gallery[name].figure
        return " ".join(" ".join([figure.get_suptitle(), *(text.get_text() for text in visible_texts(figure))]).split())

    terrier = "American Staffordshire terrier"
    for name in ("heatmaps", "patterns of classes", "story", "comparison", "concepts", "unit of the logits"):
        assert terrier in texts(name), name
    assert "class 0, logit" in texts("heatmaps")
    assert all(f"unit {u} score" in texts("patterns of units") for u in range(4))
    assert "unit 3" in texts("story")
    assert "logits, unit 0 (American" in texts("unit of the logits")
    assert "colorfulness" in texts("story")
    assert "colorfulness" not in texts("story of a gray network")
    assert "dead" in texts("marked patterns") or "stuck" in texts("marked patterns")
    assert "no positive evidence" in texts("map without positive evidence")


def test_figures_are_drawn_at_a_given_size(gallery: dict[str, Drawn]) -> None:
    for result in {type(result): result for result, *_ in gallery.values()}.values():
        assert result.figure(figsize=(9, 7)).get_size_inches().tolist() == [9, 7]


def test_sheets_have_captions(gallery: dict[str, Drawn]) -> None:
    for name, image in sheets({name: result for name, (result, *_) in gallery.items()}).items():
        pixels = np.asarray(image)
        assert (pixels[-18:].min(axis=2) < 100).any(), name
        assert (pixels[-18:].min(axis=2) > 240).mean() > 0.5, name


def test_opened_results_are_drawn_as_before(gallery: dict[str, Drawn], tmp_path: Path) -> None:
    """`render` also checks that the texts of each opened figure are legible."""
    for name, (result, before, options) in gallery.items():
        if isinstance(result, Result):
            opened = convscope.open(result.save(tmp_path / name))
            after = opened.figure(**options)
            before.draw_without_rendering()
            assert render(after).shape[:2] == before.canvas.get_width_height()[::-1], name
            texts = [[text.get_text() for text in visible_texts(figure)] for figure in (before, after)]
            assert texts[0] == texts[1], name
