"""`convscope.edit`: a model whose layers' outputs are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from convscope.arguments import check_arguments
from convscope.datasets.image_inputs import open_images
from convscope.editing.replacements import set_units, unit_means
from convscope.engine.edits import LayerEdit, MapFunction
from convscope.engine.layer_selection import LayerLike, find_layer
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, is_int
from convscope.formatting import count_of
from convscope.images.loading import ImageBatchLoader
from convscope.sources.coercion import ModelLike, as_model

UnitValues = Mapping[int, float | str]
"""For units of a layer a constant, or "mean"."""


@check_arguments
def edit(
    model: ModelLike,
    edits: Mapping[LayerLike, UnitValues | MapFunction],
    reference: object = None,
) -> Model:
    """Change the outputs of layers: set units to a value, or apply a function.

    The edited model shares its weights with the first one and is used like any other: for predictions, heatmaps,
    patterns, scans and the explorer. The first one is not changed. Editing an edited model adds to its edits.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    edits : mapping
        For each layer (its name, a row of ``model.layers`` or a module of the network) one of

        - a mapping of units, numbered from 0, to values: a number that the unit has at every position, or "mean" for
          the mean of its activations over the reference images and all positions; class tokens of transformers are
          no positions and stay as they are;
        - a function of the layer's output, channels first: (N, C, H, W) for images, (N, C) without positions. It
          returns a tensor of the same shape. The images of a batch must not influence each other.
    reference : path, sequence of paths, PIL images, arrays or tensor, optional
        Images that the means are taken over, in any form that `convscope.predict` takes; needed for "mean" only.

    Returns
    -------
    Model
        Its `notes` list the edits, and its `name` ends in "(edited)".

    Raises
    ------
    ConvscopeError
        For unknown layers and units, for "mean" without reference images, and for values that are neither.

    See Also
    --------
    convscope.effects : The effect of removing each unit of a layer.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> photo = convscope.samples.photographs()[0]
    >>> edited = convscope.edit(model, {"blocks.4": {17: 0.0, 31: 0.0}})
    >>> float(abs(convscope.activations(edited, photo, "blocks.4")["blocks.4"][0, [17, 31]]).max())
    0.0
    >>> edited.notes[-1]
    'edited: layer blocks.4, units 17, 31 set to 0'
    >>> inverted = convscope.edit(model, {"blocks.4": lambda maps: -maps})
    """
    model = as_model(model)
    if not isinstance(edits, Mapping) or not edits:
        raise ConvscopeError(f"edits is {edits!r}; expected a mapping of layers to units or functions")
    added = []
    for requested, change in edits.items():
        layer = find_layer(model, requested)
        if callable(change):
            added.append(_function_edit(layer, change))
        elif isinstance(change, Mapping) and change:
            added.append(_unit_edit(model, layer, change, reference))
        else:
            raise ConvscopeError(
                f"the edit of layer {layer.name!r} is {change!r}; expected a mapping of units to values, such as "
                "{17: 0.0}, or a function of its output"
            )
    notes = (*model.notes, *(f"edited: layer {one.layer.name}, {one.description}" for one in added))
    name = model.name if model.edits else f"{model.name} (edited)"
    return replace(model, name=name, edits=(*model.edits, *added), notes=notes)


def _unit_edit(model: Model, layer: Layer, values: UnitValues, reference: object) -> LayerEdit:
    """Make the edit that sets units of a layer to constants."""
    units = check_units(layer, values)
    constants = [_check_value(layer, unit, value) for unit, value in values.items()]
    if "mean" in constants:
        if reference is None:
            raise ConvscopeError(f"the edit of layer {layer.name!r} asks for means; give reference= images")
        loader = ImageBatchLoader(open_images(reference), model.preprocessing)
        means = unit_means(model, layer, loader).tolist()
        constants = [means[u] if value == "mean" else value for u, value in zip(units, constants, strict=True)]
    numbers = torch.tensor(constants, dtype=torch.float32)
    fingerprint = np.array(units, np.int64).tobytes() + numbers.numpy().tobytes()
    return LayerEdit(
        layer, partial(set_units, layer=layer, units=units, values=numbers), _describe(values), fingerprint
    )


def check_units(layer: Layer, units: Iterable[int]) -> list[int]:
    """Return units of a layer as a list of numbers; raise ConvscopeError for others."""
    numbers = list(units)
    for unit in numbers:
        if not is_int(unit) or not 0 <= unit < layer.units:
            raise ConvscopeError(
                f"unit {unit!r} is not in layer {layer.name!r}, which has {layer.units} units, 0 to {layer.units - 1}"
            )
    return [int(unit) for unit in numbers]


def _check_value(layer: Layer, unit: int, value: object) -> float | str:
    if value == "mean":
        return "mean"
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise ConvscopeError(f'unit {unit} of layer {layer.name!r} is set to {value!r}; expected a number or "mean"')
    return float(value)


def _describe(values: UnitValues) -> str:
    """Say which units are set to what: "units 17, 31 set to 0"."""
    by_value: dict[str, list[str]] = {}
    for unit, value in values.items():
        text = "their means" if value == "mean" else f"{float(value):g}"
        by_value.setdefault(text, []).append(str(int(unit)))
    parts = [
        f"{'unit' if len(units) == 1 else 'units'} {', '.join(units)} set to "
        f"{text.replace('their means', 'its mean') if len(units) == 1 else text}"
        if len(units) <= 8
        else f"{count_of(len(units), 'unit')} set to {text}"
        for text, units in by_value.items()
    ]
    return "; ".join(parts)


def _function_edit(layer: Layer, function: Callable[..., Any]) -> LayerEdit:
    """Make the edit that applies a function, which its name and its code identify."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    fingerprint = f"{getattr(function, '__module__', '')}.{name}".encode()
    if code is not None:
        fingerprint += code.co_code + repr(code.co_consts).encode()
    return LayerEdit(layer, function, f"function {name.rpartition('.')[2]}", fingerprint)
