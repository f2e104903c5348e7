"""Does a heatmap tell the truth? Its maps are put to the test: on the network, on what is known of the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.attribution.context import LOGITS_RTOL
from convscope.engine import capture
from convscope.engine.acceleration.conv_fusion import find_fusions, with_fusion
from convscope.engine.batching import (
    MEMORY,
    Progress,
    batch_size,
    forward_batch_size,
    forward_bytes,
    pad_to_fixed_batch,
)
from convscope.engine.capture import ForwardResult
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError, require_int
from convscope.evaluation import baselines, inputs
from convscope.evaluation import registry as table
from convscope.evaluation.context import EvaluationContext, Scores
from convscope.evaluation.inputs import HeatmapInput
from convscope.evaluation.result import Evaluation, warnings
from convscope.images.loading import DEFAULT_MAX_PIXELS, Batch, ImageBatchLoader

STATES = 64  # bytes for each pixel of each map: its heat, its rank, and what it takes to find them

__all__ = ["Evaluation", "evaluate"]


def evaluate(
    model: Model,
    images: Any,
    heatmaps: Any,
    metrics: str | Sequence[str] = ("deletion", "insertion"),
    *,
    targets: Any = None,
    masks: Any = None,
    fill: str = "blur",
    steps: int = 28,
    seed: int = 0,
    fit: str | None = None,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Figures that say how far heatmaps are to be trusted.

    Parameters
    ----------
    model
        From `convscope.load`.
    images
        The very pictures that the heatmaps are of, in any form that `convscope` takes.
    heatmaps
        What `convscope.heatmaps` gave for them; or anybody's maps, an array (N, h, w) or (N, T, h, w) of any
        resolution, laid over the network's input, higher is more evidence.
    metrics
        Keys of `convscope.evaluation.metrics.METRICS`, one or several.
    targets
        What maps given as an array are evidence for; as in `heatmaps`.
    masks
        Where the targets are, for `pointing`, `energy` and `iou`: for each picture, in its own size, (H, W) or
        (T, H, W), bool; as a list or an array (N, H, W) or (N, T, H, W).
    fill
        What takes the place of pixels that are taken away: "blur", "mean", "zero" or "noise"; see `evaluation.fills`.
    steps
        Of curves: each takes away, or shows, an equal part of the pixels.
    seed
        Of everything that is drawn at random; the draws are the same for every picture.
    fit
        For maps given as an array: "squash" (the default) or "crop", as in `heatmaps`.
    memory
        Bytes that a batch's intermediate results may take.
    max_pixels
        Pictures with more are refused before memory is spent on them.
    progress
        Called with the number of pictures done, a fraction within those that take long, and the number in all. What it
        raises ends the work, and leaves nothing behind.
    options
        Of the metrics: their functions' keyword arguments; one that several metrics have goes to all of them.

    Raises
    ------
    ConvscopeError
        Before any work is done: for an unknown metric, option or fill, for maps that are not of these pictures, for
        masks that are missing where a metric needs them and for maps given as an array where a metric has to make them
        again. Later for pictures none of which can be used, and for numbers that are not finite. Pictures that cannot
        be used are named in `.failed`.
    """
    names = list(dict.fromkeys([metrics] if isinstance(metrics, str) else metrics))
    if not names:
        raise ConvscopeError(f"no metrics; expected some of {', '.join(table.METRICS)}")
    chosen = table.options(names, options, {"steps": steps, "fill": fill})
    baselines.require_fill(fill)
    require_int("steps", steps)
    made = getattr(heatmaps, "fit", None)
    if fit is not None and made is not None and fit != made:
        raise ConvscopeError(f"fit is {fit!r}, but the heatmaps were made with fit={made!r}; leave it out")
    pictures = ImageBatchLoader(images, model.preprocessing, fit=made or fit or "squash", max_pixels=max_pixels)
    maps = inputs.parse(model, pictures, heatmaps, targets)
    positions = None if masks is None else inputs.take_masks(masks, len(pictures), maps.targets.num_targets)
    _require_needs(names, maps, positions)
    if positions is not None and maps.result is not None:
        for index, where in zip(maps.result.image_indices, maps.result.geometry, strict=True):
            inputs.check_mask_size(positions[index], where, pictures.names[index])

    each = forward_bytes(model) + STATES * maps.targets.num_targets * np.prod(model.preprocessing.size)
    size = forward_batch_size(model, memory)
    # A quicker way through the network has to be found first, which a pass or two do not pay for.
    many = any({"steps", "samples"} & own.keys() for own in chosen.values())
    found: list[dict[str, Scores]] = []
    classes: list[Tensor] = []
    done: list[int] = []
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        quick = run
        for batch in pictures.batches(batch_size(model, each, memory)):
            before = len(done) + len(pictures.failed)
            subject = _subject(model, batch, maps, positions, pictures, run, size, seed, memory)
            if model.loaded_by_convscope and many:
                quick = quick if done else with_fusion(run, find_fusions(run, pad_to_fixed_batch(model, subject.x[:1])))
                subject = replace(subject, run=_agreeing(quick, subject))
            classes.append(subject.chosen.classes.cpu())
            found.append({})
            for number, name in enumerate(names):

                def tell(share: float, before: int = before, number: int = number, count: int = len(batch.x)) -> None:
                    if progress is not None:
                        progress(before + count * (number + share) / len(names), len(pictures))

                found[-1][name] = table.find(name).function(replace(subject, tell=tell), **chosen[name])
                tell(1)
            done += batch.indices
    values = {name: _joined([part[name].values for part in found]) for name in names}
    curves = {
        curve: _joined([part[name].curves[curve] for part in found])
        for name in names
        for curve in found[0][name].curves
    }
    chance = {
        name: _joined([part[name].chance_level for part in found])
        for name in names
        if found[0][name].chance_level is not None
    }
    asked = torch.cat(classes).numpy()
    return Evaluation(
        model,
        values=values,
        curves=curves,
        chance_level=chance,
        targets=asked,
        names=maps.targets.names(asked, done),
        method=maps.method,
        layer=maps.layer,
        fit=pictures.fit,
        image_names=tuple(pictures.names[i] for i in done),
        settings={"seed": seed, "options": chosen},
        notes=(*pictures.notes, *_scored(maps), *warnings(values, chance)),
        failed=tuple(pictures.failed),
    )


def _require_needs(names: Sequence[str], maps: HeatmapInput, masks: Sequence[Tensor] | None) -> None:
    """Refuse metrics that cannot be had of what was given. Raises ConvscopeError."""
    for name in names:
        needs = table.find(name).needs
        if "masks" in needs and masks is None:
            raise ConvscopeError(f"{name} needs masks=: for each picture where its target is, (H, W) bool")
        if "heatmaps" in needs and maps.result is None:
            raise ConvscopeError(
                f"{name} makes the maps again; it needs what convscope.heatmaps gave, and an array was given"
            )
        if "classes" in needs and maps.targets.functions:
            raise ConvscopeError(f"{name} needs classes as targets; functions of the output were given")


def _subject(
    model: Model,
    batch: Batch,
    maps: HeatmapInput,
    positions: Sequence[Tensor] | None,
    images: ImageBatchLoader,
    run: Callable[[Tensor], ForwardResult],
    size: int,
    seed: int,
    memory: int,
) -> EvaluationContext:
    x = batch.x.to(model.device)
    seen = run(pad_to_fixed_batch(model, x))
    require_finite(model, seen.logits, "the network's output")
    for index, where in zip(batch.indices, batch.geometry, strict=True):
        if index not in maps.row:
            raise ConvscopeError(f"{images.names[index]} has no heatmap; when these were made it could not be used")
        if positions is not None:
            inputs.check_mask_size(positions[index], where, images.names[index])
    subject = EvaluationContext(
        model=model,
        x=x,
        maps=maps.values[[maps.row[i] for i in batch.indices]].to(x.device),
        chosen=maps.chosen(batch.indices, seen.logits[: len(x)]),
        seen=seen,
        run=run,
        size=size,
        seed=seed,
        geometry=batch.geometry,
        masks=[] if positions is None else [positions[i] for i in batch.indices],
        recompute=maps.again(model, batch.indices, memory),
    )
    maps.require_same(batch.indices, seen.logits[: len(x)], subject.logits, images.names)
    return subject


def _agreeing(
    quick: Callable[[Tensor], ForwardResult], subject: EvaluationContext
) -> Callable[[Tensor], ForwardResult]:
    """The quicker way through the network, if it says the same of these pictures; else the way that there is."""
    plain, folded = subject.seen.logits, quick(pad_to_fixed_batch(subject.model, subject.x)).logits
    return quick if bool((plain - folded).abs().max() <= LOGITS_RTOL * plain.abs().max()) else subject.run


def _scored(maps: HeatmapInput) -> list[str]:
    """In words: what stands in for a probability where there is none."""
    if maps.targets.functions:
        return ["targets are functions, which have no probability: what they give is used as it is"]
    if maps.targets.against is not None:
        return ["of a class against others, the probability is the sigmoid of the difference of their logits"]
    return []


def _joined(parts: Sequence[Tensor | None]) -> np.ndarray:
    return torch.cat([part for part in parts if part is not None]).float().cpu().numpy()
