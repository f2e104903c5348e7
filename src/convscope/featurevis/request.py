"""Check what the user asks for before the network runs: recipe, objectives, initial images and sizes."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Generator, Tensor, nn

from convscope.engine.capture import LayerOutputs
from convscope.engine.layer_selection import LayerLike, ModuleKey, layer_name
from convscope.engine.layer_table import Layer
from convscope.engine.model import LOGITS, Model
from convscope.engine.text_targets import TextTarget
from convscope.errors import ConvscopeError, find_name, is_int
from convscope.featurevis.defaults import Size
from convscope.featurevis.objective import Forward, Objective, batch_objectives, per_image_channels
from convscope.featurevis.objectives import channel, text
from convscope.featurevis.recipes import RECIPES, Recipe
from convscope.images.loading import ImageBatchLoader

SPACES = ("pixels", "input")

StartImage = str | os.PathLike[str] | Image.Image | ArrayLike | Tensor
Units = int | str | Iterable[int | str]
PatternSubject = LayerLike | Objective | TextTarget | Sequence[Objective] | Sequence[TextTarget]
SizeCheck = Callable[[Size], Exception | None]  # what the network raises for images of a size, if anything


@dataclass(frozen=True)
class PatternRequest:
    """The objectives to maximise, and the images that belong to them.

    Attributes
    ----------
    layer : str
        The layer's name; of objectives, the names of all their layers.
    units : tuple of int
        One number per image: the unit, or for objectives a running number.
    objectives : tuple of Objective
        One per unit, or the user's own. A batch is a range of their indices.
    of_units : bool
        Whether the objectives are units of one layer.
    """

    layer: str
    units: tuple[int, ...]
    objectives: tuple[Objective, ...]
    of_units: bool

    @property
    def layers(self) -> list[str]:
        """Names of the layers to capture, without ``"logits"``."""
        return list(dict.fromkeys(layer for objective in self.objectives for layer in objective.layers))

    @property
    def needs_logits(self) -> bool:
        """Whether the whole network has to run."""
        return any(layer == LOGITS for objective in self.objectives for layer, _ in objective.layer_channels)

    @property
    def texts(self) -> list[str]:
        """The texts whose logits are needed, without duplicates."""
        return list(dict.fromkeys(text for objective in self.objectives for text in objective.texts))

    @property
    def paired(self) -> bool:
        """Whether images are compared with photographs."""
        return any(objective.paired for objective in self.objectives)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the images of objectives; empty for units."""
        if self.of_units:
            return ()
        return tuple(
            objective.name if objective.num_images == 1 else f"{objective.name} ({i + 1})"
            for objective in self.objectives
            for i in range(objective.num_images)
        )

    def display_names(self, model: Model) -> list[str]:
        """Return a name for each image, for use in messages."""
        if not self.of_units:
            return list(self.names)
        if self.layer != LOGITS:
            return [f"unit {unit}" for unit in self.units]
        return [f"class {c}" + ("" if model.classes is None else f" ({model.classes[c]})") for c in self.units]

    def image_range(self, indices: Sequence[int]) -> range:
        """Return the range of the images of a range of objectives."""
        first = sum(objective.num_images for objective in self.objectives[: indices[0]])
        return range(first, first + sum(self.objectives[i].num_images for i in indices))

    def batch_objective(self, indices: Sequence[int]) -> Objective:
        """Return one objective for all images of these objectives."""
        if self.of_units:
            return per_image_channels(self.layer, [self.units[i] for i in indices])
        return batch_objectives([self.objectives[i] for i in indices])

    def generators(self, indices: Sequence[int], seed: int, start: int = 0) -> list[Generator]:
        """Return a random generator for each image of these objectives, independent of the rest of the batch.

        `start` counts the initial images that are tried for the same unit.
        """
        generators = []
        for i in indices:
            objective = self.objectives[i]
            for image in range(objective.num_images):
                number = self.units[i] if self.of_units else zlib.crc32(f"{objective.name} {image}".encode())
                image_seed = seed * 1_000_003 + number * 7919 + 1 + start * 2_147_483_647
                generators.append(Generator().manual_seed(image_seed % (1 << 63)))
        return generators

    def deepest_layer(self, model: Model) -> str | None:
        """Return the last layer that has to run, None for the logits."""
        if self.needs_logits:
            return None
        order = list(model.layers)
        return max(self.layers, key=lambda layer: order.index(model.layers.find(layer)))

    def receptive_field(self, model: Model) -> int | None:
        """Return the side of the largest receptive field in pixels; None for the whole image."""
        fields = [model.layers.find(layer).receptive_field for layer in self.layers]
        sides = [max(field) for field in fields if field is not None]
        return None if self.needs_logits or len(sides) < len(fields) else max(sides)


def find_recipe(recipe: str | Recipe, has_start: bool, space: str) -> tuple[str, Recipe]:
    """Return a recipe's name and the recipe; raise ConvscopeError if it does not go with `start` or `space`."""
    if isinstance(recipe, Recipe):
        name, row = getattr(recipe.run, "__name__", "custom"), recipe
    else:
        name = find_name("recipe", recipe, list(RECIPES))
        row = RECIPES[name]
    if space not in SPACES:
        raise ConvscopeError(f"space {space!r} is not known; expected 'pixels' or 'input'")
    if space == "input" and row is not RECIPES["plain"]:
        raise ConvscopeError(f"space='input' is for recipe='plain'; the images of {name!r} need preprocessing")
    if has_start and not row.takes_start:
        raise ConvscopeError(f"recipe {name!r} takes no start image; leave out start=")
    if not has_start and row.needs_start:
        raise ConvscopeError(f"recipe {name!r} needs a photograph; give one as start=")
    return name, row


def parse_request(
    model: Model, layer: PatternSubject, units: Units | None, name: str, recipe: Recipe
) -> PatternRequest:
    """Return the checked request for units of a layer, for objectives or for texts; raise ConvscopeError."""
    if isinstance(layer, str | Layer | nn.Module):
        return _parse_units(model, layer_name(model, layer), units, name, recipe)
    subjects = list(layer) if isinstance(layer, Sequence) else [layer]
    candidates = [text(subject.text) if isinstance(subject, TextTarget) else subject for subject in subjects]
    objectives = [objective for objective in candidates if isinstance(objective, Objective)]
    if not objectives or len(objectives) < len(candidates):
        raise ConvscopeError(
            f"layer is {layer!r}; expected a layer's name or module, an objective, a text target, or a list of "
            "objectives or text targets"
        )
    if units is not None:
        raise ConvscopeError("units= goes with a layer's name; an objective names its own units")
    return _parse_objectives(model, objectives, name)


def _parse_objectives(model: Model, objectives: Sequence[Objective], recipe_name: str) -> PatternRequest:
    resolved = [_resolve_layer_names(model, objective) for objective in objectives]
    for objective in resolved:
        objective.check(model)
        if not objective.layer_channels:
            raise ConvscopeError(f"{objective.name} depends on no layer: it cannot be maximised")
        if objective.paired and recipe_name != "caricature":
            raise ConvscopeError(f"{objective.name} compares with a photograph; use recipe='caricature'")
        if not objective.paired and recipe_name == "caricature":
            raise ConvscopeError(f"{objective.name} does not compare with a photograph; use another recipe")
    layers = dict.fromkeys(layer for objective in resolved for layer, _ in objective.layer_channels)
    numbers = range(sum(objective.num_images for objective in resolved))
    return PatternRequest(", ".join(layers), tuple(numbers), tuple(resolved), of_units=False)


def _resolve_layer_names(model: Model, objective: Objective) -> Objective:
    """Return the objective with layers under their full names, by which forward passes return them."""
    names = {layer: layer_name(model, layer) for layer, _ in objective.layer_channels}
    if all(name == full_name for name, full_name in names.items()):
        return objective

    def value(outputs: LayerOutputs) -> Tensor:
        maps = {name: outputs.maps[full_name] for name, full_name in names.items() if full_name in outputs.maps}
        return objective.function(replace(outputs, maps={**outputs.maps, **maps}))

    layer_channels = tuple((names[layer], unit) for layer, unit in objective.layer_channels)
    title = objective.name
    for name in names:
        title = title.replace(name, names[name]) if isinstance(name, ModuleKey) else title
    return replace(objective, name=title, layer_channels=layer_channels, function=value)


def _parse_units(model: Model, layer: str, units: Units | None, recipe_name: str, recipe: Recipe) -> PatternRequest:
    if units is None and recipe.objective is not None:
        if layer == LOGITS:
            raise ConvscopeError(f"recipe {recipe_name!r} needs units= for 'logits': the classes to optimise for")
        return _parse_objectives(model, [recipe.objective(layer)], recipe_name)
    if recipe_name == "caricature":
        raise ConvscopeError("recipe 'caricature' is for a layer as a whole; leave out units=")
    numbers = tuple(_unit_indices(model, layer, units))
    return PatternRequest(layer, numbers, tuple(channel(layer, number) for number in numbers), of_units=True)


def _unit_indices(model: Model, layer: str, units: Units | None) -> list[int]:
    count = model.num_outputs if layer == LOGITS else model.layers.find(layer).units
    if count is None:
        raise ConvscopeError("this model has no classes")
    if units is None:
        return list(range(count))
    requested = [units] if isinstance(units, str) or not isinstance(units, Iterable) else list(units)
    if not requested:
        raise ConvscopeError("no units were given; None stands for all of them")
    if layer == LOGITS:
        return [model.class_index(unit) for unit in requested]
    for unit in requested:
        if isinstance(unit, str) or not is_int(unit) or not 0 <= unit < count:
            raise ConvscopeError(f"unit {unit!r} is not in layer {layer!r}, which has {count} units, 0 to {count - 1}")
    return [int(unit) for unit in requested]


def initial_images(start: StartImage | None, size: int | Size | None, count: int, model: Model) -> Tensor | None:
    """Return the initial images (count, C, H, W), 0..255, if there is a `start`; raise ConvscopeError.

    Arrays and tensors are used as they are. A file or PIL image is resized to `size`, or so that its shorter side is
    that of the model's size.
    """
    if start is None:
        return None
    if isinstance(start, str | os.PathLike | Image.Image):
        return _read_photograph(start, size, model).expand(count, -1, -1, -1)
    if size is not None:
        raise ConvscopeError("size= and start= were both given; a start array has its own size, leave out size=")
    channels = model.preprocessing.channels
    if isinstance(start, Tensor):
        images = start.detach().clone()
    else:
        images = torch.from_numpy(np.array(start, dtype=np.float32))
    if images.ndim == 3:
        images = images[None]
    if images.ndim == 4 and not isinstance(start, Tensor):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != channels or images.shape[0] not in (1, count):
        raise ConvscopeError(
            f"start has shape {tuple(np.shape(start))}; expected (H, W, {channels}), ({count}, H, W, {channels}), "
            f"or a tensor ({count}, {channels}, H, W)"
        )
    if not bool(images.isfinite().all()):
        raise ConvscopeError("start contains NaN or infinity")
    return images.float().expand(count, -1, -1, -1)


def _read_photograph(start: str | os.PathLike[str] | Image.Image, size: int | Size | None, model: Model) -> Tensor:
    """Return a photograph (1, C, H, W), 0..255, resized to `size`."""
    preprocessing = model.preprocessing
    unscaled = replace(
        preprocessing,
        range=(0.0, 255.0),
        mean=(0.0,) * preprocessing.channels,
        std=(1.0,) * preprocessing.channels,
        resize=None,
        transform=None,
        channel_order="RGB" if preprocessing.channel_order == "BGR" else preprocessing.channel_order,
    )
    if size is None:
        height, width = next(ImageBatchLoader(start, unscaled).batches(1)).geometry[0].image_size
        scale = min(preprocessing.image_size) / min(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
    return next(ImageBatchLoader(start, replace(unscaled, size=height_width(size))).batches(1)).x


def height_width(size: int | Size) -> Size:
    """Return height and width from one number or two; raise ConvscopeError."""
    sides = (size, size) if isinstance(size, int | np.integer) else size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(is_int(side) and side >= 1 for side in sides):
        raise ConvscopeError(f"size is {size!r}; expected pixels, one number or height and width")
    height, width = sides
    return int(height), int(width)


def size_checker(model: Model, forward: Forward) -> SizeCheck:
    """Return a function that runs the network on a black image of a size and returns the exception, if any."""

    def check(size: Size) -> Exception | None:
        try:
            with torch.no_grad():
                forward(torch.zeros((1, model.preprocessing.channels, *size)))
        except (RuntimeError, ValueError, AssertionError) as error:
            return error
        return None

    return check


def canvas_size(
    size: int | Size | None, recipe: Recipe, receptive_field: int | None, model: Model, check: SizeCheck
) -> Size:
    """Return height and width of the images; raise ConvscopeError if the network does not run on the user's `size`."""
    model_size = model.preprocessing.image_size
    if size is None:
        default = recipe.canvas_size(receptive_field, model_size, True)
        if default == model_size or check(default) is None:
            return default
        return recipe.canvas_size(receptive_field, model_size, False)
    sides = height_width(size)
    if (error := check(sides)) is not None:
        reason = " ".join(str(error).split())[:200]
        raise ConvscopeError(
            f"the network does not run on images of {sides[0]} x {sides[1]} ({type(error).__name__}: {reason}); "
            f"its own size is {model_size[0]} x {model_size[1]}"
        ) from error
    return sides
