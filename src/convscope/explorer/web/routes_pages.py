"""The HTML pages, and their scripts and styles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.exceptions import HTTPException

from convscope.engine.model import LOGITS
from convscope.explorer.service.jobs import Client
from convscope.explorer.static_files import media_type
from convscope.explorer.views import (
    api_page,
    atlas_page,
    class_page,
    concepts_page,
    diagnosis_page,
    example_page,
    glossary_page,
    image_page,
    image_units_page,
    layer_page,
    names_page,
    network_page,
    saved_results_page,
    story_page,
    unit_page,
    units_page,
)
from convscope.explorer.views.page import Page, PageContext, render
from convscope.explorer.web.parameters import OptionalTarget, PathImage, PathLayer, PathNetwork, QueryImage, Runner
from convscope.explorer.web.requests import RequestRunner
from convscope.explorer.web.responses import IMMUTABLE

router = APIRouter(include_in_schema=False)


class PatternQuery:
    """Which pattern of a unit a page shows; what is missing is chosen by `Explorer.resolve_pattern`."""

    def __init__(self, variant: str = "positive", recipe: str | None = None, seed: int | None = None) -> None:
        self.variant, self.recipe, self.seed = variant, recipe, seed


Pattern = Annotated[PatternQuery, Depends()]


async def _render(request: Request, runner: RequestRunner, build: Callable[[PageContext], Page]) -> HTMLResponse:
    """Build and render a page in a thread."""

    def render_page(client: Client) -> str:
        context = runner.page_context(client)
        return render(build(context), context)

    return HTMLResponse(await runner.run(request, render_page))


@router.get("/")
async def home(runner: Runner) -> RedirectResponse:
    """Redirect to the first image, or to the network if it takes no images."""
    net, samples = runner.explorer.first, runner.explorer.images.samples
    parts = ("m", net.key, "image", samples[0].key) if net.takes_images and samples else ("m", net.key)
    return RedirectResponse(runner.urls.page(*parts), 307)


@router.get("/glossary")
async def glossary(request: Request, runner: Runner) -> HTMLResponse:
    """Show the glossary."""
    return await _render(request, runner, glossary_page.build)


@router.get("/docs")
async def docs(request: Request, runner: Runner) -> HTMLResponse:
    """Show the documentation of the API."""
    schema = request.app.openapi()
    return await _render(request, runner, lambda context: api_page.build(context, schema))


@router.get("/m/{model}")
async def network(request: Request, runner: Runner, net: PathNetwork) -> HTMLResponse:
    """Show the layers of a network."""
    return await _render(request, runner, lambda context: network_page.build(context, net))


@router.get("/m/{model}/story")
async def story(request: Request, runner: Runner, net: PathNetwork) -> HTMLResponse:
    """Show the story of a network."""
    return await _render(request, runner, lambda context: story_page.build(context, net))


@router.get("/m/{model}/image/{image}")
@router.get("/m/{model}/image/{image}/class/{target}")
async def image(
    request: Request, runner: Runner, net: PathNetwork, image: PathImage, target: OptionalTarget
) -> HTMLResponse:
    """Show predictions and heatmaps of an image."""
    return await _render(request, runner, lambda context: image_page.build(context, net, image, target))


@router.get("/m/{model}/image/{image}/units")
async def image_units(request: Request, runner: Runner, net: PathNetwork, image: PathImage) -> HTMLResponse:
    """Show the units that an image excites most, compared with the images of the store."""
    return await _render(request, runner, lambda context: image_units_page.build(context, net, image))


@router.get("/m/{model}/layer/{layer:path}")
async def layer(
    request: Request, runner: Runner, net: PathNetwork, layer: PathLayer, image: QueryImage, target: OptionalTarget
) -> HTMLResponse:
    """Show the feature maps of a layer."""
    return await _render(request, runner, lambda context: layer_page.build(context, net, layer, image, target))


@router.get("/m/{model}/units/{layer:path}")
async def units(
    request: Request, runner: Runner, net: PathNetwork, layer: PathLayer, image: QueryImage, target: OptionalTarget
) -> HTMLResponse:
    """Show the units of a layer as a table."""
    return await _render(request, runner, lambda context: units_page.build(context, net, layer, image, target))


@router.get("/m/{model}/unit/{layer:path}/{unit:int}")
async def unit(
    request: Request, runner: Runner, net: PathNetwork, layer: str, unit: int, image: QueryImage, pattern: Pattern
) -> HTMLResponse:
    """Show a unit."""
    net.require_unit(layer, unit)

    def build(context: PageContext) -> Page:
        spec = runner.explorer.resolve_pattern(net, layer, unit, pattern.variant, pattern.recipe, pattern.seed)
        return unit_page.build(context, net, layer, unit, image, spec)

    return await _render(request, runner, build)


@router.get("/m/{model}/class/{target}")
async def class_(
    request: Request, runner: Runner, net: PathNetwork, target: int, image: QueryImage, pattern: Pattern
) -> HTMLResponse:
    """Show a class."""
    net.require_class(target)

    def build(context: PageContext) -> Page:
        spec = runner.explorer.resolve_pattern(net, LOGITS, target, pattern.variant, pattern.recipe, pattern.seed)
        return class_page.build(context, net, target, image, spec)

    return await _render(request, runner, build)


@router.get("/m/{model}/concepts")
async def saved_results(request: Request, runner: Runner, net: PathNetwork) -> HTMLResponse:
    """List the concepts and atlases in the store."""
    return await _render(request, runner, lambda context: saved_results_page.build(context, net))


@router.get("/m/{model}/concepts/{target}")
@router.get("/m/{model}/concepts/{target}/{layer:path}")
async def concepts(
    request: Request, runner: Runner, net: PathNetwork, target: int, image: QueryImage, layer: str | None = None
) -> HTMLResponse:
    """Show the concepts of a class."""
    net.require_class(target)
    return await _render(request, runner, lambda context: concepts_page.build(context, net, target, layer, image))


@router.get("/m/{model}/names")
async def names(request: Request, runner: Runner, net: PathNetwork) -> HTMLResponse:
    """Show the named units."""
    return await _render(request, runner, lambda context: names_page.build(context, net))


@router.get("/m/{model}/diagnosis")
@router.get("/m/{model}/diagnosis/{name}")
async def diagnosis(request: Request, runner: Runner, net: PathNetwork, name: str | None = None) -> HTMLResponse:
    """Show the reasons for errors that a diagnosis in the store has found."""
    return await _render(request, runner, lambda context: diagnosis_page.build(context, net, name))


@router.get("/m/{model}/atlas/{name}")
async def atlas(request: Request, runner: Runner, net: PathNetwork, name: str) -> HTMLResponse:
    """Show an atlas."""
    return await _render(request, runner, lambda context: atlas_page.build(context, net, name))


@router.get("/m/{model}/data/{index}")
async def example(request: Request, runner: Runner, net: PathNetwork, index: int) -> HTMLResponse:
    """Show an image of the store's data set."""
    return await _render(request, runner, lambda context: example_page.build(context, net, index))


@router.post("/m/{model}/data/{index}/open")
async def open_example(request: Request, runner: Runner, net: PathNetwork, index: int) -> RedirectResponse:
    """Register an image of the data set and redirect to its page."""
    opened = await runner.run(request, lambda _: runner.open_dataset_image(net, index))
    return RedirectResponse(runner.urls.page("m", net.key, "image", opened.key), 303)


@router.get("/m/{model}/data/{index}/units")
async def example_units(request: Request, runner: Runner, net: PathNetwork, index: int) -> RedirectResponse:
    """Register an image of the data set and redirect to the page of the units that it excites."""
    opened = await runner.run(request, lambda _: runner.open_dataset_image(net, index))
    return RedirectResponse(runner.urls.page("m", net.key, "image", opened.key, "units"), 303)


@router.get("/static/{name}")
async def static_file(request: Request, name: str) -> Response:
    """Return a script, the style sheet or the icon."""
    files: dict[str, bytes] = request.app.state.static_files
    if name not in files:
        raise HTTPException(404, "there is no such file")
    return Response(files[name], media_type=media_type(name), headers={"Cache-Control": IMMUTABLE})
