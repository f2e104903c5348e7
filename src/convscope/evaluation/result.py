"""What an evaluation found, as figures, in words and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convscope.errors import ConvscopeError
from convscope.evaluation.registry import find
from convscope.evaluation.statistics import bootstrap
from convscope.results import Result


@dataclass(frozen=True, eq=False)
class Evaluation(Result):
    """What metrics say of N x T heatmaps: `evaluation["deletion"]` is float32 (N, T).

    `values` holds these, `curves` (N, T, steps + 1) where a metric draws any, `chance` (N, T) what a map without
    knowledge would be given, where that is known. `targets` (N, T) are classes, -1 for functions, and `names` theirs.
    `method` and `layer` say where the maps come from, "given" if they came as an array.
    """

    values: Mapping[str, np.ndarray]
    curves: Mapping[str, np.ndarray]
    chance_level: Mapping[str, np.ndarray]
    targets: np.ndarray
    names: list[list[str]]
    method: str
    layer: str
    fit: str
    image_names: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> list[str]:
        return list(self.values)

    def __getitem__(self, metric: str) -> np.ndarray:
        find(metric)
        if metric not in self.values:
            raise ConvscopeError(f"metric {metric!r} was not asked for; there are {', '.join(self.values)}")
        return self.values[metric]

    def mean(self, metric: str) -> float:
        """Over all pictures and targets."""
        return float(self[metric].mean(dtype=np.float64))

    def interval(self, metric: str) -> tuple[float, float]:
        """The 95 % bootstrap interval of the mean over pictures; a picture's targets are drawn together."""
        low, high = bootstrap(self[metric].mean(1, dtype=np.float64))
        return float(low), float(high)

    def rows(self) -> list[dict[str, Any]]:
        """One row a metric: its name, which way is better, mean, interval, chance (None if not known), in words."""
        found = []
        for name in self.values:
            low, high = self.interval(name)
            chance = float(self.chance_level[name].mean()) if name in self.chance_level else None
            row = {"metric": name, "mean": self.mean(name), "low": low, "high": high}
            found.append({**row, "better": find(name).better, "chance": chance, "says": find(name).description})
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        curves = {f"{name}_curve": curve for name, curve in self.curves.items()}
        chance = {f"{name}_chance": values for name, values in self.chance_level.items()}
        return {**self.values, **curves, **chance, "targets": self.targets}

    def parameters(self) -> dict[str, Any]:
        return {
            "metrics": self.metrics,
            "method": self.method,
            "layer": self.layer,
            "fit": self.fit,
            **self.settings,
            "pictures": self.image_names,
            "targets": self.targets.tolist(),
            "classes": self.names,
            "results": self.rows(),
        }

    def __str__(self) -> str:
        heading = ("metric", "mean", "95 % interval", "better", "chance", "what it is")
        lines = [heading]
        for row in self.rows():
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            chance = "" if row["chance"] is None else f"{row['chance']:.3f}"
            lines.append((row["metric"], f"{row['mean']:.3f}", interval, row["better"], chance, row["says"]))
        width = [max(len(line[i]) for line in lines) for i in range(len(heading))]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, width, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, *(f"note: {note}" for note in self.notes)])


def warnings(values: Mapping[str, np.ndarray], chance: Mapping[str, np.ndarray]) -> list[str]:
    """In words: figures that say the maps are not to be trusted."""
    said = []
    for name, found in values.items():
        metric, mean = find(name), float(found.mean())
        by_chance = float(chance[name].mean()) if name in chance else None
        if metric.warns(mean, by_chance):
            said.append(f"{name} {mean:.2f}: {metric.warning}")
    if {"deletion", "insertion"} <= values.keys() and values["insertion"].mean() <= values["deletion"].mean():
        said.append(
            "insertion is not above deletion: the pixels that the map marks do no more for the target than the others"
        )
    return said
