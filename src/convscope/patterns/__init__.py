"""The second technique: the picture that a unit wants to see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope import folded, tap
from convscope.budget import MEMORY, Progress, batch_size, chunks, gradient_bytes, quickest
from convscope.errors import ConvscopeError
from convscope.model import LOGITS, Model
from convscope.patterns.ascent import Plateau
from convscope.patterns.objective import Objective
from convscope.patterns.plan import Wanted, canvas_size, find_recipe, refuses, started, wanted
from convscope.patterns.recipes import Drawn, Recipe, Task
from convscope.patterns.result import Patterns
from convscope.patterns.worth import Run, awakened, beside_nature, beside_noise, remarks
from convscope.sound import require_finite

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
    watch: Watch | None = None,
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
        "robust": Fourier canvas and random views. "plain": the textbook's 40 normalised steps on pixels. "maco": phases
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
    want = wanted(model, layer, units, name, rule)
    own_steps, own_size = rule.pace(want.sees(model), model.preprocessing.picture_size)
    count = _whole("steps", own_steps if steps is None else steps, 0)
    kept = _whole("frames", frames, 0)
    if views is not None and rule.views == 0:
        raise ConvscopeError(f"views= is of no use to recipe {name!r}, which shows the canvas as it lies")
    shown = rule.views if views is None else _whole("views", views, 1)
    plateau = None if patience is None else Plateau(_whole("patience", patience, 1))
    first = started(start, size, len(want.numbers), model)
    given = None if first is None else (int(first.shape[-2]), int(first.shape[-1]))

    with tap.attach(model, want.layers, stop=not want.to_logits) as run:
        sees, tried = want.sees(model), refuses(model, run)
        sides = canvas_size(size if given is None else given, rule, sees, model, tried)
        seen = rule.seen(sees, model.preprocessing.picture_size, sides)
        seen = sides if seen != sides and tried(seen) is not None else seen
        if model.owned:
            blank = torch.zeros((model.fixed_batch or 1, model.preprocessing.channels, *seen))
            run = folded.quickened(run, folded.plan(run, blank, gradients=True))
        deepest, pixels = want.deepest(model), max(sides[0] * sides[1], seen[0] * seen[1])
        passes = 2 if any(objective.mates for objective in want.objectives) else 1
        each = passes * gradient_bytes(model, deepest, pixels)
        most = max(1, quickest(model, deepest, seen[0] * seen[1]) // passes)
        parts = _batches(want, batch_size(model, each, memory, most))
        natural = None if reference is None else beside_nature(run, want, reference, model, memory)
        batches: list[_Finished] = []
        for position, part in enumerate(parts):
            album = _Album(count, kept)

            def on_step(
                step: int, look: Callable[[], Tensor], album: _Album = album, before: int = position * count
            ) -> None:
                done = before + step + 1
                album.look(step, look)
                if watch is not None:
                    watch(done, look().permute(0, 2, 3, 1).cpu().numpy())
                if progress is not None:
                    progress(done, count * len(parts))

            rows = want.pictures(part)
            task = Task(
                measure=_measured(model, run, want.batch(part), want.layer),
                generators=want.generators(part, seed),
                preprocessing=model.preprocessing,
                device=model.device,
                size=sides,
                steps=count,
                step_size=own_size if step_size is None else step_size,
                sees=sees,
                seen=seen,
                start=None if first is None else first[rows.start : rows.stop],
                raw=space == "input",
                mates=passes > 1,
                views=shown,
                plateau=plateau,
                on_step=on_step,
            )
            drawn = rule.draw(task)
            scores = task.score(drawn.pictures).cpu()
            drawn, scores = _revived(drawn, scores, task, rule, want, part, run, model, seed)
            album.close(drawn.pictures)
            if progress is not None and plateau is not None:
                progress((position + 1) * count, count * len(parts))
            batches.append(_Finished(drawn, scores, album.frames))
        noise = beside_noise(run, want, model, sides, seed, memory)
    scores, history = torch.cat([b.scores for b in batches]), torch.cat([b.drawn.history.cpu() for b in batches], dim=1)
    alphas = [b.drawn.alpha for b in batches if b.drawn.alpha is not None]
    return Patterns(
        model,
        images=_for_display(torch.cat([b.drawn.pictures.cpu() for b in batches])),
        units=np.array(want.numbers),
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
        noise=noise.numpy(),
        reference=None if natural is None else natural[0].numpy(),
        alpha=None if not alphas else (torch.cat(alphas) * 255).round().to(torch.uint8).cpu().numpy(),
        frames=np.concatenate([np.stack(b.frames) for b in batches], axis=1) if kept and count else None,
        objectives=want.names,
        notes=tuple(remarks(want, scores, history, noise, rule.starts)),
        failed=() if natural is None else tuple(natural[1].failed),
    )


@dataclass(frozen=True)
class _Finished:
    """A batch."""

    drawn: Drawn
    scores: Tensor
    frames: list[np.ndarray]


@dataclass
class _Album:
    """Keeps `count` pictures of an ascent of `steps` steps, evenly spaced, the last one included."""

    steps: int
    count: int
    frames: list[np.ndarray] = field(default_factory=list)

    def look(self, step: int, look: Callable[[], Tensor]) -> None:
        due = self.count * (step + 1) // self.steps - self.count * step // self.steps
        if due:
            self.frames += [_for_display(look().cpu())] * due

    def close(self, pictures: Tensor) -> None:
        """The last is the finished picture, and so is what an ascent that ended early did not come to."""
        if self.steps and self.count:
            kept = self.frames[: self.count - 1]
            self.frames = kept + [_for_display(pictures.cpu())] * (self.count - len(kept))


def _for_display(pictures: Tensor) -> np.ndarray:
    shown: np.ndarray = pictures.permute(0, 2, 3, 1).contiguous().numpy()
    return shown


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ConvscopeError(f"{name} is {value!r}; expected a whole number, {least} or more")
    return int(value)


def _batches(want: Wanted, size: int) -> list[Sequence[int]]:
    """Objectives in batches of about `size` pictures; those of one objective are never parted."""
    largest = max(objective.pictures for objective in want.objectives)
    return list(chunks(range(len(want.objectives)), max(1, size // largest)))


def _measured(model: Model, run: Run, objective: Objective, what: str) -> Callable[[Tensor], Tensor]:
    def measure(batch: Tensor) -> Tensor:
        values = objective(run(batch.contiguous(memory_format=torch.channels_last)))
        require_finite(model, values, f"what layer {what!r} gives")
        return values

    return measure


def _revived(
    drawn: Drawn,
    scores: Tensor,
    task: Task,
    rule: Recipe,
    want: Wanted,
    part: Sequence[int],
    run: Run,
    model: Model,
    seed: int,
) -> tuple[Drawn, Tensor]:
    """Units that are still silent, drawn again from other starts and, if none wakes them, from a photograph."""
    if rule.starts == 1 or not want.of_units or want.layer == LOGITS:
        return drawn, scores
    pictures, alpha = drawn.pictures.clone(), None if drawn.alpha is None else drawn.alpha.clone()
    for begin in range(1, rule.starts):
        silent = (scores == 0).nonzero()[:, 0].tolist()
        if not silent or task.steps == 0:
            break
        again = [part[i] for i in silent]
        other = replace(
            task,
            measure=_measured(model, run, want.batch(again), want.layer),
            generators=want.generators(again, seed, begin),
            start=None if task.start is None else task.start[silent],
            steps=min(task.steps, AGAIN),
            plateau=None,
            on_step=_unseen,
        )
        found = rule.draw(other)
        pictures[silent], scores[silent] = found.pictures, other.score(found.pictures).cpu()
        if alpha is not None and found.alpha is not None:
            alpha[silent] = found.alpha
    for i in (scores == 0).nonzero()[:, 0].tolist():
        measure = _measured(model, run, want.batch([part[i]]), want.layer)
        found_at = awakened(run, measure, model, want.layer, want.numbers[part[i]], task.size)
        if found_at is not None:
            alone = replace(task, measure=measure)
            pictures[i], scores[i] = found_at, alone.score(found_at[None]).cpu()[0]
            if alpha is not None:
                alpha[i] = 1
    return drawn._replace(pictures=pictures, alpha=alpha), scores


AGAIN = 32  # steps from another start


def _unseen(step: int, look: Callable[[], Tensor]) -> None:
    """Nobody looks on."""
