"""Detect objects: the boxes that a detector finds in images."""

from __future__ import annotations

import numpy as np
import torch

from convscope.arguments import check_arguments
from convscope.datasets.image_inputs import open_images
from convscope.detection.result import Detections
from convscope.engine import capture
from convscope.engine.batching import MEMORY, batch_size, forward_bytes, iter_batches
from convscope.engine.candidates import Candidates
from convscope.engine.validation import require_finite
from convscope.errors import require_number, warns_of_failures
from convscope.images.geometry import Geometry
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model


@warns_of_failures
@check_arguments
def detect(
    model: ModelLike,
    images: object,
    threshold: float = 0.5,
    *,
    overlap: float = 0.5,
    fit: str = "squash",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Detections:
    """Detect objects in images.

    Each candidate of the network has the class that is most probable for it, and this probability as its score.

    Parameters
    ----------
    model : Model, nn.Module or str
        A detector: one of torchvision or Hugging Face (DETR's family), or any network whose output is said to be that
        of a detector: ``convscope.load(..., task="detection")``.
    images : path, sequence of paths, PIL images, arrays or tensor
        Any form that `convscope.predict` takes; N images.
    threshold : float
        The smallest score of a box, 0 to 1.
    overlap : float
        Of two boxes of a class whose overlap (intersection over union) exceeds this, the less probable one is removed;
        only where the network does not remove such boxes itself.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    memory : int
        Bytes that a batch's intermediate results may take.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` after every batch with numbers of images; exceptions raised in it cancel cleanly.

    Returns
    -------
    Detections
        Boxes in pixels of the images, clipped to them, with labels, names and scores. ``detections[0]`` holds those of
        the first image. Images that cannot be read are left out and listed in ``failed``.

    Raises
    ------
    ConvscopeError
        For a network that is no detector, for values that are not finite, and when no image can be read.

    Examples
    --------
    >>> import torch, convscope
    >>> def one_box(images):  # a detector of one class that finds the same box everywhere: centre, size, probability
    ...     return torch.tensor([16.0, 16, 8, 4, 0.9]).reshape(1, 5, 1).repeat(len(images), 1, 1)
    >>> model = convscope.load(one_box, task="detection", classes=["dog"], preprocessing={"size": 32})
    >>> detections = convscope.detect(model, torch.zeros(1, 3, 32, 32))
    >>> detections.boxes
    array([[12., 14., 20., 18.]], dtype=float32)
    >>> detections.names
    ['dog']
    """
    require_number("threshold", threshold, minimum=0, maximum=1)
    require_number("overlap", overlap, minimum=0, maximum=1)
    model = as_model(model, images)
    reader = model.detection_reader
    loader = ImageBatchLoader(
        open_images(images), model.preprocessing, fit=fit, max_pixels=max_pixels, keep_copies=True
    )
    indices: list[int] = []
    geometry: list[Geometry] = []
    by_image: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    size = batch_size(model, forward_bytes(model), memory)
    with progress_bar(progress, "detect") as report, torch.no_grad(), capture.capture_layers(model, []) as run:
        for batch in iter_batches(loader, size, report):
            outputs = run(batch.x)
            require_finite(model, outputs.logits, "the network's output")
            candidates = reader.candidates(outputs.output, outputs.input_size).require_probabilities()
            by_image += [
                _boxes_of_image(candidates, n, image_geometry, threshold, overlap)
                for n, image_geometry in enumerate(batch.geometry)
            ]
            indices += batch.indices
            geometry += batch.geometry
    boxes, labels, scores = (np.concatenate(part) for part in zip(*by_image, strict=True))
    return Detections(
        model,
        boxes=boxes,
        labels=labels,
        scores=scores,
        counts=np.array([len(part[0]) for part in by_image]),
        image_names=tuple(loader.names[i] for i in indices),
        geometry=tuple(geometry),
        image_source=loader,
        image_indices=tuple(indices),
        threshold=float(threshold),
        overlap=float(overlap),
        fit=fit,
        notes=tuple(loader.notes),
        failed=tuple(loader.failed),
    )


def _boxes_of_image(
    candidates: Candidates, n: int, geometry: Geometry, threshold: float, overlap: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return boxes (n, 4) in pixels, labels and scores of the n candidates that are good enough, the best first."""
    scores, labels = candidates.probabilities[n].max(1)
    rows = (scores >= threshold) & (scores > 0)
    boxes, scores, labels = candidates.boxes[n][rows], scores[rows], labels[rows]
    order = scores.argsort(descending=True, stable=True)
    if not candidates.is_final:
        from torchvision.ops import batched_nms

        order = batched_nms(boxes, scores, labels, overlap)
    height, width = geometry.image_size
    edges = geometry.boxes_to_original(boxes[order])
    boxes = torch.minimum(edges.clamp(min=0), edges.new_tensor([width, height] * 2))
    return boxes.cpu().numpy(), labels[order].cpu().numpy(), scores[order].cpu().numpy()
