"""Objectives about several images that are optimised together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.engine.capture import LayerOutputs
from convscope.engine.layer_selection import LayerLike, name_of
from convscope.errors import ConvscopeError
from convscope.featurevis.objective import Objective, channels_first

__all__ = ["diversity", "interpolation"]


@check_arguments
def diversity(objective: Objective, layer: LayerLike, count: int, weight: float = 1) -> Objective:
    """Return an objective for `count` images with different textures: f - weight * |f| * s for each of them.

    f is the value of `objective`; s is the mean cosine similarity of the image's Gram matrix of channels in `layer` to
    those of the other images. |f| and the other images are constants in the gradient.

    Parameters
    ----------
    objective : Objective
        About one image.
    layer : str, Layer or torch.nn.Module
        A layer with positions, by name, row or module, in which textures are compared.
    count : int
        Number of images, 2 or more. They are optimised in one batch.
    weight : float
        Weight of the penalty relative to the value, the same for every unit.

    Returns
    -------
    Objective

    Raises
    ------
    ConvscopeError
        If `count` is below 2, or `objective` is not about one image.

    References
    ----------
    Olah, Mordvintsev and Schubert, Feature visualization, Distill 2017, "Diversity".

    Examples
    --------
    >>> from convscope import objectives
    >>> objectives.diversity(objectives.channel("blocks.4.2", 7), "blocks.2.2", 3).name
    '3 of blocks.4.2 7'
    """
    layer = name_of(layer)
    if count < 2 or objective.num_images != 1 or objective.paired:
        raise ConvscopeError("diversity takes two images or more, and an objective about one image")

    def value(outputs: LayerOutputs) -> Tensor:
        x = channels_first(outputs, layer)
        if x.ndim < 3:
            raise ConvscopeError(f"layer {layer!r} has no positions, and so no texture in which images could differ")
        maps = x.flatten(2)
        grams = F.normalize((maps @ maps.transpose(1, 2)).flatten(1), dim=1)
        similarity = grams @ grams.detach().T
        others = (similarity.sum(1) - similarity.diagonal()) / (len(similarity) - 1)
        values = objective.function(outputs)
        return values - weight * values.detach().abs() * others

    name, fixed_position = f"{count} of {objective.name}", objective.fixed_position
    layer_channels = (*objective.layer_channels, (layer, None))
    return Objective(name, layer_channels, value, count, fixed_position=fixed_position, texts=objective.texts)


@check_arguments
def interpolation(first: Objective, last: Objective, layer: LayerLike, count: int, weight: float = 1) -> Objective:
    """Return an objective for a series of `count` images from one objective to another: v - weight * |v| * d.

    For image i, v = (1 - t) a + t b with t = i / (count - 1), where a and b are the values of `first` and `last`. d is
    the sum of the mean squared distances to its neighbours in `layer`, relative to the layer's mean square. It aligns
    neighbours. |v|, the neighbours and the mean square are constants in the gradient.

    Parameters
    ----------
    first, last : Objective
        Each about one image.
    layer : str, Layer or torch.nn.Module
        A name in ``model.layers``, one of its rows, or a module, in which neighbours are compared.
    count : int
        Number of images, 2 or more. They are optimised in one batch.
    weight : float
        Weight of the penalty relative to the value.

    Returns
    -------
    Objective

    Raises
    ------
    ConvscopeError
        If `count` is below 2, or one of the objectives is not about one image.

    References
    ----------
    Mordvintsev et al., Differentiable image parameterizations, Distill 2018, "Aligned interpolation".

    Examples
    --------
    >>> from convscope import objectives
    >>> first, last = objectives.channel("blocks.4.2", 7), objectives.channel("blocks.4.2", 9)
    >>> objectives.interpolation(first, last, "blocks.3.2", 4).name
    'from blocks.4.2 7 to blocks.4.2 9'
    """
    layer = name_of(layer)
    if count < 2 or (first.num_images, last.num_images) != (1, 1) or first.paired or last.paired:
        raise ConvscopeError("an interpolation takes two images or more, and objectives about one image")

    def value(outputs: LayerOutputs) -> Tensor:
        maps = channels_first(outputs, layer).flatten(1)
        t = torch.linspace(0, 1, count, device=maps.device)
        values = (1 - t) * first.function(outputs) + t * last.function(outputs)
        constant = maps.detach()
        distances = torch.zeros_like(values)
        distances[1:] += (maps[1:] - constant[:-1]).square().mean(1)
        distances[:-1] += (maps[:-1] - constant[1:]).square().mean(1)
        distances = distances / constant.square().mean(1).clamp(min=1e-12)
        return values - weight * values.detach().abs() * distances

    name, fixed = f"from {first.name} to {last.name}", first.fixed_position or last.fixed_position
    layer_channels = (*first.layer_channels, *last.layer_channels, (layer, None))
    return Objective(name, layer_channels, value, count, fixed_position=fixed, texts=first.texts + last.texts)
