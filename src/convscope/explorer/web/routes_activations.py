"""API: predictions, feature maps and relevance on an image."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from typing_extensions import TypedDict

from convscope.engine.layer_table import Layer
from convscope.errors import ConvscopeError
from convscope.explorer.service import compute
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.service.schemas import ChannelStatistics, LayerSummary, PositionRecord, Prediction
from convscope.explorer.service.state import MAX_MATCHES
from convscope.explorer.web.parameters import PathImage, PathNetwork, QueryLayer, Runner, Target
from convscope.explorer.web.requests import RequestRunner
from convscope.explorer.web.responses import ERRORS, csv_response, npz_response

router = APIRouter(prefix="/api/models/{model}/images/{image}", responses=ERRORS)


class ActivationRecord(ChannelStatistics):
    """Statistics of each channel of a layer on an image."""

    layer: str
    shape: list[int]


class ImageUnit(TypedDict):
    """A unit, and the fraction of the store's sample that excites it less than the image does."""

    layer: str
    unit: int
    relevance: float


class RelevanceRecord(TypedDict):
    """Each channel's contribution to a logit."""

    layer: str
    target: int
    relevance: list[float]


@router.get("/predictions")
async def predictions(
    request: Request,
    runner: Runner,
    net: PathNetwork,
    image: PathImage,
    top: Annotated[int, Query(ge=1, le=100)] = 5,
) -> dict[str, list[Prediction]]:
    """Return the most likely classes."""
    rows = await runner.run(request, lambda client: runner.explorer.predictions(client, net, image, top))
    return {"predictions": rows}


@router.get("/units")
async def units(
    request: Request,
    runner: Runner,
    net: PathNetwork,
    image: PathImage,
    n: Annotated[int, Query(ge=1, le=MAX_MATCHES)] = 20,
) -> dict[str, list[ImageUnit]]:
    """Return the units of the store that the image excites more than most images of its sample, the best first."""
    matches = await runner.run(request, lambda client: runner.explorer.units_of_image(client, net, image))
    rows: list[ImageUnit] = [
        {"layer": match.layer, "unit": match.unit, "relevance": match.relevance} for match in matches[:n]
    ]
    return {"units": rows}


@router.get("/predictions.csv", response_class=Response)
async def predictions_csv(request: Request, runner: Runner, net: PathNetwork, image: PathImage) -> Response:
    """Return all classes as a table, the most likely first."""
    count = net.num_classes or 1
    rows = await runner.run(request, lambda client: runner.explorer.predictions(client, net, image, count))
    return csv_response(
        ["index", "name", "probability", "logit"],
        [[row["index"], row["name"], row["probability"], row["logit"]] for row in rows],
        "predictions.csv",
    )


@router.get("/layers")
async def layers(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage
) -> dict[str, dict[str, LayerSummary]]:
    """Return statistics of every layer: fractions of dead channels, of values not above 0, and of the top decile."""
    return {"layers": await runner.run(request, lambda client: runner.explorer.layer_summaries(client, net, image))}


async def _feature_maps(
    request: Request, runner: RequestRunner, net: Network, image: RegisteredImage, layer: Layer
) -> np.ndarray:
    return await runner.run(request, lambda client: runner.explorer.feature_maps(client, net, image, layer.name))


@router.get("/activations")
async def activations(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, layer: QueryLayer
) -> ActivationRecord:
    """Return statistics of each channel: mean, max, fraction of positions above 0, and whether it is dead."""
    maps = await _feature_maps(request, runner, net, image, layer)
    statistics = await runner.run(request, lambda _: compute.channel_statistics(maps))
    return {"layer": layer.name, "shape": list(maps.shape), **statistics}


@router.get("/activations.csv", response_class=Response)
async def activations_csv(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, layer: QueryLayer
) -> Response:
    """Return the same statistics as a table."""
    maps = await _feature_maps(request, runner, net, image, layer)
    statistics = await runner.run(request, lambda _: compute.channel_statistics(maps))
    columns = [statistics["mean"], statistics["max"], statistics["active"], statistics["dead"]]
    rows = [[unit, *values] for unit, values in enumerate(zip(*columns, strict=True))]
    return csv_response(["unit", "mean", "max", "active", "dead"], rows, "activations.csv")


@router.get("/activations.npz", response_class=Response)
async def activations_npz(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, layer: QueryLayer
) -> Response:
    """Return the activations, float32 (C, H, W)."""
    maps = await _feature_maps(request, runner, net, image, layer)
    return await runner.run(request, lambda _: npz_response({"activations": maps}, "activations.npz"))


@router.get("/position")
async def position(
    request: Request,
    runner: Runner,
    net: PathNetwork,
    image: PathImage,
    layer: QueryLayer,
    row: Annotated[int, Query(ge=0)],
    column: Annotated[int, Query(ge=0)],
) -> PositionRecord:
    """Return the strongest units at a position of a layer, and the position's receptive field."""
    maps = await _feature_maps(request, runner, net, image, layer)
    height, width = maps.shape[1:]
    if row >= height or column >= width:
        raise ConvscopeError(f"layer {layer.name!r} has {height} x {width} positions; there is no {row}, {column}")
    return compute.units_at_position(net.model, maps, layer.name, row, column)


@router.get("/relevance")
async def relevance(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, layer: QueryLayer, target: Target
) -> RelevanceRecord:
    """Return each channel's contribution to a class's logit."""
    values = await runner.run(request, lambda client: runner.explorer.relevance(client, net, image, layer.name, target))
    return {"layer": layer.name, "target": target, "relevance": [float(f"{v:.4g}") for v in values]}
