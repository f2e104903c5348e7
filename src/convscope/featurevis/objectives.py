"""Objectives of feature visualisation: scalar functions of layer outputs that gradient ascent maximises.

An objective returns one value per image. Images of a batch do not interact, except where an objective compares several
images on purpose (`convscope.featurevis.image_set_objectives`). Objectives support ``+``, ``-`` and ``*`` with each
other and with numbers:

>>> from convscope import objectives
>>> (objectives.channel("blocks.5.2", 7) - 0.5 * objectives.channel("blocks.5.2", 9)).name
'blocks.5.2 7 - 0.5 * blocks.5.2 9'

In the formulas of this module, x is the output of a layer for one image: x_c(p) is the activation of channel c at
position p, and n the number of values in x. Tokens (N, L, C) are read as channels at L positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.engine.capture import LayerOutputs
from convscope.engine.layer_selection import LayerLike, name_of
from convscope.engine.model import LOGITS
from convscope.engine.text_targets import text_target
from convscope.errors import ConvscopeError
from convscope.featurevis.objective import Objective, channels_first, position_mean

__all__ = [
    "Objective",
    "caricature",
    "channel",
    "channels",
    "deepdream",
    "direction",
    "neuron",
    "text",
]


@check_arguments
def channel(layer: LayerLike, unit: int) -> Objective:
    """Return the mean activation of a channel: mean over p of x_c(p).

    Parameters
    ----------
    layer : str, Layer or torch.nn.Module
        A name in ``model.layers``, one of its rows, a module of the network, or ``"logits"``.
    unit : int
        The channel c; for ``"logits"`` the class, whose logit is the value.

    Returns
    -------
    Objective

    References
    ----------
    Erhan et al., Visualizing higher-layer features of a deep network, 2009.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> patterns = convscope.patterns(model, convscope.objectives.channel("conv_stem", 4), steps=2)
    >>> patterns.names
    ['conv_stem 4']
    """
    layer = name_of(layer)
    name = f"logit {unit}" if layer == LOGITS else f"{layer} {unit}"
    return Objective(name, ((layer, unit),), lambda outputs: position_mean(channels_first(outputs, layer)[:, unit]))


@check_arguments
def channels(layer: LayerLike, units: Sequence[int]) -> Objective:
    """Return the sum of the mean activations of several channels: sum over c of mean over p of x_c(p).

    Parameters
    ----------
    layer : str, Layer or torch.nn.Module
        A name in ``model.layers``, one of its rows, a module of the network, or ``"logits"``.
    units : sequence of int
        The channels; at least one. A channel that occurs twice counts twice.

    Returns
    -------
    Objective

    Raises
    ------
    ConvscopeError
        If `units` is empty.

    Examples
    --------
    >>> import torch
    >>> from convscope import objectives
    >>> from convscope.engine.capture import LayerOutputs
    >>> objectives.channels("fc", [0, 1])(LayerOutputs({"fc": torch.tensor([[3.0, 4.0]])}))
    tensor([7.])
    """
    layer = name_of(layer)
    indices = list(units)
    if not indices:
        raise ConvscopeError("units is empty; give at least one channel")
    name = f"{layer} {'+'.join(map(str, indices))}"
    layer_channels = tuple((layer, unit) for unit in indices)
    return Objective(name, layer_channels, lambda x: position_mean(channels_first(x, layer)[:, indices].sum(1)))


@check_arguments
def neuron(layer: LayerLike, unit: int, position: Sequence[int] | None = None) -> Objective:
    """Return the activation of a channel at one position: x_c(p).

    The default is the middle of the map, drawn here for a map of 5 x 5 positions. An even side 2 m has its middle at
    index m::

        . . . . .
        . . . . .
        . . # . .
        . . . . .
        . . . . .

    Parameters
    ----------
    layer : str, Layer or torch.nn.Module
        A name in ``model.layers``, one of its rows, a module of the network, or ``"logits"``, which has no positions.
    unit : int
        The channel c.
    position : sequence of int, optional
        Row and column in the layer's map, for tokens the token's index.

    Returns
    -------
    Objective
        Evaluating it raises ConvscopeError if the map has no such position.

    Examples
    --------
    >>> import torch
    >>> from convscope import objectives
    >>> from convscope.engine.capture import LayerOutputs
    >>> objectives.neuron("conv", 1, (0, 1))(LayerOutputs({"conv": torch.arange(8.0).view(1, 2, 2, 2)}))
    tensor([5.])
    """
    layer = name_of(layer)

    def value(outputs: LayerOutputs) -> Tensor:
        maps = channels_first(outputs, layer)[:, unit]
        index = [side // 2 for side in maps.shape[1:]] if position is None else list(position)
        if len(index) != maps.ndim - 1 or not all(0 <= i < n for i, n in zip(index, maps.shape[1:], strict=True)):
            sides = " x ".join(map(str, maps.shape[1:]))
            raise ConvscopeError(f"position {tuple(index)} is not in layer {layer!r}, whose maps are {sides} here")
        key: tuple[slice | int, ...] = (slice(None), *index)
        return maps[key]

    where = "middle" if position is None else ", ".join(map(str, position))
    return Objective(f"{layer} {unit} at {where}", ((layer, unit),), value, fixed_position=position is not None)


@check_arguments
def direction(layer: LayerLike, vector: Sequence[float] | np.ndarray | Tensor, power: float = 0) -> Objective:
    """Return the alignment with a direction v in channel space: mean over p of v . x(p) * max(0.1, cos(v, x(p)))^power.

    With ``power=0`` the activation may also grow in other directions; a higher power penalises that.

    Parameters
    ----------
    layer : str, Layer or torch.nn.Module
        A name in ``model.layers``, one of its rows, a module of the network, or ``"logits"``.
    vector : sequence of float, array or tensor
        The direction v (C,), one finite number per channel, not all zero.
    power : float
        Exponent of the cosine, 0 or more.

    Returns
    -------
    Objective

    Raises
    ------
    ConvscopeError
        If `vector` is empty, zero or not finite.

    References
    ----------
    Carter et al., Activation Atlas, Distill 2019 (``power=1``).

    Examples
    --------
    >>> import torch
    >>> from convscope import objectives
    >>> from convscope.engine.capture import LayerOutputs
    >>> outputs = LayerOutputs({"fc": torch.tensor([[3.0, 4.0]])})
    >>> objectives.direction("fc", [1.0, 0.0])(outputs)
    tensor([3.])
    >>> objectives.direction("fc", [1.0, 0.0], power=1)(outputs)  # 3 * 3 / 5
    tensor([1.8000])
    """
    layer = name_of(layer)
    weights = torch.as_tensor(vector).detach().float().flatten().cpu()
    if len(weights) == 0 or not bool(weights.isfinite().all()) or not bool(weights.any()):
        raise ConvscopeError("the vector of a direction has to be finite, and not all zero")

    def value(outputs: LayerOutputs) -> Tensor:
        x = channels_first(outputs, layer)
        if x.shape[1] != len(weights):
            raise ConvscopeError(f"the direction has {len(weights)} numbers, layer {layer!r} {x.shape[1]} channels")
        return position_mean(_alignment(x, weights.to(x.device).view(1, -1, *[1] * (x.ndim - 2)), power, (1,)))

    return Objective(f"direction in {layer}", ((layer, len(weights) - 1),), value)


@check_arguments
def text(text: str) -> Objective:
    """Return how well the image fits a text, for networks that compare images with text: the text's logit.

    ::

        s cos(e(image), e(text)) + b

    e are the embeddings of the two encoders, s is the network's scale and b its bias, if it has one.

    Parameters
    ----------
    text : str
        The text as the network reads it.

    Returns
    -------
    Objective
        `convscope.patterns` raises ConvscopeError for networks that do not compare images with text.

    Raises
    ------
    ConvscopeError
        If `text` is empty.

    References
    ----------
    Radford et al., Learning transferable visual models from natural language supervision, ICML 2021. Goh et al.,
    Multimodal neurons in artificial neural networks, Distill 2021.

    Examples
    --------
    >>> from convscope import objectives
    >>> (objectives.text("a striped cat") - objectives.text("a cat")).name
    'a striped cat - a cat'
    """
    target = text_target(text).text
    return Objective(target, ((LOGITS, None),), lambda outputs: outputs.maps[target].float(), texts=(target,))


@check_arguments
def deepdream(layer: LayerLike) -> Objective:
    """Return the mean square of all activations of a layer: sum of x^2 / n.

    Its gradient amplifies whatever the layer already detects in the image.

    Parameters
    ----------
    layer : str, Layer or torch.nn.Module
        A name in ``model.layers``, one of its rows, a module of the network, or ``"logits"``.

    Returns
    -------
    Objective

    References
    ----------
    Mordvintsev, Olah and Tyka, Inceptionism: Going deeper into neural networks, 2015.

    Examples
    --------
    >>> import torch
    >>> from convscope import objectives
    >>> from convscope.engine.capture import LayerOutputs
    >>> objectives.deepdream("fc")(LayerOutputs({"fc": torch.tensor([[3.0, 4.0]])}))
    tensor([12.5000])
    """
    layer = name_of(layer)

    def value(outputs: LayerOutputs) -> Tensor:
        return channels_first(outputs, layer).square().flatten(1).mean(1)

    return Objective(f"all of {layer}", ((layer, None),), value)


@check_arguments
def caricature(layer: LayerLike, power: float = 1) -> Objective:
    """Return the similarity of a layer's output x to that of a photograph, y: x . y / n * max(0.1, cos(x, y))^power.

    Maximising it exaggerates what the layer detects in the photograph, at the position where it is detected. The image
    and the photograph pass through the same random transforms.

    Parameters
    ----------
    layer : str, Layer or torch.nn.Module
        A name in ``model.layers``, one of its rows, a module of the network, or ``"logits"``.
    power : float
        Exponent of the cosine, 0 or more.

    Returns
    -------
    Objective
        For ``recipe="caricature"``; the photograph is the recipe's `start`.

    References
    ----------
    Olah, Mordvintsev and Schubert, Feature visualization, Distill 2017; lucid's notebook "Activation caricatures".

    Examples
    --------
    >>> import torch
    >>> from convscope import objectives
    >>> from convscope.engine.capture import LayerOutputs
    >>> outputs = LayerOutputs({"fc": torch.tensor([[3.0, 4.0], [1.0, 0.0]])})  # an image, then its photograph
    >>> objectives.caricature("fc")(outputs)  # 3 / 2 * 3 / 5
    tensor([0.9000])
    """
    layer = name_of(layer)

    def value(outputs: LayerOutputs) -> Tensor:
        x = channels_first(outputs, layer)
        images, photographs = x[::2], x[1::2]
        axes = tuple(range(1, images.ndim))
        return _alignment(images, photographs.detach(), power, axes) / images[0].numel()

    return Objective(f"likeness in {layer}", ((layer, None),), value, paired=True)


def _alignment(x: Tensor, v: Tensor, power: float, axes: tuple[int, ...]) -> Tensor:
    """Return x . v max(0.1, cos(x, v))^power along `axes`."""
    dot = (x * v).sum(axes)
    if power == 0:
        return dot
    # The square root has no gradient at 0: the clamp avoids NaN where x is 0.
    norms = x.square().sum(axes).clamp(min=1e-24).sqrt() * v.square().sum(axes).clamp(min=1e-24).sqrt()
    return dot * (dot / norms).clamp(min=0.1) ** power
