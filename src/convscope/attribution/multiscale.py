"""Pictures shown larger than the network's own input, so that its last maps have more places."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.attribution.runner import BatchResult, HeatmapJob, MethodMaps, fuse_maps, run_batch, tell_part
from convscope.engine import capture
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.images.loading import Batch, ImageBatchLoader
from convscope.images.preprocessing import Preprocessing


def validate_scales(model: Model, scale: float | Sequence[float]) -> tuple[float, ...]:
    """The scales as asked for, the network's own first.

    Raises ConvscopeError for any that makes no sense or that the network does not take.
    """
    given = [scale] if isinstance(scale, int | float) else list(scale)
    if not given or not all(isinstance(s, int | float) and not isinstance(s, bool) and 0 < s <= 16 for s in given):
        raise ConvscopeError(f"scale is {scale!r}; expected a number above 0, at most 16, or several")
    scales = tuple(sorted({float(s) for s in given}, key=lambda s: (s != 1, s)))
    for s in scales:
        if s != 1:
            _require_taken(model, scale_preprocessing(model.preprocessing, s).size)
    return scales


def scale_preprocessing(preprocessing: Preprocessing, scale: float) -> Preprocessing:
    """The same preprocessing for an input `scale` times as large, which shows the same part of the picture."""
    size = tuple(max(1, round(side * scale)) for side in preprocessing.size)
    short = preprocessing.resize or round(max(preprocessing.size) / 0.875)
    resize = max(*size, round(short * scale)) if len(size) == 2 else None
    return dataclasses.replace(preprocessing, size=size, resize=resize)


def iter_batches(
    pictures: ImageBatchLoader, images: Any, scales: Sequence[float], size: int
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Every batch of `pictures`, and its inputs at each scale, read from the pictures anew: detail that the network's
    own size would lose is there. Tensors, which are prepared already, are interpolated."""
    others = {
        s: ImageBatchLoader(
            images, scale_preprocessing(pictures.preprocessing, s), fit=pictures.fit, max_pixels=pictures.max_pixels
        ).batches(size)
        for s in scales
        if s != 1 and not isinstance(images, Tensor)
    }
    for batch in pictures.batches(size):
        yield (
            batch,
            [batch.x if s == 1 else next(others[s]).x if s in others else _stretched(batch.x, s) for s in scales],
        )


def run_multiscale(
    job: HeatmapJob,
    batch: Batch,
    scales: Sequence[float],
    inputs: Sequence[Tensor],
    report_progress: Callable[[float], None],
) -> BatchResult:
    """One batch at several scales, each cell's maps fused as its layers' are.

    Targets and logits are those of the network's own input size, whatever the scales.
    """
    own = None
    if scales[0] != 1:
        own = run_batch(dataclasses.replace(job, specs=(), smooth=None), batch.x, batch.indices, lambda share: None)
    answers: list[BatchResult] = []
    work = [s ** len(job.model.preprocessing.size) for s in scales]
    for i, x in enumerate(inputs):
        done, whole = sum(work[:i]) / sum(work), work[i] / sum(work)
        first = own or (answers[0] if answers else None)
        part = partial(tell_part, report_progress, done, whole)
        answers.append(run_batch(job, x, batch.indices, part, None if first is None else first.targets))
    if len(answers) == 1:
        return answers[0] if own is None else dataclasses.replace(own, maps=answers[0].maps)
    cells = (
        MethodMaps(fuse_maps([answer.maps[c].values for answer in answers], cell.fuse))
        for c, cell in enumerate(job.specs)
    )
    return dataclasses.replace(own or answers[0], maps=tuple(cells))


def _stretched(x: Tensor, scale: float) -> Tensor:
    sides = [max(1, round(side * scale)) for side in x.shape[2:]]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sides)]
    return F.interpolate(x, sides, mode=mode, align_corners=False, antialias=len(sides) == 2)


def _require_taken(model: Model, size: tuple[int, ...]) -> None:
    try:
        with torch.no_grad(), capture.capture_layers(model, []) as run:
            run(torch.zeros(model.fixed_batch_size or 1, model.preprocessing.channels, *size))
    except (RuntimeError, ValueError, AssertionError) as error:
        own, asked = (" x ".join(map(str, sides)) for sides in (model.preprocessing.size, size))
        reason = " ".join(str(error).split())[:200]
        raise ConvscopeError(
            f"the network does not run on inputs of {asked} ({type(error).__name__}: {reason}); its own size is {own}: "
            "leave scale at 1"
        ) from error
