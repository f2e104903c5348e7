"""Which method, at which layer? Methods side by side on your network and pictures, with their proof and their price."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from convscope.attribution.api import compute_heatmaps, resolve_method
from convscope.attribution.registry import get_method as find_method
from convscope.attribution.result import Heatmaps
from convscope.engine.batching import MEMORY, Progress
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.evaluation.api import evaluate
from convscope.evaluation.registry import find as find_metric
from convscope.evaluation.result import Evaluation
from convscope.feature_maps import predict
from convscope.images.loading import DEFAULT_MAX_PIXELS, Failure
from convscope.results import Result

METHODS = ("grad-cam", "grad-cam++", "hirescam", "layer-cam", "eigen-cam", "centred", "random")


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """Cells, one method at one layer each: `heatmaps` and `evaluations` of each, and `seconds` (cells,) a picture.

    A cell that the network does not allow is missing here, and named in `failed` with the reason.
    """

    heatmaps: tuple[Heatmaps, ...] = field(repr=False)
    evaluations: tuple[Evaluation, ...] = field(repr=False)
    seconds: np.ndarray
    fit: str

    @property
    def metrics(self) -> list[str]:
        return self.evaluations[0].metrics

    def rows(self) -> list[dict[str, Any]]:
        """One row a cell: method, layer, milliseconds a picture, and of each metric mean and 95 % interval."""
        found = []
        for heatmap, scores, seconds in zip(self.heatmaps, self.evaluations, self.seconds, strict=True):
            row: dict[str, Any] = {"method": heatmap.method, "layer": heatmap.layer, "ms": 1000 * float(seconds)}
            for metric in self.metrics:
                low, high = scores.interval(metric)
                row |= {metric: scores.mean(metric), f"{metric}_low": low, f"{metric}_high": high}
            found.append(row)
        return found

    def best(self, metric: str) -> dict[str, Any]:
        """The row that does best by a metric."""
        sign = 1 if find_metric(metric).better == "higher" else -1
        return max(self.rows(), key=lambda row: sign * row[metric])

    def arrays(self) -> dict[str, np.ndarray]:
        """The seconds, and under "method/layer/..." what each cell found."""
        arrays = {"seconds": self.seconds}
        for heatmap, scores in zip(self.heatmaps, self.evaluations, strict=True):
            for part in (heatmap.arrays(), scores.arrays()):
                arrays |= {f"{heatmap.method}/{heatmap.layer}/{name}": array for name, array in part.items()}
        return arrays

    def texts(self) -> dict[str, str]:
        rows = self.rows()
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return {"table.csv": table.getvalue(), "table.json": json.dumps(rows, indent=1) + "\n"}

    def parameters(self) -> dict[str, Any]:
        cells = [
            {"method": heatmap.method, "layer": heatmap.layer, "why": heatmap.layer_reason} for heatmap in self.heatmaps
        ]
        first = self.heatmaps[0]
        shown = {"pictures": first.image_names, "targets": first.targets.tolist(), "classes": first.names}
        settings = {"heatmaps": dict(first.settings), "metrics": dict(self.evaluations[0].settings)}
        return {"cells": cells, "metrics": self.metrics, "fit": self.fit, **shown, "settings": settings}


def compare(
    model: Model,
    images: Any,
    targets: Any = None,
    *,
    methods: Sequence[str] = METHODS,
    layers: Sequence[str] | None = None,
    metrics: Sequence[str] = ("deletion", "insertion"),
    masks: Any = None,
    fit: str = "squash",
    against: Any = None,
    smooth: str | None = None,
    scale: float | Sequence[float] = 1,
    fuse: str = "mean",
    seed: int = 0,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
) -> Comparison:
    """Every method at every layer, on the same pictures: maps, faithfulness, time.

    Each cell is made by itself, so that its time is its own; methods that look at the input are made once. Parameters
    as of `heatmaps` and `evaluate`; `methods` and `layers` are names, no layers: the automatic choice. "random" and
    "centred" know nothing of the network: what a method does not beat them by is not evidence.

    Raises ConvscopeError for anything unknown, before work starts, and when no cell is possible.
    """
    cells = []
    for method in methods:
        at_input = find_method(method).at_input
        for layer in [None] if at_input or not layers else layers:
            cells.append(resolve_method(model, method, layer, fuse, {}))
    if not cells:
        raise ConvscopeError("there are no methods to compare")
    for metric in metrics:
        find_metric(metric)
    predict(model, images, 1, fit=fit, memory=memory, max_pixels=max_pixels)  # what a first pass costs is nobody's time
    make = partial(
        compute_heatmaps,
        model,
        fit=fit,
        against=against,
        smooth=smooth,
        scale=scale,
        seed=seed,
        memory=memory,
        max_pixels=max_pixels,
    )
    heatmap: list[Heatmaps] = []
    scores: list[Evaluation] = []
    seconds: list[float] = []
    refused: list[Failure] = []
    for done, cell in enumerate(cells):
        if progress is not None:
            progress(done, len(cells))
        try:
            start = time.perf_counter()
            (maps,) = make(images, targets, [cell])
            taken = time.perf_counter() - start
        except ConvscopeError as error:
            refused.append(Failure(f"{cell.name} at {cell.layer_name}", str(error)))
            continue
        heatmap.append(maps)
        seconds.append(taken / len(maps.image_names))
        scores.append(
            evaluate(model, images, maps, metrics, masks=masks, seed=seed, memory=memory, max_pixels=max_pixels)
        )
    if progress is not None:
        progress(len(cells), len(cells))
    if not heatmap:
        raise ConvscopeError("; ".join(map(str, refused)))
    said = [
        f"{maps.method} at {maps.layer}: {note}"
        for maps, own in zip(heatmap, scores, strict=True)
        for note in own.notes
    ]
    return Comparison(
        model,
        heatmaps=tuple(heatmap),
        evaluations=tuple(scores),
        seconds=np.array(seconds),
        fit=fit,
        notes=tuple(dict.fromkeys((*heatmap[0].notes, *said))),
        failed=(*refused, *heatmap[0].failed),
    )
