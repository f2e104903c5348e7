"""Baselines for the scores of patterns, crops of photographs for dead units, and notes on poor results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from convscope.datasets.image_inputs import open_images
from convscope.engine.batching import batch_size, forward_bytes
from convscope.engine.capture import LayerOutputs
from convscope.engine.model import LOGITS, Model
from convscope.featurevis.defaults import Size
from convscope.featurevis.objective import Forward, Objective, channels_first
from convscope.featurevis.optimizer import adam_step, gradient_ascent
from convscope.featurevis.parameterization import PhaseImage, PyramidResidualImage
from convscope.featurevis.recipes import ADAM_DAMPING, RETRY_STEPS
from convscope.featurevis.request import PatternRequest
from convscope.featurevis.task import BatchObjective, OptimizationTask, render_uint8
from convscope.images.failures import Failure
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing
from convscope.samples import photographs

NUM_NOISE_IMAGES = 8
CROP_STEP_SIZE = 0.1
MIN_CONFIDENCE = 0.7  # a class is optimised again below this probability


def noise_images(preprocessing: Preprocessing, size: Size, seed: int) -> Tensor:
    """Return eight noise images (8, C, H, W) uint8: four of uniform noise, four with a natural spectrum."""
    seeds = [(seed * NUM_NOISE_IMAGES + i) % (1 << 63) for i in range(NUM_NOISE_IMAGES)]
    generators = [Generator().manual_seed(image_seed) for image_seed in seeds]
    half = NUM_NOISE_IMAGES // 2
    uniform = [128 + 20 * torch.rand((preprocessing.channels, *size), generator=g) for g in generators[:half]]
    natural = PhaseImage(generators[half:], preprocessing.channels, size, torch.device("cpu"))
    return torch.cat([torch.stack(uniform).to(torch.uint8), render_uint8(natural)])


def noise_baseline(
    forward: Forward,
    request: PatternRequest,
    model: Model,
    size: Size,
    seed: int,
    memory: int,
    skip_preprocessing: bool,
) -> Tensor:
    """Return the highest value of each image's objective on noise (U,), NaN where it compares images."""
    images, maxima = noise_images(model.preprocessing, size, seed).float(), []
    height, width = model.preprocessing.image_size
    image_bytes = forward_bytes(model) * (size[0] * size[1]) / (height * width)
    with torch.no_grad():
        for part in torch.split(images, batch_size(model, image_bytes, memory, NUM_NOISE_IMAGES)):
            outputs = forward(part if skip_preprocessing else model.preprocessing.normalize(part / 255))
            maxima.append(_maxima(request, outputs))
    return torch.stack(maxima).amax(0)


def reference_baseline(
    forward: Forward, request: PatternRequest, images: object, model: Model, memory: int, skip_preprocessing: bool
) -> tuple[Tensor, tuple[Failure, ...]]:
    """Return the highest value of each image's objective on the user's images (U,), and the images that failed."""
    loader = ImageBatchLoader(open_images(images), model.preprocessing)
    maxima = []
    with torch.no_grad():
        for batch in loader.batches(batch_size(model, forward_bytes(model), memory)):
            x = model.preprocessing.denormalize(batch.x) * 255 if skip_preprocessing else batch.x
            maxima.append(_maxima(request, forward(x)))
    return torch.stack(maxima).amax(0), tuple(loader.failed)


def _maxima(request: PatternRequest, outputs: LayerOutputs) -> Tensor:
    return torch.cat([_maximum(objective, outputs) for objective in request.objectives])


def _maximum(objective: Objective, outputs: LayerOutputs) -> Tensor:
    if objective.num_images > 1 or objective.paired:
        return torch.full((objective.num_images,), torch.nan)
    return objective(outputs).max()[None].cpu()


@dataclass(frozen=True)
class MaxActivations:
    """The strongest activation of each channel of a layer on the sample photographs.

    Attributes
    ----------
    images : Tensor
        The photographs (N, C, H, W) in [0, 1].
    values, image_indices, positions : Tensor
        (units,): the activation, its photograph, and its position in the flattened map.
    grid : (int, int) or None
        Height and width of the layer's map, None for layers without rows and columns.
    """

    images: Tensor
    values: Tensor
    image_indices: Tensor
    positions: Tensor
    grid: Size | None

    def crop(self, unit: int, size: Size) -> Tensor:
        """Return the crop (C, H, W) around a unit's strongest activation; the whole image, resized, without a grid."""
        image, position = int(self.image_indices[unit]), int(self.positions[unit])
        pixels = self.images[image : image + 1]
        if self.grid is not None:
            height, width = self.grid
            pixels = _crop_around(pixels, (position // width / height, position % width / width), size)
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        return pixels[0]


def max_activations(forward: Forward, model: Model, layer: str) -> MaxActivations:
    """Run the sample photographs and return the strongest activation of each channel of a layer."""
    loader = ImageBatchLoader(photographs(), model.preprocessing)
    batches = [batch.x for batch in loader.batches(model.fixed_batch_size or NUM_NOISE_IMAGES)]
    with torch.no_grad():
        maps = torch.cat([channels_first(forward(batch), layer) for batch in batches])
    values, positions = maps.reshape(*maps.shape[:2], -1).max(2)
    largest, image_indices = values.max(0)
    shape = model.layers.find(layer).shape[1:]
    return MaxActivations(
        model.preprocessing.denormalize(torch.cat(batches)).clamp(0, 1),
        largest.cpu(),
        image_indices.cpu(),
        positions.gather(0, image_indices[None])[0].cpu(),
        (shape[0], shape[1]) if len(shape) == 2 else None,
    )


def optimize_from_crops(crops: Tensor, objective: BatchObjective, model: Model) -> Tensor:
    """Return patterns (U, C, H, W) uint8 that start from crops (U, C, H, W) in [0, 1], without transforms."""
    canvas = PyramidResidualImage(crops.to(model.device))
    gradient_ascent(
        canvas.params,
        lambda _: objective(model.preprocessing.normalize(canvas.images())),
        adam_step(canvas.params, CROP_STEP_SIZE, ADAM_DAMPING),
        RETRY_STEPS,
        redirect_steps=RETRY_STEPS,
        keep_best=True,
    )
    return render_uint8(canvas)


def _crop_around(pixels: Tensor, centre: tuple[float, float], size: Size) -> Tensor:
    """Crop images (N, C, H, W) to at most `size` around a centre in [0, 1], inside the image."""
    for axis, (fraction, side) in enumerate(zip(centre, size, strict=True)):
        length = pixels.shape[2 + axis]
        begin = min(max(round(fraction * length - side / 2), 0), max(length - side, 0))
        pixels = pixels.narrow(2 + axis, begin, min(side, length))
    return pixels


def shuffled_confidence(
    model: Model, forward: Forward, task: OptimizationTask, images: Tensor, classes: Sequence[int]
) -> Tensor:
    """Return the probability (U,) of each image's class after diagonal quadrants are exchanged.

    Local evidence for the class survives this. Images that depend on their global layout alone transfer poorly to other
    models.
    """
    shuffled = images.roll((images.shape[2] // 2, images.shape[3] // 2), (2, 3)).float() / 255
    with torch.no_grad():
        logits = forward(task.preprocess(shuffled).contiguous(memory_format=torch.channels_last))[LOGITS]
    indices = torch.tensor(classes, device=logits.device)[:, None]
    return model.probabilities(logits).gather(1, indices)[:, 0].cpu()


def quality_notes(
    names: Sequence[str],
    scores: Tensor,
    noise_scores: Tensor,
    unit_notes: Mapping[int, str],
    confidence: Tensor | None,
) -> list[str]:
    """Return one line for each image that does not show what it was optimised for.

    Parameters
    ----------
    names : sequence of str
        One per image.
    scores, noise_scores : Tensor
        (U,): the image's score and that on noise.
    unit_notes : mapping of int to str
        What `retry_dead_units` says of an image, by index.
    confidence : Tensor, optional
        (U,): `shuffled_confidence`.
    """
    notes = []
    for i, name in enumerate(names):
        score, noise_score = float(scores[i]), float(noise_scores[i])
        if i in unit_notes:
            notes.append(f"{name} {unit_notes[i]}")
        elif score <= noise_score:
            notes.append(
                f"{name} has a score of {score:.3g}, not above the noise baseline ({noise_score:.3g}). "
                "The pattern does not show what it responds to."
            )
        elif confidence is not None and float(confidence[i]) < MIN_CONFIDENCE:
            notes.append(
                f"{name} has a probability of {float(confidence[i]):.2f} after the quadrants of the image are "
                "shuffled. The pattern may transfer poorly to other models."
            )
    return notes
