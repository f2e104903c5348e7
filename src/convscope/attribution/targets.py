"""Targets of heatmaps: classes, contrasts between classes, and functions of the network's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.attribution.box_targets import BoxTarget, box_scores, parse_box_targets
from convscope.engine.candidates import DetectionReader
from convscope.engine.capture import ForwardResult
from convscope.engine.model import Model
from convscope.engine.nested import primary_tensor
from convscope.engine.outputs import pick_output
from convscope.engine.text_targets import TextTarget, bind_texts
from convscope.errors import ConvscopeError
from convscope.images.geometry import Geometry

ScoreFunction = Callable[[Any], Tensor]
"""A function of the network's output for M inputs, of any type, that returns the scores (M,)."""

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

    def names(self, classes: np.ndarray, indices: Sequence[int]) -> list[list[str]]:
        """Name the targets (B, T) of the images `indices`, whose classes are `classes` (B, T)."""
        if self.functions:
            return [[_function_name(function) for function in self.functions]] * len(classes)
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


@dataclass(frozen=True)
class BatchTargets:
    """The targets of a batch of B images.

    Attributes
    ----------
    classes : Tensor of shape (B, T)
        Class indices, -1 for functions.
    against : Tensor of shape (B, A), optional
        Classes whose mean logit is subtracted.
    functions : tuple of callable
        T functions of the network's output, instead of classes.
    boxes : Tensor of shape (B, T, 4), optional
        Edges of boxes as fractions of the network's input, whose classes are `classes`.
    detection_reader : DetectionReader, optional
        How candidates are read from the network's output, if there are boxes.
    """

    classes: Tensor
    against: Tensor | None = None
    functions: tuple[ScoreFunction, ...] = ()
    boxes: Tensor | None = None
    detection_reader: DetectionReader | None = None

    def scores(self, outputs: ForwardResult, rows: Tensor | None = None) -> Tensor:
        """Compute each target's score for one forward pass.

        Parameters
        ----------
        outputs : ForwardResult
            The outputs of a pass over M inputs.
        rows : Tensor of shape (M,), optional
            The image of the batch that each input belongs to; if omitted, the inputs are the batch itself.

        Returns
        -------
        Tensor of shape (M, T), float32
        """
        if self.functions:
            count = len(outputs.logits)
            return torch.stack([_check_score(f, f(outputs.output), count) for f in self.functions], dim=1)
        classes = self.classes if rows is None else self.classes[rows]
        if self.boxes is not None and self.detection_reader is not None:
            candidates = self.detection_reader.candidates(outputs.output, outputs.input_size)
            return box_scores(candidates, classes, self.boxes if rows is None else self.boxes[rows])
        scores = outputs.logits.gather(1, classes)
        if self.against is None:
            return scores
        against = self.against if rows is None else self.against[rows]
        return scores - outputs.logits.gather(1, against).mean(1, keepdim=True)

    def of_image(self, image: int, count: int) -> BatchTargets:
        """Return the targets of one image for `count` copies of it."""
        rows = [image] * count
        against = None if self.against is None else self.against[rows]
        boxes = None if self.boxes is None else self.boxes[rows]
        return replace(self, classes=self.classes[rows], against=against, boxes=boxes)

    def mirrored(self) -> BatchTargets:
        """Return the targets as they lie in the mirror images; functions that have no `mirrored` stay as they are."""
        boxes = (
            None
            if self.boxes is None
            else torch.stack(
                [1 - self.boxes[..., 2], self.boxes[..., 1], 1 - self.boxes[..., 0], self.boxes[..., 3]], dim=-1
            )
        )
        functions = tuple(f.mirrored() if isinstance(f, RegionScore) else f for f in self.functions)
        return replace(self, boxes=boxes, functions=functions)

    def logits(self, outputs: ForwardResult) -> Tensor:
        """Return the targets' logits (B, T) without subtracting `against`; for functions and boxes, their values."""
        return replace(self, against=None).scores(outputs).detach()

    def probabilities(self, probabilities: Tensor) -> Tensor:
        """Return the targets' probabilities (B, T) among those of all classes (B, K); NaN for functions and boxes."""
        if self.functions or self.boxes is not None:
            return torch.full(self.classes.shape, torch.nan, device=self.classes.device)
        return probabilities.gather(1, self.classes)


def finer_cam_score(targets: BatchTargets, outputs: ForwardResult, nearest: int = 3, gamma: float = 0.6) -> Tensor:
    """Contrast each target's logit with those of the most similar classes (Finer-CAM).

    ::

        s_c = y_c - gamma (1 / D) sum_d y_d

    ``d`` runs over the D classes whose logits are closest to ``y_c``.

    Parameters
    ----------
    targets : BatchTargets
        T classes for each of B images.
    outputs : ForwardResult
        The outputs of a pass over the B images.
    nearest : int
        The number D of classes to contrast with.
    gamma : float
        Strength of the contrast.

    Returns
    -------
    Tensor of shape (B, T)

    Raises
    ------
    ConvscopeError
        For targets that are functions or contrasts, and for a network with a single class.

    Notes
    -----
    The authors' program differs from their equations: it weights the classes by their probabilities and differentiates
    these as well.

    References
    ----------
    Zhang et al., Finer-CAM: Spotting the Difference Reveals Finer Details for Visual Explanation, CVPR 2025,
    equations 5 to 8.
    """
    if targets.functions or targets.against is not None or targets.boxes is not None:
        raise ConvscopeError(
            "finer-cam contrasts each class with the classes nearest to it: give classes as targets, and no against="
        )
    logits = outputs.logits
    if logits.shape[1] == 1:
        raise ConvscopeError("finer-cam contrasts classes with each other, and this network has a single output")
    target_logits = logits.gather(1, targets.classes)
    distance = (logits.detach()[:, None] - target_logits.detach()[..., None]).abs()  # (B, T, K)
    distance.scatter_(2, targets.classes[..., None], -1)
    others = distance.topk(min(nearest + 1, logits.shape[1]), dim=2, largest=False).indices[..., 1:]
    return target_logits - gamma * logits.gather(1, others.flatten(1)).reshape(others.shape).mean(2)


@dataclass(frozen=True, eq=False)
class RegionScore:
    """The mean logit of a class inside a region; made by `convscope.segmentation_target`.

    Attributes
    ----------
    label : int
        The class.
    region : Tensor of shape (H, W)
        Above 0 inside the region.
    """

    label: int
    region: Tensor = field(repr=False)

    @property
    def __name__(self) -> str:
        return f"class {self.label} over a region"

    def __call__(self, output: object) -> Tensor:
        """Return the scores (N,) of a network's output."""
        maps = primary_tensor(output)
        if maps is None or maps.ndim != 4:
            raise ConvscopeError("segmentation_target needs a network that returns class maps (N, K, H, W)")
        inside = F.interpolate(self.region[None, None], maps.shape[2:], mode="nearest-exact")[0, 0] > 0
        if not bool(inside.any()):
            raise ConvscopeError(
                "no position of the network's maps lies inside the region at their resolution of "
                f"{' x '.join(map(str, maps.shape[2:]))}; give a larger region"
            )
        return _channel(maps, self.label, "the network's output")[:, inside.to(maps.device)].mean(1)

    def mirrored(self) -> RegionScore:
        """Return the score for mirror images."""
        return RegionScore(self.label, self.region.flip(1))


@check_arguments
def segmentation_target(label: int, mask: npt.ArrayLike) -> ScoreFunction:
    """Define the target "class `label` inside a region" for a segmentation network.

    The score is the mean logit of the class over the positions inside the region.

    Parameters
    ----------
    label : int
        Index of the class among the network's K class maps.
    mask : array_like of shape (H, W)
        Nonzero inside the region; resized to the network's maps if it has another size.

    Returns
    -------
    callable
        A function of the network's output (N, K, h, w) that returns scores (N,), for `targets` of
        `convscope.heatmaps`.

    Raises
    ------
    ConvscopeError
        For an empty mask. The function itself raises it for networks without class maps, and if no position of the
        maps lies inside the region.

    Examples
    --------
    >>> import numpy as np, torch, convscope
    >>> target = convscope.segmentation_target(1, np.eye(2))
    >>> target(torch.arange(8.0).reshape(1, 2, 2, 2))
    tensor([5.5000])
    """
    region = torch.as_tensor(np.asarray(mask), dtype=torch.float32)
    if region.ndim != 2 or not bool((region > 0).any()):
        raise ConvscopeError(
            f"mask has shape {tuple(region.shape)}; expected (H, W) with at least one position inside the region"
        )

    return RegionScore(label, region)


@check_arguments
def output_target(name: str | int, label: int) -> ScoreFunction:
    """Define the target "class `label` of output `name`" for a network with several outputs.

    Parameters
    ----------
    name : str or int
        Key, attribute or position of the output.
    label : int
        Index of the class among the output's K classes.

    Returns
    -------
    callable
        A function of the network's output that returns scores (N,), for `targets` of `convscope.heatmaps`.

    Raises
    ------
    ConvscopeError
        Raised by the function itself if the network has no such output or the output no such class.

    Examples
    --------
    >>> import torch, convscope
    >>> target = convscope.output_target("color", 2)
    >>> target({"shape": torch.zeros(1, 2), "color": torch.tensor([[0.1, 0.2, 0.7]])})
    tensor([0.7000])
    """

    def score(output: Any) -> Tensor:
        scores = pick_output(output, name)
        if not isinstance(scores, Tensor):
            raise ConvscopeError(f"output {name!r} is a {type(scores).__name__}; expected a tensor (N, K)")
        return _channel(scores, label, f"output {name!r}")

    score.__name__ = f"class {label} of {name}"
    return score


def _channel(scores: Tensor, label: int, source: str) -> Tensor:
    if scores.ndim < 2 or not 0 <= label < scores.shape[1]:
        raise ConvscopeError(f"class {label} is out of range: {source} has shape {tuple(scores.shape)}")
    return scores[:, label]


def parse_targets(
    model: Model, targets: Targets | None, num_images: int, against: ClassLabels | None = None
) -> TargetSpec:
    """Parse the arguments `targets` and `against` of `convscope.heatmaps`; raise ConvscopeError for invalid ones."""
    if boxes := parse_box_targets(targets, num_images):
        if against is not None:
            raise ConvscopeError("against= needs classes as targets; got boxes")
        classes = [[model.class_index(target.label) for target in row] for row in boxes]
        return TargetSpec(model, torch.tensor(classes), boxes=boxes)
    functions = _functions(bind_texts(model, targets))
    if functions:
        if against is not None:
            raise ConvscopeError("against= needs classes as targets; a function can subtract another class itself")
        return TargetSpec(model, functions=functions)
    against = against.tolist() if isinstance(against, np.ndarray | Tensor) else against
    if _names_several(against, num_images):
        against = [list(against)] * num_images
    if targets is None and model.task == "regression" and (model.num_outputs or 0) > 1:
        names = ", ".join(model.class_name(k) for k in range(min(model.num_outputs or 0, 4)))
        raise ConvscopeError(
            f"{model.name} computes {model.num_outputs} values; say which one: targets= ({names}, ...)"
        )
    return TargetSpec(model, parse_classes(model, targets, num_images), parse_classes(model, against, num_images))


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
        None, one class (index or name) for all images, one per image, or a list of several for each image; with a
        single image also a flat list of several.
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
        rows = [list(t) for t in targets]
    else:
        raise ConvscopeError(
            f"targets is {targets!r}; expected class indices or names, or a list of them for each image"
        )
    if len(rows) != num_images:
        raise ConvscopeError(
            f"{len(rows)} targets for {num_images} images; give one class for all images, one per image, "
            "or a list of several for each image"
        )
    if len({len(row) for row in rows}) > 1:
        raise ConvscopeError("the images have different numbers of targets; give each image equally many")
    return torch.tensor([[model.class_index(t) for t in row] for row in rows])


def _is_class(value: object) -> TypeGuard[int | str]:
    return isinstance(value, str | int | np.integer) and not isinstance(value, bool)


def _functions(targets: Targets | None) -> tuple[ScoreFunction, ...]:
    candidates = targets if isinstance(targets, list | tuple) else [targets]
    functions = tuple(t for t in candidates if callable(t))
    if functions and len(functions) < len(candidates):
        raise ConvscopeError("targets mixes classes and functions of the network's output; give only one kind")
    return functions


def _check_score(function: ScoreFunction, score: object, count: int) -> Tensor:
    if not isinstance(score, Tensor) or score.numel() != count:
        raise ConvscopeError(
            f"target {_function_name(function)!r} returned {_kind(score)} for {count} images; expected a tensor with "
            "one score per image"
        )
    return score.reshape(count).float()


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _function_name(function: ScoreFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
