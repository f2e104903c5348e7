"""What is to be drawn, checked before anything runs: for which objectives, from which numbers, how large."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from convscope.engine.capture import LayerOutputs
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError, nearest
from convscope.featurevis.objectives import Objective, batch_objectives, channel, per_image_channels
from convscope.featurevis.recipes import RECIPES, Recipe
from convscope.images.loading import ImageBatchLoader

SPACES = ("pixels", "input")


@dataclass(frozen=True)
class PatternRequest:
    """What is to be climbed: units of one layer, or objectives of any kind, each with the pictures drawn for it.

    `numbers` are the units, or count the pictures of objectives; `objectives` are the same as objects, one for each
    unit. A batch is a range of `objectives`.
    """

    layer: str
    units: tuple[int, ...]
    objectives: tuple[Objective, ...]
    of_units: bool

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(layer for objective in self.objectives for layer in objective.layers))

    @property
    def to_logits(self) -> bool:
        """Whether the whole network has to run."""
        return any(layer == LOGITS for objective in self.objectives for layer, _ in objective.layer_channels)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the pictures, where they are not simply units'."""
        if self.of_units:
            return ()
        return tuple(
            o.name if o.num_images == 1 else f"{o.name} ({i + 1})" for o in self.objectives for i in range(o.num_images)
        )

    def display_names(self, model: Model) -> list[str]:
        """What to call each picture in a sentence."""
        if not self.of_units:
            return list(self.names)
        if self.layer != LOGITS:
            return [f"unit {n}" for n in self.units]
        return [f"class {n}" + ("" if model.classes is None else f" ({model.classes[n]})") for n in self.units]

    def image_range(self, part: Sequence[int]) -> range:
        """The pictures of the objectives `part`, a range."""
        before = sum(o.num_images for o in self.objectives[: part[0]])
        return range(before, before + sum(self.objectives[i].num_images for i in part))

    def batch_objective(self, part: Sequence[int]) -> Objective:
        """One objective for all of the batch's pictures."""
        if self.of_units:
            return per_image_channels(self.layer, [self.units[i] for i in part])
        return batch_objectives([self.objectives[i] for i in part])

    def generators(self, part: Sequence[int], seed: int, start: int = 0) -> list[Generator]:
        """Each picture's own random numbers, far apart for neighbours, the same whatever is drawn beside it."""
        found = []
        for i in part:
            objective = self.objectives[i]
            for image in range(objective.num_images):
                # A unit's number says which it is; of any other objective, its name does.
                number = self.units[i] if self.of_units else zlib.crc32(f"{objective.name} {image}".encode())
                own = seed * 1_000_003 + number * 7919 + 1 + start * 2_147_483_647
                found.append(Generator().manual_seed(own % (1 << 63)))
        return found

    def deepest_layer(self, model: Model) -> str | None:
        """The layer behind which nothing has to run, None for the logits."""
        if self.to_logits:
            return None
        rows = list(model.layers)
        return max(self.layers, key=lambda layer: rows.index(model.layers.find(layer)))

    def receptive_field(self, model: Model) -> int | None:
        """Pixels that the objectives' units see at most; None where it is the whole picture."""
        fields = [model.layers.find(layer).receptive_field for layer in self.layers]
        if self.to_logits or any(field is None for field in fields):
            return None
        return max(max(field) for field in fields if field is not None)


def find_recipe(asked: str | Recipe, start: Any, space: str) -> tuple[str, Recipe]:
    """A recipe's name and row. Raises ConvscopeError, also for what the recipe cannot do anything with."""
    if not isinstance(asked, Recipe) and asked not in RECIPES:
        raise ConvscopeError(f"recipe {asked!r} is not known; nearest: {nearest(str(asked), list(RECIPES))}")
    rule = asked if isinstance(asked, Recipe) else RECIPES[asked]
    name = getattr(rule.run, "__name__", "own") if isinstance(asked, Recipe) else asked
    if space not in SPACES:
        raise ConvscopeError(f"space {space!r} is not known; expected 'pixels' or 'input'")
    if space == "input" and rule is not RECIPES["plain"]:
        raise ConvscopeError(f"space='input' is for recipe='plain'; {name!r} draws pictures that are to be prepared")
    if start is not None and not rule.takes_start:
        raise ConvscopeError(f"start= is of no use to recipe {name!r}, which draws on a canvas of its own")
    if start is None and rule.needs_start:
        raise ConvscopeError(f"recipe {name!r} begins with a photograph; give one as start=")
    return name, rule


def parse_request(
    model: Model, layer: str | Objective | Sequence[Objective], units: Any, name: str, rule: Recipe
) -> PatternRequest:
    """What the user asks for, checked. Raises ConvscopeError."""
    if isinstance(layer, str):
        return _units(model, layer, units, name, rule)
    if units is not None:
        raise ConvscopeError("units= goes with a layer's name; an objective knows its own")
    given = [layer] if isinstance(layer, Objective) else list(layer)
    if not given or not all(isinstance(o, Objective) for o in given):
        raise ConvscopeError("expected a layer's name, an objective, or a list of objectives")
    return _objectives(model, given, name)


def _objectives(model: Model, given: Sequence[Objective], name: str) -> PatternRequest:
    for objective in given:
        objective.check(model)
        if not objective.layer_channels:
            raise ConvscopeError(f"{objective.name} looks at no layer: there is nothing to climb")
        if objective.paired != (name == "caricature"):
            beside = "compares with a photograph" if objective.paired else "does not compare with a photograph"
            raise ConvscopeError(f"{objective.name} {beside}; recipe 'caricature', and no other, is for what does")
    layers = dict.fromkeys(layer for objective in given for layer, _ in objective.layer_channels)
    numbers = range(sum(objective.num_images for objective in given))
    return PatternRequest(", ".join(layers), tuple(numbers), tuple(_found(model, o) for o in given), of_units=False)


def _found(model: Model, objective: Objective) -> Objective:
    """The objective, sure to read its layers under the names that the tap gives them."""
    names = {
        layer: layer if layer == LOGITS else model.layers.find(layer).name for layer, _ in objective.layer_channels
    }
    if all(own == asked for asked, own in names.items()):
        return objective
    watches = tuple((names[layer], channel) for layer, channel in objective.layer_channels)

    def value(seen: LayerOutputs) -> Tensor:
        return objective.function(
            replace(seen, maps={asked: seen.maps[own] for asked, own in names.items() if own in seen.maps})
        )

    return replace(objective, layer_channels=watches, function=value)


def _units(model: Model, layer: str, units: Any, name: str, rule: Recipe) -> PatternRequest:
    layer = layer if layer == LOGITS else model.layers.find(layer).name
    if units is None and rule.objective is not None:
        if layer == LOGITS:
            raise ConvscopeError(
                f"recipe {name!r} takes a layer, or units; 'logits' alone says nothing of what to draw"
            )
        return _objectives(model, [rule.objective(layer)], name)
    if name == "caricature":
        raise ConvscopeError("a caricature is of all that a layer sees; it takes no units")
    numbers = tuple(_numbers(model, layer, units))
    return PatternRequest(layer, numbers, tuple(channel(layer, number) for number in numbers), of_units=True)


def _numbers(model: Model, layer: str, units: int | str | Iterable[int | str] | None) -> list[int]:
    count = model.num_outputs if layer == LOGITS else model.layers.find(layer).units
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


def initial_images(start: Any, size: int | tuple[int, int] | None, count: int, model: Model) -> Tensor | None:
    """Pictures to start from (U, C, H, W) on the scale 0..255, or none.

    Arrays and tensors are used as they are. A file, or a PIL image, is brought to `size`, or until its shorter side is
    as long as that of the network's input. Raises ConvscopeError.
    """
    if start is None:
        return None
    if isinstance(start, str | os.PathLike | Image.Image):
        return _opened(start, size, model).expand(count, -1, -1, -1)
    if size is not None:
        raise ConvscopeError("size= and start= were both given; an array to start from has its own size")
    channels = model.preprocessing.channels
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


def _opened(start: Any, size: int | tuple[int, int] | None, model: Model) -> Tensor:
    full = model.preprocessing.image_size
    like = model.preprocessing
    blank = {"range": (0.0, 255.0), "mean": (0.0,) * like.channels, "std": (1.0,) * like.channels, "resize": None}
    order = "RGB" if like.channel_order == "BGR" else like.channel_order
    as_it_is = replace(like, **blank, channel_order=order)  # type: ignore[arg-type]
    if size is None:
        height, width = next(ImageBatchLoader(start, as_it_is).batches(1)).geometry[0].image_size
        share = min(full) / min(height, width)
        size = max(1, round(height * share)), max(1, round(width * share))
    return next(ImageBatchLoader(start, replace(as_it_is, size=height_width(size))).batches(1)).x


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width. Raises ConvscopeError."""
    sides = (size, size) if isinstance(size, int | np.integer) else tuple(int(side) for side in size)
    if len(sides) != 2 or min(sides) < 1:
        raise ConvscopeError(f"size is {' x '.join(map(str, sides))}; expected pixels, one number or height and width")
    return sides


Refuses = Callable[[tuple[int, int]], Exception | None]


def size_checker(model: Model, run: Callable[[Tensor], Any]) -> Refuses:
    """What the network, up to the layers, raises on pictures of a size; None if it takes them: found by trying."""

    def tried(size: tuple[int, int]) -> Exception | None:
        try:
            with torch.no_grad():
                run(torch.zeros((1, model.preprocessing.channels, *size)))
        except (RuntimeError, ValueError, AssertionError) as error:
            return error
        return None

    return tried


def canvas_size(
    size: int | tuple[int, int] | None, rule: Recipe, sees: int | None, model: Model, refuses: Refuses
) -> tuple[int, int]:
    """Height and width of what is drawn. Raises ConvscopeError if the network does not run on it."""
    full = model.preprocessing.image_size
    if size is None:
        wished = rule.canvas_size(sees, full, True)
        return wished if wished == full or refuses(wished) is None else rule.canvas_size(sees, full, False)
    sides = height_width(size)
    if (error := refuses(sides)) is not None:
        reason = " ".join(str(error).split())[:200]
        raise ConvscopeError(
            f"the network does not run on pictures of {sides[0]} x {sides[1]} ({type(error).__name__}: {reason}); "
            f"its own size is {full[0]} x {full[1]}"
        ) from error
    return sides
