"""What a pattern is worth: beside noise, beside natural pictures, and where a unit does not fire at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from convscope.engine.batching import batch_size, forward_bytes
from convscope.engine.capture import LayerOutputs
from convscope.engine.model import LOGITS, Model
from convscope.featurevis.objectives import Objective
from convscope.featurevis.optimizer import adam_step, gradient_ascent
from convscope.featurevis.parameterization import PhaseImage, PyramidResidualImage
from convscope.featurevis.recipes import ADAM_DAMPING, RETRY_STEPS, OptimizationTask, render_uint8
from convscope.featurevis.request import PatternRequest
from convscope.images.loading import ImageBatchLoader
from convscope.images.preprocessing import Preprocessing
from convscope.samples import photographs

Forward = Callable[[Tensor], LayerOutputs]
NUM_NOISE_IMAGES = 8


def noise_images(preprocessing: Preprocessing, size: tuple[int, int], seed: int) -> Tensor:
    """Eight pictures (8, C, H, W) uint8 that show nothing: half of them the textbook's gray noise, half with the
    spectrum of a photograph and random phases."""
    draws = [Generator().manual_seed((seed * NUM_NOISE_IMAGES + i) % (1 << 63)) for i in range(NUM_NOISE_IMAGES)]
    half = NUM_NOISE_IMAGES // 2
    gray = torch.stack([128 + 20 * torch.rand((preprocessing.channels, *size), generator=g) for g in draws[:half]])
    cloudy = render_uint8(PhaseImage(draws[half:], preprocessing.channels, size, torch.device("cpu")))
    return torch.cat([gray.to(torch.uint8), cloudy])


def noise_baseline(
    run: Forward, wanted: PatternRequest, model: Model, size: tuple[int, int], seed: int, memory: int, raw: bool
) -> Tensor:
    """Each picture's objective on noise, the best of eight; NaN where it compares pictures. `raw`: unprepared."""
    images, found = noise_images(model.preprocessing, size, seed).float(), []
    pixels, own = size[0] * size[1], model.preprocessing.image_size
    each = forward_bytes(model) * pixels / (own[0] * own[1])
    with torch.no_grad():
        for part in torch.split(images, batch_size(model, each, memory, NUM_NOISE_IMAGES)):
            seen = run(part if raw else model.preprocessing.normalize(part / 255))
            found.append(torch.cat([_best(objective, seen) for objective in wanted.objectives]))
    return torch.stack(found).amax(0)


def reference_baseline(
    run: Forward, wanted: PatternRequest, images: Any, model: Model, memory: int, raw: bool
) -> tuple[Tensor, ImageBatchLoader]:
    """Each picture's objective on the natural pictures, the best of them; and these, some of which may have failed.

    `raw`: unprepared.
    """
    pictures = ImageBatchLoader(images, model.preprocessing)
    found = []
    with torch.no_grad():
        for batch in pictures.batches(batch_size(model, forward_bytes(model), memory)):
            seen = run(model.preprocessing.denormalize(batch.x) * 255 if raw else batch.x)
            found.append(torch.cat([_best(objective, seen) for objective in wanted.objectives]))
    return torch.stack(found).amax(0), pictures


def _best(objective: Objective, seen: LayerOutputs) -> Tensor:
    if objective.num_images > 1 or objective.paired:
        return torch.full((objective.num_images,), torch.nan)
    return objective.function(seen).max()[None].cpu()


@dataclass(frozen=True)
class MaxActivations:
    """How much each channel of a layer fires at most in the sample photographs (units,), in which of them, and where.

    `shown` are the photographs (N, C, H, W) in [0, 1], `grid` the layer's height and width, None without places.
    """

    images: Tensor
    values: Tensor
    image_indices: Tensor
    positions: Tensor
    grid: tuple[int, int] | None

    def crop(self, number: int, size: tuple[int, int]) -> Tensor:
        """What of a photograph (C, H, W) excites a channel most, in this size: the photograph itself without places."""
        image, position = int(self.image_indices[number]), int(self.positions[number])
        pixels = self.images[image : image + 1]
        if self.grid is not None:
            height, width = self.grid
            pixels = _cut(pixels, (position // width / height, position % width / width), size)
        return _fitted(pixels, size)[0]


def max_activations(run: Forward, model: Model, layer: str) -> MaxActivations:
    """All channels of a layer on the sample photographs."""
    batches = list(
        ImageBatchLoader(photographs(), model.preprocessing).batches(model.fixed_batch_size or NUM_NOISE_IMAGES)
    )
    shown = torch.cat([batch.x for batch in batches])
    with torch.no_grad():
        maps = torch.cat([run(batch.x).maps[layer].float() for batch in batches])
    maps = (maps.transpose(1, 2) if maps.ndim == 3 else maps).flatten(2) if maps.ndim > 2 else maps[:, :, None]
    values, positions = maps.max(2)
    most, which = values.max(0)
    shape = model.layers.find(layer).shape[1:]
    return MaxActivations(
        model.preprocessing.denormalize(shown).clamp(0, 1),
        most.cpu(),
        which.cpu(),
        positions.gather(0, which[None])[0].cpu(),
        (shape[0], shape[1]) if len(shape) == 2 else None,
    )


def optimize_from_crops(pieces: Tensor, measure: Callable[[Tensor], Tensor], model: Model) -> Tensor:
    """Patterns (U, C, H, W) uint8 from pieces of photographs, climbed as they lie."""
    canvas = PyramidResidualImage(pieces.to(model.device))
    gradient_ascent(
        canvas,
        lambda _: measure(model.preprocessing.normalize(canvas.images())),
        adam_step(canvas.params, 0.1, ADAM_DAMPING),
        RETRY_STEPS,
        redirect_steps=RETRY_STEPS,
        keep_best=True,
    )
    return render_uint8(canvas)


def _cut(pixels: Tensor, centre: tuple[float, float], size: tuple[int, int]) -> Tensor:
    for axis, (share, side) in enumerate(zip(centre, size, strict=True)):
        length = pixels.shape[2 + axis]
        begin = min(max(round(share * length - side / 2), 0), max(length - side, 0))
        pixels = pixels.narrow(2 + axis, begin, min(side, length))
    return pixels


def _fitted(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    same = tuple(pixels.shape[2:]) == size
    return pixels if same else torch.nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)


MIN_CONFIDENCE = 0.7  # the probability below which a picture is doubtful


def shuffled_confidence(
    model: Model, run: Forward, task: OptimizationTask, finished: Tensor, classes: Sequence[int]
) -> Tensor:
    """The probability (U,) that the network gives each picture's class when it sees the picture in pieces.

    The quadrants are exchanged across the centre: all that was drawn is there, nothing is where it was. What the
    network knows only whole, other networks hardly ever know at all.
    """
    pieces = finished.roll((finished.shape[2] // 2, finished.shape[3] // 2), (2, 3)).float() / 255
    with torch.no_grad():
        logits = run(task.preprocess(pieces).contiguous(memory_format=torch.channels_last))[LOGITS]
    each = torch.tensor(classes, device=logits.device)[:, None]
    return model.probabilities(logits).gather(1, each)[:, 0].cpu()


def quality_notes(
    names: Sequence[str], scores: Tensor, noise: Tensor, silent: Mapping[int, str], known: Tensor | None
) -> list[str]:
    """In words: pictures, called by these names, that do not show what was looked for."""
    said = []
    for i, name in enumerate(names):
        score, nothing = float(scores[i]), float(noise[i])
        if i in silent:
            said.append(f"{name} {silent[i]}")
        elif score <= nothing:
            said.append(
                f"{name} ends with a score of {score:.3g}, no more than on noise ({nothing:.3g}): this is not what it "
                "looks for"
            )
        elif known is not None and float(known[i]) < MIN_CONFIDENCE:
            said.append(
                f"{name} is given a probability of {float(known[i]):.2f} when the picture's quadrants are exchanged: "
                "it may convince no other network, nor you"
            )
    return said
