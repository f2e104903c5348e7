"""What an ascent climbs: one value per picture, never a sum that couples pictures.

Objectives are added, subtracted, multiplied, and named after what they are made of:

    unit("blocks.5.2", 7) - unit("blocks.5.2", 9)       what excites one unit and leaves the other cold
    -unit("logits", 386)                                what speaks most against a class
    0.5 * neuron("blocks.3", 4) + whole("blocks.5")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.engine.capture import ForwardResult, LayerOutputs
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError

Value = Callable[[LayerOutputs], Tensor]  # of P pictures: (P,)


@dataclass(frozen=True)
class Objective:
    """A value per picture, with a name.

    `watches` are the layers that `value` looks at and the largest channel of each, None where it looks at all alike.
    `pictures` are drawn together, where they are about each other: 1 unless several are compared. `mates` is whether
    each picture comes with the photograph that it began as behind it: `value` then gets twice the rows that it returns.
    `placed`: `value` looks at a place of the picture as large as it is drawn, which views of another size do not have.
    """

    name: str
    layer_channels: tuple[tuple[str, int | None], ...]
    function: Value
    num_images: int = 1
    paired: bool = False
    fixed_position: bool = False

    @property
    def layers(self) -> list[str]:
        """The layers that have to be watched, each once; the logits are always there."""
        return list(dict.fromkeys(layer for layer, _ in self.layer_channels if layer != LOGITS))

    def __call__(self, seen: LayerOutputs) -> Tensor:
        return self.function(seen)

    def check(self, model: Model) -> None:
        """Raise ConvscopeError for a layer or a channel that the model does not have."""
        for layer, channel in self.layer_channels:
            count = model.num_outputs if layer == LOGITS else model.layers.find(layer).units
            if count is None:
                raise ConvscopeError("this model has no classes")
            if channel is not None and not 0 <= channel < count:
                raise ConvscopeError(
                    f"{self.name}: unit {channel} is not in layer {layer!r}, which has {count} units, 0 to {count - 1}"
                )

    def __add__(self, other: Objective | float) -> Objective:
        return self._with("+", other, lambda a, b: a + b)

    def __sub__(self, other: Objective | float) -> Objective:
        return self._with("-", other, lambda a, b: a - b)

    def __mul__(self, other: Objective | float) -> Objective:
        return self._with("*", other, lambda a, b: a * b)

    def __radd__(self, other: float) -> Objective:
        return _constant(other) + self

    def __rsub__(self, other: float) -> Objective:
        return _constant(other) - self

    def __rmul__(self, other: float) -> Objective:
        return _constant(other) * self

    def __neg__(self) -> Objective:
        name = f"-{self._bracketed()}"
        return replace(self, name=name, function=lambda seen: -self.function(seen))

    def _with(self, sign: str, given: Objective | float, join: Callable[[Tensor, Tensor], Tensor]) -> Objective:
        other = given if isinstance(given, Objective) else _constant(given)
        if 1 not in (self.num_images, other.num_images) and self.num_images != other.num_images:
            raise ConvscopeError(
                f"{self.name} is about {self.num_images} pictures and {other.name} about {other.num_images}; "
                "what is joined must be about as many"
            )
        if self.paired != other.paired and self.layer_channels and other.layer_channels:
            raise ConvscopeError(f"only one of {self.name} and {other.name} compares with a photograph")
        left = self.name if sign == "+" else self._bracketed(sums=sign == "*")
        right = other.name if sign == "+" else other._bracketed()
        return Objective(
            f"{left} {sign} {right}",
            self.layer_channels + other.layer_channels,
            lambda seen: join(self.function(seen), other.function(seen)),
            max(self.num_images, other.num_images),
            self.paired or other.paired,
            self.fixed_position or other.fixed_position,
        )

    def _bracketed(self, sums: bool = True) -> str:
        return f"({self.name})" if sums and (" + " in self.name or " - " in self.name) else self.name


def channel(layer: str, number: int) -> Objective:
    """The mean of a channel over all places; for "logits" the logit of a class."""
    name = f"logit {number}" if layer == LOGITS else f"{layer} {number}"
    return Objective(name, ((layer, number),), lambda seen: _means(_outputs(seen, layer)[:, number]))


def channels(layer: str, numbers: Sequence[int]) -> Objective:
    """The sum of several channels' means: what excites all of them at once."""
    rows = list(numbers)
    if not rows:
        raise ConvscopeError("an objective for no units at all; give at least one")
    name = f"{layer} {'+'.join(map(str, rows))}"
    watches = tuple((layer, number) for number in rows)
    return Objective(name, watches, lambda seen: _means(_outputs(seen, layer)[:, rows].sum(1)))


def per_image_channels(layer: str, numbers: Sequence[int]) -> Objective:
    """For picture i the mean of channel `numbers[i]`: many units at once, with nothing between them."""
    name = f"{layer} {', '.join(map(str, numbers))}"

    def value(seen: LayerOutputs) -> Tensor:
        outputs = _outputs(seen, layer)
        return _means(outputs[torch.arange(len(numbers), device=outputs.device), list(numbers)])

    return Objective(name, tuple((layer, number) for number in numbers), value, len(numbers))


def neuron(layer: str, number: int, at: Sequence[int] | None = None) -> Objective:
    """A channel at one place; by default the middle one, as (row, column) the picture's own."""

    def value(seen: LayerOutputs) -> Tensor:
        maps = _outputs(seen, layer)[:, number]
        where = [side // 2 for side in maps.shape[1:]] if at is None else list(at)
        if len(where) != maps.ndim - 1 or not all(0 <= i < n for i, n in zip(where, maps.shape[1:], strict=True)):
            sides = " x ".join(map(str, maps.shape[1:]))
            raise ConvscopeError(f"place {tuple(where)} is not in layer {layer!r}, whose maps are {sides} here")
        index: tuple[slice | int, ...] = (slice(None), *where)
        return maps[index]

    position = "middle" if at is None else ", ".join(map(str, at))
    return Objective(f"{layer} {number} at {position}", ((layer, number),), value, fixed_position=at is not None)


def direction(layer: str, vector: Sequence[float] | np.ndarray | Tensor, power: float = 0) -> Objective:
    """v . x, times max(0.1, cos(v, x)) to a power: a direction in the space of a layer's channels, mean over places.

    With power 0 the picture may grow along other directions as well; a higher power keeps it to this one. (The dot
    product times the cosine is what the Activation Atlas draws: Carter et al., Distill 2019.)
    """
    along = torch.as_tensor(vector).detach().float().flatten().cpu()
    if len(along) == 0 or not bool(along.isfinite().all()) or not bool(along.any()):
        raise ConvscopeError("a direction needs a vector of finite numbers that are not all 0")

    def value(seen: LayerOutputs) -> Tensor:
        outputs = _outputs(seen, layer)
        if outputs.shape[1] != len(along):
            raise ConvscopeError(f"the direction has {len(along)} numbers, layer {layer!r} {outputs.shape[1]} channels")
        return _means(_aligned(outputs, along.to(outputs.device).view(1, -1, *[1] * (outputs.ndim - 2)), power, (1,)))

    return Objective(f"direction in {layer}", ((layer, len(along) - 1),), value)


def deepdream(layer: str) -> Objective:
    """The mean square of everything that a layer gives: more of whatever it sees already (DeepDream).

    Mordvintsev, Olah and Tyka, Inceptionism, 2015.
    """
    watches = ((layer, None),)
    return Objective(f"all of {layer}", watches, lambda seen: _outputs(seen, layer).square().flatten(1).mean(1))


def caricature(layer: str, power: float = 1) -> Objective:
    """x . p, times max(0.1, cos(x, p)) to a power: the picture's layer x along that of its photograph, p.

    Whatever the layer sees in the photograph is exaggerated, at the place where it sees it (caricatures: Olah,
    "Feature Visualization", Distill 2017; lucid's notebook of activation caricatures). Both are shown in the same view.
    """

    def value(seen: LayerOutputs) -> Tensor:
        outputs = _outputs(seen, layer)
        own, photograph = outputs[::2], outputs[1::2]
        axes = tuple(range(1, own.ndim))
        return _aligned(own, photograph.detach(), power, axes) / own[0].numel()

    return Objective(f"likeness in {layer}", ((layer, None),), value, paired=True)


def diversity(objective: Objective, layer: str, count: int, weight: float = 1) -> Objective:
    """`count` pictures for one objective, each the less worth the more its texture in `layer` is like the others'.

    (1 - weight * c) f, with c the mean cosine of the picture's Gram matrix of channels with the other pictures', which
    counts as given: a picture moves away from the others and is not held by them. (Style diversity: Olah et al.,
    Distill 2017, "Diversity".) A share of f, so that `weight` means the same for every unit.
    """
    if count < 2 or objective.num_images != 1 or objective.paired:
        raise ConvscopeError("diversity is among two pictures or more, each for an objective about one picture")

    def value(seen: LayerOutputs) -> Tensor:
        outputs = _outputs(seen, layer)
        if outputs.ndim < 3:
            raise ConvscopeError(f"layer {layer!r} has no places, and so no texture in which pictures could differ")
        maps = outputs.flatten(2)
        grams = F.normalize((maps @ maps.transpose(1, 2)).flatten(1), dim=1)
        alike = grams @ grams.detach().T
        others = (alike.sum(1) - alike.diagonal()) / (len(alike) - 1)
        own = objective.function(seen)
        # The objective's size gives the weight its meaning; it is not itself climbed by way of the weight.
        return own - weight * own.detach().abs() * others

    watches = (*objective.layer_channels, (layer, None))
    return Objective(f"{count} of {objective.name}", watches, value, count, fixed_position=objective.fixed_position)


def interpolation(first: Objective, last: Objective, layer: str, count: int, weight: float = 1) -> Objective:
    """A row of `count` pictures from one objective to another, neighbours alike in `layer`.

    Picture i has (1 - t) a + t b, t = i / (count - 1), less `weight` times its mean squared distance to its neighbours
    in the layer, relative to the layer's mean square. Neighbours count as given. (Aligned interpolation: Mordvintsev et
    al., Differentiable Image Parameterizations, Distill 2018.)
    """
    if count < 2 or (first.num_images, last.num_images) != (1, 1) or first.paired or last.paired:
        raise ConvscopeError("an interpolation is a row of two pictures or more, between objectives about one picture")

    def value(seen: LayerOutputs) -> Tensor:
        maps = _outputs(seen, layer).flatten(1)
        t = torch.linspace(0, 1, count, device=maps.device)
        own = (1 - t) * first.function(seen) + t * last.function(seen)
        given = maps.detach()
        apart = torch.zeros_like(own)
        apart[1:] += (maps[1:] - given[:-1]).square().mean(1)
        apart[:-1] += (maps[:-1] - given[1:]).square().mean(1)
        apart = apart / given.square().mean(1).clamp(min=1e-12)
        return own - weight * own.detach().abs() * apart

    watches = (*first.layer_channels, *last.layer_channels, (layer, None))
    placed = first.fixed_position or last.fixed_position
    return Objective(f"from {first.name} to {last.name}", watches, value, count, fixed_position=placed)


def batch_objectives(objectives: Sequence[Objective]) -> Objective:
    """Several objectives in one batch, each of its own pictures only: (sum of pictures,) values."""
    if len(objectives) == 1:
        return objectives[0]
    mates = objectives[0].paired
    rows = [objective.num_images * (1 + mates) for objective in objectives]

    def value(seen: LayerOutputs) -> Tensor:
        return torch.cat([o.function(part) for o, part in zip(objectives, _parts(seen, rows), strict=True)])

    watches = tuple(watch for objective in objectives for watch in objective.layer_channels)
    return Objective(", ".join(o.name for o in objectives), watches, value, sum(rows) // (1 + mates), mates)


def _parts(seen: LayerOutputs, rows: list[int]) -> Sequence[LayerOutputs]:
    """What was seen, cut into the rows of each objective."""
    maps = {layer: torch.split(tensor, rows) for layer, tensor in seen.maps.items()}
    parts = [{layer: tensors[i] for layer, tensors in maps.items()} for i in range(len(rows))]
    if not isinstance(seen, ForwardResult):
        return [LayerOutputs(part) for part in parts]
    return [ForwardResult(*part) for part in zip(parts, torch.split(seen.logits, rows), strict=True)]


def _constant(number: float) -> Objective:
    # The same for however many pictures: there are more rows than values where photographs are beside them.
    return Objective(f"{number:g}", (), lambda _: torch.tensor(float(number)))


def _outputs(seen: LayerOutputs, layer: str) -> Tensor:
    """What a layer gave, channels first, in float32."""
    outputs = seen[layer].float()
    return outputs.transpose(1, 2) if outputs.ndim == 3 else outputs  # tokens: (N, L, C)


def _means(picked: Tensor) -> Tensor:
    return picked.flatten(1).mean(1) if picked.ndim > 1 else picked


def _aligned(x: Tensor, v: Tensor, power: float, axes: tuple[int, ...]) -> Tensor:
    """x . v max(0.1, cos(x, v))^power along `axes`; a layer that gives nothing has no direction."""
    dot = (x * v).sum(axes)
    if power == 0:
        return dot
    # A root has no gradient at 0: where a rectifier is off in all channels, NaN would come of it.
    lengths = x.square().sum(axes).clamp(min=1e-24).sqrt() * v.square().sum(axes).clamp(min=1e-24).sqrt()
    return dot * (dot / lengths).clamp(min=0.1) ** power
