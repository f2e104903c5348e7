"""API: concepts and atlases in a store."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from typing_extensions import TypedDict

from convscope.explorer.service import compute, concept_data
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.schemas import JsonObject, PackedMap
from convscope.explorer.web.parameters import MAX_NAME, PathImage, PathNetwork, Runner
from convscope.explorer.web.responses import ERRORS, file_response

router = APIRouter(prefix="/api/models/{model}", responses=ERRORS)


class ConceptsListing(TypedDict):
    """Concepts of a class at a layer."""

    target: int
    name: str
    layer: str


class AtlasListing(TypedDict):
    """An atlas; its target is the class that it is restricted to, or None."""

    name: str
    layer: str
    target: int | None


class ConceptMaps(TypedDict):
    """The amount of each concept at each position of an image."""

    target: int
    layer: str
    maps: list[PackedMap]


async def _target(net: PathNetwork, target: Annotated[int, Path(description="index of a class", ge=0)]) -> int:
    net.require_class(target)
    return target


PathTarget = Annotated[int, Depends(_target)]
AtlasName = Annotated[str, Path(description="name of an atlas", max_length=MAX_NAME)]
AtLayer = Annotated[str | None, Query(description="default: the last layer in the store", max_length=MAX_NAME)]


@router.get("/concepts")
async def list_concepts(request: Request, runner: Runner, net: PathNetwork) -> dict[str, list[ConceptsListing]]:
    """List the classes and layers that the store has concepts of."""
    results = await runner.run(request, lambda _: concept_data.saved_concepts(net))
    return {
        "concepts": [
            {"target": result.target or 0, "name": net.model.class_name(result.target or 0), "layer": result.layer}
            for result in results
        ]
    }


@router.get("/concepts/{target}")
async def concepts(
    request: Request, runner: Runner, net: PathNetwork, target: PathTarget, layer: AtLayer = None
) -> JsonObject:
    """Describe the concepts of a class: importance, effect, and the images on which they were evaluated."""

    def describe(_: Client) -> JsonObject:
        result = concept_data.find_concepts(net, target, layer)
        return concept_data.describe_concepts(net, result, concept_data.load_arrays(runner.explorer, result))

    return await runner.run(request, describe)


@router.get("/concepts/{target}/arrays.npz", response_class=Response)
async def concept_arrays(
    request: Request, runner: Runner, net: PathNetwork, target: PathTarget, layer: AtLayer = None
) -> Response:
    """Return all arrays of the concepts of a class: bank, heatmaps, patches and more."""
    content = await runner.run(request, lambda _: concept_data.find_concepts(net, target, layer).archive())
    return file_response(content, "arrays.npz")


@router.get("/images/{image}/concepts/{target}")
async def concept_maps(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, target: PathTarget, layer: AtLayer = None
) -> ConceptMaps:
    """Return where each concept of a class is in an image, packed as heatmaps are."""

    def pack(client: Client) -> ConceptMaps:
        result = concept_data.find_concepts(net, target, layer)
        heatmaps = concept_data.concept_heatmaps(runner.explorer, client, net, image, result)
        return {"target": target, "layer": result.layer, "maps": [compute.pack_map(values) for values in heatmaps]}

    return await runner.run(request, pack)


@router.get("/atlases")
async def list_atlases(request: Request, runner: Runner, net: PathNetwork) -> dict[str, list[AtlasListing]]:
    """List the atlases in the store."""
    results = await runner.run(request, lambda _: concept_data.saved_atlases(net))
    return {"atlases": [{"name": r.name, "layer": r.layer, "target": r.target} for r in results]}


@router.get("/atlases/{name}")
async def atlas(request: Request, runner: Runner, net: PathNetwork, name: AtlasName) -> JsonObject:
    """Describe an atlas cell by cell: number of vectors, classes that they support, images that they come from."""

    def describe(_: Client) -> JsonObject:
        result = concept_data.find_atlas(net, name)
        arrays = concept_data.load_arrays(runner.explorer, result)
        return concept_data.describe_atlas(runner.explorer, net, result, arrays)

    return await runner.run(request, describe)


@router.get("/atlases/{name}/arrays.npz", response_class=Response)
async def atlas_arrays(request: Request, runner: Runner, net: PathNetwork, name: AtlasName) -> Response:
    """Return all arrays of an atlas: positions, sources, means, icons and more."""
    content = await runner.run(request, lambda _: concept_data.find_atlas(net, name).archive())
    return file_response(content, "arrays.npz")
