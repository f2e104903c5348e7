"""The result of `convscope.patterns`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from convscope.engine.model import LOGITS
from convscope.errors import ConvscopeError
from convscope.figures import plotting_function
from convscope.formatting import count_of
from convscope.images.animation import check_format, write_animation
from convscope.result_items import IndexedResult, ItemKey
from convscope.results import atomic_write, format_csv, local_folder

CAPTION_HEIGHT = 18  # pixels below each pattern of the sprite sheet


def sheet_columns(count: int) -> int:
    """Return the number of columns of an approximately square sprite sheet."""
    return math.ceil(math.sqrt(count))


@dataclass(frozen=True, eq=False, repr=False)
class Patterns(IndexedResult):
    """Patterns of U units, or U images for objectives.

    Attributes
    ----------
    images : ndarray
        uint8 (U, H, W, C).
    units : ndarray
        (U,): channels or classes; for objectives a running number.
    scores : ndarray
        (U,): the unit's mean activation on the finished 8-bit image, for ``"logits"`` its logit, for objectives their
        value; without any transform.
    history : ndarray
        (steps, U): the value before each step, under transforms.
    layer, recipe, seed, steps, step_size, space, views, patience
        The settings.
    noise_scores : ndarray or None
        (U,): the highest score on eight noise images; NaN where an objective compares images.
    reference_scores : ndarray or None
        (U,): the highest score on the reference images, if there are any.
    alpha : ndarray or None
        uint8 (U, H, W): opacity of each pixel, for recipes that compute it.
    frames : ndarray or None
        uint8 (F, U, H, W, C): intermediate images, if requested.
    objectives : tuple of str
        Names of the objectives; empty for units.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> patterns = convscope.patterns(model, "conv_stem", [0, 3], steps=2, size=32)
    >>> patterns.images.shape, patterns.scores.shape, patterns.history.shape
    ((2, 32, 32, 3), (2,), (2, 2))
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("images", "units", "scores", "noise_scores", "reference_scores", "alpha"), 0),
        **{"history": 1, "frames": 1},
    }

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

    def item_names(self) -> Sequence[str]:
        """Return `names`."""
        return self.names

    def _fields_of(self, positions: Sequence[int]) -> dict[str, Any]:
        fields = super()._fields_of(positions)
        return {**fields, "objectives": tuple(self.objectives[i] for i in positions)} if self.objectives else fields

    def _note_names(self) -> Sequence[str]:
        if self.objectives:
            return self.names
        return [f"{'class' if self.layer == LOGITS else 'unit'} {unit}" for unit in self.units]

    def __getitem__(self, key: ItemKey) -> Self:
        return self.select(key)

    @property
    def names(self) -> list[str]:
        """The name of each image: a class, a layer and its unit, or an objective."""
        if self.objectives:
            return list(self.objectives)
        if self.layer == LOGITS:
            return [self.model.class_name(int(unit)) for unit in self.units]
        return [f"{self.layer} {unit}" for unit in self.units]

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        return [int(unit) for unit in self.units] if self.layer == LOGITS and not self.objectives else []

    def _is_one_image(self) -> bool:
        return len(self.images) == 1

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per image: unit, name, score, and the scores of noise and reference images, if any."""
        columns: dict[str, Iterable[Any]] = {"name": self.names, "unit": self.units.tolist()}
        columns["score"] = self.scores.tolist()
        for name, scores in (("noise_score", self.noise_scores), ("reference_score", self.reference_scores)):
            if scores is not None:
                columns[name] = scores.tolist()
        columns["status"] = self.status
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _title(self) -> str:
        height, width = self.images.shape[1:3]
        kind = "objective" if self.objectives else "unit"
        count = count_of(len(self.units), kind)
        return f"{count} of {self.layer}, {self.recipe}, {count_of(self.steps, 'step')}, {height} x {width} pixels"

    @property
    def status(self) -> tuple[str, ...]:
        """What is wrong with each pattern, U strings; "" for those that show what their unit responds to.

        "dead": the unit was never active, so that it has no pattern. "stuck": it was active during the optimisation,
        but not on the finished image. "not above noise": its score is not above the one on images of noise.
        """
        was_active = self.history.any(0) if len(self.history) else np.ones(len(self.scores), bool)
        below_noise = (
            np.zeros(len(self.scores), bool) if self.noise_scores is None else self.scores <= self.noise_scores
        )
        conditions = [(self.scores == 0) & ~was_active, (self.scores == 0) & below_noise, below_noise]
        return tuple(np.select(conditions, ["dead", "stuck", "not above noise"], "").tolist())

    def animate(self, path: str | os.PathLike[str]) -> Path:
        """Write the ascent as an animation: the frames that ``frames=`` of `convscope.patterns` recorded.

        Parameters
        ----------
        path : path
            A file whose suffix is ``.gif``, ``.webp`` or ``.mp4``; MP4 needs ``pip install 'convscope[video]'``.

        Returns
        -------
        pathlib.Path
            The file.

        Raises
        ------
        ConvscopeError
            For another suffix, if no frames were recorded, and if the file cannot be written.

        Examples
        --------
        >>> import convscope
        >>> model = convscope.load("lite0")
        >>> patterns = convscope.patterns(model, "conv_stem", [3, 5], size=32, steps=8, frames=8)
        >>> patterns.animate("ascent.gif").name
        'ascent.gif'
        """
        target = local_folder(path)
        check_format(target.suffix)
        frames = plotting_function("animate", type(self))(self)
        try:
            with atomic_write(target) as file:
                write_animation(file, frames, target.suffix)
        except OSError as error:
            raise ConvscopeError(f"cannot write {target}: {error.strerror or error}") from error
        return target

    def text_files(self) -> dict[str, str]:
        """Return ``units.csv`` (scores and baselines) and ``sprites.json`` (positions in the sprite sheet)."""
        return {"units.csv": self._score_table(), "sprites.json": json.dumps(self._sprite_sheet(), indent=1) + "\n"}

    def _score_table(self) -> str:
        columns: dict[str, Iterable[object]] = {"unit": self.units, "name": self.names, "score": self.scores}
        if self.noise_scores is not None:
            columns["noise_score"] = self.noise_scores
        if self.reference_scores is not None:
            columns["reference_score"] = self.reference_scores
            pairs = zip(self.scores, self.reference_scores, strict=True)
            columns["relative_score"] = [score / best if best > 0 else "" for score, best in pairs]
        return format_csv({**columns, "status": self.status})

    def _sprite_sheet(self) -> dict[str, object]:
        height, width = self.images.shape[1:3]
        columns = sheet_columns(len(self.images))
        offsets = {
            str(unit): [i % columns * width, i // columns * (height + CAPTION_HEIGHT)]
            for i, unit in enumerate(self.units.tolist())
        }
        names = dict(zip(offsets, self.names, strict=True))
        return {"file": "sprites.png", "width": width, "height": height, "left_top": offsets, "names": names}

    def parameters(self) -> dict[str, Any]:
        """Return the settings for the manifest."""
        return {
            **super().parameters(),
            "size": list(self.images.shape[1:3]),
            "units": self.units.tolist(),
            "frames": 0 if self.frames is None else len(self.frames),
        }
