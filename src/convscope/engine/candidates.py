"""What a detector proposes: candidate boxes with class probabilities, read from the outputs of several families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convscope.engine.nested import primary_tensor
from convscope.engine.outputs import OutputSelector, describe_output, pick_output
from convscope.errors import ConvscopeError

FORMATS = (
    "a list of {'boxes', 'labels', 'scores'}, one per image (torchvision; without labels for one class); an object "
    "with logits (N, Q, K) and pred_boxes (N, Q, 4) (DETR); {'boxes': (N, A, 4), 'scores': (N, A, K)} with corners in "
    "pixels of the input; or a tensor (N, 4 + K, A) with centres and sizes in pixels of the input, and probabilities "
    "(YOLO)"
)
_TOLERANCE = 1e-4  # of probabilities, by rounding


@dataclass(frozen=True)
class Candidates:
    """The candidates of a detector for N images.

    Attributes
    ----------
    boxes : Tensor of shape (N, A, 4)
        Left, top, right and bottom edge, as fractions of the network's input.
    probabilities : Tensor of shape (N, A, K)
        The probability of each class.
    is_final : bool
        Whether the network itself has removed candidates that overlap better ones.
    """

    boxes: Tensor
    probabilities: Tensor
    is_final: bool

    def require_probabilities(self) -> Candidates:
        """Return the candidates; raise ConvscopeError if their scores are no probabilities, such as logits.

        For outputs of the network as it is: where a layer is perturbed, scores may be anything.
        """
        values = self.probabilities.detach()
        if values.numel() and not bool(((values >= -_TOLERANCE) & (values <= 1 + _TOLERANCE)).all()):
            raise ConvscopeError(
                f"a detector returned class scores from {float(values.min()):.4g} to {float(values.max()):.4g}; "
                "expected probabilities: apply the sigmoid or softmax in output=lambda out: ..."
            )
        return self


@dataclass(frozen=True)
class DetectionReader:
    """Reads a detector's output: candidates, and the probability of each class in the image.

    It is the selector of `OutputReader` for detectors: called with an output it returns class probabilities (N, K), the
    highest among the candidates.

    Attributes
    ----------
    num_classes : int or None
        The number K of classes; None where the output tells it.
    select : str, int, callable or None
        Which part of the output holds the candidates, if not all of it.
    """

    num_classes: int | None = None
    select: OutputSelector = None
    __name__ = "best candidate"

    def __call__(self, output: Any) -> Tensor:
        """Return class probabilities (N, K)."""
        selected = pick_output(output, self.select)
        if isinstance(selected, Tensor) and selected.ndim == 2:
            return selected
        return self._read(selected, (1, 1)).probabilities.amax(1)

    def check(self, output: Any) -> None:
        """Raise ConvscopeError for an output that cannot be read, or whose scores are no probabilities."""
        selected = pick_output(output, self.select)
        if not (isinstance(selected, Tensor) and selected.ndim == 2):
            self._read(selected, (1, 1)).require_probabilities()

    def candidates(self, output: Any, input_size: Sequence[int]) -> Candidates:
        """Read the candidates for inputs of `input_size`, height and width in pixels.

        Raises
        ------
        ConvscopeError
            If the output has none of `FORMATS`.
        """
        return self._read(pick_output(output, self.select), input_size)

    def _read(self, output: Any, input_size: Sequence[int]) -> Candidates:
        if is_list_of_boxes(output):
            return _from_lists(output, self.num_classes, input_size)
        logits, boxes = _part(output, "logits"), _part(output, "pred_boxes")
        if isinstance(logits, Tensor) and isinstance(boxes, Tensor):
            return _from_queries(logits, boxes, self.num_classes)
        boxes, scores = _part(output, "boxes"), _part(output, "scores")
        if isinstance(boxes, Tensor) and isinstance(scores, Tensor) and scores.ndim == boxes.ndim == 3:
            return Candidates(_relative(boxes, input_size), scores.float(), is_final=False)
        tensor = primary_tensor(output)
        if tensor is None or tensor.ndim != 3:
            raise ConvscopeError(
                f"a detector returned {describe_output(output)}; expected {FORMATS}: bring it to one of these with "
                "output=lambda out: ..."
            )
        return _from_columns(tensor, self.num_classes, input_size)


def is_list_of_boxes(output: object) -> bool:
    """Whether an output is a list with boxes and scores for each image, as torchvision's detectors return."""
    return (
        isinstance(output, list | tuple)
        and len(output) > 0
        and all(isinstance(part, Mapping) and {"boxes", "scores"} <= part.keys() for part in output)
    )


def _part(output: Any, name: str) -> object:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _from_lists(output: Sequence[Mapping[str, Any]], num_classes: int | None, size: Sequence[int]) -> Candidates:
    """Read detections of single images, padded with boxes of probability 0 to the same number, at least 1."""
    if num_classes is None and any("labels" in part for part in output):
        raise ConvscopeError(
            "the detector returns lists of boxes, and its number of classes is not known; name them: classes=[...]"
        )
    num_classes = num_classes or 1
    parts = [_boxes_labels_scores(part, num_classes) for part in output]
    count = max(1, *(len(boxes) for boxes, _, _ in parts))
    padded_boxes, probabilities = [], []
    for boxes, labels, scores in parts:
        missing = count - len(boxes)
        padded_boxes.append(torch.cat([boxes, boxes.new_zeros(missing, 4)]))
        by_class = scores[:, None] * torch.nn.functional.one_hot(labels, num_classes).to(scores)
        probabilities.append(torch.cat([by_class, by_class.new_zeros(missing, num_classes)]))
    return Candidates(_relative(torch.stack(padded_boxes), size), torch.stack(probabilities).float(), is_final=True)


def _boxes_labels_scores(part: Mapping[str, Any], num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes (n, 4), labels (n,) and scores (n,) of one image; boxes that are None are none."""
    if part["boxes"] is None:
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    boxes, scores = torch.as_tensor(part["boxes"]).float().reshape(-1, 4), torch.as_tensor(part["scores"]).float()
    if "labels" not in part and num_classes > 1:
        raise ConvscopeError(f"the detector returned boxes without labels; expected one of {num_classes} for each")
    labels = torch.as_tensor(part["labels"]).long() if "labels" in part else torch.zeros(len(boxes)).long()
    if len(labels) and int(labels.max()) >= num_classes:
        raise ConvscopeError(
            f"the detector returned class {int(labels.max())}; expected classes 0 to {num_classes - 1}"
        )
    return boxes, labels.to(boxes.device), scores


def _from_queries(logits: Tensor, boxes: Tensor, num_classes: int | None) -> Candidates:
    """Read the queries of DETR's family; where there is one logit more than classes, the last is "no object"."""
    if num_classes is not None and logits.shape[2] > num_classes:
        probabilities = logits.float().softmax(2)[..., :num_classes]
    else:
        probabilities = logits.float().sigmoid()
    return Candidates(_corners(boxes.float()), probabilities, is_final=True)


def _from_columns(tensor: Tensor, num_classes: int | None, size: Sequence[int]) -> Candidates:
    """Read YOLO's output (N, 4 + K, A); also (N, A, 4 + K), and (N, A, 5 + K) with objectness, if K is known."""
    rows, columns = tensor.shape[1:]
    if num_classes is not None and rows != 4 + num_classes and columns in (4 + num_classes, 5 + num_classes):
        tensor, rows = tensor.transpose(1, 2), columns
    if rows < 5 or (num_classes is not None and rows - 4 not in (num_classes, num_classes + 1)):
        expected = "(N, 4 + K, A)" if num_classes is None else f"(N, {4 + num_classes}, A)"
        raise ConvscopeError(f"a detector returned a tensor of shape {tuple(tensor.shape)}; expected {expected}")
    tensor = tensor.transpose(1, 2).float()
    scores = tensor[..., 4:]
    if num_classes is not None and scores.shape[2] == num_classes + 1:
        scores = scores[..., :1] * scores[..., 1:]
    return Candidates(_relative(_corners(tensor[..., :4]), size), scores, is_final=False)


def _corners(boxes: Tensor) -> Tensor:
    """Turn centres and sizes (..., 4) into left, top, right and bottom edges."""
    centers, sizes = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centers - sizes / 2, centers + sizes / 2], dim=-1)


def _relative(boxes: Tensor, input_size: Sequence[int]) -> Tensor:
    """Divide corners in pixels by the size of the input, (H, W)."""
    height, width = input_size
    return boxes.float() / boxes.new_tensor([width, height, width, height]).float()


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the overlap of boxes: the area of their intersection over that of their union.

    Parameters
    ----------
    boxes, others : Tensor of shape (..., 4)
        Edges; their other axes are broadcast.

    Returns
    -------
    Tensor of shape (...)
        0 to 1; 0 for two boxes without area.
    """
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = _area(boxes) + _area(others) - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
