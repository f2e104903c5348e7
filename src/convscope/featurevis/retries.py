"""Retries: units that are never active, and classes whose pattern depends on its global layout alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convscope.engine.batching import balanced_chunks
from convscope.engine.model import LOGITS
from convscope.featurevis.batch import BatchResult, PatternBatch
from convscope.featurevis.defaults import Size
from convscope.featurevis.frames import FrameRecorder
from convscope.featurevis.recipes import plain
from convscope.featurevis.scoring import MIN_CONFIDENCE, optimize_from_crops
from convscope.featurevis.task import RecipeOutput, avoid_batch_of_one

# Without transforms, nearly all units that become active do so within a dozen steps of half of this size.
PROBE_STEPS = 16
PROBE_STEP_SCALE = 2.0

MSG_NO_GRADIENT = "looks dead: its ReLU is off everywhere and has no gradient. recipe='robust' redirects the gradient."
MSG_REDIRECTED = "looks dead: no activation, although the gradient of its ReLU was redirected. It has no pattern."
MSG_ALL_STARTS = "looks dead: no activation from {starts} starts. It has no pattern."
MSG_DEAD = "looks dead: no activation on the sample images or from {starts} starts. It has no pattern."
MSG_LARGER = (
    "is active on a sample image, but not on its crop of {height} x {width} pixels or from {starts} starts. "
    "It has no pattern; a larger size= may help."
)
MSG_LOST = "was active during optimisation, but not on a finished image, from {starts} starts. It has no pattern."
MSG_FRAGILE = "is active on this image, but not on any shifted or scaled view of it."


def retry_dead_units(batch: PatternBatch, result: BatchResult, max_batch: int) -> None:
    """Optimise units with a score of 0 from other initial images, and finally from crops of sample photographs.

    Parameters
    ----------
    batch : PatternBatch
    result : BatchResult
        Changed in place. ``result.unit_notes`` gets a note for each unit that stays inactive or is active only without
        transforms.
    max_batch : int
        Largest number of images in a batch.
    """
    if batch.task.steps == 0:
        return
    inactive = (result.output.history == 0).all(0).cpu()
    if batch.recipe.starts == 1:
        note = MSG_NO_GRADIENT if batch.recipe.run is plain else MSG_REDIRECTED
        result.unit_notes = dict.fromkeys(_true_rows(inactive & (result.scores == 0)), note)
    if batch.recipe.starts == 1 or not batch.request.of_units or batch.request.layer == LOGITS:
        return
    active = ~inactive
    view_size = batch.task.view_sizes[-1] if batch.task.start is None else batch.task.size
    # The size of the views is cheaper. Only units that are active there, or in views, are tried at the full size.
    for size in dict.fromkeys((view_size, batch.task.size)):
        rows = [row for row in _true_rows(result.scores == 0) if size == view_size or active[row]]
        if live_starts := _find_live_starts(batch, rows, active, size, max_batch):
            inactive[list(live_starts)] &= _run_from_starts(batch, result, live_starts)
    notes = _run_from_crops(batch, result, _true_rows(result.scores == 0))
    lost = MSG_LOST.format(starts=batch.recipe.starts)
    result.unit_notes = {row: lost for row in notes if active[row] and result.scores[row] == 0}
    result.unit_notes |= {
        row: notes.get(row, MSG_FRAGILE) for row in _true_rows(inactive) if result.scores[row] != 0 or not active[row]
    }


def _find_live_starts(
    batch: PatternBatch, rows: list[int], active: Tensor, size: Size, max_batch: int
) -> dict[int, int]:
    """Return, for each unit that becomes active, the first start from which it does; without transforms, at `size`.

    `active` (U,) is updated in place with the units that were active at any step.
    """
    live_starts: dict[int, int] = {}
    tried, starts = 1, batch.recipe.starts
    while rows and tried < starts:
        # The fewer units are left, the more starts are tried in one batch.
        count = min(max(1, max_batch // len(rows)), starts - tried)
        pairs = [(row, start) for row in rows for start in range(tried, tried + count)]
        for chunk in balanced_chunks(pairs, max_batch):
            output, scores = _without_transforms(batch, avoid_batch_of_one(chunk, max_batch), size)
            for i, (row, start) in enumerate(chunk):
                active[row] |= bool(output.history[:, i].any())
                if scores[i] != 0:
                    live_starts.setdefault(row, start)
        rows = [row for row in rows if row not in live_starts]
        tried += count
    return live_starts


def _without_transforms(
    batch: PatternBatch, pairs: Sequence[tuple[int, int]], size: Size
) -> tuple[RecipeOutput, Tensor]:
    """Run the recipe without transforms for units, each with a start; return the output and the scores."""
    task = replace(
        batch.subset_task([row for row, _ in pairs], [start for _, start in pairs]),
        size=size,
        steps=min(batch.task.steps, PROBE_STEPS),
        step_size=PROBE_STEP_SCALE * batch.task.step_size,
        views=1,
        without_transforms=True,
        plateau=None,
        on_step=lambda *_: batch.on_step(),
    )
    output = batch.recipe.run(task)
    return output, task.score(output.images).cpu()


def _run_from_starts(batch: PatternBatch, result: BatchResult, live_starts: Mapping[int, int]) -> Tensor:
    """Run the recipe from starts from which units are active; without transforms where these make a unit inactive.

    Returns
    -------
    Tensor
        Bool: which of the units are inactive under transforms.
    """
    rows = list(live_starts)
    output, scores, frames = _run_recipe(batch, result, avoid_batch_of_one(rows, len(batch.indices)), live_starts)
    better = _true_rows(scores[: len(rows)] != 0)
    result.replace_run([rows[i] for i in better], output, scores, frames, better)
    if remaining := [row for row in rows if result.scores[row] == 0]:
        pairs = [(row, live_starts[row]) for row in remaining]
        still, scores = _without_transforms(batch, avoid_batch_of_one(pairs, len(batch.indices)), batch.task.size)
        result.replace_images(remaining, still, scores, range(len(remaining)))
    return (output.history[:, : len(rows)] == 0).all(0).cpu()


def _run_from_crops(batch: PatternBatch, result: BatchResult, rows: Sequence[int]) -> dict[int, str]:
    """Optimise units from the crop of a sample photograph that activates them most; return a note for each."""
    starts, (height, width) = batch.recipe.starts, batch.task.size
    if not rows or batch.model.preprocessing.channels != 3:
        return dict.fromkeys(rows, MSG_ALL_STARTS.format(starts=starts))
    samples, units = batch.sample_activations(), batch.request.units
    notes = dict.fromkeys(rows, MSG_DEAD.format(starts=starts))
    active = [row for row in rows if samples.values[units[batch.indices[row]]] > 0]
    if not active:
        return notes
    padded = avoid_batch_of_one(active, len(batch.indices))
    crops = torch.stack([samples.crop(units[batch.indices[row]], batch.task.size) for row in padded])
    task = batch.subset_task(padded, [0] * len(padded))
    images = optimize_from_crops(crops, task.objective, batch.model)
    scores = task.score(images).cpu()
    for i, row in enumerate(active):
        larger = MSG_LARGER.format(starts=starts, height=height, width=width)
        notes[row] = MSG_FRAGILE if scores[i] != 0 else larger
    opaque = torch.ones((len(padded), *batch.task.size), device=images.device)
    better = [i for i in range(len(active)) if scores[i] != 0]
    output = RecipeOutput(images, result.output.history, opaque)
    result.replace_images([active[i] for i in better], output, scores, better)
    return notes


def _true_rows(mask: Tensor) -> list[int]:
    rows: list[int] = mask.nonzero()[:, 0].tolist()
    return rows


def retry_low_confidence(batch: PatternBatch, result: BatchResult, max_batch: int) -> None:
    """Optimise classes with a low shuffled confidence from other initial images; keep the run with the highest.

    `result` is changed in place, and gets the confidence of all images. Batches have up to `max_batch` images.
    """
    if batch.recipe.max_restarts == 1 or not batch.request.of_units or batch.request.layer != LOGITS:
        return
    chunks = balanced_chunks(range(len(batch.indices)), max_batch)
    confidence = torch.cat([batch.confidence(result.output.images[list(rows)], rows) for rows in chunks])
    for start in range(1, batch.recipe.max_restarts):
        doubtful = _true_rows(confidence < MIN_CONFIDENCE)
        for rows in balanced_chunks(doubtful, max_batch):
            output, scores, frames = _run_recipe(batch, result, rows, dict.fromkeys(rows, start))
            retried = batch.confidence(output.images, rows)
            better = _true_rows(retried > confidence[list(rows)])
            improved = [rows[i] for i in better]
            result.replace_run(improved, output, scores, frames, better)
            confidence[improved] = retried[better]
    result.confidence = confidence


def _run_recipe(
    batch: PatternBatch, result: BatchResult, rows: Sequence[int], starts: Mapping[int, int]
) -> tuple[RecipeOutput, Tensor, FrameRecorder]:
    """Run the recipe for some images of the batch from other starts; return the output, scores and frames."""
    frames = FrameRecorder(batch.task.steps, result.frames.count)

    def on_step(step: int, render: Callable[[], Tensor]) -> None:
        frames.record(step, render)
        batch.on_step()

    task = replace(batch.subset_task(rows, [starts[row] for row in rows]), on_step=on_step)
    output = batch.recipe.run(task)
    frames.finish(output.images)
    return output, task.score(output.images).cpu(), frames
