"""What `patterns` returns."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from convscope.engine.model import LOGITS
from convscope.results import Result


def sheet_columns(count: int) -> int:
    """Of a sprite sheet that is about square."""
    return math.ceil(math.sqrt(count))


@dataclass(frozen=True, eq=False)
class Patterns(Result):
    """Finished pictures for U units, or U pictures for objectives.

    `images` is uint8 (U, H, W, C); `units` (U,), for objectives the pictures' numbers; `scores` (U,): the unit's mean
    activation (for "logits" the logit), or the objective's value, on the finished 8-bit picture, without any
    augmentation; `history` (steps, U): what was climbed, before each step. `noise` (U,): the best score among eight
    pictures of noise, NaN where the objective compares pictures; `reference` (U,): the best among the natural pictures
    that were given, if any. `alpha` (U, H, W), uint8, is how opaque a pixel is, if the recipe tells; `frames`
    (F, U, H, W, C), uint8, are pictures on the way, if asked for.
    """

    images: np.ndarray
    units: np.ndarray
    scores: np.ndarray
    history: np.ndarray
    layer: str
    recipe: str
    seed: int
    steps: int
    step_size: float
    space: str
    views: int = 1
    patience: int | None = None
    noise_scores: np.ndarray | None = None
    reference_scores: np.ndarray | None = None
    alpha: np.ndarray | None = None
    frames: np.ndarray | None = None
    objectives: tuple[str, ...] = ()
    """The names of what was climbed, where that were not simply the units of a layer."""

    @property
    def names(self) -> list[str]:
        """What each picture shows: a class's name, the layer and the unit's number, or the objective's name."""
        if self.objectives:
            return list(self.objectives)
        if self.layer == LOGITS:
            return [self.model.class_name(int(u)) for u in self.units]
        return [f"{self.layer} {u}" for u in self.units]

    def text_files(self) -> dict[str, str]:
        """`units.csv`: scores beside noise and natural pictures; `sprites.json`: where each is on the sheet."""
        columns: dict[str, Any] = {
            "unit": self.units,
            "name": self.names,
            "score": self.scores,
            "noise_score": self.noise_scores,
        }
        if self.reference_scores is not None:
            columns["reference_score"] = self.reference_scores
            with np.errstate(divide="ignore", invalid="ignore"):
                columns["relative_score"] = self.scores / self.reference_scores
        given = {name: column for name, column in columns.items() if column is not None}
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(given)
        writer.writerows(zip(*given.values(), strict=True))
        height, width = self.images.shape[1:3]
        across = sheet_columns(len(self.images))
        cells = {str(unit): [i % across * width, i // across * height] for i, unit in enumerate(self.units.tolist())}
        sheet = {"file": "sprites.png", "width": width, "height": height, "left and top": cells}
        return {"units.csv": table.getvalue(), "sprites.json": json.dumps(sheet, indent=1) + "\n"}

    def parameters(self) -> dict[str, Any]:
        own = {"size": list(self.images.shape[1:3]), "units": self.units.tolist()}
        return {**super().parameters(), **own, "frames": 0 if self.frames is None else len(self.frames)}
