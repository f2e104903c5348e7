"""Parameters and dependencies that routes share."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Path, Query, Request

from convscope.attribution.registry import METHODS, default_method, default_method_for_boxes
from convscope.engine.layer_table import Layer
from convscope.errors import ConvscopeError
from convscope.explorer.service.compute import HeatmapOptions
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.web.requests import RequestRunner

MAX_NAME = 400  # characters of layers and atlases

LayerName = Annotated[str, Query(description="name of a layer", max_length=MAX_NAME)]
OptionalLayer = Annotated[str | None, Query(description="default: chosen automatically", max_length=MAX_NAME)]
ClassIndex = Annotated[int, Query(description="index of a class", ge=0)]
OptionalImage = Annotated[str | None, Query(description="key of an image")]


async def _runner(request: Request) -> RequestRunner:
    return cast(RequestRunner, request.app.state.runner)


Runner = Annotated[RequestRunner, Depends(_runner)]


async def _network(runner: Runner, model: Annotated[str, Path(description="key of a model")]) -> Network:
    return runner.explorer.network(model)


async def _image(runner: Runner, image: Annotated[str, Path(description="key of an image")]) -> RegisteredImage:
    return runner.explorer.images.find(image)


async def _query_image(
    runner: Runner, net: Annotated[Network, Depends(_network)], image: OptionalImage = None
) -> RegisteredImage | None:
    return runner.explorer.images.find(image) if image and net.takes_images else None


async def _heatmap_options(
    net: Annotated[Network, Depends(_network)],
    layer: OptionalLayer = None,
    method: Annotated[
        str | None, Query(description="attribution method", json_schema_extra={"enum": list(METHODS)})
    ] = None,
    against: Annotated[int | None, Query(description="index of a contrast class", ge=0)] = None,
    box: Annotated[int | None, Query(description="number of a box that a detector finds; the target", ge=0)] = None,
) -> HeatmapOptions:
    if layer is not None:
        net.layer(layer)
    if method is None:
        method = default_method(net.model) if box is None else default_method_for_boxes(net.model)
    if method not in METHODS:
        raise ConvscopeError(f"method {method[:40]!r} is not known; expected one of {', '.join(METHODS)}")
    if against is not None:
        net.require_class(against)
    return HeatmapOptions(layer, method, against, box)


async def _query_layer(net: Annotated[Network, Depends(_network)], layer: LayerName) -> Layer:
    return net.layer(layer)


async def _path_layer(net: Annotated[Network, Depends(_network)], layer: str) -> Layer:
    return net.layer(layer)


async def _optional_target(net: Annotated[Network, Depends(_network)], target: int | None = None) -> int | None:
    if target is not None:
        net.require_class(target)
    return target


async def _target(net: Annotated[Network, Depends(_network)], target: ClassIndex) -> int:
    net.require_class(target)
    return target


PathNetwork = Annotated[Network, Depends(_network)]
"""The model whose key is in the path."""

PathImage = Annotated[RegisteredImage, Depends(_image)]
"""The image whose key is in the path."""

QueryImage = Annotated[RegisteredImage | None, Depends(_query_image)]
"""The image whose key is in the query, if the model takes images."""

QueryLayer = Annotated[Layer, Depends(_query_layer)]
"""The layer of the model whose name is in the query."""

PathLayer = Annotated[Layer, Depends(_path_layer)]
"""The layer of the model whose name is in the path."""

Target = Annotated[int, Depends(_target)]
"""A class of the model, from the query."""

OptionalTarget = Annotated[int | None, Depends(_optional_target)]
"""A class of the model from the path, or else from the query, where it may be missing."""

Options = Annotated[HeatmapOptions, Depends(_heatmap_options)]
"""How a heatmap is computed, from the query."""
