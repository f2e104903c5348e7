"""The result of an evaluation: values, curves, intervals, notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

import numpy as np
import numpy.typing as npt

from convscope.errors import ConvscopeError
from convscope.evaluation.registry import get_metric, metric_name
from convscope.evaluation.statistics import bootstrap
from convscope.formatting import Row, count_of
from convscope.result_items import IndexedResult

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(IndexedResult):
    """Metrics of N x T heatmaps.

    Attributes
    ----------
    values : mapping of str to ndarray
        float32 (N, T) by metric; ``evaluation["deletion"]`` is a shorthand.
    curves : mapping of str to ndarray
        float32 (N, T, steps + 1), for metrics that compute curves.
    chance_level : mapping of str to ndarray
        (N, T): the expected value of a random map, where it is known.
    targets : ndarray
        (N, T) classes, -1 for functions.
    names : list of list of str
        Names of the targets.
    method, layer : str
        Origin of the maps; "given" for arrays.
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = dict.fromkeys(
        ("values", "curves", "chance_level", "targets", "names", "image_names"), 0
    )

    values: Mapping[str, Floats]
    curves: Mapping[str, Floats]
    chance_level: Mapping[str, Floats]
    targets: npt.NDArray[np.int64]
    names: list[list[str]]
    method: str
    layer: str
    fit: str
    image_names: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return list(self.values)

    @overload
    def __getitem__(self, key: str) -> Floats: ...
    @overload
    def __getitem__(self, key: int | slice | list[int]) -> Evaluation: ...
    def __getitem__(self, key: str | int | slice | list[int]) -> Floats | Evaluation:
        if not isinstance(key, str):
            return self.select(key)
        name = metric_name(key)
        if name not in self.values:
            raise ConvscopeError(f"metric {name!r} was not evaluated; there are {', '.join(self.values)}")
        return self.values[name]

    def _ipython_key_completions_(self) -> list[str]:
        return self.metrics

    def mean(self, metric: str) -> float:
        """Return the mean over all images and targets."""
        return float(self[metric].mean(dtype=np.float64))

    def interval(self, metric: str) -> tuple[float, float]:
        """Return the 95 % bootstrap interval of the mean over images; NaN for a single image, which has none.

        An image's targets are resampled together.
        """
        if len(self[metric]) == 1:
            return math.nan, math.nan
        low, high = bootstrap(self[metric].mean(1, dtype=np.float64))
        return float(low), float(high)

    def advantage(self, other: Evaluation, metric: str) -> tuple[float, float, float]:
        """Return how much better the maps are than others of the same images: mean and 95 % bootstrap interval.

        The difference is taken within each image, where both depend on the same network and object, so that it is known
        better than either mean. Positive is better, whether the metric is to be high or low; the interval is NaN for a
        single image.
        """
        sign = 1 if get_metric(metric).better == "higher" else -1
        differences = sign * (self[metric].astype(np.float64) - other[metric]).mean(1)
        if len(differences) == 1:
            return float(differences[0]), math.nan, math.nan
        low, high = bootstrap(differences)
        return float(differences.mean()), float(low), float(high)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per metric: name, mean, interval, direction, chance level, description.

        The chance level is None where it is unknown, and so is the interval of a single image.
        """
        rows = []
        for name in self.values:
            low, high = interval_or_none(self, name)
            metric = get_metric(name)
            rows.append(
                {
                    "metric": name,
                    "mean": self.mean(name),
                    "low": low,
                    "high": high,
                    "better": metric.better,
                    "chance": float(self.chance_level[name].mean()) if name in self.chance_level else None,
                    "description": metric.description,
                }
            )
        return rows

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return values, curves, chance levels and targets."""
        curves = {f"{name}_curve": curve for name, curve in self.curves.items()}
        chance = {f"{name}_chance": values for name, values in self.chance_level.items()}
        return {**self.values, **curves, **chance, "targets": self.targets}

    def parameters(self) -> dict[str, Any]:
        """Return the settings and the table of results, as JSON values."""
        return {
            "metrics": self.metrics,
            "method": self.method,
            "layer": self.layer,
            "fit": self.fit,
            **self.settings,
            "image_names": self.image_names,
            "targets": self.targets.tolist(),
            "classes": self.names,
            "results": self.rows(),
        }

    def _title(self) -> str:
        return f"{self.method} at {self.layer}, {count_of(len(self.image_names), 'image')}"

    def _display_rows(self) -> Sequence[Row]:
        return [
            {
                "metric": row["metric"],
                "mean": row["mean"],
                "95 % interval": format_interval(row["low"], row["high"]),
                "better": row["better"],
                "chance": row["chance"],
            }
            for row in self.rows()
        ]


def interval_or_none(evaluation: Evaluation, metric: str) -> tuple[float, float] | tuple[None, None]:
    """Return `Evaluation.interval`, with None instead of NaN, which JSON does not know."""
    low, high = evaluation.interval(metric)
    return (None, None) if math.isnan(low) else (low, high)


def format_interval(low: float | None, high: float | None) -> str:
    """Format an interval, "0.1 to 0.3"; a dash where there is none (None or NaN)."""
    return "-" if low is None or high is None or math.isnan(low) else f"{low:.3g} to {high:.3g}"


def suspicion_notes(values: Mapping[str, Floats], chance_level: Mapping[str, Floats]) -> list[str]:
    """Return a note for each metric by which the maps are unreliable."""
    notes = []
    for name, metric_values in values.items():
        metric, mean = get_metric(name), float(metric_values.mean())
        chance = float(chance_level[name].mean()) if name in chance_level else None
        if metric.is_suspect(mean, chance):
            notes.append(f"{name} {mean:.2f}: {metric.warning}")
    if {"deletion", "insertion"} <= values.keys() and values["insertion"].mean() <= values["deletion"].mean():
        notes.append("insertion is not above deletion: the relevant pixels matter no more than the others")
    return notes
