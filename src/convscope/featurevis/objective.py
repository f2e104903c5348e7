"""The `Objective` class, and objectives of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convscope.engine.capture import ForwardResult, LayerOutputs
from convscope.engine.model import LOGITS, Model
from convscope.engine.text_targets import require_dual_encoder
from convscope.errors import ConvscopeError

Forward = Callable[[Tensor], LayerOutputs]  # network input -> outputs of the captured layers


@dataclass(frozen=True)
class Objective:
    """A function of layer outputs with one value per image, and a name.

    Call an objective with the outputs of a forward pass to evaluate it. Pass it to `convscope.patterns` to maximise it.

    Attributes
    ----------
    name : str
        Shown in results. The random numbers of the objective's images depend on it.
    layer_channels : tuple of (str, int or None)
        The layers that `function` reads, each with its largest channel index; None if all channels count alike.
    function : callable
        ``function(outputs) -> (P,)`` for P images, with gradients.
    num_images : int
        How many images the objective is about: 1, or more if it compares them.
    paired : bool
        Whether each image is followed by the photograph that it is compared with. `function` then gets 2 P images.
    fixed_position : bool
        Whether `function` reads a fixed position of the map. Such objectives are shown the canvas at its full size.
    texts : tuple of str
        Texts whose logits `function` reads, among the maps.

    Examples
    --------
    >>> import torch
    >>> from convscope import objectives
    >>> from convscope.engine.capture import LayerOutputs
    >>> outputs = LayerOutputs({"conv": torch.arange(8.0).view(1, 2, 2, 2)})
    >>> objective = objectives.channel("conv", 1) - 2 * objectives.channel("conv", 0)
    >>> objective(outputs)
    tensor([2.5000])
    """

    name: str
    layer_channels: tuple[tuple[str, int | None], ...]
    function: Callable[[LayerOutputs], Tensor]
    num_images: int = 1
    paired: bool = False
    fixed_position: bool = False
    texts: tuple[str, ...] = ()

    @property
    def layers(self) -> list[str]:
        """Names of the layers to capture, without duplicates and without ``"logits"``."""
        return list(dict.fromkeys(layer for layer, _ in self.layer_channels if layer != LOGITS))

    def __call__(self, outputs: LayerOutputs) -> Tensor:
        """Return the values (P,) for the outputs of a forward pass."""
        return self.function(outputs)

    def check(self, model: Model) -> None:
        """Raise ConvscopeError for a layer or a channel that the model does not have."""
        for text in self.texts:
            require_dual_encoder(model, text)
        for layer, unit in self.layer_channels:
            count = model.num_outputs if layer == LOGITS else model.layers.find(layer).units
            if count is None:
                raise ConvscopeError("this model has no classes")
            if unit is not None and not 0 <= unit < count:
                raise ConvscopeError(
                    f"{self.name}: unit {unit} is not in layer {layer!r}, which has {count} units, 0 to {count - 1}"
                )

    def __add__(self, other: Objective | float) -> Objective:
        return self._combine("+", other, torch.add)

    def __sub__(self, other: Objective | float) -> Objective:
        return self._combine("-", other, torch.sub)

    def __mul__(self, other: Objective | float) -> Objective:
        return self._combine("*", other, torch.mul)

    def __radd__(self, other: float) -> Objective:
        return _constant(other) + self

    def __rsub__(self, other: float) -> Objective:
        return _constant(other) - self

    def __rmul__(self, other: float) -> Objective:
        return _constant(other) * self

    def __neg__(self) -> Objective:
        return replace(self, name=f"-{_bracketed(self.name)}", function=lambda outputs: -self.function(outputs))

    def _combine(
        self, sign: str, operand: Objective | float, operation: Callable[[Tensor, Tensor], Tensor]
    ) -> Objective:
        other = operand if isinstance(operand, Objective) else _constant(operand)
        if 1 not in (self.num_images, other.num_images) and self.num_images != other.num_images:
            raise ConvscopeError(
                f"{self.name} is about {self.num_images} images and {other.name} about {other.num_images}; "
                "combine objectives about the same number of images"
            )
        if self.paired != other.paired and self.layer_channels and other.layer_channels:
            raise ConvscopeError(f"only one of {self.name} and {other.name} compares with a photograph")
        left = _bracketed(self.name) if sign == "*" else self.name
        right = other.name if sign == "+" else _bracketed(other.name)
        return Objective(
            f"{left} {sign} {right}",
            self.layer_channels + other.layer_channels,
            lambda outputs: operation(self.function(outputs), other.function(outputs)),
            max(self.num_images, other.num_images),
            self.paired or other.paired,
            self.fixed_position or other.fixed_position,
            self.texts + other.texts,
        )


def per_image_channels(layer: str, units: Sequence[int]) -> Objective:
    """Return an objective for ``len(units)`` images: for image i the mean activation of channel ``units[i]``."""
    indices = list(units)

    def value(outputs: LayerOutputs) -> Tensor:
        x = channels_first(outputs, layer)
        return position_mean(x[torch.arange(len(indices), device=x.device), indices])

    name = f"{layer} {', '.join(map(str, indices))}"
    return Objective(name, tuple((layer, unit) for unit in indices), value, len(indices))


def batch_objectives(objectives: Sequence[Objective]) -> Objective:
    """Return an objective that evaluates each of `objectives` on its own rows of the batch, one after the other."""
    if len(objectives) == 1:
        return objectives[0]
    paired = objectives[0].paired
    rows = [objective.num_images * (1 + paired) for objective in objectives]

    def value(outputs: LayerOutputs) -> Tensor:
        parts = _split_rows(outputs, rows)
        return torch.cat([objective.function(part) for objective, part in zip(objectives, parts, strict=True)])

    layer_channels = tuple(pair for objective in objectives for pair in objective.layer_channels)
    texts = tuple(text for objective in objectives for text in objective.texts)
    name = ", ".join(objective.name for objective in objectives)
    return Objective(name, layer_channels, value, sum(rows) // (1 + paired), paired, texts=texts)


def _split_rows(outputs: LayerOutputs, rows: list[int]) -> Sequence[LayerOutputs]:
    maps = {layer: torch.split(tensor, rows) for layer, tensor in outputs.maps.items()}
    parts = [{layer: tensors[i] for layer, tensors in maps.items()} for i in range(len(rows))]
    if not isinstance(outputs, ForwardResult):
        return [LayerOutputs(part) for part in parts]
    return [ForwardResult(*part) for part in zip(parts, torch.split(outputs.logits, rows), strict=True)]


def channels_first(outputs: LayerOutputs, layer: str) -> Tensor:
    """Return a layer's output (N, C, ...) in float32; tokens (N, L, C) become (N, C, L)."""
    x = outputs[layer].float()
    return x.transpose(1, 2) if x.ndim == 3 else x


def position_mean(x: Tensor) -> Tensor:
    """Return the mean of x (N, ...) over all positions; values (N,) are returned unchanged."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def _constant(number: float) -> Objective:
    # A scalar, because the number of values depends on the objective that it is combined with.
    return Objective(f"{number:g}", (), lambda _: torch.tensor(float(number)))


def _bracketed(name: str) -> str:
    return f"({name})" if " + " in name or " - " in name else name
