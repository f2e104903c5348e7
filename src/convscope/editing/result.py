"""The results of `convscope.effects` and `convscope.patch`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from convscope.errors import ConvscopeError
from convscope.featurevis.result import Patterns
from convscope.formatting import Row, base_name, count_of
from convscope.images.copies import jpeg_copies
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.result_items import IndexedResult, ItemKey
from convscope.results import Result, format_csv

REPLACED_BY = {"zero": "0", "mean": "the mean", "resample": "another image's map"}


@dataclass(frozen=True, eq=False, repr=False)
class Effects(IndexedResult):
    """What the removal of each of U units does to T targets of N images.

    ``len``, indexing and iteration go over the images.

    Attributes
    ----------
    logits : ndarray of shape (U, N, T), float32
        The targets' logits with the unit removed minus those without.
    units : ndarray of shape (U,)
        Numbers of the units.
    targets : ndarray of shape (N, T)
        Class indices; -1 for functions.
    baseline : ndarray of shape (N, T), float32
        The targets' logits without any edit.
    layer : str
    how : {"zero", "mean", "resample"}
        What a removed unit is replaced by.
    target_names : tuple of tuple of str
        Names of the targets, for each image.
    image_names : tuple of str
    fit : {"squash", "crop", "pad"}
        How images were brought to the network's size.
    seed : int
    accuracy : ndarray of shape (U,), optional
        With labels: the change of the accuracy, -1 to 1, negative where the removal makes answers wrong.
    interval : ndarray of shape (U, 2), optional
        Its 95 % bootstrap interval over images.
    baseline_accuracy : ndarray of shape (), optional
        The accuracy without any edit.
    classes : ndarray of shape (K,), optional
        The classes of the labels.
    class_accuracy : ndarray of shape (U, K), optional
        The change of the accuracy on the images of each class.
    class_interval : ndarray of shape (U, K, 2), optional
    curve_counts : ndarray of shape (P,), optional
        With a curve: how many units are removed together.
    curve : ndarray of shape (P, N, T), float32, optional
        The targets' logits then; those with the lowest mean effects are removed first.
    random_curve : ndarray of shape (P, N, T), float32, optional
        The same in a random order.
    curve_accuracy : ndarray of shape (P,), optional
        With labels: the accuracy along the curve.
    curve_interval : ndarray of shape (P, 2), optional
        Its 95 % bootstrap interval over images.
    random_curve_accuracy : ndarray of shape (P,), optional
        The accuracy along the random curve.
    unit_names : tuple of str, optional
        With a store: the names of the units, U strings; empty for units without a name.
    patch_units : ndarray of shape (D,), optional
        With a store: numbers of the units with the largest effects.
    patches : ndarray of shape (D, P, S, S, 3), uint8, optional
        Patches of the store's images that excite these units most.
    pattern_units : ndarray of shape (E,), optional
        Numbers of the units whose patterns are in the store, or were added.
    patterns : ndarray of shape (E, H, W, C), uint8, optional
        Their patterns.
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = {
        "logits": 1, "targets": 0, "baseline": 0, "target_names": 0, "image_names": 0, "curve": 1, "random_curve": 1,
    }  # fmt: skip
    ACCURACY_FIELDS: ClassVar[tuple[str, ...]] = (
        "accuracy", "interval", "baseline_accuracy", "classes", "class_accuracy", "class_interval",
        "curve_accuracy", "curve_interval", "random_curve_accuracy",
    )  # fmt: skip

    logits: np.ndarray
    units: np.ndarray
    targets: np.ndarray
    baseline: np.ndarray
    layer: str
    how: str
    target_names: tuple[tuple[str, ...], ...]
    image_names: tuple[str, ...]
    fit: str
    seed: int
    accuracy: np.ndarray | None = None
    interval: np.ndarray | None = None
    baseline_accuracy: np.ndarray | None = None
    classes: np.ndarray | None = None
    class_accuracy: np.ndarray | None = None
    class_interval: np.ndarray | None = None
    curve_counts: np.ndarray | None = None
    curve: np.ndarray | None = None
    random_curve: np.ndarray | None = None
    curve_accuracy: np.ndarray | None = None
    curve_interval: np.ndarray | None = None
    random_curve_accuracy: np.ndarray | None = None
    unit_names: tuple[str, ...] = ()
    patch_units: np.ndarray | None = None
    patches: np.ndarray | None = None
    pattern_units: np.ndarray | None = None
    patterns: np.ndarray | None = None

    def __getitem__(self, key: ItemKey) -> Self:
        return self.select(key)

    def _fields_of(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return the fields of a result on some images; accuracies concern all images and are left out."""
        return super()._fields_of(positions) | dict.fromkeys(self.ACCURACY_FIELDS)

    @property
    def mean(self) -> np.ndarray:
        """The mean effect (U,) over images and targets."""
        means: np.ndarray = self.logits.mean((1, 2))
        return means

    @property
    def order(self) -> np.ndarray:
        """Positions of the units (U,), those with the largest mean absolute effect first."""
        return np.argsort(-np.abs(self.logits).mean((1, 2)), kind="stable")

    @property
    def labels(self) -> list[str]:
        """The number and, where there is one, the name of each unit (U,): ``17 striped fur``."""
        names = self.unit_names or ("",) * len(self.units)
        return [f"{unit} {name}".rstrip() for unit, name in zip(self.units.tolist(), names, strict=True)]

    def with_patterns(self, patterns: Patterns) -> Self:
        """Return the result with patterns of units, which the figure shows beside their effects.

        Parameters
        ----------
        patterns : Patterns
            Of units of the layer, as ``convscope.patterns(model, effects.layer, effects.top(12))`` returns them.

        Raises
        ------
        ConvscopeError
            For patterns of another layer.
        """
        if patterns.layer != self.layer or patterns.objectives:
            raise ConvscopeError(f"patterns are of {patterns.layer!r}; expected those of units of layer {self.layer!r}")
        return replace(self, pattern_units=patterns.units, patterns=patterns.images)

    def top(self, count: int = 10) -> list[int]:
        """Return the numbers of the units with the largest mean absolute effect, the largest first."""
        return [int(unit) for unit in self.units[self.order[:count]]]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per unit, the largest mean absolute effects first, and change of the accuracy."""
        rows = []
        for u in self.order:
            flat = self.logits[u].ravel()
            extreme = int(np.abs(flat).argmax())
            n, t = divmod(extreme, self.logits.shape[2])
            row: dict[str, Any] = {"unit": int(self.units[u])}
            if any(self.unit_names):
                row["name"] = self.unit_names[u]
            row |= {
                "mean absolute effect": float(np.abs(flat).mean()),
                "mean effect": float(flat.mean()),
                "largest effect": float(flat[extreme]),
                "on": f"{self.target_names[n][t]} in {base_name(self.image_names[n])}",
            }
            if self.accuracy is not None and self.interval is not None:
                row["accuracy change"] = float(self.accuracy[u])
                row["low"], row["high"] = (float(edge) for edge in self.interval[u])
            rows.append(row)
        return rows

    def text_files(self) -> dict[str, str]:
        """Return ``effects.csv``: one row for each unit, image and target."""
        count, num_images, num_targets = self.logits.shape
        images = [name for name in self.image_names for _ in range(num_targets)]
        targets = [name for names in self.target_names for name in names]
        columns: dict[str, Iterable[object]] = {"unit": np.repeat(self.units, num_images * num_targets)}
        if any(self.unit_names):
            columns["name"] = np.repeat(self.unit_names, num_images * num_targets)
        columns |= {
            "image": images * count,
            "target": targets * count,
            "logit": np.tile(self.baseline.ravel(), count),
            "effect": self.logits.ravel(),
        }
        return {"effects.csv": format_csv(columns)}

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        labels = [] if self.classes is None else self.classes.tolist()
        return [*self.targets.ravel().tolist(), *labels]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all data, under the names by which they are saved."""
        return {name: array for name, array in super().arrays().items() if array is not None}

    def _title(self) -> str:
        units, images = count_of(len(self.units), "unit"), count_of(len(self.image_names), "image")
        return f"{units} of {self.layer} replaced by {REPLACED_BY[self.how]}, {images}"

    def _display_rows(self) -> Sequence[Row]:
        return [
            {
                "unit": row["unit"],
                **({"name": row["name"]} if "name" in row else {}),
                "absolute": f"{row['mean absolute effect']:.3f}",
                "mean": f"{row['mean effect']:+.3f}",
                "largest": f"{row['largest effect']:+.3f}",
                "on": row["on"],
            }
            | (
                {"accuracy change": f"{row['accuracy change']:+.1%} ({row['low']:+.1%} to {row['high']:+.1%})"}
                if "accuracy change" in row
                else {}
            )
            for row in self.rows()
        ]


@dataclass(frozen=True, eq=False, repr=False)
class Patching(Result):
    """What the activations of one image do in the pass of another.

    Attributes
    ----------
    effects : ndarray of shape (U,), (h, w) or (U, h, w), float32
        The target's score with the part moved minus that of the destination, by unit, by position, or by both.
    counts, joint_effects : ndarray of shape (K,)
        The effect of moving those `counts` parts together whose effects lead most towards the source's score: 1, 2, 4,
        ... and all.
    units : ndarray of shape (U,)
        Numbers of the units that are moved.
    source_score, destination_score : float
        The target's score for both images; that of the source with the layer's whole output moved.
    layer : str
    by : {"unit", "position", "both"}
    target : int
        Index of the class; -1 for functions.
    target_name : str
    image_names : tuple of str
        The source and the destination.
    geometry : tuple of Geometry
        Where the network's input lies in both images.
    image_sources : tuple of ImageBatchLoader
    image_indices : tuple of int
        Positions of both images in `image_sources`.
    fit : {"squash", "crop", "pad"}
        How images were brought to the network's size.
    """

    effects: np.ndarray
    counts: np.ndarray
    joint_effects: np.ndarray
    units: np.ndarray
    source_score: float
    destination_score: float
    layer: str
    by: str
    target: int
    target_name: str
    image_names: tuple[str, str]
    geometry: tuple[Geometry, Geometry]
    image_sources: tuple[ImageBatchLoader, ImageBatchLoader]
    image_indices: tuple[int, int]
    fit: str

    @property
    def total(self) -> float:
        """The effect of moving the layer's whole output: the difference of both scores."""
        return self.source_score - self.destination_score

    @property
    def shares(self) -> np.ndarray:
        """The effects as fractions of `total`; NaN if that is 0. They need not sum to 1."""
        return self.effects / (self.total or np.nan)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per unit or position, the largest effects first: what was moved, the effect and its share."""
        flat = self.effects.ravel()
        rows = []
        for i in np.argsort(-np.abs(flat), kind="stable"):
            index = np.unravel_index(int(i), self.effects.shape)
            row: dict[str, Any] = {}
            if self.by != "position":
                row["unit"] = int(self.units[index[0]])
            if self.by != "unit":
                row["position"] = ", ".join(str(int(p)) for p in index[self.by == "both" :])
            rows.append(row | {"effect": float(flat[i]), "share": float(self.shares.ravel()[i])})
        return rows

    def text_files(self) -> dict[str, str]:
        """Return ``patching.csv``, one row for each unit or position, and ``joint.csv``, one for each of `counts`."""
        rows = self.rows()
        joint = {
            "count": self.counts,
            "effect": self.joint_effects,
            "share": self.joint_effects / (self.total or np.nan),
        }
        return {
            "patching.csv": format_csv({name: [row[name] for row in rows] for name in rows[0]}),
            "joint.csv": format_csv(joint),
        }

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        return [self.target]

    def image_copies(self) -> list[bytes]:
        """Return small copies of both images, as JPEG files."""
        pairs = zip(self.image_sources, self.image_indices, strict=True)
        return [copy for source, index in pairs for copy in jpeg_copies(source, [index])]

    def parameters(self) -> dict[str, object]:
        """Return the settings of the call, scores, image names and geometry."""
        settings = {n: v for n, v in super().parameters().items() if n not in ("image_sources", "image_indices")}
        return settings | {"geometry": [[g.image_size, g.box] for g in self.geometry]}

    def _title(self) -> str:
        source, destination = map(base_name, self.image_names)
        return f"{self.layer} of {source} moved into {destination} by {self.by}, {self.target_name}"

    def _display_rows(self) -> Sequence[Row]:
        return [{**row, "effect": f"{row['effect']:+.3f}", "share": f"{row['share']:+.1%}"} for row in self.rows()]
