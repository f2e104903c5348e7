"""The same answers for programs: JSON, arrays, tables; progress by server-sent events."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel

from convscope.attribution.registry import METHODS
from convscope.errors import ConvscopeError
from convscope.explorer.service import compute
from convscope.explorer.service.images import encode_image
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.patterns import RECIPES, VARIANTS, PatternSpec
from convscope.explorer.service.state import Explorer, Network
from convscope.explorer.views import snippets
from convscope.explorer.web.requests import RequestRunner
from convscope.images.colormap import blend
from convscope.images.geometry import Geometry
from convscope.results import write_npz

LONGEST = 2048  # pixels of the longer side of a picture with its heat
Model = Annotated[str, Path(description="a model's address")]
Key = Annotated[str, Path(description="a picture's key")]
Layer = Annotated[str, Query(description="a layer's name", max_length=400)]
Target = Annotated[int, Query(description="a class", ge=0)]
Method = Annotated[str, Query(description="how the heatmap is made", json_schema_extra={"enum": list(METHODS)})]
MaybeLayer = Annotated[str | None, Query(description="default: chosen automatically", max_length=400)]
Against = Annotated[int | None, Query(description="a class that is taken off", ge=0)]


class Problem(BaseModel):
    """What went wrong, in words."""

    error: str


PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": says}
    for code, says in {
        401: "the token is missing",
        403: "another site asked",
        404: "there is no such thing here",
        422: "the request makes no sense",
        503: "the queue is full",
        504: "it took too long",
    }.items()
}


def router(desk: RequestRunner) -> APIRouter:
    """The addresses under /api/."""
    routes = APIRouter(prefix="/api", responses=PROBLEMS)
    _models(routes, desk)
    _images(routes, desk)
    _heatmaps(routes, desk)
    _long(routes, desk)
    return routes


def _models(routes: APIRouter, desk: RequestRunner) -> None:
    explorer = desk.explorer

    @routes.get("/models")
    def models() -> dict[str, Any]:
        """The networks that can be explored, and how busy the explorer is."""
        nets = explorer.networks.values()
        found = [{"key": n.key, "name": n.model.name, "version": n.version, "pictures": n.takes_images} for n in nets]
        return {
            "models": found,
            "waiting": {"quick": len(explorer.interactive_queue), "slow": len(explorer.background_queue)},
        }

    @routes.get("/models/{model}")
    def model(model: Model) -> dict[str, Any]:
        """A network: its preprocessing, notes and layers; `edges` are pairs of layers, by their places in that list."""
        net = explorer.network(model)
        rows = [{"name": r.name, "kind": r.kind, "shape": list(r.shape), "units": r.units} for r in net.layers]
        told = net.model.describe()
        return {**told, "version": net.version, "outputs": net.model.num_outputs, "layers": rows, "edges": net.edges}

    @routes.get("/models/{model}/classes")
    def classes(model: Model, search: Annotated[str, Query(max_length=100)] = "") -> dict[str, Any]:
        """Up to twenty classes whose name holds the words, or whose number it is."""
        net, wanted = explorer.network(model), search.replace("_", " ").strip().casefold()
        every = ((k, net.model.class_name(k)) for k in range(net.model.num_outputs or 0))
        found = [
            {"index": k, "name": n} for k, n in every if str(k) == wanted or wanted in n.replace("_", " ").casefold()
        ]
        exact = [c for c in found if wanted in (str(c["index"]), str(c["name"]).casefold())]
        return {"classes": [*exact, *(c for c in found if c not in exact)][:20]}


def _images(routes: APIRouter, desk: RequestRunner) -> None:
    explorer = desk.explorer

    @routes.post(
        "/pictures",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def bring(request: Request, name: Annotated[str, Query(max_length=1000)] = "picture") -> dict[str, Any]:
        """Bring a picture: the body is the file. The same picture always gets the same key."""
        made = await desk.upload(request, name)
        return {"key": made.key, "name": made.name, "height": made.height, "width": made.width}

    async def table(request: Request, model: str, picture: str, top: int) -> list[dict[str, Any]]:
        net, found = explorer.network(model), explorer.images.find(picture)
        return await desk.run(request, lambda asker: explorer.predictions(asker, net, found, top))

    @routes.get("/models/{model}/pictures/{picture}/predictions")
    async def predictions(
        request: Request, model: Model, picture: Key, top: Annotated[int, Query(ge=1, le=100)] = 5
    ) -> dict[str, Any]:
        """The likeliest classes."""
        return {"predictions": await table(request, model, picture, top)}

    @routes.get("/models/{model}/pictures/{picture}/predictions.csv", response_class=Response)
    async def predictions_csv(request: Request, model: Model, picture: Key) -> Response:
        """All classes as a table, the likeliest first."""
        count = explorer.network(model).model.num_outputs or 1
        rows = [list(row.values()) for row in await table(request, model, picture, count)]
        return _csv(["index", "name", "probability", "logit"], rows, "predictions.csv")

    @routes.get("/models/{model}/pictures/{picture}/layers")
    async def layers(request: Request, model: Model, picture: Key) -> dict[str, Any]:
        """What is measured of every layer on a picture: shares of dead units, of values not above 0."""
        net, found = explorer.network(model), explorer.images.find(picture)
        return {"layers": await desk.run(request, lambda asker: explorer.layer_summaries(asker, net, found))}

    async def maps(request: Request, model: str, picture: str, layer: str) -> tuple[Network, np.ndarray]:
        net, found = explorer.network(model), explorer.images.find(picture)
        row = net.layer(layer)
        return net, await desk.run(request, lambda asker: explorer.feature_maps(asker, net, found, row.name))

    @routes.get("/models/{model}/pictures/{picture}/activations")
    async def activations(request: Request, model: Model, picture: Key, layer: Layer) -> dict[str, Any]:
        """Of each channel of a layer: mean, max, share of places above 0, whether it is dead on the picture."""
        _, found = await maps(request, model, picture, layer)
        table = await desk.run(request, lambda asker: compute.channel_statistics(found))
        return {"layer": layer, "shape": list(found.shape), **table}

    @routes.get("/models/{model}/pictures/{picture}/activations.csv", response_class=Response)
    async def activations_csv(request: Request, model: Model, picture: Key, layer: Layer) -> Response:
        """The same as a table."""
        _, found = await maps(request, model, picture, layer)
        table = await desk.run(request, lambda asker: compute.channel_statistics(found))
        rows = [[u, *values] for u, values in enumerate(zip(*table.values(), strict=True))]
        return _csv(["unit", *table], rows, "activations.csv")

    @routes.get("/models/{model}/pictures/{picture}/activations.npz", response_class=Response)
    async def activations_npz(request: Request, model: Model, picture: Key, layer: Layer) -> Response:
        """The activations (C, H, W) themselves."""
        _, found = await maps(request, model, picture, layer)
        return await desk.run(request, lambda asker: _npz({"activations": found}, "activations.npz"))

    @routes.get("/models/{model}/pictures/{picture}/place")
    async def place(
        request: Request,
        model: Model,
        picture: Key,
        layer: Layer,
        row: Annotated[int, Query(ge=0)],
        column: Annotated[int, Query(ge=0)],
    ) -> dict[str, Any]:
        """The strongest units at a place of a layer, and which part of the picture they see."""
        net, found = await maps(request, model, picture, layer)
        if row >= found.shape[1] or column >= found.shape[2]:
            raise ConvscopeError(f"layer {layer!r} has {found.shape[1]} x {found.shape[2]} places; not {row}, {column}")
        return compute.units_at_position(net.model, found, layer, row, column)

    @routes.get("/models/{model}/pictures/{picture}/relevance")
    async def relevance(request: Request, model: Model, picture: Key, layer: Layer, target: Target) -> dict[str, Any]:
        """How much each channel of a layer adds to a class's logit."""
        net, found = explorer.network(model), explorer.images.find(picture)
        net.require_class(target)
        name = net.layer(layer).name
        speaks = await desk.run(request, lambda asker: explorer.relevance(asker, net, found, name, target))
        return {"layer": name, "target": target, "relevance": [float(f"{v:.4g}") for v in speaks]}


@dataclass(frozen=True)
class Question:
    """What is asked for a class of a picture, and how."""

    model: str
    image: str
    target: int
    layer: str | None
    method: str
    against: int | None

    def network(self, explorer: Explorer) -> Network:
        """The network, once it is certain that it can answer. Raises ConvscopeError."""
        net = explorer.network(self.model)
        for index in (self.target, self.against):
            if index is not None:
                net.require_class(index)
        if self.layer is not None:
            net.layer(self.layer)
        if self.method not in METHODS:
            raise ConvscopeError(f"method {self.method[:40]!r} is not known; expected one of {', '.join(METHODS)}")
        return net


async def _question(
    model: Model,
    image: Key,
    target: Target,
    layer: MaybeLayer = None,
    method: Method = "grad-cam",
    against: Against = None,
) -> Question:
    return Question(model, image, target, layer, method, against)


Asked = Annotated[Question, Depends(_question)]


def _heatmaps(routes: APIRouter, desk: RequestRunner) -> None:
    explorer = desk.explorer
    base = "/models/{model}/pictures/{picture}"

    async def heat(request: Request, asked: Question) -> dict[str, Any]:
        net, found = asked.network(explorer), explorer.images.find(asked.image)

        def make(asker: Client) -> dict[str, Any]:
            (one,) = explorer.heatmap(asker, net, found, [asked.target], asked.layer, asked.method, asked.against)
            return one

        return await desk.run(request, make)

    @routes.get(base + "/heatmap")
    async def heatmap(request: Request, asked: Asked) -> dict[str, Any]:
        """Which places speak for a class. `map.data`: 16-bit integers in base64; value = integer / 32767 * `peak`."""
        one = await heat(request, asked)
        net, found = explorer.network(asked.model), explorer.images.find(asked.image)
        how = (asked.target, asked.layer, asked.method, asked.against)
        return {**one, "lines": snippets.heatmap(net.source, found.source, *how)}

    @routes.get(base + "/heatmap.npz", response_class=Response)
    async def heatmap_npz(request: Request, asked: Asked) -> Response:
        """The map (h, w) as an array."""
        one = await heat(request, asked)
        arrays = {"heatmap": compute.unpack_map(one["map"]), "target": np.array(asked.target)}
        return await desk.run(request, lambda asker: _npz(arrays, "heatmap.npz"))

    @routes.get(base + "/heatmap.png", response_class=Response)
    async def heatmap_png(
        request: Request,
        asked: Asked,
        opacity: Annotated[float, Query(ge=0, le=1)] = 0.4,
        colours: Annotated[str, Query(json_schema_extra={"enum": ["jet", "viridis", "inferno", "coolwarm"]})] = "jet",
    ) -> Response:
        """The picture under its heat, rectified; its longer side has at most 2,048 pixels."""
        if colours not in ("jet", "viridis", "inferno", "coolwarm"):
            raise ConvscopeError(f"colours are {colours[:40]!r}; expected jet, viridis, inferno or coolwarm")
        one = await heat(request, asked)
        net, found = explorer.network(asked.model), explorer.images.find(asked.image)

        def draw() -> bytes:
            pixels = np.asarray(found.resized(LONGEST))
            laid = Geometry.whole(pixels.shape[:2]).to_original(torch.from_numpy(compute.unpack_map(one["map"])))
            warm = laid.clamp(min=0)
            return encode_image(blend(pixels, (warm / warm.max().clamp(min=1e-12)).numpy(), opacity, colours), "PNG")

        how = (found.key, asked.target, asked.layer, asked.method, asked.against, opacity, colours)
        content = await desk.run(request, lambda asker: explorer.cached_image(asker, net, ("overlay", *how), draw))
        return _file(content, "image/png", f"heatmap_{asked.target}.png")

    @routes.get(base + "/faithfulness")
    async def faithfulness(request: Request, asked: Asked) -> dict[str, Any]:
        """Whether the map tells the truth: deletion (lower is better) and insertion (higher), with their curves."""
        net, found = asked.network(explorer), explorer.images.find(asked.image)
        how = (asked.target, asked.layer, asked.method, asked.against)
        return await desk.run(request, lambda asker: explorer.faithfulness(asker, net, found, *how))


def _long(routes: APIRouter, desk: RequestRunner) -> None:
    explorer = desk.explorer

    def references() -> list[np.ndarray]:
        return [image.pixels for image in explorer.images.samples[:8]]

    @routes.get("/models/{model}/pattern/events", response_class=Response)
    async def pattern(
        request: Request,
        model: Model,
        layer: Layer,
        unit: Annotated[int, Query(ge=0)],
        look: Annotated[str, Query(json_schema_extra={"enum": list(VARIANTS)})] = "positive",
        recipe: Annotated[str, Query(json_schema_extra={"enum": list(RECIPES)})] = "robust",
        seed: Annotated[int, Query(ge=0, le=9999)] = 0,
    ) -> Response:
        """Draw a unit's pattern while you look on: server-sent events `progress`, `frame`, then `done` or `failed`.

        The drawing ends when nobody listens any more."""
        net = explorer.network(model)
        net.require_unit(layer, unit)
        what = PatternSpec(layer, unit, look, recipe, seed)
        work = explorer.start_pattern(desk.client_id(request), net, what, references() if net.takes_images else [])
        told: Callable[[Any], dict[str, Any]] = lambda made: {  # noqa: E731
            **{k: v for k, v in made.items() if k != "image"},
            **asdict(what),
        }
        return desk.event_stream(request, work, told)

    @routes.get("/models/{model}/story/events", response_class=Response)
    async def story(request: Request, model: Model) -> Response:
        """Tell the story of the network, as long as you listen: events as of a pattern."""
        net = explorer.network(model)
        work = explorer.start_story(desk.client_id(request), net)
        return desk.event_stream(request, work, lambda told: {"chapters": len(told.chapters)})


def _csv(heading: list[str], rows: list[list[Any]], name: str) -> Response:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows(rows)
    return _file(out.getvalue().encode(), "text/csv; charset=utf-8", name)


def _npz(arrays: dict[str, np.ndarray], name: str) -> Response:
    buffer = io.BytesIO()
    write_npz(buffer, arrays)
    return _file(buffer.getvalue(), "application/octet-stream", name)


def _file(content: bytes, kind: str, name: str) -> Response:
    return Response(content, media_type=kind, headers={"Content-Disposition": f'attachment; filename="{name}"'})
