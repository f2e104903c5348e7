"""The web application: addresses, each a few lines that ask the explorer and say what it answered."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException

from convscope.engine.model import LOGITS
from convscope.errors import ConvscopeError
from convscope.explorer.service.images import UnknownResource
from convscope.explorer.service.jobs import Client, ClientDisconnected, QueueFull, RequestTimeout
from convscope.explorer.service.state import Explorer
from convscope.explorer.service.uploads import Decoder
from convscope.explorer.urls import LiveUrls
from convscope.explorer.views import (
    api_page,
    atlas_page,
    class_page,
    concepts_page,
    error_page,
    example_page,
    glossary_page,
    image_page,
    layer_page,
    network_page,
    saved_results_page,
    story_page,
    unit_page,
)
from convscope.explorer.views.page import Page, PageContext, render
from convscope.explorer.web import routes_api, routes_concepts, routes_images, security
from convscope.explorer.web.middleware import SecurityMiddleware
from convscope.explorer.web.requests import RequestRunner

KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def assets() -> dict[str, bytes]:
    """The files of ours that pages use, by name."""
    found = files("convscope.explorer").joinpath("static").iterdir()
    return {file.name: file.read_bytes() for file in found if file.name.endswith(tuple(KINDS))}


@dataclass(frozen=True)
class _Beside:
    """What a page of a unit or a class shows beside it: a picture, and which of its patterns."""

    image: str | None = None
    look: str = "positive"
    recipe: str | None = None
    seed: int | None = None


Shown = Annotated[_Beside, Depends()]


def create_app(
    explorer: Explorer,
    *,
    decoder: Decoder | None = None,
    hosts: Sequence[str] = security.LOCAL_HOSTS,
    token: str | None = None,
    frame_ancestors: Sequence[str] = (),
    timeout: float = 120,
) -> FastAPI:
    """The application.

    hosts: names under which it may be asked ("*": any); token: what a visitor has to know; frames: origins of pages
    that may show it in a frame; seconds: how long a request may take.
    """
    ours = assets()
    version = hashlib.sha256(b"".join(ours[name] for name in sorted(ours))).hexdigest()[:10]
    site = LiveUrls(version)
    decoder = decoder or Decoder()
    desk = RequestRunner(explorer, decoder, timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = threading.Thread(target=decoder.warm, name="convscope-decoder")
        warming.start()
        yield
        explorer.close()
        warming.join()  # else it might start after the end
        decoder.close()

    app = FastAPI(
        title="convscope explorer",
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )

    app.add_middleware(SecurityMiddleware, hosts=hosts, token=token, frames=frame_ancestors)

    def error(request: Request, status: int, reason: str) -> Response:
        wait = {"Retry-After": "5"} if status == 503 else None
        if request.url.path.startswith(("/api/", "/image/")):
            return JSONResponse({"error": reason}, status, headers=wait)
        context = desk.page_context(None, site)
        return HTMLResponse(render(error_page.build(context, status, reason), context), status, headers=wait)

    @app.exception_handler(ConvscopeError)
    async def _(request: Request, problem: ConvscopeError) -> Response:
        status = {UnknownResource: 404, QueueFull: 503, RequestTimeout: 504}.get(type(problem), 422)
        return error(request, status, str(problem))

    @app.exception_handler(ClientDisconnected)
    async def _(request: Request, problem: ClientDisconnected) -> Response:
        return error(request, 503, "this work was ended")

    @app.exception_handler(HTTPException)
    async def _(request: Request, problem: HTTPException) -> Response:
        answer = error(request, problem.status_code, str(problem.detail))
        answer.headers.update(problem.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, problem: RequestValidationError) -> Response:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in problem.errors())
        return error(request, 422, told)

    async def show(request: Request, build: Callable[[PageContext], Page]) -> Response:
        def page(client: Client) -> str:
            context = desk.page_context(client, site)
            return render(build(context), context)

        return HTMLResponse(await desk.run(request, page))

    hidden: dict[str, Any] = {"include_in_schema": False, "response_model": None}

    @app.get("/", **hidden)
    def home(request: Request) -> Response:
        net = explorer.first
        samples = explorer.images.samples
        parts = ("m", net.key, "image", samples[0].key) if net.takes_images and samples else ("m", net.key)
        return RedirectResponse(site.page(*parts), 307)

    @app.get("/glossary", **hidden)
    async def glossary(request: Request) -> Response:
        return await show(request, glossary_page.build)

    @app.get("/docs", **hidden)
    async def docs(request: Request) -> Response:
        return await show(request, lambda context: api_page.build(context, app.openapi()))

    @app.get("/m/{model}", **hidden)
    async def network(request: Request, model: str) -> Response:
        return await show(request, lambda context: network_page.build(context, explorer.network(model)))

    @app.get("/m/{model}/story", **hidden)
    async def story(request: Request, model: str) -> Response:
        return await show(request, lambda context: story_page.build(context, explorer.network(model)))

    @app.get("/m/{model}/image/{image}", **hidden)
    @app.get("/m/{model}/image/{image}/class/{target}", **hidden)
    async def picture(request: Request, model: str, picture: str, target: int | None = None) -> Response:
        def build(context: PageContext) -> Page:
            net = explorer.network(model)
            if target is not None:
                net.require_class(target)
            return image_page.build(context, net, explorer.images.find(picture), target)

        return await show(request, build)

    @app.get("/m/{model}/layer/{layer:path}", **hidden)
    async def layer(
        request: Request, model: str, layer: str, picture: str | None = None, target: int | None = None
    ) -> Response:
        def build(context: PageContext) -> Page:
            net = explorer.network(model)
            if target is not None:
                net.require_class(target)
            return layer_page.build(context, net, net.layer(layer), desk.find_image(net, picture), target)

        return await show(request, build)

    @app.get("/m/{model}/unit/{layer:path}/{unit:int}", **hidden)
    async def unit(request: Request, model: str, layer: str, unit: int, shown: Shown) -> Response:
        def build(context: PageContext) -> Page:
            net = explorer.network(model)
            net.require_unit(layer, unit)
            what = explorer.resolve_pattern(net, layer, unit, shown.look, shown.recipe, shown.seed)
            return unit_page.build(context, net, layer, unit, desk.find_image(net, shown.image), what)

        return await show(request, build)

    @app.get("/m/{model}/class/{target}", **hidden)
    async def class_(request: Request, model: str, target: int, shown: Shown) -> Response:
        def build(context: PageContext) -> Page:
            net = explorer.network(model)
            net.require_class(target)
            what = explorer.resolve_pattern(net, LOGITS, target, shown.look, shown.recipe, shown.seed)
            return class_page.build(context, net, target, desk.find_image(net, shown.image), what)

        return await show(request, build)

    @app.get("/m/{model}/concepts", **hidden)
    async def kept(request: Request, model: str) -> Response:
        return await show(request, lambda context: saved_results_page.build(context, explorer.network(model)))

    @app.get("/m/{model}/concepts/{target}", **hidden)
    @app.get("/m/{model}/concepts/{target}/{layer:path}", **hidden)
    async def concepts(
        request: Request, model: str, target: int, layer: str | None = None, picture: str | None = None
    ) -> Response:
        def build(context: PageContext) -> Page:
            net = explorer.network(model)
            net.require_class(target)
            return concepts_page.build(context, net, target, layer, desk.find_image(net, picture))

        return await show(request, build)

    @app.get("/m/{model}/atlas/{name}", **hidden)
    async def atlas(request: Request, model: str, name: str) -> Response:
        return await show(request, lambda context: atlas_page.build(context, explorer.network(model), name))

    @app.get("/m/{model}/data/{number}", **hidden)
    async def example(request: Request, model: str, number: int) -> Response:
        return await show(request, lambda context: example_page.build(context, explorer.network(model), number))

    @app.post("/m/{model}/data/{number}/open", **hidden)
    async def open_example(request: Request, model: str, number: int) -> Response:
        net = explorer.network(model)
        key = await desk.run(request, lambda asker: desk.open_dataset_image(asker, net, number))
        return RedirectResponse(site.page("m", net.key, "image", key), 303)

    @app.get("/static/{name}", **hidden)
    def static(name: str) -> Response:
        if name not in ours:
            raise HTTPException(404, "there is no such file")
        kind = KINDS[name[name.rindex(".") :]]
        return Response(ours[name], media_type=kind, headers={"Cache-Control": routes_images.FOREVER})

    app.include_router(routes_images.router(desk))
    app.include_router(routes_api.router(desk))
    app.include_router(routes_concepts.router(desk))
    return app
