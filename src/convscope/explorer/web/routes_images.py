"""Images by URL. Browsers cache them, and revalidate by ETag."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from convscope.explorer.service import concept_data, diagnosis_data
from convscope.explorer.service.images import UnknownResource, encode_image
from convscope.explorer.service.jobs import Client
from convscope.explorer.service.networks import Network
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.service.story_images import chapter_sheet, story_figure
from convscope.explorer.web.parameters import Runner
from convscope.explorer.web.responses import image_response
from convscope.featurevis.layer_story import Story
from convscope.store.saved_results import SavedResult

SIZES = (96, 160, 320, 640, 1024)  # pixels of the longer side
EXAMPLE_KINDS = ("top", "bottom", "best")

SAVED = {
    "concepts": concept_data.saved_concepts,
    "atlas": concept_data.saved_atlases,
    "diagnosis": diagnosis_data.saved_diagnoses,
}
"""For each kind of saved results the function that lists those of a network."""

router = APIRouter(prefix="/image", include_in_schema=False)


async def _versioned_network(runner: Runner, model: str, v: str) -> Network:
    """Return the network, unless its weights have changed since the page was built."""
    net = runner.explorer.network(model)
    if v != net.version:
        raise UnknownResource("this image is of another version of the network; reload the page")
    return net


VersionedNetwork = Annotated[Network, Depends(_versioned_network)]


@router.get("/photo")
async def photo(
    request: Request, runner: Runner, image: str, max_size: Annotated[int, Query(ge=16, le=1024)] = 1024
) -> Response:
    """Return an image, its longer side near `max_size` pixels."""
    registered = runner.explorer.images.find(image)
    size = min(SIZES, key=lambda candidate: abs(candidate - max_size))

    def encode(_: Client) -> bytes:
        key = ("photo", registered.key, size)
        return runner.explorer.cache.get_or_compute(key, lambda: encode_image(registered.resized(size)))

    return image_response(await runner.run(request, encode), request)


@router.get("/feature_maps")
async def feature_maps(request: Request, runner: Runner, net: VersionedNetwork, image: str, layer: str) -> Response:
    """Return the sheet of all feature maps of a layer."""
    registered = runner.explorer.images.find(image)
    net.layer(layer)
    content, _ = await runner.run(
        request, lambda client: runner.explorer.feature_map_sheet(client, net, registered, layer)
    )
    return image_response(content, request)


@router.get("/pattern")
async def pattern(
    request: Request,
    runner: Runner,
    net: VersionedNetwork,
    layer: str,
    unit: int,
    variant: str,
    recipe: str,
    seed: int,
) -> Response:
    """Return a pattern that has been computed."""
    spec = PatternSpec(layer, unit, variant, recipe, seed)
    record = await runner.run(request, lambda _: runner.explorer.get_pattern(net, spec))
    if record is None:
        raise UnknownResource("this pattern has not been computed yet")
    return image_response(record["image"], request)


@router.get("/patches")
async def patches(
    request: Request, runner: Runner, net: VersionedNetwork, layer: str, unit: int, kind: str
) -> Response:
    """Return the sheet of a unit's examples."""
    net.require_unit(layer, unit)
    if net.key not in runner.sheets or kind not in EXAMPLE_KINDS:
        raise UnknownResource("there are no such examples")
    sheets, key = runner.sheets[net.key], ("patches", layer, unit, kind)
    content = await runner.run(
        request,
        lambda client: runner.explorer.cached_image(client, net, key, lambda: sheets.sheet(layer, unit, kind)),
    )
    return image_response(content, request)


@router.get("/thumbnail")
async def thumbnail(request: Request, runner: Runner, index: int, v: str) -> Response:
    """Return an image of a data set."""
    networks = runner.explorer.networks.values()
    net = next((other for other in networks if other.key in runner.sheets and other.version == v), None)
    if net is None or net.store is None or not 0 <= index < net.store.num_images:
        raise UnknownResource("there is no such image in the data set")
    owner, sheets = net, runner.sheets[net.key]
    content = await runner.run(
        request,
        lambda client: runner.explorer.cached_image(
            client, owner, ("thumbnail", index), lambda: sheets.thumbnail(index)
        ),
    )
    return image_response(content, request)


@router.get("/story_chapter")
async def story_chapter(request: Request, runner: Runner, net: VersionedNetwork, index: int) -> Response:
    """Return the patterns of one chapter of a story."""

    def render(_: Client) -> bytes:
        story = _require_story(runner.explorer.get_story(net))
        if not 0 <= index < len(story.chapters):
            raise UnknownResource(f"the story has {len(story.chapters)} chapters; there is no {index}")
        return chapter_sheet(story, index)

    return image_response(await runner.run(request, render), request)


@router.get("/story_figure")
async def whole_story(request: Request, runner: Runner, net: VersionedNetwork) -> Response:
    """Return the figure of a story."""

    def render(client: Client) -> bytes:
        story = _require_story(runner.explorer.get_story(net))
        return runner.explorer.cached_image(client, net, ("story_figure",), lambda: story_figure(story))

    return image_response(await runner.run(request, render), request)


@router.get("/saved")
async def saved_sheet(
    request: Request, runner: Runner, model: str, kind: str, name: str, sheet: str, v: str
) -> Response:
    """Return a sheet of images of concepts, an atlas or a diagnosis."""
    net = runner.explorer.network(model)
    if kind != "diagnosis" and sheet not in concept_data.SHEETS.get(kind, ()):
        raise UnknownResource("there are no such images")

    def render(client: Client) -> bytes:
        result = _find_version(SAVED[kind](net), name, v)
        key = ("saved", result.version, sheet)
        return runner.explorer.cached_image(
            client, net, key, lambda: diagnosis_data.render_saved(runner.explorer, result, sheet)
        )

    return image_response(await runner.run(request, render), request)


def _require_story(story: Story | None) -> Story:
    if story is None:
        raise UnknownResource("the story has not been computed yet")
    return story


def _find_version(results: list[SavedResult], name: str, version: str) -> SavedResult:
    for result in results:
        if (result.name, result.version) == (name, version):
            return result
    raise UnknownResource("these images are not, or no longer, in the store; reload the page")
