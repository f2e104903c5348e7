"""What a heatmap is asked about: classes, contrasts between them, or any function of the network's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.engine.capture import ForwardResult
from convscope.engine.model import Model
from convscope.engine.nested import primary_tensor
from convscope.errors import ConvscopeError

ScoreFunction = Callable[[Any], Tensor]


@dataclass(frozen=True)
class TargetSpec:
    """T things asked about each of N pictures.

    `classes` is (N, T), or None where each picture's top class is meant; `against` (N, A) holds classes whose mean
    logit is taken off. With `functions`, T functions of the network's output (M, ...) that give (M,), there are none.
    """

    model: Model = field(repr=False)
    classes: Tensor | None = None
    against: Tensor | None = None
    functions: tuple[ScoreFunction, ...] = ()

    @property
    def num_targets(self) -> int:
        """T."""
        return len(self.functions) or (1 if self.classes is None else self.classes.shape[1])

    def for_batch(self, indices: Sequence[int], logits: Tensor) -> BatchTargets:
        """The targets of some of the pictures, whose logits are (B, K)."""
        rows, device = list(indices), logits.device
        if self.functions:
            return BatchTargets(torch.full((len(rows), len(self.functions)), -1, device=device), None, self.functions)
        top = logits.argmax(1, keepdim=True) if self.classes is None else self.classes[rows].to(device)
        return BatchTargets(top, None if self.against is None else self.against[rows].to(device))

    def names(self, classes: np.ndarray, indices: Sequence[int]) -> list[list[str]]:
        """What the targets (B, T) of some of the pictures are called."""
        if self.functions:
            return [[_called(f) for f in self.functions]] * len(classes)
        named = [[self.model.class_name(int(c)) for c in row] for row in classes]
        if self.against is None:
            return named
        others = [" and ".join(self.model.class_name(int(c)) for c in row) for row in self.against[list(indices)]]
        return [[f"{name} rather than {other}" for name in row] for row, other in zip(named, others, strict=True)]


@dataclass(frozen=True)
class BatchTargets:
    """The targets of one batch: `classes` (B, T), -1 for functions."""

    classes: Tensor
    against: Tensor | None = None
    functions: tuple[ScoreFunction, ...] = ()

    def scores(self, seen: ForwardResult, rows: Tensor | None = None) -> Tensor:
        """What each target scores, (M, T), float32, for one pass through the network.

        `rows` (M,) says which picture of the batch each row of the pass belongs to; None: they are the batch itself.
        """
        if self.functions:
            return torch.stack([_checked(f, f(seen.output), len(seen.logits)) for f in self.functions], dim=1)
        classes = self.classes if rows is None else self.classes[rows]
        scores = seen.logits.gather(1, classes)
        if self.against is None:
            return scores
        against = self.against if rows is None else self.against[rows]
        return scores - seen.logits.gather(1, against).mean(1, keepdim=True)

    def logits(self, seen: ForwardResult) -> Tensor:
        """The targets' own logits (B, T), nothing taken off; what functions give."""
        return BatchTargets(self.classes, None, self.functions).scores(seen).detach()


def finer_cam_score(chosen: BatchTargets, seen: ForwardResult, nearest: int = 3, gamma: float = 0.6) -> Tensor:
    """What sets a class apart from the classes nearest to it: y_c - gamma / D sum_d y_d, (B, T).

    d runs over the D = `nearest` classes whose logits are closest to that of c. Zhang et al., Finer-CAM, CVPR 2025,
    equations 5 to 8, with their gamma. (Their program weighs the classes by their probabilities instead, and takes the
    gradient of these as well.)
    """
    if chosen.functions or chosen.against is not None:
        raise ConvscopeError("finer-cam sets a class against those nearest to it by itself: give classes, no against=")
    logits = seen.logits
    if logits.shape[1] == 1:
        raise ConvscopeError("finer-cam sets a class against those nearest to it, and this network has only one")
    own = logits.gather(1, chosen.classes)
    distance = (logits.detach()[:, None] - own.detach()[..., None]).abs()  # (B, T, K)
    distance.scatter_(2, chosen.classes[..., None], -1)
    others = distance.topk(min(nearest + 1, logits.shape[1]), dim=2, largest=False).indices[..., 1:]
    return own - gamma * logits.gather(1, others.flatten(1)).reshape(others.shape).mean(2)


def segmentation_target(label: int, mask: Any) -> ScoreFunction:
    """The target "class `target` over a region", for a network that gives maps of classes (N, K, H, W).

    Its score is the mean logit over the places where `mask` (any size, brought to H x W) is true.
    """
    region = torch.as_tensor(np.asarray(mask), dtype=torch.float32)
    if region.ndim != 2 or not bool((region > 0).any()):
        raise ConvscopeError(f"a mask of shape {tuple(region.shape)}; expected (H, W) with at least one place inside")

    def score(output: Any) -> Tensor:
        maps = primary_tensor(output)
        if maps is None or maps.ndim != 4:
            raise ConvscopeError("a region was given, but the network gives no maps of classes (N, K, H, W)")
        inside = torch.nn.functional.interpolate(region[None, None], maps.shape[2:], mode="nearest-exact")[0, 0] > 0
        if not bool(inside.any()):
            raise ConvscopeError("at the resolution of the network's maps, nothing of the region is left")
        return _channel(maps, label, "the network's maps")[:, inside.to(maps.device)].mean(1)

    score.__name__ = f"class {label} over a region"
    return score


def output_target(name: Any, label: int) -> ScoreFunction:
    """The target "class `target` of one head", for a network that gives several outputs, by name or position."""

    def score(output: Any) -> Tensor:
        try:
            by_name = isinstance(name, str) and not isinstance(output, Mapping)
            head = None if isinstance(output, Tensor) else getattr(output, name) if by_name else output[name]
        except (KeyError, IndexError, TypeError, AttributeError):
            head = None
        if not isinstance(head, Tensor):
            given = f": {', '.join(map(str, output))}" if isinstance(output, Mapping) else f" in {_kind(output)}"
            raise ConvscopeError(f"the network gives no head {name!r}{given}")
        return _channel(head, label, f"head {name!r}")

    score.__name__ = f"class {label} of {name}"
    return score


def _channel(scores: Tensor, target: int, where: str) -> Tensor:
    if scores.ndim < 2 or not 0 <= target < scores.shape[1]:
        raise ConvscopeError(f"class {target} is out of range: {where} gave {tuple(scores.shape)}")
    return scores[:, target]


def parse_targets(model: Model, targets: Any, count: int, against: Any = None) -> TargetSpec:
    """The targets as the user gives them; see `heatmaps`. Raises ConvscopeError for what cannot be meant."""
    functions = _functions(targets)
    if functions:
        if against is not None:
            raise ConvscopeError("against= goes with classes; a function can take another class off by itself")
        return TargetSpec(model, functions=functions)
    others = None
    if against is not None:
        against = against.tolist() if isinstance(against, np.ndarray | Tensor) else against
        several = isinstance(against, Sequence) and not isinstance(against, str)
        others = parse_classes(model, [list(against)] * count if several and _flat(against, count) else against, count)
    return TargetSpec(model, parse_classes(model, targets, count), others)


def _flat(against: Sequence[Any], count: int) -> bool:
    """Whether a list names several classes for all pictures rather than one for each."""
    return len(against) != count and all(_is_class(a) for a in against)


def parse_classes(model: Model, targets: Any, count: int) -> Tensor | None:
    """Class indices (count, T) for `count` pictures; None where each picture's top class is meant.

    Accepted: None; one class (index or name) for all; one per picture; a list of several for each picture; with a
    single picture also a plain list of several. Raises ConvscopeError for anything else and for unknown classes.
    """
    if targets is None:
        return None
    if isinstance(targets, np.ndarray | Tensor):
        targets = targets.tolist()
    if _is_class(targets):
        return torch.tensor([[model.class_index(targets)]] * count)
    if not isinstance(targets, Sequence) or not targets:
        raise ConvscopeError(f"targets {targets!r}: expected None, a class, one class per picture, or a list of lists")
    if all(_is_class(t) for t in targets):
        rows = [list(targets)] if count == 1 else [[t] for t in targets]
    elif all(isinstance(t, Sequence) and t and all(_is_class(c) for c in t) for t in targets):
        rows = [list(t) for t in targets]
    else:
        raise ConvscopeError(
            f"targets {targets!r}: classes are indices or names, several per picture are lists of them"
        )
    if len(rows) != count:
        raise ConvscopeError(
            f"{len(rows)} targets for {count} pictures; give one class for all, one per picture, "
            "or a list of several for each picture"
        )
    if len({len(row) for row in rows}) > 1:
        raise ConvscopeError("every picture needs the same number of targets")
    return torch.tensor([[model.class_index(t) for t in row] for row in rows])


def _is_class(value: Any) -> bool:
    return isinstance(value, str | int | np.integer) and not isinstance(value, bool)


def _functions(targets: Any) -> tuple[ScoreFunction, ...]:
    many = targets if isinstance(targets, list | tuple) else [targets]
    if not many or not any(callable(t) for t in many):
        return ()
    if not all(callable(t) for t in many):
        raise ConvscopeError("targets are either all classes or all functions of the network's output")
    return tuple(many)


def _checked(function: ScoreFunction, score: Any, count: int) -> Tensor:
    if not isinstance(score, Tensor) or score.numel() != count:
        raise ConvscopeError(
            f"target {_called(function)!r} gave {_kind(score)} for {count} pictures; "
            "expected a tensor with a score for each"
        )
    return score.reshape(count).float()


def _kind(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _called(function: ScoreFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
