"""Find the main concepts behind a class, and measure their importance (CRAFT)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.datasets.image_inputs import open_images
from convscope.decomposition.crops import crop_boxes, cut_examples, non_overlapping_top_k
from convscope.decomposition.layer_access import (
    check_image_model,
    iter_activations,
    last_nonnegative_layer,
    layer_activations,
    logits_from_layer,
    resolve_class,
    spatial_layer,
)
from convscope.decomposition.nmf import (
    Factorization,
    check_dependencies,
    coefficients_to_maps,
    factorize,
    nnls,
    position_vectors,
)
from convscope.decomposition.result import Concepts
from convscope.decomposition.sobol import precision_notes, saltelli_points, total_indices
from convscope.engine import capture
from convscope.engine.batching import MEMORY, forward_batch_size, pad_to_fixed_batch
from convscope.engine.layer_selection import LayerLike
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError, require_int, warns_of_failures
from convscope.images.batches import Batch
from convscope.images.decoding import Array
from convscope.images.geometry import Geometry
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model

PATCH_HEIGHT = 112  # pixels of the patches in a result
THUMBNAIL_SIDE = 160  # pixels of the thumbnails in a result
MAX_OVERLAP = 0.3  # intersection over union of two example crops of a concept


@warns_of_failures
@check_arguments
def concepts(
    model: ModelLike,
    images: object,
    target: int | str,
    *,
    layer: LayerLike | None = None,
    count: int = 10,
    crop: float = 1 / 3,
    crops: int = 32,
    only_predicted: bool = True,
    patches: int = 8,
    sobol_points: int = 32,
    n_evaluated: int = 32,
    seed: int = 0,
    fit: str = "squash",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Concepts:
    """Find the main concepts behind a class: directions of a layer that recur in crops of its images.

    The layer's activations of all crops, averaged over positions, are the rows of a matrix A. Non-negative matrix
    factorisation minimises |A - U W| over U >= 0 and W >= 0; the `count` rows of W are the concepts. The importance of
    concept i is its total Sobol index E[Var(f | M_j, j != i)] / Var(f), where f is the class's logit when the concepts
    of an image are scaled by random factors M_i in [0, 1].

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        Any form that `convscope.predict` takes: images of the class. They are cropped at their own resolution.
    target : int or str
        The class, by index or name.
    layer : str, Layer or nn.Module, optional
        A layer, as in `convscope.activations`, without negative activations, such as one after a ReLU. By default the
        last one.
    count : int
        Number of concepts.
    crop : float
        Side of a crop, as a fraction of the image's, in (0, 1]. Crops have the proportions of the network's input.
    crops : int
        Maximum number of crops per image. They form a grid with half a crop from one to the next; of a larger grid, so
        many are drawn at random.
    only_predicted : bool
        Leave out images that the network predicts as another class.
    patches : int
        Maximum number of example crops per concept.
    sobol_points : int
        Points of the Sobol sequence, preferably a power of two: ``sobol_points * (count + 2)`` passes through the part
        of the network after the layer for each evaluated image.
    n_evaluated : int
        Maximum number of images, evenly spaced, on which importance is measured.
    seed : int
        Seed of random crops and of the Sobol sequence. An image has the same crops whatever the other images are.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    memory : int
        Bytes for intermediate results.
    max_pixels : int
        Images with more pixels are refused.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        with the number of steps done and in total; an image is a step when it is classified, when it is cropped and
        when it is evaluated.

    Returns
    -------
    Concepts
        Concepts in order of importance, with example patches and heatmaps.

    Raises
    ------
    ConvscopeError
        For an unknown class or layer, a layer with negative activations, arguments out of range, if no image is left,
        and without scikit-learn or scipy (``convscope[concepts]``).

    References
    ----------
    Fel et al., CRAFT: Concept Recursive Activation FacTorization for Explainability, CVPR 2023.

    Examples
    --------
    >>> import convscope
    >>> from convscope import samples
    >>> model = convscope.load("lite0")
    >>> panda = [path for path in samples.photographs() if "panda" in path]
    >>> result = convscope.concepts(model, panda, "lesser panda", count=3, crops=8, sobol_points=4)
    >>> result.bank.shape, result.importance.shape, result.heatmaps.shape
    ((3, 1280), (3,), (1, 3, 7, 7))
    """
    check_dependencies()
    model = as_model(model)
    check_image_model(model.preprocessing, "concepts")
    with progress_bar(progress, "concepts") as report:
        job = _Job(
            model=model,
            loader=ImageBatchLoader(
                open_images(images), model.preprocessing, fit=fit, max_pixels=max_pixels, keep_copies=True
            ),
            target=resolve_class(model, target),
            layer=layer,
            count=count,
            crop=crop,
            crops=crops,
            only_predicted=only_predicted,
            patches=patches,
            sobol_points=sobol_points,
            n_evaluated=n_evaluated,
            seed=seed,
            fit=fit,
            memory=memory,
            max_pixels=max_pixels,
            progress=report,
        )
        job.check()
        selection = _select_images(job)
        name = last_nonnegative_layer(model, next(job.loader.batches(1)).x, layer).name
        boxes, vectors = _crop_activations(job, name, selection)
        factors = factorize(vectors, count)
        evaluations = _evaluate(job, name, selection, factors.bank)
        return _collect(job, name, selection, boxes, factors, evaluations)


@dataclass(frozen=True)
class _Job:
    """The arguments of `concepts`."""

    model: Model
    loader: ImageBatchLoader
    target: int
    layer: LayerLike | None
    count: int
    crop: float
    crops: int
    only_predicted: bool
    patches: int
    sobol_points: int
    n_evaluated: int
    seed: int
    fit: str
    memory: int
    max_pixels: int
    progress: Progress

    def check(self) -> None:
        """Raise ConvscopeError for a layer or a number that cannot be used."""
        if self.layer is not None:
            spatial_layer(self.model, self.layer)
        if not 0 < self.crop <= 1:
            raise ConvscopeError(
                f"crop is {self.crop!r}; expected a fraction of the image's sides, above 0 and up to 1"
            )
        for name in ("count", "crops", "patches", "n_evaluated"):
            require_int(name, getattr(self, name))
        require_int("sobol_points", self.sobol_points, 2)

    def report(self, done: int) -> None:
        """Report the number of finished steps."""
        self.progress(done, self.num_steps)

    @property
    def num_steps(self) -> int:
        """Steps in total: images to classify, to crop and to evaluate."""
        return 2 * len(self.loader) + min(self.n_evaluated, len(self.loader))


class _Selection(NamedTuple):
    """The images that are used: indices into the loader, logits (N,) of the class, and notes on the others."""

    indices: list[int]
    logits: np.ndarray
    notes: list[str]

    def evaluated(self, limit: int) -> np.ndarray:
        """Choose at most `limit` evenly spaced images: positions in `indices`."""
        count = len(self.indices)
        return np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int))


class _Evaluation(NamedTuple):
    """The concepts in one image: Sobol indices (R,), effects (R,), the reconstructed logit, heatmaps (1, R, h, w)."""

    indices: Tensor
    effects: Tensor
    reconstructed_logit: float
    heatmaps: Tensor
    geometry: Geometry


def _select_images(job: _Job) -> _Selection:
    """Classify all images and select those to use."""
    model = job.model
    indices: list[int] = []
    class_logits: list[float] = []
    others: Counter[int] = Counter()
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        for batch in job.loader.batches(forward_batch_size(model, job.memory)):
            logits = run(pad_to_fixed_batch(model, batch.x)).logits
            require_finite(model, logits, "the network's output")
            for index, row in zip(batch.indices, logits.cpu(), strict=False):
                top = int(row.argmax())
                if job.only_predicted and top != job.target:
                    others[top] += 1
                    continue
                indices.append(index)
                class_logits.append(float(row[job.target]))
            job.report(batch.indices[-1] + 1)
    name, num_others = model.class_name(job.target), others.total()
    predictions = ", ".join(f"{model.class_name(k)} ({n})" for k, n in others.most_common(3))
    if not indices:
        raise ConvscopeError(
            f"the model classifies none of the {num_others} images as {name!r}, but as {predictions}; "
            "give other images, or only_predicted=False"
        )
    notes = []
    if num_others:
        total = num_others + len(indices)
        notes = [f"left out {num_others} of {total} images that are not classified as {name!r}, but as {predictions}"]
    return _Selection(indices, np.array(class_logits), notes)


def _crop_activations(job: _Job, layer: str, selection: _Selection) -> tuple[np.ndarray, Tensor]:
    """Crop all images; return the crops (M, 5) and the mean activations (M, C) of the layer."""
    input_size = job.model.preprocessing.image_size
    vectors, boxes = [], []
    with iter_activations(job.model, layer, job.memory) as iterate:
        for i, index in enumerate(selection.indices):
            original = job.loader.original(index)
            image_boxes = crop_boxes(original.shape[:2], input_size, job.crop, job.crops, (job.seed, index))
            parts = [original[top:bottom, left:right] for top, left, bottom, right in image_boxes]
            crops = ImageBatchLoader(parts, job.model.preprocessing)
            vectors += [maps.flatten(2).mean(2) for _, maps in iterate(crops)]
            boxes.append(np.insert(image_boxes, 0, i, axis=1))
            job.report(len(job.loader) + index + 1)
    return np.concatenate(boxes), torch.cat(vectors)


def _evaluate(job: _Job, layer: str, selection: _Selection, bank: Tensor) -> list[_Evaluation]:
    """Measure importance and effects of the concepts on some of the images."""
    evaluated = {selection.indices[i] for i in selection.evaluated(job.n_evaluated)}
    points = saltelli_points(job.count, job.sobol_points, job.seed)
    evaluations: list[_Evaluation] = []
    for batch in job.loader.batches(1):
        if batch.indices[0] in evaluated:
            evaluations.append(_evaluate_image(job, layer, batch, bank, points))
            job.report(job.num_steps - len(evaluated) + len(evaluations))
    return evaluations


def _evaluate_image(job: _Job, layer: str, batch: Batch, bank: Tensor, points: Tensor) -> _Evaluation:
    """Reconstruct one image's activations with its concepts scaled down (at `points`), and with each one removed."""
    maps = layer_activations(job.model, layer, batch.x)
    count = len(bank)
    coefficients = nnls(position_vectors(maps), bank)
    scales = torch.cat([points, 1 - torch.eye(count), torch.ones(1, count)])
    make_maps = partial(_reconstruct, coefficients, bank, maps.shape, job.model.device)
    logits = logits_from_layer(job.model, layer, batch.x, scales, make_maps, job.memory)[:, job.target].double()
    ablated, complete = logits[len(points) : -1], logits[-1]
    return _Evaluation(
        total_indices(logits[: len(points)], count),
        complete - ablated,
        float(complete),
        coefficients_to_maps(coefficients, maps.shape),
        batch.geometry[0],
    )


def _reconstruct(coefficients: Tensor, bank: Tensor, shape: torch.Size, device: torch.device, scales: Tensor) -> Tensor:
    """Make activations (M, C, h, w) from concepts whose coefficients (h w, R) are multiplied by `scales` (M, R)."""
    vectors = (scales[:, None] * coefficients) @ bank
    return vectors.float().transpose(1, 2).reshape(len(scales), -1, *shape[2:]).to(device)


def _collect(
    job: _Job,
    layer: str,
    selection: _Selection,
    crops: np.ndarray,
    factors: Factorization,
    evaluations: Sequence[_Evaluation],
) -> Concepts:
    """Sort the concepts by importance and make the result."""
    indices = torch.stack([evaluation.indices for evaluation in evaluations])
    precision = precision_notes(indices.mean(0), len(evaluations), job.sobol_points)
    order = indices.mean(0).argsort(descending=True, stable=True)
    coefficients = factors.coefficients[:, order].float().numpy()
    examples = np.stack([non_overlapping_top_k(column, crops, job.patches, MAX_OVERLAP) for column in coefficients.T])
    evaluated = selection.evaluated(job.n_evaluated)
    thumbnails, shapes = _thumbnails(job, selection, evaluations)
    height, width = job.model.preprocessing.image_size

    def load_image(i: int) -> Array:
        return job.loader.original(selection.indices[i])

    return Concepts(
        job.model,
        bank=factors.bank[order].float().numpy(),
        importance=indices.mean(0)[order].numpy(),
        indices=indices[:, order].numpy(),
        ablation_effects=torch.stack([evaluation.effects for evaluation in evaluations]).mean(0)[order].numpy(),
        heatmaps=torch.cat([evaluation.heatmaps for evaluation in evaluations])[:, order].numpy(),
        evaluated_indices=evaluated,
        thumbnails=thumbnails,
        shapes=shapes,
        logits=selection.logits[evaluated],
        reconstructed_logits=np.array([evaluation.reconstructed_logit for evaluation in evaluations]),
        crops=crops,
        coefficients=coefficients,
        examples=examples,
        patches=cut_examples(load_image, crops, examples, (PATCH_HEIGHT, max(1, round(PATCH_HEIGHT * width / height)))),
        reconstruction_error=factors.error,
        layer=layer,
        target=job.target,
        crop=job.crop,
        sobol_points=job.sobol_points,
        seed=job.seed,
        fit=job.fit,
        memory=job.memory,
        max_pixels=job.max_pixels,
        image_names=tuple(job.loader.names[i] for i in selection.indices),
        geometry=tuple(evaluation.geometry for evaluation in evaluations),
        image_source=job.loader,
        image_indices=tuple(selection.indices),
        notes=(*job.loader.notes, *selection.notes, *precision),
        failed=tuple(job.loader.failed),
    )


def _thumbnails(job: _Job, selection: _Selection, evaluations: Sequence[_Evaluation]) -> tuple[np.ndarray, np.ndarray]:
    """Resize the network's view of the evaluated images: uint8 (J, 160, 160, 3), and its (height, width) (J, 2)."""
    thumbnails, shapes = [], []
    for i, evaluation in zip(selection.evaluated(job.n_evaluated), evaluations, strict=True):
        original = Image.fromarray(job.loader.original(selection.indices[i]))
        limits = (original.height, original.width, original.height, original.width)
        box = evaluation.geometry.box
        top, left, bottom, right = (min(max(0.0, edge), limit) for edge, limit in zip(box, limits, strict=True))
        size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
        thumbnail = original.resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        thumbnails.append(np.asarray(thumbnail))
        shapes.append((max(1, round(bottom - top)), max(1, round(right - left))))
    return np.stack(thumbnails), np.array(shapes)
