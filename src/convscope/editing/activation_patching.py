"""`convscope.patch`: move activations of one image into the pass of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.attribution.batch_targets import BatchTargets
from convscope.attribution.targets import ClassLabels, Targets, TargetSpec, parse_targets
from convscope.datasets.image_inputs import open_images
from convscope.editing.api import check_units
from convscope.editing.result import Patching
from convscope.editing.unit_effects import as_list
from convscope.engine import capture
from convscope.engine.batching import MEMORY, pad_to_fixed_batch, resumed_batch_size
from convscope.engine.capture import ForwardResult
from convscope.engine.layer_selection import LayerLike, find_layer
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.resume import resume_from_layer
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError
from convscope.images.batches import Batch
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.images.tensor_inputs import to_channels_last
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model

BY = ("unit", "position", "both")
"""What is moved from one image to the other at a time."""

By = Literal["unit", "position", "both"]


@check_arguments
def patch(
    model: ModelLike,
    source: object,
    destination: object,
    layer: LayerLike,
    *,
    by: By = "unit",
    units: int | Sequence[int] | None = None,
    targets: Targets | None = None,
    against: ClassLabels | None = None,
    fit: str = "squash",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Patching:
    """Find which units or positions of a layer turn the prediction for one image into that for another.

    Activation patching: the network runs on the destination image, while a part of the layer's output is replaced by
    that for the source image, and the change of the target's score is measured::

        effect = y(destination; part of the layer's output from source) - y(destination)

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    source : path, PIL image, array or tensor
        One image: its activations are moved.
    destination : path, PIL image, array or tensor
        One image: its pass receives them.
    layer : str, Layer or nn.Module
        The layer whose output is moved.
    by : {"unit", "position", "both"}
        Move one unit's map at a time; all units of one position at a time; or one unit at one position at a time.
    units : int or sequence of int, optional
        The units that are moved; all of the layer if omitted.
    targets : optional
        One target, as for `convscope.heatmaps`. By default the contrast of the source's top class with the
        destination's, or this class if it is the same for both.
    against : optional
        A class, or several, whose mean logit is subtracted from the target's, as for `convscope.heatmaps`.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    memory : int
        Bytes that intermediate results may take.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` with numbers of passes; exceptions raised in it cancel cleanly.

    Returns
    -------
    Patching
        Effects: (U,) by unit, (h, w) by position, (U, h, w) by both; and `joint_effects` of the 1, 2, 4, ... largest,
        moved together, since effects do not add up.

    Raises
    ------
    ConvscopeError
        For several images or targets, for unknown layers and units, for a layer without positions where these are
        asked for, and if an image cannot be read.

    References
    ----------
    Vig et al., Investigating Gender Bias in Language Models Using Causal Mediation Analysis, NeurIPS 2020.
    Heimersheim and Nanda, How to use and interpret activation patching, 2024.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> cat, crab, *_ = convscope.samples.photographs()
    >>> patched = convscope.patch(model, cat, crab, "blocks.6", by="position")
    >>> patched.effects.shape
    (7, 7)
    >>> patched.target_name
    'Egyptian cat rather than fiddler crab'
    """
    if by not in BY:
        raise ConvscopeError(f"by is {by!r}; expected one of {', '.join(BY)}")
    model = as_model(model, source)
    selected = find_layer(model, layer)
    if by != "unit" and not selected.is_spatial:
        raise ConvscopeError(f"by={by!r} needs positions, and layer {selected.name!r} has none; use by='unit'")
    numbers = list(range(selected.units)) if units is None else check_units(selected, as_list(units))
    batches, loaders = zip(*(_load_one(model, image, fit, max_pixels) for image in (source, destination)), strict=True)
    logits, maps = zip(*(_run(model, selected, batch) for batch in batches), strict=True)
    spec = _parse_target(model, targets, against, logits[0], logits[1])
    with progress_bar(progress, "patch") as report:
        measured = _effects(model, selected, batches[1], maps, spec, by, torch.tensor(numbers), memory, report)
    classes = spec.for_batch([0], logits[0], batches[1].geometry).classes.cpu().numpy()
    return Patching(
        model,
        effects=measured.effects.cpu().numpy(),
        counts=measured.counts.numpy(),
        joint_effects=measured.joint_effects.cpu().numpy(),
        units=np.array(numbers),
        source_score=float(measured.scores[0]),
        destination_score=float(measured.scores[1]),
        layer=selected.name,
        by=by,
        target=int(classes[0, 0]),
        target_name=spec.names(classes, [0])[0][0],
        image_names=_names(loaders[0].names[0], loaders[1].names[0]),
        geometry=(batches[0].geometry[0], batches[1].geometry[0]),
        image_sources=loaders,
        image_indices=(0, 0),
        fit=fit,
        notes=tuple(dict.fromkeys((*loaders[0].notes, *loaders[1].notes))),
    )


def _load_one(model: Model, image: object, fit: str, max_pixels: int) -> tuple[Batch, ImageBatchLoader]:
    """Load one image; raise ConvscopeError for several."""
    loader = ImageBatchLoader(open_images(image), model.preprocessing, fit=fit, max_pixels=max_pixels, keep_copies=True)
    if len(loader) != 1:
        raise ConvscopeError(f"{len(loader)} images; patch takes one source and one destination")
    return next(loader.batches(1)), loader


def _names(source: str, destination: str) -> tuple[str, str]:
    """Return names that differ, also of images that have none."""
    return (source, destination) if source != destination else ("source", "destination")


def _run(model: Model, layer: Layer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits (1, K) and the layer's output (1, C, ...) for one image."""
    with torch.no_grad(), capture.capture_layers(model, [layer.name]) as run:
        outputs = run(pad_to_fixed_batch(model, batch.x))
    require_finite(model, outputs.logits, "the network's output")
    return outputs.logits[:1], outputs.maps[layer.name][:1]


def _parse_target(
    model: Model, targets: Targets | None, against: ClassLabels | None, source: Tensor, destination: Tensor
) -> TargetSpec:
    """Return the one target; by default the contrast of both images' top classes."""
    if targets is None and not model.has_values:
        model.require_scores()
        targets, other = int(source.argmax()), int(destination.argmax())
        against = other if against is None and other != targets else against
    spec = parse_targets(model, targets, 1, against)
    if spec.num_targets != 1:
        raise ConvscopeError(f"targets names {spec.num_targets} targets; patch takes one")
    return spec


class _Effects(NamedTuple):
    """Scores (2,) of source and destination, effects one by one, and of the `counts` largest together."""

    scores: Tensor
    effects: Tensor
    counts: Tensor
    joint_effects: Tensor


def _effects(
    model: Model,
    layer: Layer,
    batch: Batch,
    maps: Sequence[Tensor],
    spec: TargetSpec,
    by: By,
    units: Tensor,
    memory: int,
    report: Progress,
) -> _Effects:
    """Measure what moving each part does, and moving several.

    `batch` is the destination, and `maps` holds the layer's output (1, C, ...) for source and destination.
    """
    source, destination = (m.movedim(layer.unit_axis, 1) for m in maps)
    shape = destination.shape[2:]
    num_positions = int(np.prod(shape)) if by != "unit" else 1
    count = num_positions * (1 if by == "position" else len(units))
    batch_size = resumed_batch_size(model, layer, memory)
    with resume_from_layer(model, layer.name, batch.x) as run:

        def score(values: Tensor) -> Tensor:
            outputs = run(pad_to_fixed_batch(model, values.movedim(1, layer.unit_axis)))
            require_finite(model, outputs.logits, "the network's output")
            return _scores(spec, batch, outputs)[: len(values)]

        def score_moved(groups: Sequence[Tensor]) -> Tensor:
            patched = to_channels_last(destination.expand(len(groups), *destination.shape[1:])).clone()
            rows = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
            _move(patched, source[0], rows, torch.cat(list(groups)), by, units)
            return score(patched)

        ends = torch.cat([score(source), score(destination)])
        parts = []
        for numbers in torch.split(torch.arange(count), batch_size):
            parts.append(score_moved(numbers[:, None].unbind()))
            report(int(numbers[-1]) + 1, count)
        effects = torch.cat(parts) - ends[1]
        order = torch.argsort(effects.cpu() * torch.sign(ends[0] - ends[1]).cpu(), descending=True, stable=True)
        counts = torch.tensor([2**i for i in range(count.bit_length()) if 2**i < count] + [count])
        joint = [score_moved([order[:n] for n in some]) for some in torch.split(counts, batch_size)]
    effects = effects.reshape({"unit": (len(units),), "position": shape, "both": (len(units), *shape)}[by])
    return _Effects(ends, effects, counts, torch.cat(joint) - ends[1])


def _scores(spec: TargetSpec, batch: Batch, outputs: ForwardResult) -> Tensor:
    """Return the target's score (M,) of M patched passes of one image."""
    targets: BatchTargets = spec.for_batch([0], outputs.logits[:1], batch.geometry)
    return targets.of_image(0, len(outputs.logits)).scores(outputs)[:, 0]


def _move(patched: Tensor, source: Tensor, rows: Tensor, numbers: Tensor, by: By, units: Tensor) -> None:
    """Replace in `rows` of `patched` (M, C, ...) the parts that the numbers stand for by those of `source` (C, ...)."""
    if by == "unit":
        patched[rows, units[numbers]] = source[units[numbers]]
        return
    shape = source.shape[1:]
    if by == "position":
        positions = torch.unravel_index(numbers[:, None], shape)
        patched[(rows[:, None], units[None], *positions)] = source[(units[None], *positions)]
    else:
        index = torch.unravel_index(numbers, (len(units), *shape))
        selected = (units[index[0]], *index[1:])
        patched[(rows, *selected)] = source[selected]
