"""`compare`: heatmap methods and layers side by side, with faithfulness and time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from convscope.arguments import check_arguments
from convscope.attribution.api import compute_heatmaps, resolve_method
from convscope.attribution.registry import BASELINES, get_method
from convscope.attribution.result import Heatmaps
from convscope.attribution.runner import MethodSpec
from convscope.attribution.targets import ClassLabels, Targets
from convscope.datasets.image_inputs import open_images
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike, as_layers
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, warns_of_failures
from convscope.evaluation.api import evaluate
from convscope.evaluation.registry import get_metric, metric_name
from convscope.evaluation.result import Evaluation, interval_or_none
from convscope.formatting import Row, count_of
from convscope.images.failures import Failure
from convscope.images.loading import DEFAULT_MAX_PIXELS
from convscope.predictions import predict
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.result_items import IndexedResult, ItemKey
from convscope.results import format_csv
from convscope.sources.coercion import ModelLike, as_model

ARROWS = {"lower": "↓", "higher": "↑"}  # the better direction, in tables
METHODS = ("grad-cam", "grad-cam++", "hirescam", "layer-cam", "eigen-cam", "centred", "random")
FAITHFULNESS = ("deletion", "insertion", "road", "mu-fidelity", "average-drop")  # in which baselines are not good


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(IndexedResult):
    """Heatmaps of several methods and layers, each evaluated.

    A combination of method and layer that the network does not support is left out and named in `failed`.

    Attributes
    ----------
    heatmaps : tuple of Heatmaps
        One per combination.
    evaluations : tuple of Evaluation
        One per combination.
    seconds : ndarray
        (combinations,): seconds per image.
    """

    heatmaps: tuple[Heatmaps, ...]
    evaluations: tuple[Evaluation, ...]
    seconds: npt.NDArray[np.float64]
    fit: str

    def item_names(self) -> Sequence[str]:
        """Return the names of the images."""
        return self.heatmaps[0].image_names

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        return [index for heatmaps in self.heatmaps for index in heatmaps.class_indices()]

    def image_copies(self) -> list[bytes]:
        """Return small copies of the images."""
        return self.heatmaps[0].image_copies()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("heatmaps", "evaluations"):
            state[name] = tuple(replace(part, model=state["model"]) for part in state[name])
        return state

    def _fields_of(self, positions: Sequence[int]) -> dict[str, Any]:
        return {
            "heatmaps": tuple(heatmaps.select(positions) for heatmaps in self.heatmaps),
            "evaluations": tuple(evaluation.select(positions) for evaluation in self.evaluations),
        }

    def __getitem__(self, key: ItemKey) -> Self:
        return self.select(key)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return self.evaluations[0].metrics

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per combination: method, layer, milliseconds per image, mean and 95 % interval per metric."""
        rows = []
        for heatmaps, evaluation, seconds in zip(self.heatmaps, self.evaluations, self.seconds, strict=True):
            row: dict[str, Any] = {"method": heatmaps.method, "layer": heatmaps.layer, "ms": 1000 * float(seconds)}
            for metric in self.metrics:
                low, high = interval_or_none(evaluation, metric)
                row |= {metric: evaluation.mean(metric), f"{metric}_low": low, f"{metric}_high": high}
            rows.append(row)
        return rows

    def advantages(self) -> list[dict[str, Any]]:
        """Return how much better each combination is than each baseline among them, in each metric.

        Returns
        -------
        list of dict
            ``method, layer, baseline, metric``, and ``advantage``: the mean over the images of the difference within an
            image (positive: better than the baseline), with its 95 % interval, ``low`` to ``high`` (None for a single
            image). Where the interval contains 0, these images do not show that the method is better.
        """
        rows = []
        for maps, evaluation in zip(self.heatmaps, self.evaluations, strict=True):
            for baseline, of_baseline in self._baselines(maps.layer).items():
                if maps.method in BASELINES:
                    continue
                for metric in self.metrics:
                    mean, low, high = evaluation.advantage(of_baseline, metric)
                    row = {"method": maps.method, "layer": maps.layer, "baseline": baseline, "metric": metric}
                    interval = {"low": None, "high": None} if math.isnan(low) else {"low": low, "high": high}
                    rows.append(row | {"advantage": mean} | interval)
        return rows

    def _baselines(self, layer: str) -> dict[str, Evaluation]:
        """Return each baseline's evaluation: that at a layer if there is one, otherwise the first."""
        parts = sorted(zip(self.heatmaps, self.evaluations, strict=True), key=lambda part: part[0].layer == layer)
        by_method = {maps.method: evaluation for maps, evaluation in parts}
        return {name: by_method[name] for name in BASELINES if name in by_method}

    def _title(self) -> str:
        return f"{count_of(len(self.heatmaps), 'map')} of {count_of(len(self.heatmaps[0].image_names), 'image')}"

    def _display_rows(self) -> Sequence[Row]:
        return [
            {
                "method": row["method"],
                "layer": row["layer"],
                "ms/image": f"{row['ms']:.0f}",
                **{f"{metric} {ARROWS[get_metric(metric).better]}": row[metric] for metric in self.metrics},
            }
            for row in self.rows()
        ]

    def best(self, metric: str) -> dict[str, Any]:
        """Return the row with the best mean of a metric."""
        sign = 1 if get_metric(metric).better == "higher" else -1
        name = metric_name(metric)
        return max(self.rows(), key=lambda row: sign * row[name])

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the seconds, and the arrays of each combination under "method/layer/..."."""
        arrays: dict[str, npt.NDArray[Any]] = {"seconds": self.seconds}
        for heatmaps, evaluation in zip(self.heatmaps, self.evaluations, strict=True):
            for part in (heatmaps.arrays(), evaluation.arrays()):
                arrays |= {f"{heatmaps.method}/{heatmaps.layer}/{name}": array for name, array in part.items()}
        return arrays

    def text_files(self) -> dict[str, str]:
        """Return ``table.csv`` and ``table.json``, and ``advantages.csv`` if there are baselines to compare with."""
        rows, advantages = self.rows(), self.advantages()
        files = {"table.csv": _csv(rows), "table.json": json.dumps(rows, indent=1) + "\n"}
        return files | ({"advantages.csv": _csv(advantages)} if advantages else {})

    def parameters(self) -> dict[str, Any]:
        """Return the settings, as JSON values."""
        first = self.heatmaps[0]
        return {
            "combinations": [
                {"method": maps.method, "layer": maps.layer, "layer_reason": maps.layer_reason}
                for maps in self.heatmaps
            ],
            "metrics": self.metrics,
            "fit": self.fit,
            "image_names": first.image_names,
            "targets": first.targets.tolist(),
            "classes": first.names,
            "parts": [
                {"heatmaps": maps.parameters(), "evaluation": evaluation.parameters()}
                for maps, evaluation in zip(self.heatmaps, self.evaluations, strict=True)
            ],
            "settings": {"heatmaps": dict(first.settings), "metrics": dict(self.evaluations[0].settings)},
        }


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    return format_csv({name: [row[name] for row in rows] for name in rows[0]})


def _baseline_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a note for each method and baseline that the images do not tell apart in faithfulness."""
    open_questions: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["metric"] in FAITHFULNESS and row["low"] is not None and row["low"] <= 0:
            interval = f"{row['metric']} {row['low']:+.3f} to {row['high']:+.3f}"
            open_questions.setdefault((row["method"], row["layer"], row["baseline"]), []).append(interval)
    return [
        f"{method} at {layer}: not shown to be better than {baseline!r}: 95 % interval of its advantage in "
        + ", ".join(metrics)
        for (method, layer, baseline), metrics in open_questions.items()
    ]


@warns_of_failures
@check_arguments
def compare(
    model: ModelLike,
    images: object,
    targets: Targets | None = None,
    *,
    methods: Sequence[str] = METHODS,
    layers: LayerLike | Sequence[LayerLike] | None = None,
    metrics: Sequence[str] = ("deletion", "insertion"),
    masks: object = None,
    fit: str = "squash",
    against: ClassLabels | None = None,
    smooth: str | None = None,
    scale: float | Sequence[float] = 1,
    fuse: str = "mean",
    seed: int = 0,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Comparison:
    """Compare heatmap methods and layers on the same images: maps, faithfulness, time.

    Each combination is computed separately, so that its time can be measured; methods at the input run once.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images, targets
        As in `convscope.heatmaps`.
    methods : sequence of str
        Names of methods, which `convscope.methods` lists. "random" and "centred" do not depend on the network: a method
        must beat them.
    layers : str, Layer, nn.Module or sequence of these, optional
        As in `convscope.activations`; chosen automatically if omitted.
    metrics, masks
        As in `convscope.evaluate`.
    fit, against, smooth, scale, fuse, seed, memory, max_pixels
        As in `convscope.heatmaps`.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        with the number of combinations done and their total, with fractions.

    Returns
    -------
    Comparison
        One row per combination of method and layer.

    Raises
    ------
    ConvscopeError
        For unknown methods, layers or metrics, before any work is done; later if no combination is possible.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> image = convscope.samples.photographs()[3]
    >>> comparison = convscope.compare(model, image, methods=["grad-cam", "random"], metrics=["deletion"])
    >>> comparison.best("deletion")["method"]
    'grad-cam'
    """
    model = as_model(model, images)
    images = open_images(images)
    combinations = _combinations(model, methods, layers, fuse)
    for metric in metrics:
        get_metric(metric)
    total = len(combinations)
    results: list[Heatmaps] = []
    evaluations: list[Evaluation] = []
    seconds: list[float] = []
    failures: list[Failure] = []
    with progress_bar(progress, "compare") as report:
        predict(model, images, 1, fit=fit, memory=memory, max_pixels=max_pixels)  # warm-up, so that it is not timed
        for number, spec in enumerate(combinations):
            try:
                start = time.perf_counter()
                (maps,) = compute_heatmaps(
                    model, images, targets, [spec], fit=fit, against=against, smooth=smooth, scale=scale, seed=seed,
                    memory=memory, max_pixels=max_pixels, progress=partial(_report_half, report, number, total),
                )  # fmt: skip
                duration = time.perf_counter() - start
            except ConvscopeError as error:
                failures.append(Failure(f"{spec.name} at {spec.layer_name}", str(error)))
                continue
            results.append(replace(maps, image_source=results[0].image_source) if results else maps)
            seconds.append(duration / len(maps.image_names))
            report_evaluation = partial(_report_half, report, number + 0.5, total)
            evaluations.append(
                evaluate(
                    model,
                    images,
                    maps,
                    metrics,
                    masks=masks,
                    seed=seed,
                    memory=memory,
                    max_pixels=max_pixels,
                    progress=report_evaluation,
                )
            )
        report(total, total)
    if not results:
        raise ConvscopeError("; ".join(map(str, failures)))
    notes = [
        f"{maps.method} at {maps.layer}: {note}"
        for maps, evaluation in zip(results, evaluations, strict=True)
        for note in evaluation.notes
    ]
    comparison = Comparison(
        model,
        heatmaps=tuple(results),
        evaluations=tuple(evaluations),
        seconds=np.array(seconds),
        fit=fit,
        failed=(*failures, *results[0].failed),
    )
    notes += _baseline_notes(comparison.advantages())
    return replace(comparison, notes=tuple(dict.fromkeys((*results[0].notes, *notes))))


def _report_half(progress: Progress, start: float, num_combinations: int, done: float, total: int) -> None:
    """Report one half of a combination: the heatmaps or their evaluation."""
    progress(start + 0.5 * done / total, num_combinations)


def _combinations(
    model: Model, methods: Sequence[str], layers: LayerLike | Sequence[LayerLike] | None, fuse: str
) -> list[MethodSpec]:
    """Return every method at every layer; methods at the input once."""
    requested = [] if layers is None else as_layers(layers)
    combinations = []
    for method in methods:
        at_input = get_method(method).at_input
        for layer in [None] if at_input or not requested else requested:
            combinations.append(resolve_method(model, method, layer, fuse, {}))
    if not combinations:
        raise ConvscopeError("there are no methods to compare")
    return combinations
