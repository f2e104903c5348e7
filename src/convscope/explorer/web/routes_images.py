"""Pictures by address. A browser keeps them, and asks each time whether they are still the same."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from convscope.explorer.service.images import UnknownResource, encode_image
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.service.state import Network
from convscope.explorer.web.requests import RequestRunner
from convscope.plotting.figures import pattern_grid

FOREVER = "public, max-age=31536000, immutable"
ASKED = "private, no-cache"  # an address does not tell which pixels a sample has, or what a store holds by now
SIZES = (96, 160, 320, 640, 1024)
Longest = Annotated[int, Query(ge=16, le=1024)]


def image(content: bytes, request: Request) -> Response:
    """A picture, or, where the browser has it already, the word that it is the same."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
    headers = {"Cache-Control": ASKED, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    kind = "image/png" if content[:4] == b"\x89PNG" else "image/webp"
    return Response(content, media_type=kind, headers=headers)


def router(desk: RequestRunner) -> APIRouter:
    """The addresses under /image/."""
    routes = APIRouter(prefix="/image", include_in_schema=False)
    explorer = desk.explorer

    def network(model: str, v: str) -> Network:
        net = explorer.network(model)
        if v != net.version:
            raise UnknownResource("this picture is of another version of the network; open the page anew")
        return net

    async def made(request: Request, make: Callable[[Client], bytes]) -> Response:
        return image(await desk.run(request, make), request)

    @routes.get("/photo")
    async def photo(request: Request, picture: str, longest: Longest = 1024) -> Response:
        found = explorer.images.find(picture)
        size = min(SIZES, key=lambda known: abs(known - longest))

        def make(asker: Client) -> bytes:
            kept: bytes | None = explorer.cache.get(("photo", found.key, size))
            if kept is None:
                kept = encode_image(found.resized(size))
                explorer.cache.put(("photo", found.key, size), kept)
            return kept

        return await made(request, make)

    @routes.get("/sheet")
    async def sheet(request: Request, model: str, picture: str, layer: str, v: str) -> Response:
        net, found = network(model, v), explorer.images.find(picture)
        net.layer(layer)
        return await made(request, lambda asker: explorer.feature_map_sheet(asker, net, found, layer)[0])

    @routes.get("/pattern")
    async def pattern(
        request: Request, model: str, layer: str, unit: int, look: str, recipe: str, seed: int, v: str
    ) -> Response:
        net, what = network(model, v), PatternSpec(layer, unit, look, recipe, seed)

        def make(asker: Client) -> bytes:
            found = explorer.get_pattern(net, what)
            if found is None:
                raise UnknownResource("this pattern is not drawn yet")
            image: bytes = found["image"]
            return image

        return await made(request, make)

    @routes.get("/patches")
    async def patches(request: Request, model: str, layer: str, unit: int, kind: str, v: str) -> Response:
        net = network(model, v)
        net.require_unit(layer, unit)
        if net.key not in desk.sheets or kind not in ("top", "bottom", "best"):
            raise UnknownResource("there are no such examples here")
        what: tuple[Any, ...] = ("patches", layer, unit, kind)
        sheets = desk.sheets[net.key]
        return await made(
            request, lambda asker: explorer.cached_image(asker, net, what, lambda: sheets.sheet(layer, unit, kind))
        )

    @routes.get("/thumbnail")
    async def thumbnail(request: Request, number: int, v: str) -> Response:
        net = next((n for n in explorer.networks.values() if n.key in desk.sheets and n.version == v), None)
        if net is None or net.store is None or not 0 <= number < net.store.num_images:
            raise UnknownResource("there is no such picture here")
        owner, sheets = net, desk.sheets[net.key]

        def make(client: Client) -> bytes:
            return explorer.cached_image(client, owner, ("thumbnail", number), lambda: sheets.thumbnail(number))

        return await made(request, make)

    @routes.get("/chapter")
    async def chapter(request: Request, model: str, number: int, v: str) -> Response:
        net = network(model, v)

        def make(asker: Client) -> bytes:
            told = explorer.get_story(net)
            if told is None or not 0 <= number < len(told.chapters):
                raise UnknownResource("this story is not told yet")
            return chapter_sheet(told, number)

        return await made(request, make)

    @routes.get("/story")
    async def story(request: Request, model: str, v: str) -> Response:
        net = network(model, v)

        def make(asker: Client) -> bytes:
            told = explorer.get_story(net)
            if told is None:
                raise UnknownResource("this story is not told yet")
            return explorer.cached_image(asker, net, ("story",), lambda: story_figure(told))

        return await made(request, make)

    return routes


def story_figure(told: Any) -> bytes:
    """The whole story as one picture: patterns, and beside them what is measured."""
    buffer = io.BytesIO()
    told.figure().savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def chapter_sheet(told: Any, number: int) -> bytes:
    """A chapter's patterns side by side, no margin between them."""
    images = told.chapters[number].images
    return encode_image(pattern_grid(images, columns=len(images), margin=0), "PNG")
