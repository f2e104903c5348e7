"""API: heatmaps and their faithfulness."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from convscope.errors import ConvscopeError
from convscope.explorer.service import compute
from convscope.explorer.service.compute import COLORMAPS, HeatmapOptions
from convscope.explorer.service.images import RegisteredImage
from convscope.explorer.service.networks import Network
from convscope.explorer.service.schemas import FaithfulnessRecord, HeatmapRecord
from convscope.explorer.views import snippets
from convscope.explorer.web.parameters import Options, PathImage, PathNetwork, Runner, Target
from convscope.explorer.web.requests import RequestRunner
from convscope.explorer.web.responses import ERRORS, file_response, npz_response

router = APIRouter(prefix="/api/models/{model}/images/{image}", responses=ERRORS)


class HeatmapWithCode(HeatmapRecord):
    """A heatmap, and the code that computes it by language."""

    snippets: dict[str, str]


async def _heatmap(
    request: Request,
    runner: RequestRunner,
    net: Network,
    image: RegisteredImage,
    target: int,
    options: HeatmapOptions,
) -> HeatmapRecord:
    (record,) = await runner.run(request, lambda client: runner.explorer.heatmap(client, net, image, [target], options))
    return record


@router.get("/heatmap")
async def heatmap(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, target: Target, options: Options
) -> HeatmapWithCode:
    """Return the evidence for a class at each position.

    `map.data` holds 16-bit integers in base64, least significant byte first; value = integer / 32767 * `peak`.
    """
    record = await _heatmap(request, runner, net, image, target, options)
    code = snippets.heatmap(net.source, image.source, target, options)
    return {**record, "snippets": code}


@router.get("/heatmap.npz", response_class=Response)
async def heatmap_npz(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, target: Target, options: Options
) -> Response:
    """Return the map (h, w) as an array."""
    record = await _heatmap(request, runner, net, image, target, options)
    arrays = {"heatmap": compute.unpack_map(record["map"]), "target": np.array(target)}
    return await runner.run(request, lambda _: npz_response(arrays, "heatmap.npz"))


@router.get("/heatmap.png", response_class=Response)
async def heatmap_png(
    request: Request,
    runner: Runner,
    net: PathNetwork,
    image: PathImage,
    target: Target,
    options: Options,
    opacity: Annotated[float | None, Query(ge=0, le=1, description="default: 0.4; 0.8 if signed")] = None,
    colormap: Annotated[
        str | None,
        Query(description="default: jet; RdBu_r if signed", json_schema_extra={"enum": list(COLORMAPS)}),
    ] = None,
    signed: Annotated[
        bool | None,
        Query(description="whether to show evidence against the class; default: where the method is signed"),
    ] = None,
) -> Response:
    """Return the heatmap over the image; the longer side has at most 2,048 pixels.

    Evidence against the class is shown on a gray image, and the stronger evidence is, the more opaque.
    """
    if colormap is not None and colormap not in COLORMAPS:
        raise ConvscopeError(f"colormap is {colormap[:40]!r}; expected one of {', '.join(COLORMAPS)}")
    record = await _heatmap(request, runner, net, image, target, options)
    key = ("overlay", image.key, target, options, opacity, colormap, signed)
    content = await runner.run(
        request,
        lambda client: runner.explorer.cached_image(
            client, net, key, lambda: compute.overlay(image, record, opacity, colormap, signed)
        ),
    )
    return file_response(content, f"heatmap_{target}.png", "image/png")


@router.get("/faithfulness")
async def faithfulness(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, target: Target, options: Options
) -> FaithfulnessRecord:
    """Measure the faithfulness of a heatmap: deletion (lower is better) and insertion (higher), with their curves."""
    return await runner.run(request, lambda client: runner.explorer.faithfulness(client, net, image, target, options))
