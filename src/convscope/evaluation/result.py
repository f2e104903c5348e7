"""The result of an evaluation: values, curves, intervals, notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from convscope.errors import ConvscopeError
from convscope.evaluation.registry import get_metric, metric_name
from convscope.evaluation.statistics import bootstrap
from convscope.results import Result

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Evaluation(Result):
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

    values: Mapping[str, Floats]
    curves: Mapping[str, Floats]
    chance_level: Mapping[str, Floats]
    targets: npt.NDArray[np.int64]
    names: list[list[str]]
    method: str
    layer: str
    fit: str
    image_names: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return list(self.values)

    def __getitem__(self, metric: str) -> Floats:
        name = metric_name(metric)
        if name not in self.values:
            raise ConvscopeError(f"metric {name!r} was not evaluated; there are {', '.join(self.values)}")
        return self.values[name]

    def mean(self, metric: str) -> float:
        """Return the mean over all images and targets."""
        return float(self[metric].mean(dtype=np.float64))

    def interval(self, metric: str) -> tuple[float, float]:
        """Return the 95 % bootstrap interval of the mean over images; an image's targets are resampled together."""
        low, high = bootstrap(self[metric].mean(1, dtype=np.float64))
        return float(low), float(high)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per metric: name, mean, interval, direction, chance level (None if unknown), description."""
        rows = []
        for name in self.values:
            low, high = self.interval(name)
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

    def __str__(self) -> str:
        headings = ("metric", "mean", "95 % interval", "better", "chance", "description")
        lines = [headings]
        for row in self.rows():
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            chance = "" if row["chance"] is None else f"{row['chance']:.3f}"
            lines.append((row["metric"], f"{row['mean']:.3f}", interval, row["better"], chance, row["description"]))
        widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, *(f"note: {note}" for note in self.notes)])


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
