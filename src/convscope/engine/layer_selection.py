"""Find the layers that a user refers to, and select layers that represent a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias

from torch import nn

from convscope.engine.layer_table import Layer
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError

LayerLike: TypeAlias = str | Layer | nn.Module
"""A layer: its name in ``model.layers``, its row there, or the module itself."""


def last_per_resolution(model: Model) -> list[Layer]:
    """Return the last layer before each reduction of the resolution, poolings excluded."""
    layers = [layer for layer in model.layers if layer.is_spatial and not layer.is_pooling]
    return [layer for layer, following in pairwise(layers) if _area(following) < _area(layer)] + layers[-1:]


def evenly_spaced(layers: Sequence[Layer], count: int) -> list[Layer]:
    """Return `count` of the layers, evenly spaced, first and last included; the last if `count` is 1."""
    if len(layers) <= count:
        return list(layers)
    if count == 1:
        return [layers[-1]]
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def select_by_depth(model: Model, count: int, min_count: int | None = None) -> list[Layer]:
    """Return up to `count` layers from shallow to deep.

    They are the last ones per resolution if there are `min_count` of these (`count` if omitted), else any with spatial
    extent.
    """
    stages = last_per_resolution(model)
    enough = len(stages) >= (count if min_count is None else min_count)
    return evenly_spaced(stages if enough else model.layers.unique_spatial(), count)


def _area(layer: Layer) -> int:
    return math.prod(layer.shape[1:])


class ModuleKey(str):
    """Stand for a module until the model is known whose layer it is: a text that no layer is called."""

    module: nn.Module

    def __new__(cls, module: nn.Module) -> ModuleKey:
        """Make the key of a module; keys of one module are equal."""
        key = super().__new__(cls, f"<{type(module).__name__} at {id(module):#x}>")
        key.module = module
        return key


def layer_name(model: Model, layer: LayerLike) -> str:
    """Return the full name of a layer; ``"logits"`` stands for the classes and is returned as it is."""
    return LOGITS if isinstance(layer, str) and layer == LOGITS else find_layer(model, layer).name


def find_layer(model: Model, layer: LayerLike) -> Layer:
    """Return the row of the layer table for a name, a row or a module of the network.

    Raises ConvscopeError for a layer that this model does not have, and for a module that it calls several times.
    """
    module = layer.module if isinstance(layer, ModuleKey) else layer
    if isinstance(module, nn.Module):
        return model.layers.find(_name_of_module(model, module))
    if not isinstance(layer, str | Layer):
        raise ConvscopeError(
            f"layer is {layer!r}; expected a name in model.layers, a row of model.layers, or a module of the network"
        )
    return model.layers.find(name_of(layer))


def find_layers(model: Model, layers: LayerLike | Sequence[LayerLike]) -> list[Layer]:
    """Return the rows of one layer or several that have maps; raise ConvscopeError for none, and for the logits."""
    requested = as_layers(layers)
    if not requested:
        raise ConvscopeError("layers is empty; omit it for the last layer of each resolution")
    if any(isinstance(layer, str) and layer == LOGITS for layer in requested):
        raise ConvscopeError("layers has 'logits', the classes, which have no maps; convscope.predict returns .logits")
    return [find_layer(model, layer) for layer in requested]


def name_of(layer: LayerLike) -> str:
    """Return the name of a layer, where no model is at hand; of a module a `ModuleKey`."""
    if isinstance(layer, nn.Module):
        return ModuleKey(layer)
    if not isinstance(layer, str | Layer):
        raise ConvscopeError(f"layer is {layer!r}; expected a name in model.layers, a row of it, or a module")
    return layer if isinstance(layer, str) else layer.name


def as_layers(layers: LayerLike | Sequence[LayerLike]) -> list[LayerLike]:
    """Return one layer or several as a list."""
    if isinstance(layers, str | Layer | nn.Module) or not isinstance(layers, Iterable):
        return [layers]
    return list(layers)


def _name_of_module(model: Model, module: nn.Module) -> str:
    modules, _ = model.modules_and_parameters()
    kind = type(module).__name__
    name = next((name for name, candidate in modules.items() if candidate is module), None)
    if name is None:
        raise ConvscopeError(f"this {kind} is not a layer of {model.name}; print(model.layers) lists them")
    calls = [layer.name for layer in model.layers if layer.name.partition("#")[0] == name]
    if len(calls) > 1:
        raise ConvscopeError(f"this {kind} runs {len(calls)} times; give one of its calls: {', '.join(calls)}")
    return name
