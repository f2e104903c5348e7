"""Pictures drawn again: of units that stay silent, and of classes that the network itself does not know in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.budget import chunks
from convscope.model import LOGITS, Model
from convscope.patterns.frames import Album
from convscope.patterns.objective import Objective
from convscope.patterns.plan import Wanted
from convscope.patterns.recipes import Drawn, Recipe, Task, plain
from convscope.patterns.worth import KNOWN, Run, awakened, known
from convscope.sound import require_finite

AGAIN = 32  # steps from another start, for a unit that was silent from the first

OFF = "is stuck at 0: its rectifier is off everywhere and gives no gradient; recipe='robust' lets the gradient past it"
STILL = "is stuck at 0: it stayed silent though the gradient was let past its rectifier"
ASLEEP = "is stuck at 0: it stayed silent from {starts} starts with the gradient let past its rectifier"
DEAD = (
    "is stuck at 0: dead: it fired on none of the sample photographs, nor from {starts} starts with the gradient let "
    "past its rectifier"
)
LARGER = (
    "is stuck at 0: it fires on a sample photograph, but at no piece of {height} x {width} pixels that was cut out of "
    "it, nor from {starts} starts with the gradient let past its rectifier; a larger size= may help"
)
FLEETING = "fires at this very picture, but was silent whenever it was moved or zoomed"


def measured(model: Model, run: Run, objective: Objective, what: str) -> Callable[[Tensor], Tensor]:
    """What a batch is climbed by. Raises ConvscopeError if the network gives numbers that are not finite."""

    def measure(batch: Tensor) -> Tensor:
        values = objective(run(batch.contiguous(memory_format=torch.channels_last)))
        require_finite(model, values, f"what layer {what!r} gives")
        return values

    return measure


@dataclass(frozen=True)
class Batch:
    """What is drawn together: `part` of all that is wanted. `beat` is called at every step of what is drawn again."""

    task: Task
    rule: Recipe
    want: Wanted
    part: Sequence[int]
    run: Run
    model: Model
    seed: int
    beat: Callable[[], None]

    def again(self, which: Sequence[int], start: int, **changes: Any) -> Task:
        """The task for some of the batch's pictures alone, from another start."""
        part = [self.part[i] for i in which]
        return replace(
            self.task,
            measure=measured(self.model, self.run, self.want.batch(part), self.want.layer),
            generators=self.want.generators(part, self.seed, start),
            start=None if self.task.start is None else self.task.start[list(which)],
            **changes,
        )

    def known(self, pictures: Tensor, which: Sequence[int]) -> Tensor:
        """How well the network knows the classes of some of the pictures in these."""
        return known(self.model, self.run, self.task, pictures, [self.want.numbers[self.part[i]] for i in which])


@dataclass
class Finished:
    """A batch's pictures, their scores (U,), and frames.

    For units that were silent at every step also what is to be said of them, by row; for classes how well the network
    knows them (U,).
    """

    drawn: Drawn
    scores: Tensor
    album: Album
    silent: dict[int, str] = field(default_factory=dict)
    known: Tensor | None = None

    def put(self, which: Sequence[int], found: Drawn, scores: Tensor) -> None:
        """Other pictures in the place of these."""
        rows = list(which)
        pictures, alpha = self.drawn.pictures.clone(), None if self.drawn.alpha is None else self.drawn.alpha.clone()
        pictures[rows] = found.pictures
        if alpha is not None and found.alpha is not None:
            alpha[rows] = found.alpha
        self.drawn = self.drawn._replace(pictures=pictures, alpha=alpha)
        self.scores = self.scores.clone()
        self.scores[rows] = scores


def revive(batch: Batch, done: Finished) -> None:
    """Units that end at 0, drawn again from other starts and, if none wakes them, from a photograph.

    Of units that were silent at every step of every start, `done` tells why.
    """
    if batch.task.steps == 0:
        return
    never = (done.drawn.history == 0).all(0).cpu()
    if batch.rule.starts == 1:
        done.silent = dict.fromkeys(_rows(never & (done.scores == 0)), OFF if batch.rule.draw is plain else STILL)
    if batch.rule.starts == 1 or not batch.want.of_units or batch.want.layer == LOGITS:
        return
    for start in range(1, batch.rule.starts):
        silent = _rows(done.scores == 0)
        if not silent:
            break
        steps = min(batch.task.steps, AGAIN)
        other = batch.again(silent, start, steps=steps, plateau=None, on_step=lambda *_: batch.beat())
        found = batch.rule.draw(other)
        done.put(silent, found, other.score(found.pictures).cpu())
        never[silent] &= (found.history == 0).all(0).cpu()
    said = {i: _from_photograph(batch, done, i) for i in _rows(done.scores == 0)}
    done.silent = {i: said.get(i, FLEETING) for i in _rows(never)}


def _from_photograph(batch: Batch, done: Finished, i: int) -> str:
    """A unit that no start woke, drawn from the sample photograph that excites it most. What is to be said of it."""
    starts, (height, width) = batch.rule.starts, batch.task.size
    if batch.model.preprocessing.channels != 3:
        return ASLEEP.format(starts=starts)
    alone = batch.again([i], 0)
    number = batch.want.numbers[batch.part[i]]
    picture = awakened(batch.run, alone.measure, batch.model, batch.want.layer, number, batch.task.size)
    if picture is None:
        return DEAD.format(starts=starts)
    score = alone.score(picture[None]).cpu()
    if float(score) == 0:
        return LARGER.format(starts=starts, height=height, width=width)
    opaque = torch.ones((1, *batch.task.size), device=picture.device)
    done.put([i], Drawn(picture[None], done.drawn.history, opaque), score)
    return FLEETING


def _rows(which: Tensor) -> list[int]:
    rows: list[int] = which.nonzero()[:, 0].tolist()
    return rows


def convince(batch: Batch, done: Finished, fits: int) -> None:
    """Classes that the network does not know in pieces, drawn again from other starts and in twice as many views.

    What convinces best is kept, with its own history and frames. Of so many views, `fits` pictures are drawn at once.
    """
    if batch.rule.tries == 1 or not batch.want.of_units or batch.want.layer != LOGITS:
        return
    every = list(chunks(range(len(batch.part)), fits))
    sure = torch.cat([batch.known(done.drawn.pictures[list(part)], part) for part in every])
    for start in range(1, batch.rule.tries):
        doubtful = _rows(sure < KNOWN)
        for which in chunks(doubtful, fits):
            _try(batch, done, sure, which, start)
    done.known = sure


def _try(batch: Batch, done: Finished, sure: Tensor, which: Sequence[int], start: int) -> None:
    album = Album(batch.task.steps, done.album.count)

    def on_step(step: int, look: Callable[[], Tensor]) -> None:
        album.look(step, look)
        batch.beat()

    other = batch.again(which, start, views=2 * batch.task.views, on_step=on_step)
    found = batch.rule.draw(other)
    album.close(found.pictures)
    scores, now = other.score(found.pictures).cpu(), batch.known(found.pictures, which)
    rows = _rows(now > sure[list(which)])
    better = [which[row] for row in rows]
    alpha = None if found.alpha is None else found.alpha[rows]
    done.put(better, Drawn(found.pictures[rows], found.history, alpha), scores[rows])
    done.drawn.history[:, better] = found.history[:, rows]
    sure[better] = now[rows]
    done.album.put(better, album, rows)


def joined(batches: Sequence[Finished]) -> Finished:
    """Batches one after the other."""
    parts = [batch.drawn for batch in batches]
    alphas = [part.alpha for part in parts if part.alpha is not None]
    drawn = Drawn(
        torch.cat([part.pictures for part in parts]),
        torch.cat([part.history for part in parts], dim=1),
        torch.cat(alphas) if alphas else None,
    )
    album = batches[0].album
    frames = [np.concatenate(frame) for frame in zip(*(batch.album.frames for batch in batches), strict=True)]
    before = accumulate([0, *(len(batch.scores) for batch in batches)])
    silent = {first + i: why for first, batch in zip(before, batches, strict=False) for i, why in batch.silent.items()}
    scores = torch.cat([batch.scores for batch in batches])
    return Finished(drawn, scores, Album(album.steps, album.count, frames), silent)
