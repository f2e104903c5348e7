"""The second technique: the picture that a unit wants to see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.engine import capture
from convscope.engine.acceleration import conv_fusion
from convscope.engine.batching import (
    MEMORY,
    Progress,
    balanced_chunks,
    batch_size,
    cache_friendly_batch_size,
    gradient_bytes,
)
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, require_int
from convscope.featurevis.frames import FrameRecorder, to_numpy_images
from convscope.featurevis.objectives import Objective
from convscope.featurevis.optimizer import Plateau
from convscope.featurevis.recipes import OptimizationTask, Recipe
from convscope.featurevis.request import (
    PatternRequest,
    canvas_size,
    find_recipe,
    initial_images,
    parse_request,
    size_checker,
)
from convscope.featurevis.result import Patterns
from convscope.featurevis.retries import (
    BatchResult,
    PatternBatch,
    joined,
    measure_of,
    retry_dead_units,
    retry_low_confidence,
)
from convscope.featurevis.scoring import Forward, max_activations, noise_baseline, quality_notes, reference_baseline
from convscope.featurevis.skip_gradient import with_skip_gradient

__all__ = ["Patterns", "patterns"]

Watch = Callable[[int, np.ndarray], None]


def patterns(
    model: Model,
    layer: str | Objective | Sequence[Objective],
    units: int | str | Iterable[int | str] | None = None,
    *,
    recipe: str | Recipe = "robust",
    size: int | tuple[int, int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    start: Any = None,
    space: str = "pixels",
    step_size: float | None = None,
    views: int | None = None,
    patience: int | None = None,
    reference: Any = None,
    frames: int = 0,
    callback: Watch | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Patterns:
    """Draw, for each unit, the picture that it responds to most, by gradient ascent on the picture.

    The network is cut off behind the layer. All units are drawn in batches, each from random numbers of its own.

    Parameters
    ----------
    model
        From `convscope.load`.
    layer
        A layer's name, or "logits" for the classes themselves. Or what is to be climbed: an objective of
        `convscope.patterns.objective`, or several.
    units
        Channels of the layer; for "logits" class indices or names. None: all of them, or, with recipes that begin with
        a photograph, the layer as a whole.
    recipe
        "robust": Fourier canvas and random views; classes that the network does not know when the picture's quadrants
        are exchanged are drawn again. "plain": the textbook's 40 normalised steps on pixels. "maco": phases
        of a natural spectrum. "dream": a photograph, changed. "caricature": a photograph, redrawn. Or a `Recipe`.
    size
        Height and width of the picture, or one number for both. Default: three receptive fields, from 64 pixels to
        the network's own size (robust, maco); 150 (plain); that of the photograph, its shorter side brought to the
        network's own (dream, caricature).
    steps, step_size
        Number and length of the steps. Default: the recipe's.
    seed
        The same seed gives the same pictures, whatever other units are drawn beside them.
    start
        The picture to start from: a file, a PIL image, or numbers on the scale 0..255, (H, W, C) for all or
        (U, H, W, C), or a tensor (U, C, H, W). For "plain", and needed by "dream" and "caricature".
    space
        For "plain": "pixels" puts the picture through the preprocessing, "input" feeds it to the network as it is.
    views
        How many random views the network is shown at each step; their mean is climbed. Default: the recipe's; "plain"
        has none.
    patience
        A picture is done when its best value has grown by less than one per cent in so many steps. None: never before
        the last step.
    reference
        Natural pictures, in any form that `convscope` takes: their best score is put beside the pattern's.
    frames
        So many pictures on the way are kept, evenly spaced, the last one included.
    watch
        Called after every step with the number of steps done in all and the pictures (U', H, W, C), uint8, that are
        drawn just then. What it, or `progress`, raises ends the work, and leaves nothing behind.
    memory
        Bytes that a batch's intermediate results may take.
    progress
        Called after every step with the number of steps done and the number in all.

    Raises
    ------
    ConvscopeError
        For an unknown layer, unit, recipe or space, for a size that the network does not take, and for numbers that are
        not finite.
    """
    name, rule = find_recipe(recipe, start, space)
    want = parse_request(model, layer, units, name, rule)
    own_steps, own_size = rule.schedule(want.receptive_field(model), model.preprocessing.image_size)
    count = require_int("steps", own_steps if steps is None else steps, 0)
    kept = require_int("frames", frames, 0)
    if views is not None and rule.views == 0:
        raise ConvscopeError(f"views= is of no use to recipe {name!r}, which shows the canvas as it lies")
    shown = rule.views if views is None else require_int("views", views, 1)
    plateau = None if patience is None else Plateau(require_int("patience", patience, 1))
    first = initial_images(start, size, len(want.units), model)
    given = None if first is None else (int(first.shape[-2]), int(first.shape[-1]))

    with capture.capture_layers(model, want.layers, stop_early=not want.to_logits) as run:
        sees, tried = want.receptive_field(model), size_checker(model, run)
        sides = canvas_size(size if given is None else given, rule, sees, model, tried)
        seen = rule.view_sizes(sees, model.preprocessing.image_size, sides)
        if any(o.fixed_position for o in want.objectives) or any(tried(s) is not None for s in {*seen} - {sides}):
            seen = (sides,)
        largest = seen[-1]
        if model.loaded_by_convscope:
            blank = torch.zeros((model.fixed_batch_size or 1, model.preprocessing.channels, *largest))
            run = _quickened(run, blank)
        if want.to_logits and rule.residual_grad_scale != 1:
            run = with_skip_gradient(run, rule.residual_grad_scale)
        deepest, pixels = want.deepest_layer(model), max(sides[0] * sides[1], largest[0] * largest[1])
        mates = any(objective.paired for objective in want.objectives)
        passes = (2 if mates else 1) * max(1, shown)  # of the network at each step
        each = passes * gradient_bytes(model, deepest, pixels)
        # What many pictures at once save while views are coarse is more than they cost when they are fine.
        coarsest = min(height * width for height, width in seen)
        fits = batch_size(
            model,
            each,
            memory,
            max(1, cache_friendly_batch_size(model, deepest, coarsest, with_gradients=True) // passes),
        )
        parts = _batches(want, fits)
        together = max(objective.num_images for objective in want.objectives) * (2 if mates else 1)
        if model.fixed_batch_size is not None and together > model.fixed_batch_size:
            raise ConvscopeError(
                f"{together} pictures have to be shown together, and {model.name} takes {model.fixed_batch_size} at a time"
            )
        nature = cache(partial(max_activations, run, model, want.layer))
        natural = (
            None if reference is None else reference_baseline(run, want, reference, model, memory, space == "input")
        )
        batches: list[BatchResult] = []
        for position, part in enumerate(parts):
            album = FrameRecorder(count, kept)

            def on_step(
                step: int, look: Callable[[], Tensor], album: FrameRecorder = album, before: int = position * count
            ) -> None:
                done = before + step + 1
                album.record(step, look)
                if callback is not None:
                    callback(done, look().permute(0, 2, 3, 1).cpu().numpy())
                if progress is not None:
                    progress(done, count * len(parts))

            def all_done(done: int = (position + 1) * count) -> None:
                if progress is not None:
                    progress(done, count * len(parts))

            rows, alone = want.image_range(part), measure_of(model, run, want, part)
            task = OptimizationTask(
                objective=alone(range(len(part))),
                generators=want.generators(part, seed),
                preprocessing=model.preprocessing,
                device=model.device,
                size=sides,
                steps=count,
                step_size=own_size if step_size is None else step_size,
                receptive_field=sees,
                view_sizes=seen,
                start=None if first is None else first[rows.start : rows.stop],
                skip_preprocessing=space == "input",
                paired=mates,
                views=shown,
                plateau=plateau,
                on_step=on_step,
                subset_objective=alone if together == 1 else None,
            )
            drawn = rule.run(task)
            done = BatchResult(drawn, task.score(drawn.images).cpu(), album)
            album.finish(drawn.images)
            retry_dead_units(PatternBatch(task, rule, want, part, run, model, seed, all_done, nature), done, fits)
            album.finish(done.output.images)
            if plateau is not None or (count and not bool(drawn.history.any())):  # it may have ended early
                all_done()
            batches.append(done)
        done = joined(batches)
        if count >= own_steps:  # fewer were asked for to see something soon
            whole = PatternBatch(
                replace(task, start=first), rule, want, range(len(want.objectives)), run, model, seed, all_done, nature
            )
            retry_low_confidence(whole, done, fits)
        noise = noise_baseline(run, want, model, sides, seed, memory, space == "input")
    scores, history, alpha = done.scores, done.output.history.cpu(), done.output.alpha
    return Patterns(
        model,
        images=to_numpy_images(done.output.images.cpu()),
        units=np.array(want.units),
        scores=scores.numpy(),
        history=history.numpy(),
        layer=want.layer,
        recipe=name,
        seed=seed,
        steps=count,
        step_size=task.step_size,
        space=space,
        views=shown,
        patience=patience,
        noise_scores=noise.numpy(),
        reference_scores=None if natural is None else natural[0].numpy(),
        alpha=None if alpha is None else (alpha * 255).round().to(torch.uint8).cpu().numpy(),
        frames=np.stack(done.frames.frames) if kept and count else None,
        objectives=want.names,
        notes=tuple(quality_notes(want.display_names(model), scores, noise, done.silent, done.confidence)),
        failed=() if natural is None else tuple(natural[1].failed),
    )


def _quickened(run: Forward, blank: Tensor) -> Forward:
    quick = conv_fusion.with_fusion(run, conv_fusion.find_fusions(run, blank, gradients=True))
    noise = torch.randn(blank.shape, generator=torch.Generator().manual_seed(0))
    return quick if conv_fusion.outputs_match(run, quick, noise) else run


def _batches(want: PatternRequest, size: int) -> list[Sequence[int]]:
    """Objectives in batches of about `size` pictures; those of one objective are never parted."""
    largest = max(objective.num_images for objective in want.objectives)
    return list(balanced_chunks(range(len(want.objectives)), max(1, size // largest)))
