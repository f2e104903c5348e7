"""Heatmaps of images enlarged beyond the network's input size, so that the last maps have more positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from convscope.attribution.fusion import fuse_maps
from convscope.attribution.refinement import refine_maps
from convscope.attribution.runner import BatchResult, HeatmapJob, MethodMaps, ReportProgress, report_step, run_batch
from convscope.engine import capture
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.images.batches import Batch
from convscope.images.loading import ImageBatchLoader

MAX_SCALE = 16

_working_sizes: WeakKeyDictionary[Model, set[tuple[int, ...]]] = WeakKeyDictionary()


def validate_scales(model: Model, scale: float | Sequence[float]) -> tuple[float, ...]:
    """Return the scales in ascending order, the network's own (1) first.

    Raises
    ------
    ConvscopeError
        For invalid scales, and for scales at which the network does not run.
    """
    candidates = [scale] if isinstance(scale, int | float) else list(scale)
    if not candidates or not all(_is_scale(s) for s in candidates):
        raise ConvscopeError(f"scale is {scale!r}; expected a number above 0 and at most {MAX_SCALE}, or several")
    scales = tuple(sorted({float(s) for s in candidates}, key=lambda s: (s != 1, s)))
    for s in scales:
        if s != 1:
            _require_runs(model, model.preprocessing.scaled(s).size)
    return scales


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_SCALE


def scaled_inputs(
    loader: ImageBatchLoader, images: object, scales: Sequence[float], size: int
) -> list[Iterator[Tensor]]:
    """Return for each scale other than 1 the inputs of the loader's batches at that scale."""
    make_loader = partial(ImageBatchLoader, images, loader.preprocessing, fit=loader.fit, max_pixels=loader.max_pixels)
    return [map(attrgetter("x"), make_loader(scale=s).batches(size)) for s in scales if s != 1]


def run_multiscale(
    job: HeatmapJob,
    batch: Batch,
    scales: Sequence[float],
    scaled: Sequence[Tensor],
    report_progress: ReportProgress,
) -> BatchResult:
    """Compute the maps of all methods for one batch at several scales, and fuse them over the scales.

    Targets and logits are those at the network's own input size.

    Parameters
    ----------
    job : HeatmapJob
    batch : Batch
    scales : sequence of float
        As returned by `validate_scales`.
    scaled : sequence of Tensor
        The batch's input at each scale other than 1, as of `scaled_inputs`.
    report_progress : callable
    """
    results: list[BatchResult] = []
    inputs = [batch.x, *scaled] if scales[0] == 1 else scaled
    if scales[0] != 1:
        plain = replace(job, specs=(), smooth=None)
        results.append(run_batch(plain, batch.x, batch.indices, report_progress, geometry=batch.geometry))
    work = [s ** len(job.model.preprocessing.size) for s in scales]
    for i, x in enumerate(inputs):
        report_scale = partial(report_step, report_progress, sum(work[:i]), work[i], sum(work))
        targets = results[0].targets if results else None
        results.append(run_batch(job, x, batch.indices, report_scale, targets, batch.geometry))
    reference, at_scales = results[0], results[-len(scales) :]
    maps = at_scales[0].maps
    if len(at_scales) > 1:
        maps = tuple(
            MethodMaps(fuse_maps([result.maps[s].values for result in at_scales], spec.fuse))
            for s, spec in enumerate(job.specs)
        )
    if job.refine:
        maps = tuple(replace(m, values=refine_maps(m.values, batch.x.cpu())) for m in maps)
    return replace(reference, maps=maps)


def _require_runs(model: Model, size: tuple[int, ...]) -> None:
    """Raise ConvscopeError if the network does not run on inputs of this size; a size that works is tried once."""
    sizes = _working_sizes.setdefault(model, set())
    if size in sizes:
        return
    try:
        with torch.no_grad(), capture.capture_layers(model, []) as run:
            run(torch.zeros(model.fixed_batch_size or 1, model.preprocessing.channels, *size))
    except (RuntimeError, ValueError, AssertionError) as error:
        input_size, scaled_size = (" x ".join(map(str, sides)) for sides in (model.preprocessing.size, size))
        reason = " ".join(str(error).split())[:200]
        raise ConvscopeError(
            f"the network does not run on inputs of {scaled_size} ({type(error).__name__}: {reason}); its own size is "
            f"{input_size}: leave scale at 1"
        ) from error
    sizes.add(size)
