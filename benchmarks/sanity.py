"""Sanity checks of methods: similarity of maps to those of randomised weights, and of another class."""

from __future__ import annotations

from dataclasses import dataclass

import convscope
from convscope.samples import photographs

METHODS = ("grad-cam", "layer-cam", "eigen-cam", "saliency", "guided-backprop", "deconvnet")


@dataclass(frozen=True)
class Row:
    """Mean rank correlations of a method's maps."""

    method: str
    randomisation: float
    random_logit: float


def run(methods: tuple[str, ...] = METHODS) -> list[Row]:
    """Run on Lite0 and the sample photographs."""
    model, images = convscope.load("lite0"), photographs()
    rows = []
    for method in methods:
        heatmaps = convscope.heatmaps(model, images, method=method)
        evaluation = convscope.evaluate(model, images, heatmaps, ["randomisation", "random-logit"])
        rows.append(Row(method, evaluation.mean("randomisation"), evaluation.mean("random-logit")))
    return rows


def table(rows: list[Row]) -> list[str]:
    """Return the rows as a table in Markdown."""
    return [
        "Lite0, four sample photographs, each method at its default layer: rank correlation of maps with those of the",
        "network with random weights (`randomisation`), and with those of another class (`random-logit`). High values",
        "mean that a map does not depend on what the network has learned, or on the class.",
        "",
        "| method | randomisation | random-logit |",
        "| --- | --- | --- |",
        *(f"| {row.method} | {row.randomisation:.2f} | {row.random_logit:.2f} |" for row in rows),
    ]
