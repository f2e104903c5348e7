"""The targets of one batch, and their scores in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convscope.attribution.box_targets import box_scores
from convscope.attribution.output_targets import RegionScore, ScoreFunction, function_name
from convscope.engine.candidates import DetectionReader
from convscope.engine.capture import ForwardResult
from convscope.errors import ConvscopeError


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


def _check_score(function: ScoreFunction, score: object, count: int) -> Tensor:
    if not isinstance(score, Tensor) or score.numel() != count:
        raise ConvscopeError(
            f"target {function_name(function)!r} returned {_kind(score)} for {count} images; expected a tensor with "
            "one score per image"
        )
    return score.reshape(count).float()


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
