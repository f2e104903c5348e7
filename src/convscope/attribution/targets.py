"""Targets of heatmaps: classes, contrasts between classes, and functions of the network's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from convscope.attribution.batch_targets import BatchTargets
from convscope.attribution.box_targets import BoxTarget, parse_box_targets
from convscope.attribution.output_targets import ScoreFunction, function_name
from convscope.engine.model import Model
from convscope.engine.text_targets import TextTarget, bind_texts, require_classes
from convscope.errors import ConvscopeError
from convscope.images.geometry import Geometry

ClassLabel = str | int | np.integer[Any]
"""A class, by name or index."""

ClassLabels = ClassLabel | Sequence[ClassLabel] | Sequence[Sequence[ClassLabel]] | np.ndarray | Tensor
"""One class for all images, one per image, or several per image."""

Targets = (
    ClassLabels
    | ScoreFunction
    | Sequence[ScoreFunction]
    | BoxTarget
    | Sequence[BoxTarget]
    | Sequence[Sequence[BoxTarget]]
    | TextTarget
    | Sequence[TextTarget]
)


@dataclass(frozen=True)
class TargetSpec:
    """T targets for each of N images.

    Attributes
    ----------
    model : Model
    classes : Tensor of shape (N, T), optional
        Class indices; None for each image's top class.
    against : Tensor of shape (N, A), optional
        Classes whose mean logit is subtracted from each target's logit.
    functions : tuple of callable
        T functions of the network's output, instead of classes.
    boxes : tuple of tuple of BoxTarget
        T boxes for each image, whose classes are `classes`.
    """

    model: Model = field(repr=False)
    classes: Tensor | None = None
    against: Tensor | None = None
    functions: tuple[ScoreFunction, ...] = ()
    boxes: tuple[tuple[BoxTarget, ...], ...] = ()

    @property
    def num_targets(self) -> int:
        """The number T of targets per image."""
        return len(self.functions) or (1 if self.classes is None else self.classes.shape[1])

    def for_batch(self, indices: Sequence[int], logits: Tensor, geometry: Sequence[Geometry] = ()) -> BatchTargets:
        """Select the targets of the images `indices`.

        Their logits (B, K) determine the top class, and their geometry where boxes lie in the network's input.
        """
        rows, device = list(indices), logits.device
        if self.functions:
            return BatchTargets(torch.full((len(rows), len(self.functions)), -1, device=device), None, self.functions)
        classes = logits.argmax(1, keepdim=True) if self.classes is None else self.classes[rows].to(device)
        if self.boxes:
            edges = torch.tensor([[target.box for target in self.boxes[i]] for i in rows], dtype=torch.float64)
            boxes = torch.stack([g.boxes_to_input(part) for g, part in zip(geometry, edges, strict=True)])
            boxes = boxes.float().to(device)
            return BatchTargets(classes, boxes=boxes, detection_reader=self.model.detection_reader)
        return BatchTargets(classes, None if self.against is None else self.against[rows].to(device))

    def select(self, indices: Sequence[int]) -> TargetSpec:
        """Return the targets of the images `indices`, which are counted from 0 then."""
        classes, against = (None if rows is None else rows[list(indices)] for rows in (self.classes, self.against))
        boxes = tuple(self.boxes[i] for i in indices) if self.boxes else ()
        return replace(self, classes=classes, against=against, boxes=boxes)

    def names(self, classes: np.ndarray, indices: Sequence[int]) -> list[list[str]]:
        """Name the targets (B, T) of the images `indices`, whose classes are `classes` (B, T)."""
        if self.functions:
            return [[function_name(function) for function in self.functions]] * len(classes)
        names = [[self.model.class_name(int(c)) for c in row] for row in classes]
        if self.boxes:
            pairs = zip((self.boxes[i] for i in indices), names, strict=True)
            return [[box.name(name) for box, name in zip(*pair, strict=True)] for pair in pairs]
        if self.against is None:
            return names
        contrasts = [" and ".join(row) for row in self.against_names(indices) or ()]
        return [
            [f"{name} rather than {contrast}" for name in row] for row, contrast in zip(names, contrasts, strict=True)
        ]

    def against_names(self, indices: Sequence[int]) -> list[list[str]] | None:
        """Name the classes whose logits are subtracted for the images `indices`; None if there are none."""
        if self.against is None:
            return None
        return [[self.model.class_name(int(c)) for c in row] for row in self.against[list(indices)]]


@dataclass(frozen=True)
class SavedTargets(TargetSpec):
    """The names of the targets of a result that was saved or pickled.

    Attributes
    ----------
    labels, contrasts : mapping of int to list of str
        For each image the names of its targets, and of the classes that are subtracted, if any.
    """

    labels: Mapping[int, list[str]] = field(default_factory=dict)
    contrasts: Mapping[int, list[str]] = field(default_factory=dict)

    def for_batch(
        self,
        indices: Sequence[int],  # noqa: ARG002
        logits: Tensor,  # noqa: ARG002
        geometry: Sequence[Geometry] = (),  # noqa: ARG002
    ) -> BatchTargets:
        """Raise ConvscopeError: the targets themselves are not saved."""
        raise ConvscopeError("these heatmaps were saved or pickled, without their targets; compute them again")

    def names(self, classes: np.ndarray, indices: Sequence[int]) -> list[list[str]]:  # noqa: ARG002
        """Return the names of the targets of the images `indices`."""
        return [self.labels[i] for i in indices]

    def against_names(self, indices: Sequence[int]) -> list[list[str]] | None:
        """Return the names of the classes that are subtracted for the images `indices`, if any."""
        return [self.contrasts[i] for i in indices] if self.contrasts else None


def parse_targets(
    model: Model, targets: Targets | None, num_images: int, against: ClassLabels | None = None
) -> TargetSpec:
    """Parse the arguments `targets` and `against` of `convscope.heatmaps`; raise ConvscopeError for invalid ones."""
    if targets is None:
        _require_top_class(model)
    elif boxes := parse_box_targets(targets, num_images):
        if against is not None:
            raise ConvscopeError("against= needs classes as targets; got boxes")
        classes = [[model.class_index(target.label) for target in row] for row in boxes]
        return TargetSpec(model, torch.tensor(classes), boxes=boxes)
    elif functions := _functions(bind_texts(model, targets)):
        if against is not None:
            raise ConvscopeError("against= needs classes as targets; a function can subtract another class itself")
        return TargetSpec(model, functions=functions)
    against = against.tolist() if isinstance(against, np.ndarray | Tensor) else against
    if _names_several(against, num_images):
        against = [list(against)] * num_images
    contrasts = None if against is None else parse_classes(model, against, num_images)
    return TargetSpec(model, parse_classes(model, targets, num_images), contrasts)


def _require_top_class(model: Model) -> None:
    """Raise ConvscopeError where the largest output is no class that could be each image's target."""
    if model.dual_encoder is not None:
        require_classes(model, "a striped cat")
    if model.task == "regression" and (model.num_outputs or 0) > 1:
        names = ", ".join(model.class_name(k) for k in range(min(model.num_outputs or 0, 4)))
        raise ConvscopeError(
            f"{model.name} computes {model.num_outputs} values; say which one: targets= ({names}, ...)"
        )


def _names_several(against: object, num_images: int) -> TypeGuard[Sequence[int | str]]:
    """Check whether a list holds several classes for all images rather than one per image."""
    if not isinstance(against, Sequence) or isinstance(against, str):
        return False
    return len(against) != num_images and all(_is_class(a) for a in against)


def parse_classes(model: Model, targets: object, num_images: int) -> Tensor | None:
    """Parse classes for each image.

    Parameters
    ----------
    model : Model
    targets : object
        None, one class (index or name) for all images, one per image, or a list of several for each image, of which one
        alone, ``[["cat", "dog"]]``, is for all images; with a single image also a flat list of several.
    num_images : int

    Returns
    -------
    Tensor of shape (num_images, T), or None
        Class indices; None for each image's top class.

    Raises
    ------
    ConvscopeError
        For anything else, and for unknown classes.
    """
    model.require_scores()
    if targets is None:
        return None
    if isinstance(targets, np.ndarray | Tensor):
        targets = targets.tolist()
    if _is_class(targets):
        return torch.tensor([[model.class_index(targets)]] * num_images)
    if not isinstance(targets, Sequence) or not targets:
        raise ConvscopeError(f"targets is {targets!r}; expected None, a class, one class per image, or a list of lists")
    if all(_is_class(t) for t in targets):
        rows = [list(targets)] if num_images == 1 else [[t] for t in targets]
    elif all(isinstance(t, Sequence) and t and all(_is_class(c) for c in t) for t in targets):
        rows = [list(t) for t in targets] * (num_images if len(targets) == 1 else 1)
    else:
        raise ConvscopeError(
            f"targets is {targets!r}; expected class indices or names, or a list of them for each image"
        )
    if len(rows) != num_images:
        several = [list(targets)] if all(_is_class(t) for t in targets) else [[0, 1]]
        raise ConvscopeError(
            f"{len(rows)} targets for {num_images} images; give one class for all images, one per image, a list for "
            f"each image, or one list for all of them, such as {several}"
        )
    if len({len(row) for row in rows}) > 1:
        raise ConvscopeError("the images have different numbers of targets; give each image equally many")
    return torch.tensor([[model.class_index(t) for t in row] for row in rows])


def parse_labels(model: Model, labels: object, num_images: int) -> Tensor:
    """Return the right class (N,) of each image. Raises ConvscopeError for anything but one class for each."""
    if isinstance(labels, Sequence) and not isinstance(labels, str) and len(labels) != num_images:
        raise ConvscopeError(f"labels has {len(labels)} classes for {num_images} images; give each image's right class")
    classes = parse_classes(model, labels, num_images)
    if classes is None or classes.shape[1] != 1:
        raise ConvscopeError("labels names several classes per image; give each image's right class")
    return classes[:, 0]


def _is_class(value: object) -> TypeGuard[int | str]:
    return isinstance(value, str | int | np.integer) and not isinstance(value, bool)


def _functions(targets: Targets | None) -> tuple[ScoreFunction, ...]:
    candidates = targets if isinstance(targets, list | tuple) else [targets]
    functions = tuple(t for t in candidates if callable(t))
    if functions and len(functions) < len(candidates):
        raise ConvscopeError("targets mixes classes and functions of the network's output; give only one kind")
    return functions
