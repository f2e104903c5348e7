"""The second technique: the picture that a unit wants to see."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from convscope import tap
from convscope.budget import MEMORY, Progress, batch_size, chunks, gradient_bytes, quickest
from convscope.errors import ConvscopeError, nearest
from convscope.model import LOGITS, Model
from convscope.patterns.objective import Objective, unit
from convscope.patterns.recipes import RECIPES, Recipe, Task
from convscope.results import Result
from convscope.sound import require_finite

SPACES = ("pixels", "input")

STUCK = {
    "plain": "its rectifier is off everywhere and gives no gradient; recipe='robust' lets the gradient past it",
    "robust": "it did not fire although the gradient was let past its rectifier; it seems to be dead",
}


@dataclass(frozen=True, eq=False)
class Patterns(Result):
    """Finished pictures for U units.

    `images` is uint8 (U, H, W, C); `units` (U,); `scores` (U,): the unit's mean activation (for "logits" the logit) on
    the finished 8-bit picture, without any augmentation; `history` (steps, U): what was climbed, before each step.
    """

    images: np.ndarray
    units: np.ndarray
    scores: np.ndarray
    history: np.ndarray
    layer: str
    recipe: str
    seed: int
    steps: int
    step_size: float
    space: str

    @property
    def names(self) -> list[str]:
        """What each picture shows: a class's name, or the layer and the unit's number."""
        if self.layer == LOGITS:
            return [self.model.class_name(int(u)) for u in self.units]
        return [f"{self.layer} {u}" for u in self.units]

    def parameters(self) -> dict[str, Any]:
        return {**super().parameters(), "size": list(self.images.shape[1:3]), "units": self.units.tolist()}


def patterns(
    model: Model,
    layer: str,
    units: int | Iterable[int | str] | None = None,
    *,
    recipe: str = "robust",
    size: int | tuple[int, int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    start: Any = None,
    space: str = "pixels",
    step_size: float | None = None,
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
        A layer's name, or "logits" for the classes themselves.
    units
        Channels of the layer; for "logits" class indices or names. None: all of them.
    recipe
        "robust": Fourier canvas and random views. "plain": the textbook's 40 normalised steps on pixels.
    size
        Height and width of the picture, or one number for both. Default: three receptive fields, from 64 pixels to
        the network's own size (robust); 150 (plain).
    steps, step_size
        Number and length of the steps. Default: 128 of 0.1 (robust, Adam), 40 of 1 on the scale 0..255 (plain).
    seed
        The same seed gives the same pictures, whatever other units are drawn beside them.
    start
        For "plain": the picture to start from, on the scale 0..255, (H, W, C) for all units or (U, H, W, C), or a
        tensor (U, C, H, W).
    space
        For "plain": "pixels" puts the picture through the preprocessing, "input" feeds it to the network as it is.
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
    rule = _recipe(recipe, start, space)
    chosen = _units(model, layer, units)
    layer = layer if layer == LOGITS else model.layers.find(layer).name
    count = rule.steps if steps is None else steps
    if count < 0:
        raise ConvscopeError(f"steps is {count}; expected 0 or more")
    rate = rule.step_size if step_size is None else step_size
    first = None if start is None else _start(start, len(chosen), model.preprocessing.channels)
    if first is not None and size is not None:
        raise ConvscopeError("size= and start= were both given; the start picture has its own size")
    sees = _sees(model, layer)

    images, histories, scores = [], [], []
    with tap.attach(model, [] if layer == LOGITS else [layer], stop=layer != LOGITS) as run:
        refuses = _refuses(model, run)
        sides = _sides(size if first is None else (first.shape[-2], first.shape[-1]), rule, sees, model, refuses)
        seen = rule.seen(sees, model.preprocessing.picture_size, sides)
        seen = sides if seen != sides and refuses(seen) is not None else seen
        behind = None if layer == LOGITS else layer
        each = gradient_bytes(model, behind, max(sides[0] * sides[1], seen[0] * seen[1]))
        most = quickest(model, behind, seen[0] * seen[1])
        parts = list(chunks(range(len(chosen)), batch_size(model, each, memory, most)))
        ticks = itertools.count(1)

        def on_step(_: int) -> None:
            done = next(ticks)
            if progress is not None:
                progress(done, count * len(parts))

        for part in parts:
            numbers = [chosen[i] for i in part]
            task = Task(
                measure=_measured(model, run, unit(layer, torch.tensor(numbers)), layer),
                generators=[Generator().manual_seed(_own_seed(seed, u)) for u in numbers],
                preprocessing=model.preprocessing,
                device=model.device,
                size=sides,
                steps=count,
                step_size=rate,
                sees=sees,
                seen=seen,
                start=None if first is None else first[part[0] : part[-1] + 1],
                raw=space == "input",
                on_step=on_step,
            )
            finished, history = rule.draw(task)
            scores.append(task.score(finished).cpu())
            images.append(finished.cpu())
            histories.append(history.cpu())
    final, values = torch.cat(scores), torch.cat(histories, dim=1)
    return Patterns(
        model,
        images=torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy(),
        units=np.array(chosen),
        scores=final.numpy(),
        history=values.numpy(),
        layer=layer,
        recipe=recipe,
        seed=seed,
        steps=count,
        step_size=rate,
        space=space,
        notes=tuple(_remarks(chosen, final, values, recipe)),
    )


def _recipe(name: str, start: Any, space: str) -> Recipe:
    if name not in RECIPES:
        raise ConvscopeError(f"recipe {name!r} is not known; nearest: {nearest(name, list(RECIPES))}")
    if space not in SPACES:
        raise ConvscopeError(f"space {space!r} is not known; expected 'pixels' or 'input'")
    if not RECIPES[name].takes_start and (start is not None or space != "pixels"):
        raise ConvscopeError(f"start= and space= are for recipe='plain'; {name!r} draws on a canvas of its own")
    return RECIPES[name]


def _units(model: Model, layer: str, units: int | Iterable[int | str] | None) -> list[int]:
    count = model.outputs if layer == LOGITS else model.layers.find(layer).units
    if count is None:
        raise ConvscopeError("this model has no classes")
    if units is None:
        return list(range(count))
    asked: Sequence[Any] = [units] if isinstance(units, int | str | np.integer) else list(units)
    if not asked:
        raise ConvscopeError("no units were given; None means all of them")
    if layer == LOGITS:
        return [model.class_index(u) for u in asked]
    for u in asked:
        if isinstance(u, bool) or not isinstance(u, int | np.integer) or not 0 <= u < count:
            raise ConvscopeError(f"unit {u!r} is not in layer {layer!r}, which has {count} units, 0 to {count - 1}")
    return [int(u) for u in asked]


def _own_seed(seed: int, number: int) -> int:
    """A generator's seed for one unit: far apart for neighbours, the same whatever is drawn beside it."""
    return (seed * 1_000_003 + number * 7919 + 1) % (1 << 63)


def _sees(model: Model, layer: str) -> int | None:
    field = None if layer == LOGITS else model.layers.find(layer).receptive_field
    return None if field is None else max(field)


def _refuses(model: Model, run: Callable[[Tensor], tap.Seen]) -> Callable[[tuple[int, int]], Exception | None]:
    """What the network, up to the layer, raises on pictures of a size; None if it takes them: found by trying."""

    def refuses(size: tuple[int, int]) -> Exception | None:
        try:
            with torch.no_grad():
                run(torch.zeros((1, model.preprocessing.channels, *size)))
        except (RuntimeError, ValueError, AssertionError) as error:
            return error
        return None

    return refuses


def _sides(
    size: int | tuple[int, int] | None,
    rule: Recipe,
    sees: int | None,
    model: Model,
    refuses: Callable[[tuple[int, int]], Exception | None],
) -> tuple[int, int]:
    full = model.preprocessing.picture_size
    if size is None:
        wished = rule.size(sees, full, True)
        return wished if wished == full or refuses(wished) is None else rule.size(sees, full, False)
    sides = (size, size) if isinstance(size, int | np.integer) else (int(size[0]), int(size[1]))
    if min(sides) < 1:
        raise ConvscopeError(f"size is {sides[0]} x {sides[1]}; expected pixels")
    if (error := refuses(sides)) is not None:
        reason = " ".join(str(error).split())[:200]
        raise ConvscopeError(
            f"the network does not run on pictures of {sides[0]} x {sides[1]} ({type(error).__name__}: {reason}); "
            f"its own size is {full[0]} x {full[1]}"
        ) from error
    return sides


def _start(start: Any, count: int, channels: int) -> Tensor:
    given = start.detach().clone() if isinstance(start, Tensor) else torch.from_numpy(np.array(start, dtype=np.float32))
    if given.ndim == 3:
        given = given[None]
    if given.ndim == 4 and not isinstance(start, Tensor):
        given = given.permute(0, 3, 1, 2)
    if given.ndim != 4 or given.shape[1] != channels or given.shape[0] not in (1, count):
        raise ConvscopeError(
            f"start has shape {tuple(np.shape(start))}; expected (H, W, {channels}), ({count}, H, W, {channels}), "
            f"or a tensor ({count}, {channels}, H, W)"
        )
    if not bool(given.isfinite().all()):
        raise ConvscopeError("start holds NaN or infinity")
    return given.float().expand(count, -1, -1, -1)


def _measured(
    model: Model, run: Callable[[Tensor], tap.Seen], objective: Objective, layer: str
) -> Callable[[Tensor], Tensor]:
    def measure(batch: Tensor) -> Tensor:
        values = objective(run(batch.contiguous(memory_format=torch.channels_last)))
        require_finite(model, values, f"what layer {layer!r} gives")
        return values

    return measure


def _remarks(units: Sequence[int], scores: Tensor, history: Tensor, recipe: str) -> list[str]:
    """In words: units that did not respond."""
    said = []
    for position, number in enumerate(units):
        path = history[:, position]
        silent = len(path) > 0 and bool((path == 0).all())
        if scores[position] > 0 and not (silent and recipe == "plain"):
            if silent:
                said.append(f"unit {number} fires at this very picture, but was silent whenever it was moved or zoomed")
        elif silent:
            said.append(f"unit {number} is stuck at 0: {STUCK[recipe]}")
        else:
            said.append(
                f"unit {number} ends with a score of {float(scores[position]):.3g}: this is not what it looks for"
            )
    return said
