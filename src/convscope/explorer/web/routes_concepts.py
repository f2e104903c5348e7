"""Concepts and atlases for programs, JSON and arrays; and the pictures on their pages."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from convscope.explorer.service import compute, concept_data
from convscope.explorer.service.images import UnknownResource
from convscope.explorer.service.jobs import Client
from convscope.explorer.web import routes_images
from convscope.explorer.web.requests import RequestRunner
from convscope.explorer.web.routes_api import PROBLEMS, Key, Model
from convscope.store.saved_results import SavedResult

Class = Annotated[int, Path(description="a class", ge=0)]
Name = Annotated[str, Path(description="an atlas's name", max_length=400)]
AtLayer = Annotated[str | None, Query(description="default: the first layer that is kept", max_length=400)]


def router(desk: RequestRunner) -> APIRouter:
    """The addresses under /api/ and /image/. What is asked for is looked up in the store's own listing."""
    routes = APIRouter()
    api = APIRouter(prefix="/api", responses=PROBLEMS)
    _concepts(api, desk)
    _atlases(api, desk)
    routes.include_router(api)
    _sheets(routes, desk)
    return routes


def _concepts(routes: APIRouter, desk: RequestRunner) -> None:
    explorer = desk.explorer

    @routes.get("/models/{model}/concepts")
    async def listed(request: Request, model: Model) -> dict[str, Any]:
        """The classes whose concepts are kept in the store, and at which layers."""
        net = explorer.network(model)
        every = await desk.run(request, lambda asker: concept_data.saved_concepts(net))
        found = [{"target": k.target, "name": net.model.class_name(k.target or 0), "layer": k.layer} for k in every]
        return {"concepts": found}

    @routes.get("/models/{model}/concepts/{target}")
    async def concepts(request: Request, model: Model, target: Class, layer: AtLayer = None) -> dict[str, Any]:
        """What a class is made of: importance and effect of each concept, and on which pictures they were judged."""
        net = explorer.network(model)
        net.require_class(target)

        def make(asker: Client) -> dict[str, Any]:
            one = concept_data.find_concepts(net, target, layer)
            return concept_data.describe_concepts(net, one, concept_data.load_arrays(explorer, one))

        return await desk.run(request, make)

    @routes.get("/models/{model}/concepts/{target}/arrays.npz", response_class=Response)
    async def arrays(request: Request, model: Model, target: Class, layer: AtLayer = None) -> Response:
        """All arrays of the concepts of a class: bank, heats, patches and more."""
        net = explorer.network(model)
        net.require_class(target)
        return _archive(await desk.run(request, lambda asker: concept_data.find_concepts(net, target, layer).archive()))

    @routes.get("/models/{model}/pictures/{picture}/concepts/{target}")
    async def heat(
        request: Request, model: Model, picture: Key, target: Class, layer: AtLayer = None
    ) -> dict[str, Any]:
        """Where in a picture each concept of a class is: maps as those of heatmaps, 0 and more."""
        net, found = explorer.network(model), explorer.images.find(picture)
        net.require_class(target)

        def make(asker: Client) -> dict[str, Any]:
            one = concept_data.find_concepts(net, target, layer)
            maps = concept_data.concept_heatmaps(explorer, asker, net, found, one)
            return {"target": target, "layer": one.layer, "maps": [compute.pack_map(values) for values in maps]}

        return await desk.run(request, make)


def _atlases(routes: APIRouter, desk: RequestRunner) -> None:
    explorer = desk.explorer

    @routes.get("/models/{model}/atlases")
    async def listed(request: Request, model: Model) -> dict[str, Any]:
        """The atlases that are kept in the store."""
        net = explorer.network(model)
        every = await desk.run(request, lambda asker: concept_data.saved_atlases(net))
        return {"atlases": [{"name": one.name, "layer": one.layer, "target": one.target} for one in every]}

    @routes.get("/models/{model}/atlases/{name}")
    async def atlas(request: Request, model: Model, name: Name) -> dict[str, Any]:
        """An atlas, cell by cell: how many vectors, for which classes they speak, from which pictures they come."""
        net = explorer.network(model)

        def make(asker: Client) -> dict[str, Any]:
            one = concept_data.find_atlas(net, name)
            return concept_data.describe_atlas(explorer, net, one, concept_data.load_arrays(explorer, one))

        return await desk.run(request, make)

    @routes.get("/models/{model}/atlases/{name}/arrays.npz", response_class=Response)
    async def arrays(request: Request, model: Model, name: Name) -> Response:
        """All arrays of an atlas: positions, sources, means, icons and more."""
        net = explorer.network(model)
        return _archive(await desk.run(request, lambda asker: concept_data.find_atlas(net, name).archive()))


def _sheets(routes: APIRouter, desk: RequestRunner) -> None:
    explorer = desk.explorer

    @routes.get("/image/kept", include_in_schema=False)
    async def sheet(request: Request, model: str, kind: str, name: str, which: str, v: str) -> Response:
        net = explorer.network(model)
        if which not in concept_data.SHEETS.get(kind, ()):
            raise UnknownResource("there are no such pictures here")

        def make(asker: Client) -> bytes:
            one = _version(
                concept_data.saved_concepts(net) if kind == "concepts" else concept_data.saved_atlases(net), name, v
            )
            draw = lambda: concept_data.render_sheet(concept_data.load_arrays(explorer, one), which)  # noqa: E731
            return explorer.cached_image(asker, net, ("kept", one.version, which), draw)

        return routes_images.image(await desk.run(request, make), request)


def _version(every: list[SavedResult], name: str, version: str) -> SavedResult:
    for one in every:
        if (one.name, one.version) == (name, version):
            return one
    raise UnknownResource("these pictures are not, or no longer, in the store; open the page anew")


def _archive(content: bytes) -> Response:
    kind, name = "application/octet-stream", 'attachment; filename="arrays.npz"'
    return Response(content, media_type=kind, headers={"Content-Disposition": name})
