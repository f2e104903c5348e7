"""The result of `convscope.explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from convscope.dictionaries.attachment import SUFFIX
from convscope.explanations.regions import position_name
from convscope.formatting import Row, base_name, count_of
from convscope.images.copies import jpeg_copies
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.result_items import IndexedResult, ItemKey
from convscope.results import format_csv

NUMBERS = ("no", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(IndexedResult):
    """The units that carry the prediction for each of N images, at most F for each.

    ``explanation[0]``, and each item of an iteration, is the explanation for one image.

    Attributes
    ----------
    units : ndarray of shape (N, F)
        Numbers of the units, those with the largest effects first; -1 where there are fewer.
    effects : ndarray of shape (N, F), float32
        How far the logit falls when a unit is removed in addition to those before it. They sum to the fall when all are
        removed together. NaN where there is no unit.
    single_effects : ndarray of shape (N, F), float32
        How far the logit falls when the unit alone is removed.
    maps : ndarray of shape (N, F, h, w), float32
        What each position of a unit contributes, to first order; no positions (N, F, 0, 0) at layers without them.
    boxes : ndarray of shape (N, F, 4), float32
        Left, top, right and bottom edge of the region of a unit's contribution, in pixels of the image; NaN for none.
    targets : ndarray of shape (N,)
        Class indices; -1 for functions.
    logits : ndarray of shape (N,), float32
        The targets' logits.
    base_logits : ndarray of shape (N,), float32
        The logits with all units of the layer removed.
    removed_logits : ndarray of shape (N,), float32
        The logits with the F units removed together.
    removed_classes : ndarray of shape (N,)
        The predicted classes then; -1 for networks that do not classify.
    random_logits : ndarray of shape (N, R), float32
        The logits with as many other units removed, whose removal changes the layer about as much: R draws.
    layer : str
    layer_reason : str
        Why this layer was chosen.
    num_units : int
        Units of the layer.
    how : {"zero", "mean"}
        What a removed unit is replaced by.
    share : float
        The share of the logit that was asked for.
    target_names : tuple of str
    unit_names : tuple of tuple of str
        Names of the units, N tuples of F; empty for units without a name.
    image_names : tuple of str
    geometry : tuple of Geometry
        Where the network's input lies in each image.
    image_source : ImageBatchLoader
    image_indices : tuple of int
        Positions of the N images in `image_source`.
    fit : {"squash", "crop", "pad"}
        How images were brought to the network's size.
    seed : int
    patches : ndarray of shape (N, F, P, S, S, 3), uint8, optional
        Patches of a data set that excite the units most.
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = dict.fromkeys(
        (
            "units", "effects", "single_effects", "maps", "boxes", "targets", "logits", "base_logits", "removed_logits",
            "removed_classes", "random_logits", "target_names", "unit_names", "image_names", "geometry",
            "image_indices", "patches",
        ),
        0,
    )  # fmt: skip

    units: np.ndarray
    effects: np.ndarray
    single_effects: np.ndarray
    maps: np.ndarray
    boxes: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    base_logits: np.ndarray
    removed_logits: np.ndarray
    removed_classes: np.ndarray
    random_logits: np.ndarray
    layer: str
    layer_reason: str
    num_units: int
    how: str
    share: float
    target_names: tuple[str, ...]
    unit_names: tuple[tuple[str, ...], ...]
    image_names: tuple[str, ...]
    geometry: tuple[Geometry, ...]
    image_source: ImageBatchLoader
    image_indices: tuple[int, ...]
    fit: str
    seed: int
    patches: np.ndarray | None = None

    def __getitem__(self, key: ItemKey) -> Self:
        return self.select(key)

    @property
    def counts(self) -> np.ndarray:
        """The number of units (N,) for each image."""
        counts: np.ndarray = (self.units >= 0).sum(1)
        return counts

    @property
    def totals(self) -> np.ndarray:
        """What the whole layer adds to the logits (N,): the logit minus that with all units removed."""
        totals: np.ndarray = self.logits - self.base_logits
        return totals

    @property
    def shares(self) -> np.ndarray:
        """The effects (N, F) as fractions of `totals`; NaN where the layer does not raise the logit."""
        shares: np.ndarray = self.effects / np.where(self.totals > 0, self.totals, np.nan)[:, None]
        return shares

    @property
    def joint_shares(self) -> np.ndarray:
        """The share (N,) of the units together; NaN where the layer does not raise the logit."""
        shares: np.ndarray = (self.logits - self.removed_logits) / np.where(self.totals > 0, self.totals, np.nan)
        return shares

    @property
    def positions(self) -> list[list[str]]:
        """Where each unit's contribution lies: "upper left", "all over the image"; empty for no position."""
        return [
            [position_name(box, geometry.image_size) for box in boxes]
            for boxes, geometry in zip(self.boxes, self.geometry, strict=True)
        ]

    @property
    def sentences(self) -> list[str]:
        """The explanation in words, for each image."""
        return [self._sentence(n) for n in range(len(self))]

    @property
    def noun(self) -> str:
        """What a unit is called: "feature" in the layer of a dictionary, else "unit"."""
        return "feature" if self.layer.endswith(SUFFIX) else "unit"

    def unit_label(self, n: int, f: int) -> str:
        """Return a unit's number and name: ``unit 17 "striped fur"``."""
        name = self.unit_names[n][f]
        return f"{self.noun} {self.units[n, f]}" + (f' "{name}"' if name else "")

    def _sentence(self, n: int) -> str:
        target, logit, count = self.target_names[n], self.logits[n], int(self.counts[n])
        start = f"{self.model.name} gives {target} the logit {logit:.2f}."
        if count == 0:
            return f"{start} No {self.noun} of {self.layer} raises it."
        verb = "carries" if count == 1 else "carry"
        number = NUMBERS[count] if count < len(NUMBERS) else f"{count}"
        subject = f"{number} of {count_of(self.num_units, self.noun)} of {self.layer}"
        fall = f"{logit - self.removed_logits[n]:.2f}"
        amount = (
            f"{verb} {fall} of it, {self.joint_shares[n]:.0%} of what the layer adds"
            if self.totals[n] > 0
            else f"{verb} {fall} of it, though the layer as a whole does not raise it"
        )
        parts = ", ".join(self._describe(n, f) for f in range(count))
        return f"{start} {subject} {amount}: {parts}. {self._proof(n)}"

    def _describe(self, n: int, f: int) -> str:
        facts = [f"{self.shares[n, f]:.0%}" if self.totals[n] > 0 else f"{self.effects[n, f]:.2f}"]
        facts += [position] if (position := self.positions[n][f]) else []
        return f"{self.unit_label(n, f)} ({', '.join(facts)})"

    def _proof(self, n: int) -> str:
        without = "it" if self.counts[n] == 1 else "them"
        text = f"Without {without} the logit is {self.removed_logits[n]:.2f}"
        changed = self.removed_classes[n]
        if 0 <= changed != self.targets[n] >= 0:
            text += f", and the top class is {self.model.class_name(int(changed))}"
        draws = self.random_logits[n]
        draws = draws[np.isfinite(draws)]
        if not len(draws):
            return f"{text}."
        low, high = draws.min(), draws.max()
        others = f"{count_of(int(self.counts[n]), f'other {self.noun}')} of similar activation"
        return f"{text}; without {others} it is {draws.mean():.2f} ({low:.2f} to {high:.2f} in {len(draws)} draws)."

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per image and unit: effects, share, position, and edges of its region in pixels."""
        rows = []
        for n, f in zip(*np.nonzero(self.units >= 0), strict=True):
            box = self.boxes[n, f]
            row: dict[str, Any] = {
                "image": self.image_names[n],
                "target": self.target_names[n],
                "unit": int(self.units[n, f]),
                "name": self.unit_names[n][f],
                "effect": float(self.effects[n, f]),
                "share": float(self.shares[n, f]),
                "alone": float(self.single_effects[n, f]),
                "position": self.positions[n][f],
            }
            edges = zip(("left", "top", "right", "bottom"), box.tolist(), strict=True)
            rows.append(row | {name: edge if np.isfinite(edge) else None for name, edge in edges})
        return rows

    def text_files(self) -> dict[str, str]:
        """Return ``explanation.txt``, the sentences, and ``explanation.csv``: one row for each image and unit."""
        names = ("image", "target", "unit", "name", "effect", "share", "alone", "position")
        columns = (*names, "left", "top", "right", "bottom")
        rows = self.rows()
        lines = [f"{name}: {text}\n" for name, text in zip(self.image_names, self.sentences, strict=True)]
        return {
            "explanation.txt": "".join(lines),
            "explanation.csv": format_csv({name: [row[name] for row in rows] for name in columns}),
        }

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        return [*self.targets.tolist(), *self.removed_classes.tolist()]

    def image_copies(self) -> list[bytes]:
        """Return small copies of the images, as JPEG files."""
        return jpeg_copies(self.image_source, self.image_indices)

    def parameters(self) -> dict[str, object]:
        """Return the settings of the call, names and geometry."""
        settings = {
            name: v for name, v in super().parameters().items() if name not in ("image_source", "image_indices")
        }
        return settings | {"geometry": [[g.image_size, g.box] for g in self.geometry]}

    def _is_one_image(self) -> bool:
        return len(self) == 1

    def _title(self) -> str:
        return f"{count_of(int(self.counts.sum()), self.noun)} of {self.layer} for {count_of(len(self), 'image')}"

    def _display_rows(self) -> Sequence[Row]:
        return [
            {
                **({"image": base_name(row["image"]), "target": row["target"]} if len(self) > 1 else {}),
                "unit": row["unit"],
                "name": row["name"],
                "effect": f"{row['effect']:+.2f}",
                "share": "" if np.isnan(row["share"]) else f"{row['share']:.1%}",
                "alone": f"{row['alone']:+.2f}",
                "position": row["position"],
            }
            for row in self.rows()
        ]

    def _remarks(self) -> list[str]:
        return [*self.sentences, *super()._remarks()] if len(self) <= 4 else super()._remarks()
